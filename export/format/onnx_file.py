"""Opening an ONNX file: its card, its graph and the metadata inside it must agree."""

import json
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from export.format.card import Card, Precision, Source, label_port, ports, read_model
from pipeline.common.errors import DataError, first_line
from pipeline.common.onnx_graph import refuse_external_data
from pipeline.config import NetworkConfig


def metadata(network: NetworkConfig, source: Source, precision: Precision, max_batch: int) -> dict[str, str]:
    """Return the `metadata_props` of an exported graph. They repeat the card, so that an edited card is found."""
    named = {"classes": json.dumps(network.class_titles)} if network.label else {}
    return named | {
        "network": network.model_dump_json(),
        "weights_sha256": source.sha256,
        "weights_kind": source.kind,
        "images_seen": "" if source.images_seen is None else str(source.images_seen),
        "precision": precision,
        "max_batch": str(max_batch),
    }


def load_checked(model: str) -> tuple[Card, bytes]:
    """Return card and bytes of an ONNX model, after every check that does not run it.

    Raises DataError when the file does not match its card, is no valid graph, or has a static batch.
    """
    import onnx

    card, data = read_model(model)
    try:
        proto: Any = onnx.load_from_string(data)
        refuse_external_data(proto, model)
        onnx.checker.check_model(proto, full_check=True)
    except DataError:
        raise
    except Exception as error:  # errors of protobuf and onnx have no common class
        line = first_line(error)
        raise DataError(f"{model}: not a valid ONNX graph: {line}; export it again") from None
    _check_ports(model, card, proto)
    _check_metadata(model, card, proto)
    return card, data


def _check_ports(model: str, card: Card, proto: Any) -> None:
    """Raise DataError unless the graph's inputs and outputs are those of the card and of its network."""
    from onnx import TensorProto

    types = {TensorProto.FLOAT: "float32", TensorProto.UINT8: "uint8", TensorProto.INT64: "int64"}
    found = [
        (
            value.name,
            types.get(value.type.tensor_type.elem_type, "another type"),
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*proto.graph.input, *proto.graph.output)
    ]
    expected = [(port.name, port.dtype, port.shape) for port in (*card.inputs, card.output)]
    if fixed := [shape[0] for _, _, shape in found if shape and isinstance(shape[0], int)]:
        raise DataError(
            f"{model}: its batch is fixed at {fixed[0]}, expected a dynamic one; export it with dcgan-export onnx"
        )
    if found != expected:
        raise DataError(f"{model}: the graph has {found}, its card says {expected}; export it again")
    check_network(model, card, card.network)


def check_network(model: str, card: Card, network: NetworkConfig) -> None:
    """Raise DataError unless the card describes exactly `network`, with its input and output."""
    if network.label and not network.class_images:
        raise DataError(
            f"{model}: is conditioned on {', '.join(network.label)}, but its card does not name the classes"
        )
    expected = (*ports(network, card.output_kind), label_port(network))
    if card.network != network or (card.input, card.output, card.label) != expected:
        raise DataError(f"{model}: its card describes another network than the one it was made from; export it again")


def _check_metadata(model: str, card: Card, proto: Any) -> None:
    """Raise DataError unless the metadata in the graph agrees with the card."""
    found = {entry.key: entry.value for entry in proto.metadata_props}
    with suppress(KeyError, ValidationError):  # this version may have more fields, with defaults
        found["network"] = NetworkConfig.model_validate_json(found["network"]).model_dump_json()
    for key, expected in metadata(card.network, card.source, card.precision, card.max_batch).items():
        if found.get(key) != expected:
            raise DataError(
                f"{model}: made with {key} {found.get(key, 'unknown')}, its card says {expected}: the card was edited; "
                "export it again"
            )
