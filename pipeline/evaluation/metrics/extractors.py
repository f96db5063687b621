"""Feature extractors for Fréchet distance and the like: TorchScript, ONNX, our attribute classifier, or a fallback.

No package holds the weights behind published numbers, and a cluster may have no internet access. So an extractor is a
file: one of metrics/protocols.py, by its name, or any, by path or URL, pinned by its SHA-256. Every result names the
extractor that it was made with.
"""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.common.errors import DataError, UnavailableError, UsageError, first_line
from pipeline.common.imaging import Pixels
from pipeline.common.onnx_graph import refuse_external_data
from pipeline.common.storage import is_url, locate, sha256_bytes
from pipeline.evaluation.classifier import parse_classifier
from pipeline.evaluation.device import device, opaque
from pipeline.evaluation.metrics.protocols import NETWORKS, fetch_network

FALLBACK = "fallback"
FALLBACK_NAME = "dcgan-fallback-v1 (untrained convolutions; never compare with published numbers)"
FALLBACK_SEED = 20151119
TORCHSCRIPT = (".pt", ".pth", ".jit")


@dataclass(frozen=True)
class Extraction:
    """What an extractor returns for N images."""

    features: NDArray[np.float32]
    """(N, F)."""
    probabilities: NDArray[np.float32] | None
    """(N, classes), or None when the extractor has no classes."""


class Extractor(ABC):
    """Images in, features out. The result states `name` and `sha256`; the cache is keyed by them."""

    name: str
    sha256: str
    resize: int | None = None
    """Pixels that images are resized to before it."""

    @abstractmethod
    def extract(self, images: Pixels) -> Extraction:
        """Return the features of images uint8 (N, H, W, C); gray and RGBA become RGB where needed."""

    def protocol(self) -> dict[str, str | None]:
        """Return what a protocol says of the extractor."""
        resize = f"{self.resize} pixels, bilinear, antialiased, rounded to uint8" if self.resize is not None else None
        return {"extractor": self.name, "extractor_sha256": self.sha256, "resize": resize}


def load_extractor(reference: str, sha256: str | None = None, *, resize: int | None = None) -> Extractor:
    """Return the extractor that `--extractor` names: `fallback`, `inception`, or a .pt, .onnx or .safetensors.

    A URL needs its SHA-256. Raises UsageError, and DataError when the file has another SHA-256 or cannot be loaded.
    """
    if reference == FALLBACK:
        fallback = FallbackExtractor(resize)
        _check_sha256(reference, fallback.sha256, sha256)
        return fallback
    if reference in NETWORKS:
        _check_sha256(reference, NETWORKS[reference].sha256, sha256)
        data = fetch_network(reference)
        return TorchScriptExtractor(data, reference, NETWORKS[reference].sha256, resize)
    if is_url(reference) and sha256 is None:
        raise UsageError(f"--extractor {reference}: a URL needs --extractor-sha256, which pins the file")
    store, name = locate(reference)
    if not name.endswith((".onnx", ".safetensors", *TORCHSCRIPT)):
        raise UsageError(
            f"--extractor {reference}: expected {FALLBACK}, {', '.join(NETWORKS)}, or a .pt (TorchScript), .onnx or "
            ".safetensors file"
        )
    data = store.read(name)
    found = sha256_bytes(data)
    _check_sha256(reference, found, sha256)
    if name.endswith(".onnx"):
        return OnnxExtractor(data, name, found, resize)
    if name.endswith(".safetensors"):
        return ClassifierExtractor(data, name, found)
    return TorchScriptExtractor(data, name, found, resize)


def _check_sha256(reference: str, found: str, expected: str | None) -> None:
    if expected is not None and expected.lower() != found:
        raise DataError(
            f"--extractor {reference}: its SHA-256 is {found}, expected {expected.lower()}: it is another file"
        )


class FallbackExtractor(Extractor):
    """Three layers of fixed random filters: enough to rank runs on one data set, and to test the commands."""

    SMALLEST = 16
    """Pixels: the third layer then has maps of 2x2; a single value would have no deviation."""

    def __init__(self, resize: int | None = None) -> None:
        self.name = FALLBACK_NAME
        self.resize = resize
        generator = torch.Generator().manual_seed(FALLBACK_SEED)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
            convolution = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False)
            nn.init.normal_(convolution.weight, 0.0, (2.0 / (inputs * 16)) ** 0.5, generator=generator)
            layers += [convolution, nn.ReLU()]
        self.network = nn.Sequential(*layers).to(device()).requires_grad_(False)
        self.sha256 = sha256_bytes(b"".join(p.cpu().numpy().tobytes() for p in self.network.parameters()))

    def extract(self, images: Pixels) -> Extraction:
        maps = _prepare(images, self.resize) / 127.5 - 1
        if min(maps.shape[2:]) < self.SMALLEST:
            raise UsageError(
                f"the fallback extractor got images of {min(maps.shape[2:])} pixels; expected at least {self.SMALLEST} "
                "(--resize)"
            )
        means, deviations = [], []
        for layer in self.network:
            maps = layer(maps)
            if isinstance(layer, nn.ReLU):
                means.append(maps.mean((2, 3)))
                deviations.append(maps.std((2, 3)))
        return Extraction(_numpy(torch.cat([*means, *deviations], 1)), None)


