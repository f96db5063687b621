"""Exported files make the images of the network they came from; those that do not are never written."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_cases import MAX_BATCH, SMALL, Cli, Export, make_generator, write_checkpoint

from export.builders import parity
from export.builders.onnx_model import check_parity, export_onnx, verify_onnx
from export.format.card import ComputePrecision, Parity
from export.format.graph import DeployedGenerator
from export.samplers.base import Sampler
from export.samplers.onnx import OpenVinoSampler
from export.samplers.open import ONNX_BACKENDS, open_sampler
from pipeline.checkpoints.weights import serialize
from pipeline.common.errors import DataError
from pipeline.common.imaging import open_image
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig, load_config, preset_names
from pipeline.model.latents import latents
from pipeline.model.networks import Generator
from pipeline.model.sampling import to_uint8

FLOAT_BAR = {"fp32": 1e-4, "fp16": 1e-2}
ON_THE_CPU = [backend for backend in ONNX_BACKENDS if "-" not in backend]


def expected(generator: Generator, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float NCHW and uint8 NHWC of the network as trained, by numpy alone after the forward pass."""
    with torch.no_grad():
        floats = generator(torch.from_numpy(z)).numpy()
    return floats, np.clip(floats.transpose(0, 2, 3, 1) * 127.5 + 128, 0, 255).astype(np.uint8)


def draw(config: NetworkConfig, count: int) -> np.ndarray:
    return latents(7, Purpose.SAMPLE, 0, count, config.latent_dim, config.latent_distribution)


def float_session(model: Path) -> onnxruntime.InferenceSession:
    """Return a session of the file that also outputs its last Tanh: the images before their conversion to uint8."""
    graph = onnx.load(model)
    tanh = next(node for node in graph.graph.node if node.op_type == "Tanh").output[0]
    graph.graph.output.insert(0, onnx.helper.make_empty_tensor_value_info(tanh))
    return onnxruntime.InferenceSession(graph.SerializeToString())


def check(config: NetworkConfig, folder: Path, precision: ComputePrecision, batches: tuple[int, ...]) -> None:
    """Export a generator and compare its file with it at every batch size, in every backend here."""
    checkpoint, generator = write_checkpoint(folder, config), make_generator(config)
    export_onnx(str(checkpoint), folder, precision=precision, max_batch=max(batches), parity_images=max(batches))
    model = folder / "model.onnx"
    session = float_session(model)
    for batch in batches:
        z = draw(config, batch)
        floats, pixels = expected(generator, z)
        assert pixels.std() > 20, "images without contrast compare nothing"
        assert np.abs(session.run(None, {"z": z})[0].astype(np.float32) - floats).max() <= FLOAT_BAR[precision]
        for backend in ON_THE_CPU:
            with open_sampler(str(model), backend=backend, batch=batch) as sampler:
                assert np.abs(sampler.sample(z).astype(int) - pixels).max() <= 1, backend


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (NetworkConfig(width=8), "fp32"),
        (NetworkConfig(width=8, upsampling="bilinear", channels=1), "fp16"),
        (NetworkConfig(width=4, image_size=128, kernel_size=5, channels=1, first_batchnorm="unit"), "fp32"),
        (NetworkConfig(width=8, image_size=32, upsampling="bilinear", latent_distribution="normal"), "fp32"),
        (NetworkConfig(width=8, image_size=32, kernel_size=5, latent_dim=64), "fp16"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.image_size}-{value.upsampling}-{value.channels}",
)
def test_every_member_of_the_family_exports_equal(
    config: NetworkConfig, precision: ComputePrecision, tmp_path: Path
) -> None:
    check(config, tmp_path, precision, (1, 7, 32))


def whole_matrix() -> Iterator[NetworkConfig]:
    for size in (32, 64, 128):
        for upsampling in ("transposed", "bilinear"):
            for channels in (1, 3):
                yield NetworkConfig.model_validate(
                    {"width": 16, "image_size": size, "upsampling": upsampling, "channels": channels}
                )
    networks = [load_config(preset).network for preset in preset_names()]
    yield from dict.fromkeys(network for network in networks if not network.label)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("config", list(whole_matrix()), ids=str)
def test_the_whole_matrix_and_every_preset_at_its_real_width(
    config: NetworkConfig, precision: ComputePrecision, tmp_path: Path
) -> None:
    check(config, tmp_path, precision, (1, 7, 256))


def test_float_output_is_the_networks_own(exported: Export, tmp_path: Path) -> None:
    export_onnx(str(exported.checkpoint), tmp_path, output="float", max_batch=8, parity_images=8)
    z = draw(SMALL, 8)
    floats, pixels = expected(exported.generator, z)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert np.abs(session.run(None, {"z": z})[0] - floats).max() <= 1e-4
    for backend in ON_THE_CPU:
        with open_sampler(str(tmp_path / "model.onnx"), backend=backend) as sampler:
            assert np.abs(sampler.sample(z).astype(int) - pixels).max() <= 1, backend


def test_an_export_depends_on_the_weights_alone(exported: Export, tmp_path: Path) -> None:
    again = export_onnx(str(exported.checkpoint), tmp_path, max_batch=MAX_BATCH, parity_images=1)
    assert again.sha256 == exported.card.sha256


