"""What the loader holds does not grow with the batches that it has made."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from loader_cases import write_dataset

from pipeline.data.dataset import Encoding
from pipeline.data.loading.loader import RESIDENT_BYTES

SCRIPT = """
    import gc, resource, sys
    from pathlib import Path
    from pipeline.data.dataset import open_dataset
    from pipeline.data.loading.loader import Loader

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    settings = dict(seed=0, streams=4, batch=8, threads=1, resident_limit=int(sys.argv[2]))
    with Loader(open_dataset(sys.argv[1]), **settings) as loader:
        for _ in range(10_000):
            loader.next_batch()
        early = resident()
        for _ in range(90_000):
            loader.next_batch()
        print(early, resident())
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["packed", "jpg", "webp", "png"])
@pytest.mark.parametrize(
    ("shards", "resident_limit"),
    [([30] * 12, RESIDENT_BYTES), ([30] * 4, 0), ([30] * 12, 0)],
    ids=["decoded", "all in slots", "in turns"],
)
def test_memory_is_flat_over_100_000_batches(
    tmp_path: Path, encoding: Encoding, shards: list[int], resident_limit: int
) -> None:
    write_dataset(tmp_path, shards, encoding)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), str(resident_limit)]
    early, late = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    print(f"{early / 1e6:.2f} MB after 10,000 batches, {late / 1e6:.2f} MB after 100,000")
    assert late - early < 2 << 20  # 23 bytes a batch
