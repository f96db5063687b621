"""What is asked of slots: a failure counts where its shard is needed, and what has passed by then does not count."""

from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest

from pipeline.common.errors import DataError, TryAgainError, UserError
from pipeline.data.loading.slots import SlotBuffer


class Flaky(SlotBuffer):
    """Loads nothing; raises what it is told, in turn."""

    def __init__(self, shards: int, slots: int, faults: dict[int, list[UserError]]) -> None:
        super().__init__(shards, slots)
        self.faults = faults
        self.loads: list[tuple[int, int]] = []

    def bases(self, shards: Any) -> Any:
        return np.zeros(len(shards), np.int64)

    def copy(self, shards: Any, rows: Any, bases: Any, out: Any) -> None:
        raise AssertionError("nothing is copied here")

    def _load(self, shard: int, slot: int) -> None:
        self.loads.append((shard, slot))
        if faults := self.faults.get(shard):
            raise faults.pop(0)


def test_what_failed_ahead_of_time_and_may_have_passed_is_asked_for_once_more() -> None:
    faults: dict[int, list[UserError]] = {
        0: [TryAgainError("busy")],
        1: [TryAgainError("busy"), TryAgainError("still busy")],
        2: [DataError("not what dataset.json says")],
    }
    buffer = Flaky(3, 3, faults)
    buffer.hold([0, 1, 2])
    wait(list(buffer._loads.values()))
    assert buffer.loaded() == []
    buffer.wait([0])
    assert buffer.loaded() == [0]
    with pytest.raises(TryAgainError, match="still busy"):
        buffer.wait([1])
    with pytest.raises(DataError, match="not what"):
        buffer.wait([2])
    assert [shard for shard, _ in sorted(buffer.loads)] == [0, 0, 1, 1, 2], "what will never pass is asked for once"
    assert all(shard == slot for shard, slot in buffer.loads)
    assert not buffer.complete
    buffer.close()


def test_a_slot_is_filled_again_only_when_its_readers_are_done() -> None:
    buffer, reader = Flaky(4, 2, {}), Future[None]()
    buffer.hold([0, 1])
    buffer.wait([0, 1])
    buffer.read_by([reader])
    buffer.hold([1, 2])
    assert buffer.loaded() == [1]
    reader.set_result(None)
    buffer.wait([2])
    assert buffer.loads[-1] == (2, 0)
    assert (buffer.holds_all, buffer.complete) == (False, False)
    buffer.close()
