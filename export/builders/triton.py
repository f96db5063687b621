"""Writes a Triton model repository: the model, its card, and a config.pbtxt that agrees with the card."""

import re
from pathlib import Path
from typing import Any

from export.format.card import Card, card_json, card_name, read_model
from export.format.onnx_file import check_network, load_checked
from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.storage import Store

TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8", "int64": "TYPE_INT64"}
VERSION_FOLDER = "1"


def export_repository(
    model: str,
    repository: Path,
    *,
    name: str = "dcgan",
    instances: int = 1,
    max_queue_delay_microseconds: int = 500,
    threads: int | None = None,
) -> Path:
    """Write `repository`/`name` from an ONNX file or an engine with its card; return the path of its config.pbtxt.

    `threads` are those of an ONNX model on the CPU, over all instances. Without it ONNX Runtime takes one for each core
    of the node, whatever the limit of the server's container.

    The configuration is written last, so a server that polls the repository never loads half a model.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):  # excludes `..`, hidden files and options
        raise UsageError(f"--name {name}: expected letters, digits, '_', '-' and '.', with no '-' or '.' first")
    if threads is not None and threads < instances:
        raise UsageError(f"--threads {threads}: expected at least one for each of {instances} --instances")
    if instances < 1 or max_queue_delay_microseconds < 0:
        raise UsageError(
            f"--instances {instances} --queue-delay-microseconds {max_queue_delay_microseconds}: "
            "expected at least 1 and 0"
        )
    card, data = read_model(model) if model.endswith(".plan") else load_checked(model)
    check_network(model, card, card.network)  # the names of its input and output go into the configuration
    if card.engine is not None and card.engine.runtime != "tensorrt":
        raise UnavailableError(
            f"{model}: Triton's server has no {card.engine.runtime} backend; use the ONNX file, or --runtime tensorrt"
        )
    text = make_config(card, name, instances, max_queue_delay_microseconds, threads)
    check_config(text, card)
    file = "model.plan" if card.engine else "model.onnx"
    files = {
        f"{VERSION_FOLDER}/{file}": data,
        f"{VERSION_FOLDER}/{card_name(file)}": card_json(card.model_copy(update={"file": file})),
        "config.pbtxt": text.encode(),
    }
    Store(repository / name).write_all(files)
    return repository / name / "config.pbtxt"


def make_config(
    card: Card, name: str, instances: int, max_queue_delay_microseconds: int, threads: int | None = None
) -> str:
    """Return the text of config.pbtxt. Its dims omit the batch, which `max_batch_size` implies."""
    is_engine = card.engine is not None
    warm_ups = "\n".join(_warm_up(card, batch) for batch in sorted({1, card.max_batch}))
    # An engine's kernels were chosen for one batch size, so preferred sizes help. With ONNX Runtime they only delay.
    preferred = f"\n  preferred_batch_size: [ {_preferred(card)} ]" if is_engine else ""
    graphs = "\noptimization { cuda { graphs: true } }" if is_engine else ""
    # The server uses the profile whose best size is nearest to the batch.
    profiles = '\n    profile: [ "0", "1" ]' if is_engine else ""
    inputs = f'{{ name: "{card.input.name}" data_type: {TYPES[card.input.dtype]} dims: [ {_dims(card.input.shape)} ] }}'
    if card.label is not None:
        # The graph has one number an image, and the server no input without dimensions.
        scalar = "" if card.label.shape[1:] else " reshape: { shape: [ ] }"
        label = f'name: "{card.label.name}" data_type: {TYPES[card.label.dtype]} dims: [ {_dims(card.label.shape)} ]'
        inputs += f", {{ {label}{scalar} }}"
    per_instance = "" if is_engine or threads is None else _parameter("intra_op_thread_count", threads // instances)
    return f"""# Made by dcgan-export triton from {card.source.kind} weights {card.source.sha256}.
name: "{name}"
backend: "{"tensorrt" if is_engine else "onnxruntime"}"
max_batch_size: {card.max_batch}
input [ {inputs} ]
output [ {{ name: "{card.output.name}" data_type: {TYPES[card.output.dtype]} dims: [ {_dims(card.output.shape)} ] }} ]
dynamic_batching {{{preferred}
  max_queue_delay_microseconds: {max_queue_delay_microseconds}
}}
instance_group [
  {{
    count: {instances}
    kind: {"KIND_GPU" if is_engine else "KIND_AUTO"}{profiles}
  }}
]{graphs}{per_instance}
{warm_ups}
"""


def _parameter(key: str, value: int) -> str:
    return f'\nparameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'


def _preferred(card: Card) -> str:
    assert card.engine is not None
    return ", ".join(map(str, sorted({card.engine.profiles[-1][1], card.max_batch})))


def _dims(shape: list[int | str]) -> str:
    return ", ".join(str(size) for size in shape[1:] or [1])


def _warm_up(card: Card, batch: int) -> str:
    label = ""
    if card.label is not None:  # zeros are a class, or none of several labels; random numbers would be no class
        label = f"""
  inputs {{
    key: "{card.label.name}"
    value {{ data_type: {TYPES[card.label.dtype]} dims: [ {_dims(card.label.shape)} ] zero_data: true }}
  }}"""
    return f"""model_warmup {{
  name: "batch {batch}"
  batch_size: {batch}
  inputs {{
    key: "{card.input.name}"
    value {{ data_type: {TYPES[card.input.dtype]} dims: [ {_dims(card.input.shape)} ] random_data: true }}
  }}{label}
}}"""


def check_config(text: str, card: Card) -> bool:
    """Parse `text` with Triton's own schema and compare it with `card`. Return False if tritonclient is missing.

    Raises DataError for an unknown field or value, with line and column, and for a contradiction to the card.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2 as schema
    except ImportError:
        return False
    try:
        config: Any = text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise DataError(f"config.pbtxt: {error}") from None
    found: list[Any] = [config.max_batch_size]
    expected: list[Any] = [card.max_batch]
    for tensor in (*config.input, *config.output):
        found.append((tensor.name, schema.DataType.Name(tensor.data_type), list(tensor.dims)))
    for port in (*card.inputs, card.output):
        expected.append((port.name, TYPES[port.dtype], port.shape[1:] or [1]))
    if found != expected:
        raise DataError(f"config.pbtxt: has {found}, the card of {card.file} says {expected}")
    return True
