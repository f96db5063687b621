"""What every finish does before it commits a data set: compare one listing of the folder with the records.

Records say that shards were written; the listing says that they are still there. Another command that was pointed at
the same folder may have removed or replaced some, or left others.
"""

from collections.abc import Callable, Iterable

from pipeline.common.errors import DataError
from pipeline.common.storage import Store
from pipeline.data.shard_table import Shard, ShardTable


def require_recorded(
    store: Store,
    shards: Iterable[Shard],
    *,
    forget: Callable[[set[str]], None],
    spare: Callable[[str], bool],
    advice: str,
) -> None:
    """Raise DataError unless the tars in `store` are exactly `shards`, by names and sizes in one listing.

    `spare` says by name which tars may be there besides. `forget` gets the names of the shards that are missing or of
    another size, before the error, so that the next run makes them again; `advice` says which run that is.
    """
    table, sizes = ShardTable.of(shards), store.sizes()
    recorded = dict(zip(table.names(), table.bytes.tolist(), strict=True))
    lost: dict[str, str] = {}
    for name, stated in recorded.items():
        if name not in sizes:
            lost[name] = "missing, though its record says that it was written"
        elif (size := sizes[name]) not in (None, stated):
            lost[name] = f"{size} bytes, though its record says {stated}"
    if lost:
        forget(set(lost))
        name, what = next(iter(lost.items()))
        raise DataError(f"{store.path(name)}: {what}{_others(lost)}; {advice}")
    tars = [name for name in sorted(sizes) if name.endswith(".tar") and name not in recorded]
    if foreign := [name for name in tars if not spare(name)]:
        raise DataError(
            f"{store.path(foreign[0])}: no record names this shard{_others(foreign)}, so it is not of this data set, "
            "but readers of tars would take it for a part; move it away, then run the same command again"
        )


def _others(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f" ({count} more like it)" if count else ""
