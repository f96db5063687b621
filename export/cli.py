"""dcgan-export: exports a checkpoint to an ONNX file or a TensorRT engine, with measured parity and speed."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.common.command_line import command_group, run_command
from pipeline.common.errors import UsageError, escaped, one_line

app = command_group(help="Export a checkpoint to an ONNX file or a TensorRT engine, with measured parity and speed.")


class PrecisionOption(StrEnum):
    """Choices of --precision for ONNX."""

    FP32 = "fp32"
    FP16 = "fp16"


class EnginePrecisionOption(StrEnum):
    """Choices of --precision for engines."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"


class RuntimeOption(StrEnum):
    """Choices of --runtime."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class OutputOption(StrEnum):
    """Choices of --output."""

    UINT8 = "uint8"
    FLOAT = "float"


Ckpt = Annotated[str, typer.Option(help="A run, a checkpoint, or a weights file, also of other DCGANs; path or URL.")]
OptionalCkpt = Annotated[
    str | None, typer.Option(help="The weights that the model was made from. For an engine, default: its ONNX file.")
]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
ParityImages = Annotated[int, typer.Option(min=1, help="Images compared with PyTorch at the largest batch.")]
MaxBatch = Annotated[int, typer.Option(help="Largest batch that the file accepts.")]
Model = Annotated[str, typer.Argument(help="A .onnx file or a .plan engine, with its card beside it.")]


@app.command()
def onnx(
    ckpt: Ckpt,
    out: Out,
    name: Annotated[str, typer.Option(help="File name; the card has the same name with .json.")] = "model.onnx",
    precision: Annotated[
        PrecisionOption, typer.Option(help="Precision of weights and arithmetic.")
    ] = PrecisionOption.FP32,
    output: Annotated[
        OutputOption, typer.Option(help="uint8: NHWC, made in the graph; float: NCHW in [-1, 1].")
    ] = OutputOption.UINT8,
    max_batch: MaxBatch = 256,
    parity_images: ParityImages = 10_000,
) -> None:
    """Export a generator to one ONNX file with a dynamic batch. Fails unless its images equal PyTorch's."""
    from export.builders.onnx_model import export_onnx
    from export.builders.parity import describe

    card = export_onnx(
        ckpt,
        out,
        name=name,
        precision=precision.value,
        output=output.value,
        max_batch=max_batch,
        parity_images=parity_images,
    )
    for proven in card.parity:
        typer.echo(describe(proven))
    typer.echo(f"wrote {out / card.file} ({card.bytes / 1e6:.1f} MB) from {card.source.reference}, and its card")


@app.command()
def trt(
    ckpt: Annotated[str, typer.Option(help="A run, a checkpoint, a weights file, or a .onnx file with its card.")],
    out: Out,
    name: Annotated[str, typer.Option(help="File name; the card has the same name with .json.")] = "engine.plan",
    runtime: Annotated[
        RuntimeOption, typer.Option(help="tensorrt builds for the GPU here; tensorrt-rtx builds without a GPU.")
    ] = RuntimeOption.TENSORRT,
    precision: Annotated[
        EnginePrecisionOption, typer.Option(help="Precision of the arithmetic; tf32 is float32 with TF32 products.")
    ] = (EnginePrecisionOption.FP32),
    output: Annotated[
        OutputOption | None,
        typer.Option(help="uint8 (default): NHWC, made in the graph; float: NCHW in [-1, 1]."),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Largest batch that the file accepts. Default: 256.")] = None,
    optimization_level: Annotated[int, typer.Option(min=0, max=5, help="0 builds fastest, 5 searches longest.")] = 3,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps kernel timings for later builds.")
    ] = None,
    parity_images: ParityImages = 10_000,
) -> None:
    """Build a TensorRT or TensorRT-RTX engine. If it can run here, it is compared with PyTorch before it is written."""
    from export.builders.engine import export_engine
    from export.builders.parity import describe
    from export.builders.tensorrt import BuildOptions

    card = export_engine(
        ckpt,
        out,
        name=name,
        precision=precision.value,
        output=output.value if output else None,
        max_batch=max_batch,
        options=BuildOptions(runtime.value, optimization_level=optimization_level, timing_cache=timing_cache),
        parity_images=parity_images,
    )
    assert card.engine is not None
    typer.echo(
        f"wrote {out / card.file} ({card.bytes / 1e6:.1f} MB, {card.engine.runtime} {card.engine.version}) "
        f"from {card.engine.onnx}, and its card"
    )
    for proven in card.parity:
        typer.echo(describe(proven))
    if not card.parity:
        typer.echo(f"parity not measured: no GPU here runs it; on one that does: dcgan-export verify {out / card.file}")


@app.command()
def triton(
    model: Annotated[str, typer.Option(help="A .onnx file or a .plan engine, with its card beside it.")],
    out: Annotated[Path, typer.Option(help="The model repository, for tritonserver --model-repository.")],
    name: Annotated[str, typer.Option(help="Name of the model in the repository.")] = "dcgan",
    instances: Annotated[int, typer.Option(help="Instances of the model on each GPU.")] = 1,
    queue_delay_microseconds: Annotated[int, typer.Option(help="Longest wait of a request for its batch.")] = 500,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of an ONNX model, over all instances: the server's CPU limit. Default: all of its node.",
        ),
    ] = None,
) -> None:
    """Write a Triton model repository with dynamic batching and warm-up, checked against the model's card."""
    from export.builders.triton import check_config, export_repository
    from export.format.card import read_card

    path = export_repository(
        model,
        out,
        name=name,
        instances=instances,
        max_queue_delay_microseconds=queue_delay_microseconds,
        threads=threads,
    )
    card = read_card(model)
    checked = check_config(path.read_text(), card)
    how = "parsed by Triton's schema, equal to the card" if checked else "not checked: pip install tritonclient grpcio"
    typer.echo(f"wrote {path} ({how}) and {path.parent / '1'}")
    if card.engine:
        typer.echo(one_line(f"serve it on {card.engine.gpu}, with a Triton image of TensorRT {card.engine.version}"))


