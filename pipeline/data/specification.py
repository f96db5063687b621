"""Shard specifications: the notations in which people name WebDataset tars, expanded to paths and URLs.

| notation | names |
|---|---|
| `a/train-{0000..0123}.tar`, `a-{x,y}/{0..9}.tar` | what the library's own brace expansion makes of it |
| `a.tar::b-{0..3}.tar` | one specification after another |
| `a/*.tar`, `s3://bucket/a-*/*.tar`, `a/**/*.tar` | the tars that match, sorted; `**` on disks only |
| `a`, `s3://bucket/a` | the tars in a folder, sorted; not those in its folders |
| `@list.txt` | a specification a line, beside the list unless absolute; `#` begins a comment |
| `a.json` | the `shardlist` of a WIDS index (`widsindex`) |
| `a.tar`, `https://host/a.tar?key=…` | itself |

`${NAME}` is the value of the environment variable WDS_NAME, as in the library. `pipe:` is refused everywhere.
"""

import fnmatch
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from string import ascii_letters
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.common.errors import DataError, UsageError, first_line
from pipeline.common.storage import Store, is_url, locate
from pipeline.data.dataset import DATASET_FILE

MOST_TARS = 1_000_000
"""Tars that one specification may name."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""What a listed file must end in to be taken for a tar. A compressed one is listed, so that it is refused by name."""
FORMS = "a tar, a folder of tars, braces ({000..123}), a glob, @list.txt, or several of these joined by ::"

_RANGE = r"\{(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.-?(\d+))?\n?\}"
_TOKEN = re.compile(rf"\\.|{_RANGE}|[{{}},]", re.DOTALL)
DEEPEST = 20
"""Braces within braces; the library's time grows with the square."""


def expand(spec: str) -> list[str]:
    """Return the tars that a shard specification names, in its own order: paths or URLs.

    The tars on disks exist; whether URLs do is not asked. Raises UsageError for a notation that means nothing, is
    refused, or names a tar twice or more than MOST_TARS; DataError when a file, folder or list is missing or empty.
    """
    tars: list[str] = []
    for part in [spec] if os.path.exists(spec) else spec.split("::"):
        tars += _read_list(part, spec) if part.startswith("@") and not os.path.exists(part) else _expand(part, spec)
    if len(tars) > MOST_TARS:
        raise UsageError(f"{spec}: names {len(tars):,} tars; expected at most {MOST_TARS:,}")
    if missing := [tar for tar in tars if not is_url(tar) and not os.path.exists(tar)]:
        raise DataError(
            f"{missing[0]}: no such file"
            + (f"; {spec} names {len(tars):,} tars, and {len(missing):,} are missing" if len(tars) > 1 else "")
            + f"; expected {FORMS}"
        )
    for tar, following in pairwise(sorted(tars)):
        if tar == following:
            raise UsageError(f"{spec}: names {tar} twice, and its images would count twice; name every tar once")
    return tars


def is_specification(location: str) -> bool:
    """Whether `location` names tars, rather than a data set of ours: a folder or URL with a dataset.json.

    A place that is neither is no specification. Raises UsageError for URLs that are refused.
    """
    location = location.removeprefix("file://")
    if _is_notation(location):
        return True
    store = Store(location)
    return not store.exists(DATASET_FILE) and any(_is_tar(name) for name in store.names())


def is_dataset(location: str) -> bool:
    """Whether `location` is a folder or URL with a dataset.json. Raises UsageError for URLs that are refused."""
    location = location.removeprefix("file://")
    return not _is_notation(location) and Store(location).exists(DATASET_FILE)


def _is_notation(location: str) -> bool:
    """Whether `location` names tars, whatever lies there. An existing folder has only its name."""
    if os.path.isdir(location):
        return False
    path = _path(location)
    if os.path.isfile(location) or path.endswith((*TAR_SUFFIXES, ".json")):
        return path.rpartition("/")[2] != DATASET_FILE
    return location.startswith("@") or "::" in location or "{" in location or _is_pattern(location)