class TorchScriptExtractor(Extractor):
    """Any TorchScript module that takes NCHW images in [0, 255]; the Inception of the StyleGAN line is one."""

    def __init__(self, data: bytes, name: str, sha256: str, resize: int | None) -> None:
        self.name, self.sha256, self.resize = name, sha256, resize
        try:
            self.network = torch.jit.load(io.BytesIO(data), map_location=device()).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            line = first_line(error)
            raise DataError(f"--extractor {name}: not a TorchScript module ({line})") from None
        arguments = {argument.name for argument in self.network.forward.schema.arguments}
        self._inception = "return_features" in arguments
        self._no_bias = {"no_output_bias": True} if "no_output_bias" in arguments else {}

    @torch.no_grad()
    def extract(self, images: Pixels) -> Extraction:
        batch = _prepare(images, self.resize)
        try:
            if self._inception:
                features = self.network(batch.to(torch.uint8), return_features=True)
                return Extraction(_numpy(features), _numpy(self.network(batch.to(torch.uint8), **self._no_bias)))
            output = self.network(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _refused(self.name, batch, error) from None
        features, logits = output if isinstance(output, tuple) else (output, None)
        if features.ndim != 2:
            features = features.flatten(1)
        return Extraction(_numpy(features), None if logits is None else _numpy(logits.softmax(1)))


class OnnxExtractor(Extractor):
    """Any ONNX graph that takes float32 NCHW images in [0, 255]; a second output holds class logits."""

    def __init__(self, data: bytes, name: str, sha256: str, resize: int | None) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError:
            raise UnavailableError("--extractor *.onnx needs ONNX Runtime: install the extra `cpu` or `gpu`") from None
        self.name, self.sha256, self.resize = name, sha256, resize
        try:
            refuse_external_data(onnx.load_from_string(data), f"--extractor {name}")
            self.session = onnxruntime.InferenceSession(data, providers=onnxruntime.get_available_providers())
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"--extractor {name}: ONNX Runtime cannot load it ({first_line(error)})") from None

    def extract(self, images: Pixels) -> Extraction:
        batch = _prepare(images, self.resize).cpu().numpy()
        try:
            outputs = self.session.run(None, {self.session.get_inputs()[0].name: batch})
        except Exception as error:  # the exceptions of ONNX Runtime have no common class
            raise _refused(self.name, batch, error) from None
        probabilities = None
        if len(outputs) > 1:
            probabilities = _numpy(torch.from_numpy(outputs[1]).softmax(1))
        return Extraction(np.asarray(outputs[0], np.float32).reshape(len(images), -1), probabilities)


class ClassifierExtractor(Extractor):
    """Our attribute classifier; its classes are all combinations of its bool attributes."""

    MOST_ATTRIBUTES = 6
    """The first so many bool attributes make the classes, so there are 2^6 at most."""

    def __init__(self, data: bytes, name: str, sha256: str) -> None:
        self.classifier = parse_classifier(data, f"--extractor {name}")
        bools = [head.name for head in self.classifier.heads.values() if head.kind == "bool"]
        self.attributes = bools[: self.MOST_ATTRIBUTES]
        self.name = f"{name} (attribute classifier; classes from {', '.join(self.attributes)})"
        self.sha256 = sha256

    def extract(self, images: Pixels) -> Extraction:
        predictions = self.classifier.predict(images)
        classes = np.ones((len(images), 1), np.float32)
        for attribute in self.attributes:
            yes = predictions[attribute][:, None]
            classes = np.concatenate([classes * yes, classes * (1 - yes)], 1)
        return Extraction(self.classifier.features(images), classes if self.attributes else None)


def _refused(name: str, batch: Tensor | NDArray[np.float32], error: Exception) -> DataError:
    """Return the error for a batch that an extractor cannot take: most often it was made for another size."""
    line = next((text for text in reversed(str(error).strip().splitlines()) if text.strip()), type(error).__name__)
    return DataError(
        f"--extractor {name}: cannot take images of shape {tuple(batch.shape[1:])} ({line.strip()[:160]}); "
        "give it the size that it was made for with --resize"
    )


def _prepare(images: Pixels, resize: int | None) -> Tensor:
    """uint8 NHWC -> float32 (N, 3, H, W) in [0, 255] on the device, resized with antialiasing if asked."""
    batch = torch.from_numpy(np.ascontiguousarray(opaque(images))).to(device()).permute(0, 3, 1, 2).float()
    if batch.shape[1] == 1:
        batch = batch.expand(-1, 3, -1, -1)
    if resize is not None and batch.shape[2:] != (resize, resize):
        batch = F.interpolate(batch, (resize, resize), mode="bilinear", align_corners=False, antialias=True)
        batch = batch.clamp(0, 255).round()
    return batch.contiguous()


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return np.asarray(tensor.float().cpu().numpy(), np.float32)