def test_folding_batchnorm_changes_nothing_but_rounding() -> None:
    generator = make_generator(NetworkConfig(width=8))
    z = torch.from_numpy(draw(generator.config, 8))
    folded = DeployedGenerator(generator, output="float")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(z), generator(z), atol=1e-5, rtol=0)


def test_a_network_that_half_precision_cannot_hold_is_not_exported(tmp_path: Path, cli: Cli) -> None:
    generator = make_generator(SMALL)
    layers: Any = generator.layers
    with torch.no_grad():
        layers[-4].weight *= 1e6  # the feature maps exceed fp16's range, but not float32's
        layers[-4].bias *= 1e6
        layers[-2].weight *= 1e-6
    (tmp_path / "wide.safetensors").write_bytes(serialize(generator, SMALL, "ema", 0))
    arguments = ("onnx", "--ckpt", tmp_path / "wide.safetensors", "--max-batch", 8, "--parity-images", 8)
    assert cli(*arguments, "--out", tmp_path / "full")[0] == 0
    code, _, error = cli(*arguments, "--out", tmp_path / "half", "--precision", "fp16")
    assert code == 65
    assert "differs from PyTorch" in error
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["model_parity_failure.png"]
    assert open_image((tmp_path / "half" / "model_parity_failure.png").read_bytes()).width >= 32


def test_verify_finds_other_weights(exported: Export, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path, SMALL, seed=1)
    with pytest.raises(DataError, match="was made from"):
        verify_onnx(str(exported.model), reference=str(other), images=8)
    card, records = verify_onnx(str(exported.model), reference=str(exported.checkpoint), images=20)
    assert card == exported.card
    for proven in records:
        assert proven.batches == [1, 7, MAX_BATCH]
        assert proven.images == 1 + 7 + 2 * MAX_BATCH


def test_a_gate_that_measures_other_weights_fails(exported: Export, tmp_path: Path) -> None:
    """The comparison itself: the right file beside the wrong network must not pass."""
    model, data = str(tmp_path / "m.onnx"), exported.model.read_bytes()
    with pytest.raises(DataError, match=r"differs from PyTorch by \d+ gray levels"):
        check_parity(make_generator(SMALL, seed=1), exported.card, data, model, 16)
    assert (tmp_path / "m_parity_failure.png").exists()


def test_the_gate_runs_every_backend_that_is_installed(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes OpenVINO: a gate of ONNX Runtime alone would not have seen it go wrong."""
    assert [proven.backend.split("/")[0] for proven in exported.card.parity] == ["openvino", "onnxruntime"]
    right = OpenVinoSampler._run
    monkeypatch.setattr(OpenVinoSampler, "_run", lambda self, z: right(self, z) // 2)
    with pytest.raises(DataError, match="on openvino"):
        export_onnx(str(exported.checkpoint), tmp_path, max_batch=8, parity_images=8)
    assert not (tmp_path / "model.onnx").exists()


class Altered(Sampler):
    """The reference's own images, changed."""

    backend = provider = "altered"

    def __init__(self, generator: Generator, batch: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(generator.config, batch, "0" * 64)
        self.run, self.change = parity.of_generator(generator).run, change

    def _run(self, z: np.ndarray) -> np.ndarray:
        return self.change(to_uint8(torch.from_numpy(self.run(z))).numpy())


def measure(
    generator: Generator,
    change: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    floats: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[tuple[Parity, parity.Comparison]]:
    candidate = parity.Candidate(
        lambda batch: Altered(generator, batch, change), lambda sampler, z: floats(z) if floats else None
    )
    return parity.measure(parity.of_generator(generator), [candidate], max_batch=8, images=64, precision="fp32")


def test_the_floats_of_every_image_are_compared(exported: Export, tmp_path: Path) -> None:
    """The first blocks may be right and a later one wrong."""
    reference, calls = parity.of_generator(exported.generator), []

    def floats(z: np.ndarray) -> np.ndarray:
        calls.append(len(z))
        return reference.run(z) + np.float32(0.01 if len(calls) == 9 else 0)

    with pytest.raises(DataError, match=r"differs from PyTorch by 0.01 in \[-1, 1\]"):
        parity.require(measure(exported.generator, floats=floats), str(tmp_path / "m.onnx"))
    assert calls == [1, 7] + 8 * [8]


@pytest.mark.parametrize(("share", "passes"), [(0.002, True), (0.01, False)])
def test_pixels_that_are_one_gray_level_off_are_counted(
    exported: Export, tmp_path: Path, share: float, passes: bool
) -> None:
    """TF32 in place of float32 moves no pixel by more than one, but 3 to 9 % of them by one."""
    random = np.random.default_rng(0)

    def change(pixels: np.ndarray) -> np.ndarray:
        return np.where(random.random(pixels.shape) < share, pixels ^ 1, pixels)

    measured = measure(exported.generator, change)
    ((proven, _),) = measured
    assert proven.max_uint8_error == 1
    assert proven.share_of_pixels_off == pytest.approx(share, rel=0.1)
    if passes:
        assert parity.require(measured, str(tmp_path / "m.onnx")) == [proven]
    else:
        with pytest.raises(DataError, match=r"differs from PyTorch by [\d.]+% of the values \(at most 0.5%\)"):
            parity.require(measured, str(tmp_path / "m.onnx"))