def short_names(tars: Sequence[str]) -> list[str]:
    """Return the name of each tar that its images' names begin with, all different: its file name.

    Where two tars share one, all have their paths below the deepest folder that holds them all.
    """
    paths = [_path(tar).split("/") for tar in tars]
    names = [path[-1] for path in paths]
    if len(set(names)) < len(names):
        shared = next((depth for depth, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
        names = ["/".join(path[shared:]) for path in paths]
    if len(set(names)) < len(names):  # URLs that differ in their queries only
        names = [f"{number:06d}/{name}" for number, name in enumerate(names)]
    return names


def _expand(part: str, spec: str) -> list[str]:
    """Return the tars of one part of `spec` that is no list."""
    if not part or "\0" in part:
        raise UsageError(f"{spec!r}: an empty name among the tars, or one with a zero byte; expected {FORMS}")
    if os.path.exists(part) or not re.search(r"[{}]", part):
        return _find(part)
    return [tar for name in _expand_braces(part) for tar in _find(name)]


def _expand_braces(part: str) -> list[str]:
    """Return what the library makes of braces and variables, counted beforehand: it would try any number."""
    from webdataset.shardlists import envsubst, expand_urls

    try:
        text = envsubst(part)
        if "${" in text:
            raise ValueError("a variable within a variable is not expanded")
        count = _count(text)
        if count > MOST_TARS:
            raise UsageError(f"{part}: names {count:,} tars; expected at most {MOST_TARS:,}")
        names: list[str] = expand_urls(text)
    except AssertionError as error:
        raise UsageError(f"{part}: {first_line(error)}: ${{NAME}} is the value of WDS_NAME") from None
    except ValueError as error:
        raise UsageError(f"{part}: {first_line(error)}; expected braces such as {{000..123}} or {{a,b}}") from None
    return names


def _count(text: str) -> int:
    """Return how many names the braces in `text` make, without making them. Raises ValueError for unequal braces."""
    before: list[tuple[int, int]] = []  # of the groups around this place: finished alternatives, names so far
    done, names = 0, 1
    for token in _TOKEN.finditer(text):
        match token[0]:
            case "{":
                if len(before) == DEEPEST:
                    raise ValueError(f"braces within braces, more than {DEEPEST} deep")
                before.append((done, names))
                done, names = 0, 1
            case "," if before:
                done, names = done + names, 1
            case "}":
                if not before:
                    raise ValueError("a closing brace without its opening one")
                inner = done + names
                done, names = before.pop()
                names *= inner
            case _ if token[2] or token[4]:
                ordinal: Callable[[str], int] = ascii_letters.index if token[4] else int
                first, last = ordinal(token[1] or token[3]), ordinal(token[2] or token[4])
                names *= abs(last - first) // max(1, int(token[5] or 1)) + 1
    if before:
        raise ValueError("an opening brace without its closing one")
    return names


def _find(name: str) -> list[str]:
    """Return the tars that a name without braces means."""
    name = name.removeprefix("file://")
    remote = is_url(name)
    if _is_pattern(name) and (remote or not os.path.exists(name)):
        return _match(name, remote)
    path = _path(name)
    if path.endswith(".json"):
        return _read_wids(name)
    if _is_tar(path) or not (remote or os.path.isdir(name)):
        return [name]
    folder = name.rstrip("/")
    if tars := [f"{folder}/{found}" for found in Store(name).names() if _is_tar(found)]:
        return tars
    raise DataError(f"{name}: no .tar files here; for those in its folders, name them: {folder}/*/*.tar")


def _match(pattern: str, remote: bool) -> list[str]:
    """Return the tars that a glob matches, sorted."""
    if remote:
        if "**" in pattern:
            raise UsageError(f"{pattern}: ** works on disks only; on a store name each level: */*.tar")
        scheme, _, path = pattern.partition("://")
        start, *components = path.split("/")
        found, listed = [f"{scheme}://{start}"], False
        for component in components:  # level by level: fsspec's own glob takes a failing store for an empty one
            listed = listed or _is_pattern(f"{scheme}://{component}")
            if listed:
                folders = [at for at in found if not _is_tar(at)]
                found = [f"{at}/{entry}" for at in folders for entry in _matching(Store(at), component)]
            else:
                found = [f"{at}/{component}" for at in found]
    else:
        found = glob.glob(pattern, recursive=True)
    if tars := sorted(name for name in found if _is_tar(name)):
        return tars
    what = f"matches {len(found):,} files, none of them a .tar" if found else "matches nothing"
    raise DataError(f"{pattern}: {what}; expected the tars of a data set")


def _matching(store: Store, pattern: str) -> Iterator[str]:
    return (name for name in store.names() if fnmatch.fnmatchcase(store.shown(name), pattern))


def _read_list(part: str, spec: str) -> list[str]:
    """Return the tars that the lines of `@list.txt` name."""
    location = part[1:].removeprefix("file://")
    if not location:
        raise UsageError(f"{spec}: @ without a file; expected @list.txt, a file with a tar a line")
    tars: list[str] = []
    for number, line in enumerate(_read_text(location).splitlines(), 1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        where = f"{location}, line {number}"
        for name in text.split("::"):
            if name.startswith("@") or "${" in name:
                raise UsageError(f"{where}: {text}: a list names tars, and neither lists nor variables")
            tars += _expand(_beside(name, location, where), where)
    if not tars:
        raise DataError(f"{location}: an empty list; expected a tar a line")
    return tars


def _read_wids(location: str) -> list[str]:
    """Return the tars in the index `widsindex` wrote: {"shardlist": [{"url": …}, …]}."""
    expected = 'expected the JSON of widsindex, {"shardlist": [{"url": …}, …]}'
    try:
        content = json.loads(_read_text(location))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({first_line(error)}); {expected}") from None
    shards: Any = content.get("shardlist") if isinstance(content, dict) else None
    shards = shards if isinstance(shards, list) else []
    urls = [url for shard in shards if isinstance(shard, dict) and isinstance(url := shard.get("url"), str) and url]
    if not urls or len(urls) != len(shards):
        raise DataError(f"{location}: no list of shards; {expected}")
    if content.get("datasets"):
        raise DataError(f"{location}: refers to other data sets; name the index of each, joined by ::")
    base = content.get("base", content.get("base_path"))
    folder = _beside(f"{base.rstrip('/')}/", location, location) if isinstance(base, str) and base else location
    return [_beside(url, folder, location) for url in urls]


def _read_text(location: str) -> str:
    store, name = locate(location)
    try:
        return store.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{location}: not a text file ({first_line(error)})") from None


def _beside(name: str, location: str, where: str) -> str:
    """Return `name`, which the file `location` states, as a path or URL. Only a local file may name local tars."""
    if is_url(name.removeprefix("file://")):
        return name
    name = name.removeprefix("file://")
    remote = is_url(location)
    if name.startswith("/"):
        if remote:
            raise DataError(f"{where}: names {name} on this machine; a file from a store may name only URLs")
        return name
    folder, slash, _ = (location.partition("?")[0] if remote else location).rpartition("/")
    return f"{folder}{slash}{name}"


def _path(location: str) -> str:
    """Return the path within a location; of http, without the query and as people write it."""
    if location.startswith(("http://", "https://")):
        return unquote(urlsplit(location).path, errors="surrogateescape")
    return location


def _is_tar(name: str) -> bool:
    return name.endswith(TAR_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def _is_pattern(name: str) -> bool:
    """Whether a name has wildcards. In an http URL `?` begins the query."""
    return "*" in name if name.startswith(("http://", "https://")) else glob.has_magic(name)
