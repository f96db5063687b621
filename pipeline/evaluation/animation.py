"""`dcgan-eval walk` and `progress`: moving pictures of a way through latent space, and of a run over its training."""

import io
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.common.errors import DataError, UnavailableError, UsageError
from pipeline.common.imaging import BadImage, Pixels, decode, grid
from pipeline.common.storage import Store
from pipeline.evaluation import inputs
from pipeline.evaluation.paper.sample_pool import images_with_progress
from pipeline.evaluation.paper.walks import Z, draw, spherical
from pipeline.evaluation.results import Result
from pipeline.model.labels import named_label

Format = Literal["webp", "gif", "mp4"]

MOST_FRAMES = 600
QUALITY = 80
CRF = "18"
"""The rate factor of H.264, from 0, without loss, to 51; 18 looks the same."""
LAST_SECONDS = 2.0
"""How long the last grid of a run stays before the animation begins anew."""


def animate(frames: Sequence[Pixels], format: Format, seconds: Sequence[float]) -> bytes:
    """Return frames (H, W, 1 or 3), each shown for its seconds, as one file. WebP and GIF repeat for ever.

    Raises UnavailableError for mp4 without PyAV.
    """
    if format == "mp4":
        return _film(frames, seconds)
    pictures = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).convert("RGB") for frame in frames]
    options: dict[str, Any] = {"quality": QUALITY, "method": 4} if format == "webp" else {"optimize": False}
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format.upper(),
        save_all=True,
        append_images=pictures[1:],
        duration=[round(1000 * each) for each in seconds],
        loop=0,
        **options,
    )
    return buffer.getvalue()


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UnavailableError(f"--format mp4 needs PyAV ({error}): pip install 'dcgan-pipeline[mp4]'") from None
    return av


def _film(frames: Sequence[Pixels], seconds: Sequence[float]) -> bytes:
    av = _pyav()
    unit = Fraction(1, 1000)  # of time stamps, in seconds
    height, width = (side + side % 2 for side in frames[0].shape[:2])  # 4:2:0 wants even sides
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1 / seconds[0]).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base, stream.options = unit, {"crf": CRF}
        starts = np.cumsum([0.0, *seconds])
        for frame, start in zip((*frames, frames[-1]), starts, strict=True):  # the last again: where its time ends
            padded = np.pad(frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), "edge")
            picture = av.VideoFrame.from_ndarray(np.broadcast_to(padded, (height, width, 3)).copy(), format="rgb24")
            picture.pts, picture.time_base = round(1000 * start), unit
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def closed_walk(stops: Z, steps: int) -> Z:
    """Return the points (stops * steps, dim) of a walk along the sphere from stop to stop, and back to the first."""
    legs = zip(stops, np.roll(stops, -1, axis=0), strict=True)
    return np.concatenate([spherical(a, b, steps + 1)[:-1] for a, b in legs])


def run_walk(
    out: Path,
    *,
    ckpt: str,
    format: Format,
    rows: int,
    columns: int,
    stops: int,
    steps: int,
    frames_per_second: float,
    scale: int,
    seed: int,
    label: str | None = None,
) -> dict[str, float]:
    """Write walk.json and walk.FORMAT: `rows` times `columns` walks at once, each through `stops` random z and back.

    A walk of a conditional generator keeps one of the classes of `label`, such as `3,5,8`, by default of all: the
    first walk the first, and so on. Raises UsageError for a class that it does not have, and for a `label` of another
    generator.
    """
    frames = stops * steps
    if frames > MOST_FRAMES:
        raise UsageError(f"--stops {stops} --steps {steps}: {frames} frames; expected at most {MOST_FRAMES}")
    if format == "mp4":
        _pyav()  # before the work
    loaded, subject = inputs.any_generator(ckpt)
    names = list(islice(cycle(inputs.class_names(ckpt, loaded.config, label)), rows * columns))
    values = [named_label(loaded.config, name, "--label") for name in names]
    settings = {"walks": rows * columns, "stops": stops, "steps": steps, "seed": seed}
    kept: dict[str, Any] = {"classes": list(dict.fromkeys(names))} if names else {}
    result = Result("walk", out, subject, settings=settings | kept)
    ends = draw(loaded.config, seed, 0, rows * columns * stops).reshape(rows * columns, stops, -1)
    ways = np.stack([closed_walk(each, steps) for each in ends], 1)  # (frames, walks, dim)
    labels = [np.tile(values, (frames, 1))] if values else []
    images = images_with_progress(loaded.generator, ways.reshape(-1, ways.shape[-1]), "walking", *labels)
    images = images.reshape(frames, rows * columns, *images.shape[1:]).repeat(scale, 2).repeat(scale, 3)
    sheets = [grid(frame, columns, gap=2) for frame in images]
    caption = f"{rows * columns} walks along the sphere, each through {stops} random z and back to the first"
    caption += f", in turn of {', '.join(dict.fromkeys(names))}" if names else ""
    result.animation(animate(sheets, format, [1 / frames_per_second] * frames), format, caption)
    result.write({"frames": frames}, summary=f"{caption}: {frames} frames.")
    return {"frames": frames}


def run_progress(out: Path, *, run: Path, format: Format, frames_per_second: float) -> dict[str, float]:
    """Write progress.json and progress.FORMAT: the grids that a run left in RUN/samples, in their order.

    Raises DataError when there are fewer than two, or one cannot be read.
    """
    store = Store(run)
    names = [name for name in store.names("samples") if re.fullmatch(r"[0-9]{1,15}\.png", name)]
    if len(names) < 2:
        raise DataError(f"{run / 'samples'}: {len(names)} grids; expected at least 2 (schedule.grid_every_images)")
    names = [names[place] for place in np.unique(np.linspace(0, len(names) - 1, MOST_FRAMES).round().astype(int))]
    frames = []
    for name in names:
        try:
            frames.append(decode(store.read(store.inside(f"samples/{name}"))))
        except BadImage as error:
            raise DataError(f"{run / 'samples' / name}: {error}; remove it") from None
        if frames[-1].shape != frames[0].shape:
            raise DataError(f"{run / 'samples' / name}: of another size than the first grid; remove it")
    seconds = [1 / frames_per_second] * (len(frames) - 1) + [LAST_SECONDS]
    first, last = int(names[0][:-4]), int(names[-1][:-4])
    result = Result("progress", out, {"kind": "run", "source": run.resolve().name})
    caption = f"The same 64 samples, from {first:,} to {last:,} images of training"
    result.animation(animate(frames, format, seconds), format, caption)
    result.write({"frames": len(frames), "first": first, "last": last}, summary=f"{caption}: {len(frames)} grids.")
    return {"frames": len(frames)}
