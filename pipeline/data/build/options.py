"""The options of `dcgan-data build` and their defaults, which stand here and nowhere else. Imports nothing heavy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.common.shapes.frame import Fit, Resize
    from pipeline.common.shapes.size import Channels
    from pipeline.data.dataset import Encoding

LARGEST_SEED = 2**64 - 1
DEFAULT_QUALITY = {"packed": 100, "png": 100, "jpg": 95, "webp": 92}
"""`--quality` by encoding; packed and png are lossless."""
DEFAULT_MARGIN = 0.25
"""`--margin` of faces."""
CENTER, WHOLE, FACE = "center", "none", "face"
"""`--crop`: the largest central part, all of the picture, and every face in it."""
DEFAULT_MAX_BAD = 0.01
"""`--max-bad`. Without the option, a damaged source is an error whatever its share of pictures."""


@dataclass(frozen=True)
class BuildOptions:
    """The command line of `dcgan-data build`; its help says what each option does.

    None stands for a default that depends on other options, or for an option that was not given.
    """

    kind: str
    src: str
    out: str
    size: int | str = 64
    channels: "Channels" = 3
    encoding: "Encoding" = "packed"
    quality: int | None = None
    min_side: int = 1
    fit: "Fit" = "crop"
    fill: str = ""
    window: str = ""
    crop: str = ""
    resize: "Resize" = "lanczos"
    all_frames: bool = False
    labels: str | None = None
    all_files: bool = False
    categories: tuple[str, ...] = ()
    source_split: str | None = None
    column: str | None = None
    config: str | None = None
    where: tuple[str, ...] = ()
    limit: int | None = None
    val_fraction: float = 0.0
    seed: int = 0
    shard_bytes: int = 32_000_000
    shard_images: int | None = None
    max_bad: float | None = None
    part: str | None = None
    workers: int | None = None
    overwrite: bool = False
    min_face: int | None = None
    margin: float | None = None
    model: str | None = None
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"
    push_gateway: str | None = None