@app.command()
def verify(model: Model, ckpt: OptionalCkpt = None, parity_images: ParityImages = 10_000) -> None:
    """Verify an exported file: its card, its hash, its graph, and its images against PyTorch's."""
    from export.builders.parity import describe

    if model.endswith(".plan"):
        from export.builders.engine import verify_engine

        card, proven = verify_engine(model, reference=ckpt, images=parity_images)
        what = "the engine fits this machine"
    else:
        from export.builders.onnx_model import verify_onnx

        card, proven = verify_onnx(model, reference=ckpt, images=parity_images)
        what = "the graph is valid"
    typer.echo(f"{model}: card and SHA-256 {card.sha256[:12]}... match, {what}")
    for measured in proven:
        typer.echo(describe(measured))


@app.command()
def publish(
    model: Annotated[str, typer.Option(help="A .onnx file or a .plan engine, with its card beside it; path or URL.")],
    to: Annotated[str, typer.Option(help="Folder or URL (s3://, gs://) to copy both into.")],
) -> None:
    """Copy a model, its card and its speed table to a folder or bucket, after checking the first two."""
    from export.format.card import copy_model
    from export.format.speeds import copy_speeds

    card = copy_model(model, to)
    copy_speeds(model, to)
    typer.echo(f"{to}/{card.file}: {card.bytes:,} bytes, SHA-256 {card.sha256[:12]}...")


@app.command()
def hub(
    ckpt: Ckpt,
    out: Annotated[Path, typer.Option(help="Folder to write, for `hf upload OWNER/NAME FOLDER`.")],
    title: Annotated[str | None, typer.Option(help="Title of the card. Default: DCGAN and the size.")] = None,
    license: Annotated[
        str | None, typer.Option(help="License of the weights, as the Hub names it, such as apache-2.0.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Data set on the Hub that it was trained on; repeatable.")
    ] = None,
    parity_images: ParityImages = 10_000,
) -> None:
    """Write a folder for the Hugging Face Hub: model card, weights, ONNX file, samples. It uploads nothing."""
    from export.hub.folder import write_hub_folder

    card = write_hub_folder(ckpt, out, title=title, license=license, datasets=dataset, parity_images=parity_images)
    typer.echo(f"wrote {out}: README.md, {card.file} ({card.bytes / 1e6:.1f} MB), weights, samples; look at README.md")
    if license is None:
        typer.echo("the card names no license: others may not use the model without one (--license)")
    typer.echo(f"hf upload OWNER/NAME {shlex.quote(str(out))} publishes it")


@app.command()
def explore(
    model: Annotated[str, typer.Option(help="A .onnx file, a TensorRT engine (.plan), or any form of --ckpt.")],
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of the page; 0: the first free one from 7860 on.")
    ] = 0,
    address: Annotated[
        str, typer.Option(help="Address that the page listens on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    backend: Annotated[str, typer.Option(help="auto, openvino, onnxruntime, eager, compiled, ...")] = "auto",
) -> None:
    """Serve a page to play with a model: samples, walks between them, sums of them. Ctrl-C ends it."""
    import tempfile

    from export.explore.serve import serve
    from export.samplers.open import open_sampler

    with open_sampler(model, backend=backend) as sampler, tempfile.TemporaryDirectory(prefix="dcgan-explore-") as files:
        title = one_line(f"{model}: {sampler.model_sha256[:12]}")
        serve(sampler, title, Path(files), address=address, port=port, say=typer.echo)


@app.command()
def inspect(model: Model) -> None:
    """Print input, output, source, versions and parity of an exported file."""
    from export.builders.inspection import describe_model

    for line in describe_model(model):
        typer.echo(escaped(line))


@app.command()
def bench(
    out: Out,
    ckpt: Annotated[str | None, typer.Option(help="A checkpoint to measure in the PyTorch backends.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A .onnx or .plan to measure; repeatable. Default: exported from --ckpt."),
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Measure only this backend; repeatable.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeatable. Default: 1, 8, 64, 256.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds; results are medians over them.")] = 15,
    quick: Annotated[bool, typer.Option("--quick", help="Few short rounds: a first impression in seconds.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure the CPU's backends of one .onnx, and write their speeds beside it for --backend auto.",
        ),
    ] = False,
) -> None:
    """Measure every backend that runs here, in interleaved rounds, against the device's roofline."""
    models, batches = model or [], batch or [1, 8, 64, 256]
    if calibrate:
        from export.benchmark.calibration import calibrate as measure

        if ckpt is not None or backend or len(models) != 1:
            raise UsageError(
                "--calibrate compares the CPU's backends of one file: give one --model, no --ckpt, no --backend"
            )
        for line in measure(out, models[0], batches=batches, rounds=rounds, quick=quick, threads=threads):
            typer.echo(one_line(line))
        return
    from export.benchmark.run import run_benchmark

    run_benchmark(
        out,
        ckpt=ckpt,
        models=models,
        backends=backend or [],
        batches=batches,
        rounds=rounds,
        quick=quick,
        threads=threads,
    )


def main() -> None:
    """Entry point of dcgan-export."""
    run_command(app)


if __name__ == "__main__":
    main()
