"""What benchmarks/data_loading.py compares: each contender turns one folder of data into an endless supply of batches.

Run as `loading/contenders.py NAME FOLDER`: for every line "COUNT" on standard input it draws COUNT batches and
prints the seconds that they took, by the clock and of processor time. The contenders of other projects import
nothing of ours, so that they run in an environment of their own.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

BATCH, STREAMS, SEED, SIZE = 128, 16, 0, 64
WARM_UP_BATCHES = 8


def ours(folder: Path, encoding: str, *, resident: bool) -> Iterator[Any]:
    from pipeline.data.dataset import open_dataset
    from pipeline.data.loading.loader import RESIDENT_BYTES, Loader

    limit = RESIDENT_BYTES if resident else 0
    # Four streams hold five of the eight packed shards: the rest is read again all the time.
    streams = STREAMS if resident or encoding != "packed" else 4
    dataset = open_dataset(folder / encoding)
    return iter(Loader(dataset, seed=SEED, streams=streams, batch=BATCH, threads=1, resident_limit=limit))


def memmap_gather(folder: Path) -> Iterator[Any]:
    """The very batches of `ours`, gathered by numpy from one mapped file; nothing is verified."""
    from pipeline.data.dataset import open_dataset
    from pipeline.data.loading.shuffle import image_ids

    images = np.load(folder / "images.npy", mmap_mode="r")
    images.sum()  # into the page cache
    dataset = open_dataset(folder / "packed")
    epoch = len(images) // BATCH * BATCH
    ids = image_ids(dataset, SEED, STREAMS, 0, 4 * epoch).reshape(-1, BATCH)
    while True:
        for batch in ids:
            yield images[batch]


def webdataset_pil(folder: Path, encoding: str = "jpg") -> Iterator[Any]:
    """The tutorials' pipeline: decode("pil"), then torchvision's ToTensor and Normalize, operation by operation."""
    import torch
    import webdataset as wds

    def normalize(image: Any) -> Any:
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        pixels = pixels.view(image.size[1], image.size[0], 3).permute((2, 0, 1)).contiguous()
        scaled = pixels.to(dtype=torch.get_default_dtype()).div(255).clone()
        mean = torch.as_tensor([0.5] * 3, dtype=scaled.dtype, device=scaled.device)
        deviation = torch.as_tensor([0.5] * 3, dtype=scaled.dtype, device=scaled.device)
        if (deviation == 0).any():
            raise ValueError
        return scaled.sub_(mean.view(-1, 1, 1)).div_(deviation.view(-1, 1, 1))

    shards = sorted(str(path) for path in (folder / encoding).glob("*.tar"))
    samples = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil").to_tuple("jpg")
    yield from samples.map_tuple(normalize).batched(BATCH).repeat()


def webdataset_simplejpeg(folder: Path) -> Iterator[Any]:
    """webdataset with a faster decoder and uint8 batches: what a careful user of it writes."""
    import simplejpeg
    import webdataset as wds

    shards = sorted(str(path) for path in (folder / "jpg").glob("*.tar"))
    samples = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).to_tuple("jpg")
    yield from samples.map_tuple(simplejpeg.decode_jpeg).batched(BATCH).repeat()


def mosaicml(folder: Path, form: str) -> Iterator[Any]:
    """MosaicML streaming from MDS shards: PIL decoding (`jpg`), or raw arrays (`raw`), to uint8 batches."""
    import torch
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    out = folder / f"mosaicml-{form}"
    if not (out / "index.json").exists():
        with MDSWriter(
            out=str(out), columns={"image": "bytes" if form == "jpg" else f"ndarray:uint8:{SIZE},{SIZE},3"}
        ) as w:
            for data in _raw_images(folder) if form == "raw" else _jpg_bytes(folder):
                w.write({"image": data})

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            image = super().__getitem__(index)["image"]
            return torch.from_numpy(_pil(image) if form == "jpg" else image.copy())

    dataset = Images(local=str(out), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True)
    while True:
        yield from loader


def litdata(folder: Path, form: str) -> Iterator[Any]:
    """litdata from its optimized chunks: JPEG bytes decoded with simplejpeg (`jpg`), or raw bytes, to uint8 batches."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    out = folder / f"litdata-{form}"
    if not (out / "index.json").exists():
        writer = BinaryWriter(str(out), chunk_bytes=32 << 20)
        for index, data in enumerate(_raw_images(folder) if form == "raw" else _jpg_bytes(folder)):
            writer[index] = data if form == "jpg" else data.tobytes()
        writer.done()
        writer.merge(num_workers=1)

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            data = super().__getitem__(index)
            if form == "jpg":
                import simplejpeg

                return torch.from_numpy(simplejpeg.decode_jpeg(data))
            return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(SIZE, SIZE, 3)

    dataset = Images(str(out), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    while True:
        yield from loader


def ours_indexed(folder: Path) -> Iterator[Any]:
    """The tars of others where they lie: never resident, as sets too large for the memory are read."""
    from pipeline.data.dataset import open_dataset
    from pipeline.data.loading.loader import Loader

    threads = len(os.sched_getaffinity(0))
    dataset = open_dataset(folder / "indexed")
    return iter(Loader(dataset, seed=SEED, streams=4, batch=BATCH, threads=threads, resident_limit=0))


def webdataset_resized(folder: Path, decoder: str, filter_name: str) -> Iterator[Any]:
    """webdataset on the same tars, each image resized: uint8 batches; with more than one core, from that many workers.

    The scaled decoding never goes below twice the target, as ours.
    """
    import simplejpeg
    import webdataset as wds
    from PIL import Image

    resampling = Image.Resampling[filter_name]

    def resize(image: Any) -> Any:
        return np.asarray(image.resize((SIZE, SIZE), resampling))

    def scaled(data: bytes) -> Any:
        return resize(Image.fromarray(simplejpeg.decode_jpeg(data, min_height=2 * SIZE, min_width=2 * SIZE)))

    shards = sorted(str(path) for path in (folder / "tars").glob("*.tar"))
    samples = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000)
    if decoder == "pil":
        batches = samples.decode("pil").to_tuple("jpg").map_tuple(resize).batched(BATCH)
    else:
        batches = samples.to_tuple("jpg").map_tuple(scaled).batched(BATCH)
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        yield from batches.repeat()
    else:
        yield from wds.WebLoader(batches.repeat(), num_workers=cores, batch_size=None)


