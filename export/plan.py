"""A checkpoint or an ONNX file becomes a TensorRT plan with its card; and an old plan a new one."""

from dataclasses import replace
from pathlib import Path

from export.card import Card, ComputePrecision, Output, Parity, Precision, read_card, read_model, versions, write_card
from export.driver import driver_version
from export.tensorrt_engine import BuildOptions, build_plan, require_builder
from pipeline.errors import DataError, UsageError
from pipeline.storage import sha256_bytes, write_atomic

PARITY_IMAGES = 10_000


def export_plan(
    reference: str,
    folder: Path,
    *,
    name: str = "engine.plan",
    precision: Precision = "fp32",
    output: Output = "uint8",
    max_batch: int = 256,
    options: BuildOptions | None = None,
    parity_images: int = PARITY_IMAGES,
) -> Card:
    """Write `folder`/`name` and its card, from a `.onnx` with its card or any form of --ckpt.

    From a checkpoint the ONNX file is made first, in the same folder, unless it is there. Where the plan can
    run, it is compared with PyTorch before it is written. Raises UnavailableError when no plan can be built
    here, DataError when the graph cannot be built or is not equal.
    """
    options = replace(options or BuildOptions(), tf32=precision == "tf32")
    if not name.endswith(".plan"):
        raise UsageError(f"--name {name}: expected a name that ends in .plan")
    if options.runtime == "tensorrt-rtx" and options.timing_cache is not None:
        raise UsageError("--timing-cache: TensorRT-RTX has none, it chooses kernels on the GPU that it later runs on")
    require_builder(options.runtime)  # told before the minutes of an ONNX export
    if reference.endswith(".onnx"):
        model = Path(reference)
        card = read_card(reference)
        if (card.precision == "fp16") != (precision == "fp16"):
            raise UsageError(
                f"--precision {precision}: {reference} is {card.precision}, and a plan has its graph's precision; "
                "name the checkpoint instead, and the ONNX file is made for it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if model.parent.resolve() != folder.resolve():  # a plan keeps the file that it can be rebuilt from beside it
            write_atomic(folder / model.name, read_model(reference)[1])
            write_card(str(folder), card)
            model = folder / model.name
    else:
        model = _onnx_of(reference, folder, precision, output, max_batch, parity_images)
    return _build(model, folder / name, precision, options, parity_images)


def rebuild(plan: str) -> Card:
    """Build `plan` again for this machine from the ONNX file beside it, with the options in its card."""
    card = read_card(plan)
    if card.engine is None:
        raise DataError(f"{plan}: its card names no engine; it was not made by dcgan-export trt")
    path = Path(plan)
    model = path.with_name(card.engine.onnx)
    found = read_card(str(model)).sha256
    if found != card.engine.onnx_sha256:
        raise DataError(f"{model}: is not the file that {plan} was built from (SHA-256 {found[:12]}...); export again")
    options = BuildOptions(card.engine.runtime, card.precision == "tf32", card.engine.optimization_level)
    return _build(model, path, card.precision, options, PARITY_IMAGES)


def rebuild_unless_it_fits(plan: str) -> bool:
    """Rebuild `plan` if it is damaged or belongs to another machine; return whether that was needed."""
    from export.tensorrt_runtime import require_fit

    if not plan.endswith(".plan"):
        raise UsageError(f"--rebuild: {plan} is not a .plan, only engines are built")
    try:
        card, _ = read_model(plan)
        require_fit(plan, card)
    except DataError:
        rebuild(plan)
        return True
    return False


def _onnx_of(
    reference: str, folder: Path, precision: Precision, output: Output, max_batch: int, parity_images: int
) -> Path:
    """Return the ONNX file of a checkpoint in `folder`: the one that is there if it is the same, else a new one."""
    from export.onnx_model import export_onnx
    from pipeline.checkpoint import load_generator

    graph: ComputePrecision = "fp16" if precision == "fp16" else "fp32"
    name = "model_fp16.onnx" if graph == "fp16" else "model.onnx"
    if (folder / name).exists() and (folder / name).with_suffix(".json").exists():
        card, _ = read_model(str(folder / name))
        wanted = (load_generator(reference).sha256, graph, output, max_batch)
        if (card.source.sha256, card.precision, card.output_kind, card.max_batch) == wanted:
            return folder / name
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


def _build(model: Path, plan: Path, precision: Precision, options: BuildOptions, parity_images: int) -> Card:
    """Build, compare, write the plan, then its card."""
    from export.onnx_model import load_checked

    onnx_card, data = load_checked(str(model))
    built, engine = build_plan(str(model), onnx_card, data, options)
    card = onnx_card.model_copy(
        update={
            "file": plan.name,
            "sha256": sha256_bytes(built),
            "bytes": len(built),
            "precision": precision,
            "versions": versions("torch", "onnx", "tensorrt", "tensorrt-rtx-cu13"),
            "engine": engine,
            "parity": [],
        }
    )
    if can_run(card):
        card = card.model_copy(update={"parity": [check_parity(card, built, plan, None, parity_images)]})
    write_atomic(plan, built)
    write_card(str(plan.parent), card)
    return card


def can_run(card: Card) -> bool:
    """Whether a plan that was built here can also run here: TensorRT-RTX builds without a GPU."""
    if driver_version() is None:
        return False
    from export.tensorrt_engine import this_gpu
    from export.tensorrt_runtime import RTX_CAPABILITIES

    return card.engine is not None and (
        card.engine.gpu is not None or this_gpu().compute_capability in RTX_CAPABILITIES
    )


def verify_plan(plan: str, *, reference: str | None = None, images: int = PARITY_IMAGES) -> tuple[Card, Parity]:
    """Check card, hash, machine and parity of a plan again. Raises what `tensorrt_runtime.open_plan` raises."""
    from export.tensorrt_runtime import require_fit

    card, data = read_model(plan)
    require_fit(plan, card)
    return card, check_parity(card, data, Path(plan), reference, images)


def check_parity(card: Card, data: bytes, plan: Path, reference: str | None, images: int) -> Parity:
    """Run the plan beside PyTorch; return how far they are apart. Raises DataError beyond the bars."""
    from export import parity
    from export.onnx_model import load_source
    from export.tensorrt_runtime import TensorRTSampler, open_plan

    proven, compared = parity.measure(
        load_source(card, reference).generator,
        lambda batch: open_plan(str(plan), card, data, batch),
        lambda sampler, z: sampler.floats(z) if isinstance(sampler, TensorRTSampler) else None,
        max_batch=card.max_batch,
        images=images,
        float_bar=parity.FLOAT_BARS[card.precision],
    )
    parity.require(proven, compared, str(plan), plan.with_name(f"{plan.stem}_parity_failure.png"))
    return proven
