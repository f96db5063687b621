"""`dcgan-export inspect`: describes an exported file in a dozen lines."""

from collections import Counter
from typing import Any

from export.format.card import Card, Parity, Port, read_model
from pipeline.common.errors import DataError


def describe_model(model: str) -> list[str]:
    """Return lines that describe an ONNX file or an engine. Raises DataError when it does not match its card."""
    card, data = read_model(model)
    rows = {
        "file": f"{model}, {card.bytes:,} bytes, sha256 {card.sha256}",
        "input": _port(card.input),
        "label": _port(card.label) if card.label is not None else "",
        "output": _port(card.output),
        "batch": f"1 to {card.max_batch}",
        "precision": card.precision,
        "network": _network(card),
        "weights": _weights(card),
        "graph": _graph(model, data) if model.endswith(".onnx") else "",
        "engine": _engine(card),
        "versions": ", ".join(f"{name} {version}" for name, version in card.versions.items()),
        "parity": "; ".join(_parity(proven) for proven in card.parity) or "not measured: it needs an NVIDIA GPU",
    }
    return [f"{name:10}{text}" for name, text in rows.items() if text]


def _port(port: Port) -> str:
    return f"{port.name} {port.dtype} ({', '.join(map(str, port.shape))}), {port.values}"


def _network(card: Card) -> str:
    net = card.network
    return (
        f"{net.image_shape[1]}x{net.image_shape[0]}, {net.channels} channels, width {net.width}, "
        f"{net.kernel_size}x{net.kernel_size} {net.upsampling}"
    )


def _weights(card: Card) -> str:
    seen = "" if card.source.images_seen is None else f", {card.source.images_seen:,} images seen"
    return f"{card.source.kind}{seen}, {card.source.reference}, sha256 {card.source.sha256}"


def _graph(model: str, data: bytes) -> str:
    import onnx

    try:
        proto: Any = onnx.load_from_string(data)
    except Exception as error:  # protobuf's own type
        raise DataError(f"{model}: not an ONNX file ({error}); export it again") from None
    operators = Counter(node.op_type for node in proto.graph.node)
    listed = ", ".join(f"{count} {name}" for name, count in operators.items())
    opset = proto.opset_import[0].version if proto.opset_import else "unknown"
    return f"opset {opset}, {sum(operators.values())} nodes: {listed}"


def _engine(card: Card) -> str:
    if card.engine is None:
        return ""
    engine = card.engine
    profiles = ", ".join("/".join(map(str, profile)) for profile in engine.profiles)
    where = engine.gpu or "any supported RTX GPU"
    return f"{engine.runtime} {engine.version} for {where} on {engine.system}, batch profiles {profiles}"


def _parity(proven: Parity) -> str:
    from export.builders.parity import describe

    return describe(proven).removeprefix("parity ")