def _raw_images(folder: Path) -> Any:
    return np.load(folder / "images.npy", mmap_mode="r")


def _jpg_bytes(folder: Path) -> Iterator[bytes]:
    for shard in json.loads((folder / "jpg" / "dataset.json").read_text())["shards"]:
        content = (folder / "jpg" / shard["name"]).read_bytes()
        for offset, size in zip(shard["offsets"], shard["sizes"], strict=True):
            yield content[offset : offset + size]


def _pil(data: bytes) -> Any:
    from io import BytesIO

    from PIL import Image

    return np.array(Image.open(BytesIO(data)).convert("RGB"))


CONTENDERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "ours jpg": lambda folder: ours(folder, "jpg", resident=False),
    "ours jpg, again": lambda folder: ours(folder, "jpg", resident=False),
    "ours jpg 4:4:4": lambda folder: ours(folder, "jpg444", resident=False),
    "ours packed": lambda folder: ours(folder, "packed", resident=True),
    "ours packed, again": lambda folder: ours(folder, "packed", resident=True),
    "ours packed, read again each epoch": lambda folder: ours(folder, "packed", resident=False),
    "memmap gather": memmap_gather,
    "webdataset pil + normalize": webdataset_pil,
    "webdataset pil + normalize 4:4:4": lambda folder: webdataset_pil(folder, "jpg444"),
    "webdataset simplejpeg": webdataset_simplejpeg,
    "mosaicml-streaming jpg": lambda folder: mosaicml(folder, "jpg"),
    "mosaicml-streaming raw": lambda folder: mosaicml(folder, "raw"),
    "litdata jpg": lambda folder: litdata(folder, "jpg"),
    "litdata raw": lambda folder: litdata(folder, "raw"),
}
INDEXED: dict[str, Callable[[Path], Iterator[Any]]] = {
    "ours, indexed tars": ours_indexed,
    "ours, indexed tars, again": ours_indexed,
    "webdataset pil + resize": lambda folder: webdataset_resized(folder, "pil", "LANCZOS"),
    "webdataset pil + resize, bicubic": lambda folder: webdataset_resized(folder, "pil", "BICUBIC"),
    "webdataset simplejpeg scaled + resize": lambda folder: webdataset_resized(folder, "simplejpeg", "LANCZOS"),
    "webdataset simplejpeg scaled + resize, bicubic": lambda folder: webdataset_resized(
        folder, "simplejpeg", "BICUBIC"
    ),
}
"""The contenders of benchmarks/indexed_loading.py."""
OTHERS = ("mosaicml-streaming", "litdata")


def main() -> None:
    """Serve draws until standard input ends."""
    name, folder, out = sys.argv[1], Path(sys.argv[2]), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    for module in ("torch", "webdataset", "simplejpeg", "pipeline.data.loading.loader", "streaming", "litdata"):
        with suppress(ImportError):  # what each needs is imported before the clock starts
            importlib.import_module(module)
            if module == "torch":
                sys.modules["torch"].set_num_threads(1)
    began = time.perf_counter()
    batches = {**CONTENDERS, **INDEXED}[name](folder)
    first = next(batches)
    first = first[0] if isinstance(first, (tuple, list)) else first
    assert first.shape[0] == BATCH, first.shape
    seconds = {"first_batch_seconds": time.perf_counter() - began}
    count = len(np.load(folder / "images.npy", mmap_mode="r")) // BATCH
    for _ in range(count - 1):
        next(batches)
    # From nothing to the end of the first epoch: with opening, reading, and the checksums of those that verify.
    seconds["first_epoch_images_per_second"] = count * BATCH / (time.perf_counter() - began)
    print(json.dumps(seconds), file=out)
    for line in sys.stdin:
        for _ in range(WARM_UP_BATCHES):  # also empties what was made ahead while others had their turn
            next(batches)
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            next(batches)
        print(time.perf_counter() - start, time.process_time() - processor, file=out)


if __name__ == "__main__":
    main()
