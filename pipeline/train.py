"""Train a DCGAN on shards. Run the same command again to resume where it stopped.

One machine, CPU or one GPU:
    accelerate launch pipeline/train.py --data shards/ --out runs/faces --preset faces
One machine, 8 GPUs, bf16:
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 pipeline/train.py --data ... --out ...
Two CPU processes:
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 pipeline/train.py --data ... --out ...
Two machines with 8 GPUs each, on machine 0 and 1 (in containers: dcgan-launch, which finds the numbers itself):
    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 \\
        --main_process_ip 10.0.0.1 --main_process_port 29500 pipeline/train.py --data ... --out ...
Without accelerate's launcher:
    python pipeline/train.py --data ... --out ...
"""

import ctypes
import logging
import os
import re
import signal
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    # Launchers put pipeline/ itself first on the path, where its modules must not be found as top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer

from pipeline.common.command_line import HELP_OPTIONS, Version, exit_with, plain_app, run_command
from pipeline.common.errors import (
    ConfigConflict,
    DataError,
    TryAgainError,
    UnavailableError,
    UsageError,
    UserError,
    first_line,
)
from pipeline.common.records import parse_json
from pipeline.common.shapes.size import refusal
from pipeline.common.telemetry import MetricsAddress, MetricsPort, PushGateway
from pipeline.config import RunConfig, explain, load_config, preset_names, validate
from pipeline.training.trackers.names import check_trackers

app = plain_app(completion=False)  # a launcher starts this file: there is no command of that name to complete


class Resume(StrEnum):
    """Whether a run that is already there is continued."""

    auto = "auto"
    never = "never"


@app.command(context_settings=HELP_OPTIONS, help=(__doc__ or "").replace("\n\n", "\n\n\b\n", 1))
def main(
    out: Annotated[Path, typer.Option(help="Run directory: checkpoints, samples, metrics.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set made by dcgan-data, or WebDataset tars of others, such as 'tars/train-{0000..0123}.tar'; "
            "paths or URLs. A run that is there knows its own."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of: {', '.join(preset_names())}.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings, over the preset's.")] = None,
    resume: Annotated[
        Resume, typer.Option(help="auto continues the newest checkpoint in --out; never refuses to.")
    ] = Resume.auto,
    allow_change: Annotated[
        str, typer.Option(help="Settings of the run's identity that may differ from its checkpoint, with commas.")
    ] = "",
    init_from: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights that a new run begins from: a run (RUN, RUN@best, RUN@128000), a checkpoint, or the "
            ".safetensors, netG or netD of one network; name it twice for two.",
        ),
    ] = None,
    log_with: Annotated[
        str,
        typer.Option(
            help="Trackers that get losses, quality, grids and settings: tensorboard, wandb, mlflow, with commas."
        ),
    ] = "",
    mirror: Annotated[str | None, typer.Option(help="Object store URL that gets a copy of every checkpoint.")] = None,
    metrics_port: MetricsPort = None,
    metrics_address: MetricsAddress = "127.0.0.1",
    push_gateway: PushGateway = None,
    show_config: Annotated[
        bool,
        typer.Option(
            "--show-config", help="Print all settings with their meaning and choices, as YAML for --config, and exit."
        ),
    ] = False,
    version: Version = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Single settings, such as recipe.batch=64.")
    ] = None,
) -> None:
    """Read the options into a RunConfig and train."""
    settings, data, taken = resolve(out, data, preset, config, overrides or [])
    if show_config:
        from pipeline.model.footprint import in_words

        print(explain(settings))
        cost = in_words(settings.network, settings.recipe.batch, alternate=settings.recipe.alternate)
        print("".join(f"# {line}\n" for line in cost), end="")
        return
    if data is None:
        raise UsageError(
            "--data: missing; expected a data set (make one with dcgan-data build), or the names of WebDataset tars"
        )
    trackers = check_trackers(log_with)
    configure_logging()
    if taken:
        named = " and ".join(f"network.{name}={value}" for name, value in taken.items())
        logging.getLogger("pipeline").info("%s: as the images of the data set", named)
    from pipeline.training.loop import train

    try:
        train(
            settings,
            data=data,
            out=out,
            resume=resume.value,
            init_from=init_from or [],
            allow_change=[name for name in allow_change.split(",") if name],
            mirror=mirror,
            log_with=trackers,
            metrics_port=metrics_port,
            metrics_address=metrics_address,
            push_gateway=push_gateway,
        )
    except RuntimeError as error:
        if lost := lost_peer(error):
            raise TryAgainError(lost) from error
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
            raise UnavailableError(
                f"the device's memory is full ({first_line(error)[:160]}); cut the batch of a process with "
                "runtime.accumulate=2 or more, lower recipe.batch, or use more processes"
            ) from error
        raise


