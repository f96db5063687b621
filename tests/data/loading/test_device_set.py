"""A data set in the device's memory must give the images of the stream, and say so when it cannot be loaded."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_cases import tar_images, write_dataset, write_tars

from pipeline.common.errors import ConfigConflict, DataError, Interrupted, Stopped
from pipeline.common.ranks import Ranks
from pipeline.config import RunConfig, load_config
from pipeline.data.dataset import Dataset
from pipeline.data.index.indexer import make_index
from pipeline.data.loading import device_set
from pipeline.data.loading.device_set import DeviceLoader, load_images, open_loader
from pipeline.data.loading.loader import Loader, run_loader
from pipeline.training.stop_requests import StopRequests

CPU = torch.device("cpu")
SIZES = [9, 5, 14, 7, 11, 3]


def settings(mode: str, *more: str) -> RunConfig:
    return load_config(overrides=[f"runtime.data={mode}", "recipe.streams=4", "recipe.batch=8", *more])


@pytest.fixture(params=["packed", "jpg", "tar"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    if request.param != "tar":
        return write_dataset(tmp_path / "set", SIZES, request.param)
    made = make_index(write_tars(tmp_path / "tars", SIZES), str(tmp_path / "index"), size=8, channels=3, workers=1)
    assert made is not None
    return made


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load and locate in several pieces, of which the last is shorter."""
    monkeypatch.setattr(device_set, "CHUNK_BYTES", 10 * 48)
    monkeypatch.setattr(device_set, "LOCATED_IMAGES", 12)


@pytest.mark.usefixtures("small_pieces")
def test_every_rank_and_restart_sees_the_images_of_the_stream(dataset: Dataset) -> None:
    config = settings("device", "recipe.seed=4")
    for start, world_size in ((0, 1), (0, 2), (56, 2), (1_000, 1)):
        for rank in range(world_size):
            with (
                open_loader(config, dataset, CPU, start, Ranks(rank, world_size)) as there,
                run_loader(config, dataset, start=start, rank=rank, world_size=world_size) as stream,
            ):
                assert isinstance(there, DeviceLoader)
                for _ in range(20):  # past the end of an epoch
                    assert there.ids().tolist() == stream.ids().tolist()
                    batch = there.next_batch()
                    assert batch.dtype == torch.uint8
                    assert np.array_equal(batch.numpy(), stream.next_batch())
                assert there.position == stream.position == start + 160


def test_the_images_are_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", SIZES)
    dataset = make_index(tars, str(tmp_path / "index"), size=8, channels=3, workers=1)
    assert dataset is not None
    assert np.array_equal(load_images(dataset, CPU).numpy(), tar_images(tars, 8))


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, SIZES)
    path = tmp_path / dataset.shards[3].name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{path.name}.*damaged"):
        open_loader(settings("device"), dataset, CPU, 0, Ranks())


def test_a_set_that_does_not_fit_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path, SIZES)
    huge = dataset.model_copy(update={"images": 10**9}).at(dataset.store)
    monkeypatch.setattr(device_set, "free_bytes", lambda device: 50 * 10**9)
    with pytest.raises(ConfigConflict, match=r"runtime\.data=device.*48\.00 GB.*cpu has 50\.00 GB free, 25% of which"):
        open_loader(settings("device"), huge, CPU, 0, Ranks())


def test_auto_streams_on_the_cpu(tmp_path: Path) -> None:
    with open_loader(settings("auto"), write_dataset(tmp_path, SIZES), CPU, 0, Ranks()) as loader:
        assert isinstance(loader, Loader)


@pytest.mark.parametrize(
    ("mode", "free", "total", "start", "world_size", "there"),
    [
        ("auto", 4_000, 10_000, 0, 1, True),
        ("auto", 3_000, 10_000, 0, 1, False),  # 49 images of 48 bytes, and a quarter for training
        ("auto", 4_000, 10_000, 9_960, 1, False),  # 40 images are left, fewer than the set has
        ("auto", 4_000, 90, 0, 2, False),  # each of two ranks would read 49, and streams 45
        ("device", 4_000, 40, 0, 2, True),
        ("stream", 4_000, 10_000, 0, 1, False),
    ],
)
def test_auto_takes_a_gpu_where_the_set_fits_and_is_read_no_more_than_by_streaming(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    free: int,
    total: int,
    start: int,
    world_size: int,
    there: bool,
) -> None:
    monkeypatch.setattr(device_set, "free_bytes", lambda device: free)
    config = settings(mode, f"schedule.total_images={total}")
    dataset = write_dataset(tmp_path, SIZES)
    assert device_set._goes_on_device(config, dataset, torch.device("cuda"), start, world_size) is there


def test_free_memory_of_the_machine_is_known() -> None:
    assert 1 << 20 < device_set.free_bytes(CPU) < 1 << 50


@pytest.mark.usefixtures("small_pieces")
def test_loading_shows_how_far_it_is_and_says_each_time_that_it_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[object] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        events.append("wait")
        yield

    dataset = write_dataset(tmp_path, SIZES)
    with open_loader(settings("device"), dataset, CPU, 0, Ranks(), waiting, events.append) as loader:
        assert events == ["wait", 10, "wait", 20, "wait", 30, "wait", 40, "wait", 49]
        assert "loading the data set: 49/49 images" in capsys.readouterr().err
        assert loader.footprint == "all of them in the memory of cpu, 0 MB"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("signal_name", "kind"), [("SIGTERM", Stopped), ("SIGINT", Interrupted)])
def test_a_signal_ends_the_loading(tmp_path: Path, signal_name: str, kind: type[Stopped]) -> None:
    with StopRequests() as requests:

        def loaded(images: int) -> None:
            if images == 20:
                signal.raise_signal(getattr(signal, signal_name))
            requests.end_loading(images)

        with pytest.raises(kind, match="after 20 images; run it again") as caught:
            open_loader(settings("device"), write_dataset(tmp_path, SIZES), CPU, 0, Ranks(), loaded=loaded)
        assert caught.type is kind
