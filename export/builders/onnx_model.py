"""Exports a generator as one ONNX file with a dynamic batch, and verifies one. Parity is measured before writing."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.builders import parity
from export.format.card import (
    MAX_BATCH,
    Card,
    ComputePrecision,
    Output,
    Parity,
    Source,
    label_port,
    ports,
    write_model,
)
from export.format.graph import DeployedConditional, DeployedGenerator
from export.format.onnx_file import check_network, load_checked, metadata
from export.format.rows import feeds, rows_at
from export.samplers.base import Sampler
from export.samplers.choice import installed_cpu_backends
from export.samplers.onnx import create_session, open_onnx
from pipeline.checkpoints.reference import LoadedGenerator, load_generator
from pipeline.common.errors import DataError, UsageError
from pipeline.common.machine import available_threads, imported_versions, processor
from pipeline.common.randomness import Purpose
from pipeline.common.storage import require_writable, sha256_bytes
from pipeline.model.networks import Generator

OPSET = 20
"""What the exporter is asked for. The file says the least that means the same: see `_lower`."""


def export_onnx(
    reference: str,
    folder: Path,
    *,
    name: str = "model.onnx",
    precision: ComputePrecision = "fp32",
    output: Output = "uint8",
    max_batch: int = 256,
    parity_images: int = parity.IMAGES,
) -> Card:
    """Write `folder`/`name` and its card from any form of --ckpt. Writes nothing when parity fails.

    Raises DataError when the images differ from the generator's by more than the tolerances of
    `export.builders.parity`.
    """
    if not 2 <= max_batch <= MAX_BATCH:
        raise UsageError(f"--max-batch {max_batch}: expected 2 to {MAX_BATCH}")
    if not name.endswith(".onnx"):
        raise UsageError(f"--name {name}: expected a name that ends in .onnx")
    require_writable(folder)  # before the work
    loaded = load_generator(reference)
    data = build(loaded, precision, output, max_batch)
    z, image = ports(loaded.config, output)
    card = Card(
        file=name,
        sha256=sha256_bytes(data),
        bytes=len(data),
        precision=precision,
        max_batch=max_batch,
        input=z,
        label=label_port(loaded.config),
        output=image,
        network=loaded.config,
        source=source_of(loaded),
        versions={},
    )
    proven = check_parity(loaded.generator, card, data, str(folder / name), parity_images)
    card = card.model_copy(update={"parity": proven, "processor": processor(), "versions": imported_versions()})
    write_model(str(folder), card, data)
    return card


def build(loaded: LoadedGenerator, precision: ComputePrecision, output: Output, max_batch: int) -> bytes:
    """Return the ONNX graph of a generator, checked by onnx, as the bytes of one file."""
    kind = DeployedConditional if loaded.config.label else DeployedGenerator
    network = kind(loaded.generator, precision=precision, output=output)
    # 2, because torch.export would make a batch of 1 a constant
    examples = feeds(loaded.config, rows_at(loaded.config, 0, Purpose.BENCHMARK, 0, 2))
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    with _quiet():
        program = torch.onnx.export(
            network,
            tuple(torch.from_numpy(values) for values in examples.values()),
            input_names=list(examples),
            output_names=["image"],
            dynamic_shapes={name: {0: batch} for name in examples},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model_proto
    _strip(model)
    _lower(model)
    for key, value in metadata(loaded.config, source_of(loaded), precision, max_batch).items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def source_of(loaded: LoadedGenerator) -> Source:
    """Return the weights as the card describes them."""
    began = loaded.init_from or None
    source = {"reference": loaded.reference, "sha256": loaded.sha256, "kind": loaded.kind}
    return Source.model_validate({**source, "images_seen": loaded.images_seen, "init_from": began})


class _quiet:
    """Silences the exporter's messages about its own internals."""

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")
        self._logger = logging.getLogger("torch.onnx")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *details: Any) -> None:
        self._logger.setLevel(self._level)
        self._caught.__exit__(*details)


