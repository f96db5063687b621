"""`dcgan-data clear`: removes what builds wrote into OUT, finished or not, and nothing else."""

from pathlib import Path

from pipeline.common.errors import UsageError
from pipeline.common.storage import Store, remove_empty, require_writable
from pipeline.data.build import state
from pipeline.data.dataset import DATASET_FILE, open_dataset


def find_builds(out: str) -> list[str]:
    """Return where in `out` a build wrote: `out` itself, or OUT/train and OUT/val of --val-fraction.

    An empty or missing folder has none. Raises UsageError when there are only files of others, DataError when
    dataset.json cannot be read.
    """
    require_writable(out)
    whole = Store(out).location
    splits = [f"{whole}/{split}" for split in ("train", "val")]
    found = [place for place in (whole, *splits) if _is_build(Store(place))]
    if not found and (names := Store(out).names()):
        raise UsageError(f"{out}: holds {names[0]}, but nothing that dcgan-data build wrote; nothing was removed")
    return found


def describe(place: str) -> str:
    """Return in words what `clear` would remove."""
    shards = [size or 0 for name, size in Store(place).sizes().items() if state.SHARD.fullmatch(name)]
    what = "data set" if Store(place).exists(DATASET_FILE) else "unfinished build"
    return f"the {what} in {place}: {len(shards):,} shards, {sum(shards) / 1e6:,.1f} MB"


def clear(place: str, out: str) -> None:
    """Remove one of `find_builds(out)`. Files of others stay, and OUT itself."""
    state.clear(place)
    store = Store(place)
    store.remove_abandoned()
    store.delete(state.CLEARING)
    if not store.remote:
        remove_empty(Path(place) / state.STATE_FOLDER)
        if place != Store(out).location:
            remove_empty(Path(place))


def _is_build(store: Store) -> bool:
    """Whether a build wrote into `store`. Raises UsageError for a data set of another program."""
    if any(state.is_record(name) for name in store.names(state.STATE_FOLDER)):
        return True
    if DATASET_FILE not in store.names():
        return False
    if all(map(state.SHARD.fullmatch, open_dataset(store).shards.names())):
        return True
    raise UsageError(
        f"{store.path(DATASET_FILE)}: not of dcgan-data build (samples, or made by hand): remove the folder yourself"
    )
