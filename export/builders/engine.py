"""Builds a TensorRT engine and its card from a checkpoint or an ONNX file, rebuilds one, and verifies one."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.builders.tensorrt import BuildOptions, build_engine, can_run, require_builder
from export.format.card import (
    Card,
    ComputePrecision,
    Output,
    Parity,
    Precision,
    beside,
    read_card,
    read_model,
    require_replaceable,
    write_model,
)
from pipeline.common.errors import DataError, UsageError
from pipeline.common.machine import imported_versions, processor
from pipeline.common.storage import is_url, locate, require_writable, sha256_bytes

if TYPE_CHECKING:
    from export.builders.parity import Reference

PARITY_IMAGES = 10_000
OUTPUT: Output = "uint8"
MAX_BATCH = 256


def export_engine(
    reference: str,
    folder: Path,
    *,
    name: str = "engine.plan",
    precision: Precision = "fp32",
    output: Output | None = None,
    max_batch: int | None = None,
    options: BuildOptions | None = None,
    parity_images: int = PARITY_IMAGES,
) -> Card:
    """Write `folder`/`name` and its card, from a `.onnx` with its card or any form of --ckpt.

    From a checkpoint the ONNX file is made first, in the same folder, unless it is there; `output` (default uint8)
    and `max_batch` (default 256) are the ONNX file's. If the engine can run here, it is compared with PyTorch before
    it is written.

    Raises UnavailableError when no engine can be built here, DataError when the graph cannot be built or parity
    fails, UsageError when the options contradict the ONNX file or another engine in the folder.
    """
    options = replace(options or BuildOptions(), tf32=precision == "tf32")
    if not name.endswith(".plan"):
        raise UsageError(f"--name {name}: expected a name that ends in .plan")
    if options.runtime == "tensorrt-rtx" and options.timing_cache is not None:
        raise UsageError("--timing-cache: TensorRT-RTX has none; it chooses kernels on the GPU that runs the engine")
    require_builder(options.runtime)  # refuse before the minutes of an ONNX export
    require_writable(folder)
    if reference.endswith(".onnx"):
        model, weights = _onnx_beside(reference, folder, name, precision, output, max_batch), None
    else:
        output, max_batch = output or OUTPUT, MAX_BATCH if max_batch is None else max_batch
        model = _onnx_of(reference, folder, name, precision, output, max_batch, parity_images)
        weights = reference
    return _build(model, folder / name, precision, options, weights, parity_images)


def rebuild(engine: str) -> Card:
    """Build `engine` again for this machine from the ONNX file beside it, with the options in its card."""
    if is_url(engine := engine.removeprefix("file://")):
        raise UsageError(
            f"--rebuild: {engine} is a URL, and an engine is built on a disk, beside its ONNX file; copy both to "
            "a folder with dcgan-export publish"
        )
    card = read_card(engine)
    assert card.engine is not None, "read_card refuses an engine whose card has no target"
    options = BuildOptions(card.engine.runtime, card.precision == "tf32", card.engine.optimization_level)
    require_builder(options.runtime)
    _onnx_card(engine, card)
    path = Path(engine)
    return _build(path.with_name(card.engine.onnx), path, card.precision, options, None, PARITY_IMAGES)


def rebuild_unless_it_fits(engine: str) -> bool:
    """Rebuild `engine` if it is damaged or was built for another machine; return whether it was rebuilt."""
    from export.samplers.tensorrt import require_fit

    if not engine.endswith(".plan"):
        raise UsageError(f"--rebuild: {engine} is not a .plan, and only engines are built")
    try:
        card, _ = read_model(engine)
        require_fit(engine, card)
    except DataError:
        rebuild(engine)
        return True
    return False


def _onnx_beside(
    reference: str, folder: Path, engine: str, precision: Precision, output: Output | None, max_batch: int | None
) -> Path:
    """Copy an ONNX file and its card into `folder`, because an engine is rebuilt from the file beside it.

    Returns the copy. Raises UsageError for an option that contradicts the graph's precision, output or batch.
    """
    card, data = read_model(reference)
    precisions = ("fp16",) if card.precision == "fp16" else ("fp32", "tf32")
    for option, wanted, found in (
        ("--precision", precision, precision if precision in precisions else card.precision),
        ("--output", output, card.output_kind),
        ("--max-batch", max_batch, card.max_batch),
    ):
        if wanted is not None and wanted != found:
            raise UsageError(
                f"{option} {wanted}: {reference} has {found}, and an engine has what its graph has; pass the "
                "checkpoint as --ckpt instead, to export another graph"
            )
    model = folder / card.file
    require_replaceable(model, card.sha256, replacing=engine)
    write_model(str(folder), card, data)
    return model


def _onnx_of(
    reference: str,
    folder: Path,
    engine: str,
    precision: Precision,
    output: Output,
    max_batch: int,
    parity_images: int,
) -> Path:
    """Return the ONNX file of a checkpoint in `folder`: the existing one if it is the same, else a new export."""
    from export.builders.onnx_model import export_onnx
    from pipeline.checkpoints.reference import load_generator

    graph: ComputePrecision = "fp16" if precision == "fp16" else "fp32"
    name = "model_fp16.onnx" if graph == "fp16" else "model.onnx"
    if (folder / name).exists() and (folder / name).with_suffix(".json").exists():
        card, _ = read_model(str(folder / name))
        wanted = (load_generator(reference).sha256, graph, output, max_batch)
        if (card.source.sha256, card.precision, card.output_kind, card.max_batch) == wanted:
            return folder / name
    require_replaceable(folder / name, None, replacing=engine)
    export_onnx(
        reference,
        folder,
        name=name,
        precision=graph,
        output=output,
        max_batch=max_batch,
        parity_images=parity_images,
    )
    return folder / name


def _build(
    model: Path, engine: Path, precision: Precision, options: BuildOptions, weights: str | None, parity_images: int
) -> Card:
    """Build an engine, compare it, write it, then write its card."""
    from export.format.onnx_file import load_checked

    onnx_card, data = load_checked(str(model))
    # Before the build, which takes minutes: without a reference there is no parity, and the build would be in vain.
    reference = _reference(onnx_card, str(model), weights) if can_run(options.runtime) else None
    serialized, target = build_engine(str(model), onnx_card, data, options)
    card = onnx_card.model_copy(
        update={
            "file": engine.name,
            "sha256": sha256_bytes(serialized),
            "bytes": len(serialized),
            "precision": precision,
            "versions": imported_versions(),
            "processor": processor(),
            "engine": target,
            "parity": [],
        }
    )
    if reference is not None:
        card = card.model_copy(update={"parity": check_parity(card, serialized, str(engine), reference, parity_images)})
    write_model(str(engine.parent), card, serialized)
    return card


def verify_engine(
    engine: str, *, reference: str | None = None, images: int = PARITY_IMAGES
) -> tuple[Card, list[Parity]]:
    """Check card, hash, machine and parity of an engine again. Raises as `open_engine` does."""
    from export.samplers.tensorrt import require_fit

    card, data = read_model(engine)
    require_fit(engine, card)
    return card, check_parity(card, data, engine, find_reference(engine, card, reference), images)


def find_reference(engine: str, card: Card, weights: str | None) -> "Reference":
    """Return the reference that an engine is compared with.

    Raises DataError unless its card agrees with the reference and with the ONNX file beside it.
    """
    from export.builders import parity
    from export.builders.onnx_model import load_source

    assert card.engine is not None
    model = beside(engine, card.engine.onnx)
    store, name = locate(model)
    if store.exists(store.inside(name)):
        return _reference(_onnx_card(engine, card), model, weights)
    return parity.of_generator(load_source(card, weights).generator)


def _onnx_card(engine: str, card: Card) -> Card:
    """Return the card of the ONNX file beside an engine. Raises DataError unless the engine was built from it."""
    from export.format.onnx_file import load_checked

    assert card.engine is not None
    model = beside(engine, card.engine.onnx)
    store, name = locate(model)
    store.inside(name)
    found, _ = load_checked(model)
    if found.sha256 != card.engine.onnx_sha256:
        raise DataError(
            f"{model}: is not the file that {engine} was built from (SHA-256 {found.sha256[:12]}...); export again"
        )
    same = {"network", "input", "label", "output", "max_batch", "source"}
    ours, theirs = card.model_dump(include=same), found.model_dump(include=same)
    ours["precision"], theirs["precision"] = (one.precision.replace("tf32", "fp32") for one in (card, found))
    if wrong := [field for field in {**theirs, **ours} if ours.get(field) != theirs.get(field)]:
        raise DataError(
            f"{engine}: its card differs from that of {model} in {', '.join(wrong)}: it was edited; export again"
        )
    return found


def _reference(onnx_card: Card, model: str, weights: str | None) -> "Reference":
    """Return the generator in PyTorch or, without its weights, the ONNX file, whose parity with it was measured.

    Machines that build engines often have only the ONNX file. If `weights` are given, they must be the right ones.
    """
    from export.builders import parity
    from export.builders.onnx_model import float_runner, load_source
    from pipeline.common.machine import available_threads

    if weights is not None:
        return parity.of_generator(load_source(onnx_card, weights).generator)
    run = float_runner(onnx_card, read_model(model)[1], model, available_threads())
    return parity.Reference(onnx_card.file, onnx_card.network, run)


def check_parity(card: Card, data: bytes, engine: str, reference: "Reference", images: int) -> list[Parity]:
    """Compare the engine with its reference; return the differences. Raises DataError beyond the tolerances."""
    from export.builders import parity
    from export.samplers.tensorrt import TensorRTSampler, open_engine

    candidate = parity.Candidate(
        lambda batch: open_engine(engine, card, data, batch),
        lambda sampler, z: sampler.floats(z) if isinstance(sampler, TensorRTSampler) else None,
    )
    measured = parity.measure(reference, [candidate], max_batch=card.max_batch, images=images, precision=card.precision)
    return parity.require(measured, engine)