def _strip(model: Any) -> None:
    """Remove the exporter's metadata (stack traces with local paths), so that the file depends on the weights alone."""
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info, graph):
        item.ClearField("metadata_props")
        if item is not graph:
            item.ClearField("doc_string")
    model.ClearField("doc_string")


def _lower(model: Any) -> None:
    """State the oldest opset and IR in which every node means what it does here, so that old runtimes take the file."""
    (version,) = [entry.version for entry in model.opset_import if entry.domain == ""]
    pending, oldest = [model.graph], 1
    while pending:
        for node in pending.pop().node:
            assert node.domain == "", node.op_type
            oldest = max(oldest, onnx.defs.get_schema(node.op_type, version).since_version)
            pending += [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    del model.opset_import[:]  # the exporter also names a domain of its own, of which no node is
    model.opset_import.append(onnx.helper.make_opsetid("", oldest))
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)


def check_parity(generator: Generator, card: Card, data: bytes, model: str, images: int) -> list[Parity]:
    """Compare `data` with `generator` in every installed CPU backend; return the differences of each.

    Raises DataError beyond the tolerances.
    """
    threads = available_threads()

    def candidate(backend: str) -> parity.Candidate:
        def open_at(batch: int) -> Sampler:
            return open_onnx(model, card, data, backend, batch, threads)

        if backend != "onnxruntime":
            return parity.Candidate(open_at)
        run_floats = float_runner(card, data, model, threads)
        return parity.Candidate(open_at, lambda sampler, z: run_floats(z))

    measured = parity.measure(
        parity.of_generator(generator),
        [candidate(backend) for backend in installed_cpu_backends()],
        max_batch=card.max_batch,
        images=images,
        precision=card.precision,
    )
    return parity.require(measured, model)


def float_runner(
    card: Card, data: bytes, model: str, threads: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return rows -> float images (N, C, H, W) of the same graph, before their conversion to uint8."""
    output = "image"
    if card.output_kind == "uint8":
        proto: Any = onnx.load_from_string(data)
        permute = next((node for node in reversed(proto.graph.node) if node.op_type == "Transpose"), None)
        if permute is None or not permute.input:
            raise DataError(f"{model}: its graph has no float images before the uint8 ones; export it again")
        output = permute.input[0]
        proto.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
        data = proto.SerializeToString()
    session = create_session(model, data, "onnxruntime", threads)

    def run(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        images: NDArray[np.float32] = session.run([output], feeds(card.network, rows))[0]
        return images

    return run


def verify_onnx(model: str, *, reference: str | None = None, images: int = parity.IMAGES) -> tuple[Card, list[Parity]]:
    """Check hash, card, graph and parity again. `reference` is the checkpoint.

    Raises DataError with the check that fails.
    """
    card, data = load_checked(model)
    loaded = load_source(card, reference)
    return card, check_parity(loaded.generator, card, data, model, images)


def load_source(card: Card, reference: str | None) -> LoadedGenerator:
    """Return the generator that `card` was exported from, which `reference` names.

    A card says what its weights were, but it may come from anyone: only what the user names is opened or fetched.

    Raises DataError when it is not named, is gone, has another hash, or contradicts the card.
    """
    if reference is None:
        raise DataError(
            f"{card.file}: its images can only be compared with those of the weights it was made from; name them "
            f"with --ckpt (the card says {card.source.reference}, SHA-256 {card.source.sha256[:12]}...)"
        )
    loaded = load_generator(reference)
    if loaded.sha256 != card.source.sha256:
        raise DataError(
            f"{loaded.source}: its SHA-256 is {loaded.sha256[:12]}..., but {card.file} was made from "
            f"{card.source.sha256[:12]}...; pass the right weights as --ckpt, or export again"
        )
    check_network(card.file, card, loaded.config)
    return loaded