def resolve(
    out: Path, data: str | None, preset: str | None, config: Path | None, overrides: list[str]
) -> tuple[RunConfig, str | None, dict[str, Any]]:
    """Return the settings and the data; without --preset and --config a run that is there keeps its own.

    Size and channels that neither --config nor an override names are those of the data set's images. Also return
    which of them differ from the preset's.
    """
    stored = out / "config.json"
    if preset is not None or config is not None or not stored.is_file():
        of_data = _of_data(data)
        usual = load_config(preset, config, overrides).network if of_data else None
        settings = load_config(preset, config, overrides, of_data=of_data)
        taken = {n: getattr(settings.network, n) for n in of_data if getattr(settings.network, n) != getattr(usual, n)}
        return settings, data, taken
    advice = "name --preset or --config and --data to do without it"
    content = parse_json(stored.read_bytes(), str(stored), hint=advice)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise DataError(f"{stored}: damaged; {advice}")
    settings = validate(content["config"], str(stored))
    if extractor := settings.schedule.extractor:
        from pipeline.evaluation.metrics.extractors import FALLBACK

        if extractor != FALLBACK and not any(re.match(r"(schedule\.)?extractor=", one) for one in overrides):
            raise UsageError(
                f"{stored}: names the extractor {extractor}, which may be a program; name it yourself to use it: "
                f"schedule.extractor={extractor}"
            )
    if data is None:
        from pipeline.training.run_directory import known_location

        data = known_location(out, content)
    return load_config(None, None, overrides, base=settings), data, {}


def _of_data(data: str | None) -> dict[str, Any]:
    """Return the settings that a data set decides; {} for tars of others, and for what the trainer will refuse.

    Raises ConfigConflict when no network makes images of their size.
    """
    from pipeline.data.dataset import open_dataset
    from pipeline.data.specification import is_specification

    if data is None or is_specification(data):
        return {}
    try:
        dataset = open_dataset(data)
    except DataError:
        return {}
    height, width, channels = dataset.image_shape
    if problem := refusal(width, height):
        raise ConfigConflict(f"--data {dataset.location}: {problem}; build the shards again with one of them as --size")
    return {"image_size": dataset.image_size, "channels": channels}


def lost_peer(error: RuntimeError) -> str:
    """Return one line for an error that means that another process is gone, '' for any other."""
    import torch

    text = str(error)
    kinds = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")
    if "Duplicate GPU" in text:  # nothing is lost: this never works
        return ""
    if not isinstance(error, torch.distributed.DistError) and not any(kind in text for kind in kinds):
        return ""
    rank = os.environ.get("RANK", "0")
    return (
        f"rank {rank} lost contact with the other processes ({first_line(error)[:160]}); "
        "run it again on all of them: it resumes from the last checkpoint"
    )


def end_with_accelerate() -> None:
    """Be stopped as well when `accelerate launch` is: it ends at SIGTERM and leaves its trainer behind.

    Linux only. Not for other parents: a shell's end must not stop what it put into the background.
    """
    with suppress(OSError, AttributeError):
        if b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def configure_logging() -> None:
    """Let our own messages through: all of rank 0's, the warnings of the others."""
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == "0" else f"rank {rank}: %(message)s"))
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)


def run() -> None:
    """Run the command line; what every rank would say alike is said once on each machine, which has its own log."""

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to save that comes too early must not end us
    end_with_accelerate()

    def command() -> None:
        try:
            app()
        except UserError as error:
            said_by_all = error.on_all_ranks or isinstance(error, UsageError | ConfigConflict)
            if not said_by_all or os.environ.get("LOCAL_RANK", "0") == "0":
                raise
            exit_with(error.exit_code)
        finally:
            # All is saved and the exit code is decided: a signal that comes twice must not change it.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)

    run_command(command)


if __name__ == "__main__":
    run()
