"""A checkpoint is written beside the training: from a copy that no update changes, one at a time, no error lost."""

import threading

import pytest
import torch

from pipeline.checkpoints.saver import HostMemory, Saver


def test_one_thing_at_a_time_and_all_in_order() -> None:
    saver, go_on, done = Saver(), threading.Event(), []

    def first() -> None:
        go_on.wait(60)
        done.append("first")

    saver.start(first)
    assert saver.busy
    saver.check()
    assert not done
    threading.Timer(0.01, go_on.set).start()
    saver.start(lambda: done.append("second"))
    assert done[0] == "first", "the second waited for it"
    saver.wait()
    assert (done, saver.busy) == (["first", "second"], False)


@pytest.mark.parametrize("call", ["check", "wait", "start"])
def test_an_error_is_raised_once_by_the_next_call(call: str) -> None:
    saver, done = Saver(), []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    saver.start(fail)
    assert saver._thread is not None
    saver._thread.join()
    with pytest.raises(OSError, match="No space left"):
        saver.start(lambda: done.append("never")) if call == "start" else getattr(saver, call)()
    saver.wait()
    assert not done


def test_a_copy_keeps_the_values_types_and_strides_and_its_place() -> None:
    weight = torch.rand(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    step, betas = torch.tensor(3.0), (0.5, 0.999)
    state = {"networks": {"raw": {"weight": weight}}, "optimizer": [{"step": step, "lr": 2e-4, "betas": betas}]}
    memory = HostMemory()
    copied = memory.copy(state)
    copy, before = copied["networks"]["raw"]["weight"], weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        step += 1
    assert torch.equal(copy, before)
    assert (copy.dtype, copy.stride(), copy.requires_grad) == (weight.dtype, weight.stride(), False)
    assert copied["optimizer"] == [{"step": torch.tensor(3.0), "lr": 2e-4, "betas": betas}]
    again = memory.copy(state)
    assert again["networks"]["raw"]["weight"].data_ptr() == copy.data_ptr()
    assert not copy.any()
    assert again["optimizer"][0]["step"] == 4.0
