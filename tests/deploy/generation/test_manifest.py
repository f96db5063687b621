"""Merging a generation takes little memory: case of a pod of 2 GiB that was killed, and started again, for ever."""

import tracemalloc
from pathlib import Path

import pytest

from deploy.generation import manifest
from deploy.generation.manifest import FinishedShard, Provenance, begin, record_name, shard_name
from deploy.generation.plan import Plan
from pipeline.common.storage import Store
from pipeline.data.dataset import Shard

SHARDS, IMAGES = 200, 1024


@pytest.fixture
def many(tmp_path: Path) -> tuple[Store, Plan]:
    """The records of a finished generation of pictures that are members of their own."""
    store = Store(tmp_path)
    plan = Plan(
        model_sha256="ab" * 32,
        backend="onnxruntime",
        block_images=64,
        seed=0,
        start=0,
        count=SHARDS * IMAGES,
        latent_dim=100,
        latent_distribution="uniform",
        image_size=64,
        channels=3,
        format="webp",
        quality=90,
        shard_images=IMAGES,
    )
    begin(store, plan)
    provenance = Provenance(device="cpu", provider="cpu", versions={"python": "3"})
    places = {"offsets": list(range(1024, 1024 + 3000 * IMAGES, 3000)), "sizes": [1500 + i for i in range(IMAGES)]}
    for number, range_ in enumerate(plan.iterate_shards()):
        sha256 = f"{number:064x}"
        shard = Shard(name=shard_name(range_, sha256), images=IMAGES, bytes=3100 * IMAGES, sha256=sha256, **places)
        record = FinishedShard(plan_sha256=plan.sha256(), start=range_.start, shard=shard, made_by=provenance)
        store.write(record_name(range_), record.model_dump_json().encode())
    return store, plan


def test_records_become_columns_as_they_are_read(many: tuple[Store, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "READ_AHEAD", 4)
    manifest._assemble(*many)  # what is imported at the first use does not count
    tracemalloc.start()
    try:
        found, dataset = manifest._assemble(*many)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 * SHARDS * IMAGES, "the records of all images take 106 bytes each"
    assert (found.images, len(found.shards), len(dataset.shards)) == (SHARDS * IMAGES, SHARDS, SHARDS)
    assert [shard.start for shard in found.shards] == [number * IMAGES for number in range(SHARDS)]
    assert dataset.shards[SHARDS - 1].offsets[-1] == 1024 + 3000 * (IMAGES - 1)
