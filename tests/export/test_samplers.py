"""Samplers: the same images however a range is cut, from every kind of model."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from export_cases import Export

from export.samplers import onnx as onnx_backends
from export.samplers.base import Sampler
from export.samplers.cuda import memory_errors
from export.samplers.onnx import OpenVinoSampler
from export.samplers.open import open_sampler
from pipeline.common.errors import UnavailableError, UsageError
from pipeline.common.machine import NO_SIGNAL_STACK, SignalStack
from pipeline.common.randomness import Purpose
from pipeline.model.latents import latents

CASES = [
    ("checkpoint", "eager"),
    ("checkpoint", "channels_last"),
    ("model", "onnxruntime"),
    ("model", "openvino"),
]


def collect(sampler: Sampler, start: int, count: int) -> np.ndarray:
    parts = list(sampler.sample_range(3, start, count))
    assert parts[0][0] == start
    assert sum(len(images) for _, images in parts) == count
    return np.concatenate([images for _, images in parts])


@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_how_a_range_is_cut_never_shows(exported: Export, kind: str, backend: str) -> None:
    with open_sampler(str(getattr(exported, kind)), backend=backend, batch=8, threads=1) as sampler:
        assert (sampler.backend, sampler.batch, sampler.latent_dim) == (backend, 8, 100)
        whole = collect(sampler, 5, 40)
        cut = np.concatenate([collect(sampler, start, count) for start, count in ((5, 1), (6, 20), (26, 19))])
    with open_sampler(str(getattr(exported, kind)), backend=backend, batch=8, threads=1) as another:
        alone = collect(another, 44, 1)
    assert np.array_equal(whole, cut)
    assert np.array_equal(whole[-1:], alone)
    assert len(np.unique(whole.reshape(40, -1), axis=0)) == 40


def test_every_backend_makes_the_same_images(exported: Export) -> None:
    z = latents(1, Purpose.SAMPLE, 0, 21, 100)
    results = {}
    for kind, backend in CASES:
        with open_sampler(str(getattr(exported, kind)), backend=backend, batch=16) as sampler:
            results[backend] = sampler.sample(z).astype(int)
            assert results[backend].shape == (21, 32, 32, 3)
    for backend, images in results.items():
        assert np.abs(images - results["eager"]).max() <= 1, backend


@pytest.mark.parametrize("piece", [4, 3])
def test_threads_do_not_change_the_images(exported: Export, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are images lost in the last of OpenVINO's pieces when they do not divide the block."""
    monkeypatch.setattr(OpenVinoSampler, "piece", piece)
    z = latents(1, Purpose.SAMPLE, 0, 30, 100)
    images = []
    for threads in (1, 2, 3):
        with open_sampler(str(exported.model), backend="openvino", batch=16, threads=threads) as sampler:
            images.append(sampler.sample(z))
    with open_sampler(str(exported.checkpoint), backend="eager", batch=16) as sampler:
        assert np.abs(images[0].astype(int) - sampler.sample(z)).max() <= 1
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_openvino_leaves_signals_their_stack(exported: Export) -> None:
    """On the 12 kB that it sets aside where AMX is in use, Python's handler of Ctrl-C is a segmentation fault."""
    with open_sampler(str(exported.model), backend="openvino", batch=16) as sampler:
        sampler.sample(latents(1, Purpose.SAMPLE, 0, 16, 100))
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    assert found.flags == NO_SIGNAL_STACK


def test_images_may_be_kept(exported: Export) -> None:
    """No backend hands out a buffer that it writes again."""
    for kind, backend in CASES:
        with open_sampler(str(getattr(exported, kind)), backend=backend, batch=4) as sampler:
            blocks = [latents(1, Purpose.SAMPLE, start, 4, 100) for start in (0, 4, 8)]
            kept = list(sampler.stream(blocks))
            for block, images in zip(blocks, kept, strict=True):
                assert np.array_equal(images, sampler.sample(block)), backend


def test_a_missing_compiler_is_one_line(exported: Export, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.cli", "bench", "--ckpt", str(exported.checkpoint), "--out", str(tmp_path)]
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = ["--model", str(exported.model), "--backend", "compiled", "--batch", "1", "--quick"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 69, done.stderr
    assert "torch.compile fails here" in done.stderr
    assert "channels_last" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_nodes_that_a_provider_does_not_take_are_not_run_on_the_cpu(
    exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real provider that takes none of the nodes stands for a GPU's that does not take some of them."""
    azure = "AzureExecutionProvider"
    if azure not in onnxruntime.get_available_providers():
        pytest.skip("needs an ONNX Runtime with a second provider")
    monkeypatch.setitem(onnx_backends.PROVIDERS, "onnxruntime-cuda", [azure])
    monkeypatch.setattr(onnx_backends, "_prepare_cuda", lambda *_: None)
    with pytest.raises(UnavailableError, match=f"{azure} cannot run all of it: .*assigned to the default CPU"):
        onnx_backends.create_session("model.onnx", exported.model.read_bytes(), "onnxruntime-cuda", 1)


def test_an_error_of_onnx_runtime_is_one_line(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_sampler(str(exported.model), backend="onnxruntime", batch=4) as sampler:
        monkeypatch.setattr(sampler, "_pad", lambda z: z)  # rows of a wrong size reach the graph
        with pytest.raises(
            UnavailableError, match=r"CPUExecutionProvider cannot run a block of 4 images: .* invalid dimensions"
        ):
            sampler.sample(np.zeros((4, 99), np.float32))


def test_too_little_gpu_memory_is_one_line() -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(UnavailableError, match="too little free memory for blocks of 256"), memory_errors(256):
            raise error
    with pytest.raises(RuntimeError, match="another"), memory_errors(256):
        raise RuntimeError("another")


def test_the_model_is_named_by_its_hash(exported: Export) -> None:
    with open_sampler(str(exported.model), batch=4) as sampler:
        assert sampler.model_sha256 == exported.card.sha256
    with open_sampler(str(exported.checkpoint), batch=4) as sampler:
        assert sampler.model_sha256 == exported.card.source.sha256


def test_nothing_in_nothing_out(exported: Export) -> None:
    with open_sampler(str(exported.model), batch=4) as sampler:
        assert sampler.sample(np.empty((0, 100), np.float32)).shape == (0, 32, 32, 3)
        assert list(sampler.sample_range(0, 10, 0)) == []


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("model", {"backend": "eager"}, "cannot run .*model.onnx, an ONNX file: expected auto, openvino"),
        ("checkpoint", {"backend": "openvino"}, "a checkpoint: expected auto, eager"),
        ("model", {"backend": "nonsense"}, "nonsense"),
        ("model", {"batch": 17}, "takes at most 16 images"),
        ("model", {"batch": 0}, "expected at least 1"),
    ],
)
def test_an_impossible_option_is_refused(exported: Export, kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_sampler(str(getattr(exported, kind)), **options)


def test_z_of_another_network_is_refused(exported: Export) -> None:
    with open_sampler(str(exported.model), batch=4) as sampler, pytest.raises(UsageError, match="100 values"):
        sampler.sample(np.zeros((4, 99), np.float32))
