"""RunConfig: everything that decides a training run, typed, validated, and stored beside its results."""

import difflib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.common.division import batch_refusal, ranks_refusal
from pipeline.common.errors import ConfigConflict, UsageError
from pipeline.common.shapes.size import Channels, Stages, between, parse_size, refusal, stages

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200  # a small file with aliases may stand for gigabytes of text
PRESETS = Path(__file__).parent / "presets"

NETWORKS = {
    "dcgan": "pipeline.model.dcgan",
    "residual": "pipeline.model.residual",
}
"""`network.architecture`: the module that holds its `Generator` and `Discriminator`, imported when one is built."""

CONDITIONAL = "pipeline.model.conditional"
"""The module of the networks that read a label, which are built when `network.label` names one."""

LOSSES = {
    "non_saturating": "pipeline.model.losses.non_saturating",
    "hinge": "pipeline.model.losses.hinge",
    "relativistic": "pipeline.model.losses.relativistic",
}
"""`recipe.loss`: the module that holds its `discriminator_loss` and `generator_loss`."""


def one_of(table: dict[str, str]) -> Any:
    """Return the type of a setting whose values are the names in `table`."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"expected one of {', '.join(table)}")
        return name

    return Annotated[str, AfterValidator(check), Field(json_schema_extra={"enum": list(table)})]


AUGMENTATIONS = ("color", "translation", "cutout")
"""The kinds in `recipe.augment`, in the order in which they are applied."""


def _kinds(value: Any) -> str:
    """Return a list of kinds, or their names between commas, in the one order that they are stored in."""
    names = [str(name).strip() for name in (value if isinstance(value, list) else str(value or "").split(","))]
    if unknown := [name for name in names if name not in (*AUGMENTATIONS, "")]:
        raise ValueError(f"no such kind {unknown[0]!r}; expected some of {', '.join(AUGMENTATIONS)}")
    return ",".join(kind for kind in AUGMENTATIONS if kind in names)


def _names(value: Any) -> Any:
    """Return a name, or names between commas, as a list."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


LARGEST_CLASSES = 1000
"""Classes, or combinations of true-or-false labels, that a network can be conditioned on."""


def _trainable(size: int | str) -> int | str:
    """Return a size that the networks can have. Raises ValueError with the two nearest."""
    if problem := refusal(*parse_size(size)):
        raise ValueError(problem)
    return size


MOST_STRETCHED = 8
"""The largest proportion of pictures that images are given back, as width over height or the reverse."""

SWITCH = {True: "on", False: "off"}
"""What YAML makes of `on` and `off`."""


class Section(BaseModel):
    """A group of settings. Unknown keys are refused. Values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def class_titles(label: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Return the classes as people name them: `male+eyeglasses`, `none`; `smiling`, `not smiling`; else the values."""
    if len(label) > 1:
        chosen = ([name for name, bit in zip(label, bits, strict=True) if bit == "1"] for bits in classes)
        return tuple("+".join(names) or "none" for names in chosen)
    if label and {*classes} <= {"false", "true"}:
        return tuple(label[0] if value == "true" else f"not {label[0]}" for value in classes)
    return tuple(classes)


class NetworkConfig(Section):
    """The architecture (section 3 of the paper). Fixed for the life of a run."""

    architecture: one_of(NETWORKS) = "dcgan"  # type: ignore[valid-type]
    """What the networks are built of: `dcgan` is the paper's."""
    image_size: Annotated[between(1, 999_999), AfterValidator(_trainable)] = 64  # type: ignore[valid-type]
    """Pixels: 64 is a square, 96x64 is width x height. Each side is 3 to 7 times the same power of two; 16 to 512."""
    channels: Channels = 3
    """1 for gray, 3 for RGB, 4 for RGBA with the color multiplied by the alpha."""
    width: int = Field(128, ge=4, le=1024)
    """Channels of the largest feature maps; each halving of the size doubles them. 128 is the paper's at 64 px."""
    kernel_size: Literal[4, 5] = 4
    """4 is divisible by the stride and avoids checkerboards; 5 is what the paper's code uses. Only for dcgan."""
    upsampling: Literal["transposed", "bilinear"] = "transposed"
    """Transposed convolution (the paper's), or bilinear resizing followed by a convolution. Only for dcgan."""
    head: Literal["convolution", "average"] = "convolution"
    """D's last layer: one convolution over the last maps, 4x4 (the paper's), or global average pooling."""
    bias: bool = Field(False, exclude_if=lambda chosen: not chosen)
    """Add a bias in layers without BatchNorm (G's last, D's first and last), as some others' do. Only for dcgan."""
    first_batchnorm: Literal["channel", "unit"] = Field("channel", exclude_if=lambda kind: kind == "channel")
    """G's first BatchNorm: one for each channel, or for each unit, as in the authors' code. Only for dcgan."""
    discriminator_norm: Literal["batch", "spectral"] = Field("batch", exclude_if=lambda kind: kind == "batch")
    """What normalizes D: BatchNorm (the paper's), or in its place its weights' spectral norms. Only for dcgan."""
    latent_dim: int = Field(100, ge=1, le=4096)
    """Values in z."""
    latent_distribution: Literal["uniform", "normal"] = "uniform"
    """U(-1, 1) (the paper's), or N(0, 1) (the tutorials')."""
    label: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field((), exclude_if=lambda names: not names)
    """Label of the data set that G and D are conditioned on, or several that are true or false; none by default."""
    conditioning: Literal["projection", "concat"] = Field("projection", exclude_if=lambda kind: kind == "projection")
    """How the networks read the label: a class's own BatchNorm and a projection, or beside every layer's input."""
    classes: tuple[str, ...] = Field((), max_length=LARGEST_CLASSES, exclude_if=lambda names: not names)
    """The label's values in the order in which the networks have them. A run takes them from its data set."""
    class_images: tuple[int, ...] = Field((), max_length=LARGEST_CLASSES, exclude_if=lambda counts: not counts)
    """Images of each class in the training set. A run counts them."""
    aspect: float | None = Field(None, ge=1 / MOST_STRETCHED, le=MOST_STRETCHED, exclude_if=lambda value: value is None)
    """Width over height of the pictures that were stretched to image_size. A run takes it from its data set."""

    @model_validator(mode="after")
    def _classes_belong_to_the_label(self) -> "NetworkConfig":
        if not self.label:
            if self.classes or self.class_images or self.conditioning != "projection":
                raise ValueError("classes and conditioning belong to network.label, which is not set")
            return self
        if len({*self.label}) < len(self.label) or len({*self.classes}) < len(self.classes):
            raise ValueError("a name in network.label or network.classes stands there twice")
        if len(self.label) > 1 and any(len(c) != len(self.label) or {*c} - {*"01"} for c in self.classes):
            raise ValueError(f"network.classes: expected a 0 or 1 for each of the {len(self.label)} labels")
        if self.class_images and (len(self.class_images) != len(self.classes) or min(self.class_images) < 1):
            raise ValueError("network.class_images: expected a number above 0 for each of network.classes")
        return self

    @property
    def label_dim(self) -> int:
        """Values that the networks read of a label: one for each class, or for each of several labels."""
        return len(self.label) if len(self.label) > 1 else len(self.classes)

    @property
    def class_titles(self) -> tuple[str, ...]:
        """The classes as people name them."""
        return class_titles(self.label, self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        width, height = parse_size(self.image_size)
        return height, width, self.channels

    @property
    def stages(self) -> Stages:
        """The smallest maps of both networks, and how often they are doubled."""
        found = stages(*parse_size(self.image_size))
        assert found is not None  # validated
        return found


class RecipeConfig(Section):
    """What decides the result of training. Fixed for the life of a run, unless `--allow-change` names it."""

    seed: int = Field(0, ge=0, lt=2**64)
    """Decides the weights, the order of images and every z."""
    streams: int = Field(16, ge=1, le=65536)
    """Independent streams of images. The number of processes must divide it, and it must divide the batch."""
    mix_shards: int = Field(0, ge=0, le=1024)
    """Shards that a stream draws from at once; more mend an order that is sorted by class. 0 chooses by the data."""
    batch: int = Field(128, ge=1)
    """Images in one update, over all processes together."""
    loss: one_of(LOSSES) = "non_saturating"  # type: ignore[valid-type]
    """What the networks minimize: `non_saturating` is the paper's."""
    learning_rate_g: float = Field(2e-4, gt=0)
    """Adam's step size for the generator."""
    learning_rate_d: float = Field(2e-4, gt=0)
    """Adam's step size for the discriminator."""
    beta1: float = Field(0.5, ge=0, lt=1)
    """Adam's decay of the first moment (section 3.1 of the paper)."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Adam's decay of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """What of each weight Adam adds to its gradient (L2); 1e-5 in the code of the paper's authors, for all weights."""
    alternate: bool = False
    """Update G and D in turn, each on new images and z, as the authors' code: half the updates of as many images."""
    ema_half_life_images: int = Field(10_000, ge=1)
    """Half-life of G's exponential moving average, in images."""
    ema_ramp_up: float = Field(0.05, gt=0)
    """The half-life is at most this share of the images seen, so that the first noise is forgotten."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over all processes (CUDA only). Wanted when a rank has fewer than 16 images."""
    tf32: bool = True
    """In float32 on CUDA, convolutions round their inputs to TF32 (10 bits), which tensor cores need."""
    r1: float = Field(0.0, ge=0)
    """gamma of the gradient penalty on real images (R1); 0 is off, and the paper's."""
    r2: float = Field(0.0, ge=0)
    """gamma of the gradient penalty on fake images (R2); 0 is off, and the paper's."""
    penalty_interval: int = Field(1, ge=1)
    """Updates from one with gradient penalties to the next. They weigh as many times more."""
    flips: bool = False
    """Mirror half of the real images, left to right; an image may be mirrored in one epoch and not in the next."""
    freeze_d: int = Field(0, ge=0)
    """Stages of D, from the image on, whose weights stay as they began; for --init-from with few images (FreezeD)."""
    augment: Annotated[str, BeforeValidator(_kinds)] = ""
    """What D sees changed at random, real or fake (DiffAugment): some of color,translation,cutout; none by default."""


class ScheduleConfig(Section):
    """Length of the run and the interval of each periodic task, in images. Free to change on resume."""

    total_images: int = Field(2_000_000, ge=1)
    """Length of the run in real images, rounded up to whole batches."""
    log_every_images: int = Field(6_400, ge=1)
    """Images between two log boundaries: metrics, the progress line. Whole batches."""
    grid_every_images: int = Field(64_000, ge=1)
    """Images between two grids of the same 64 samples. Rounded up to a log boundary."""
    checkpoint_every_images: int = Field(128_000, ge=1)
    """Images between two checkpoints. Rounded up to a log boundary."""
    checkpoint_minutes: float = Field(0, ge=0)
    """Also save when this many minutes have passed since the last checkpoint; 0 turns this off."""
    evaluate_every_images: int = Field(256_000, ge=1)
    """Images between two evaluations (SWD, MS-SSIM), which choose the best checkpoint. Rounded up to a log boundary."""
    evaluate_samples: int = Field(2_048, ge=64)
    """Images generated for an evaluation, compared with as many real ones."""
    extractor: str = ""
    """Also measure FID and KID with an extractor: inception, a path, or a URL with its SHA-256 (`dcgan-eval fid`)."""
    extractor_sha256: str = ""
    """SHA-256 of the extractor's file."""
    best_metric: Literal["swd", "fid", "kid_x1000"] = "swd"
    """The checkpoint with the smallest value of this metric is kept as the best."""
    keep_checkpoints: int = Field(3, ge=1)
    """Number of newest checkpoints to keep, besides the best."""
    on_collapse: Literal["warn", "stop", "revert"] = Field("warn", exclude_if=lambda chosen: chosen == "warn")
    """What a run does that has fallen apart: say so; end with code 79; or go back to its best weights, more slowly."""
    overhead_share: float = Field(0.05, gt=0, le=1)
    """Share of the time that grids, evaluations and checkpoints may stop training for; 1 keeps to their intervals."""


class RuntimeConfig(Section):
    """How the work is done. Nothing here changes what is learned, beyond rounding. Free to change on resume."""

    accumulate: int = Field(1, ge=1)
    """Number of micro-batches that a rank's share of the batch is cut into, each with its own BatchNorm statistics."""
    channels_last: bool = True
    """Memory order of the feature maps: 1.1-1.3 times as fast on CPU, needed by tensor cores."""
    fused_optimizer: bool = True
    """One kernel for all of Adam's work."""
    compile: bool = False
    """torch.compile both networks: a minute of waiting, then 1.0-1.1 times as fast on CPU."""
    graph: Annotated[Literal["auto", "off", "on"], BeforeValidator(lambda value: SWITCH.get(value, value))] = "auto"
    """Run an update as one CUDA graph, which frees the GPU from the host. auto: where that is possible."""
    compress_gradients: bool = False
    """Add the gradients of several processes in bfloat16: half the traffic, some of the precision."""
    loader_threads: int = Field(2, ge=1, le=256)
    """Threads in each process that decode jpg, webp or png. Packed shards need none."""
    lookahead_mb: int = Field(1_024, ge=0, le=1 << 24)
    """MiB of shards that each machine reads ahead of training, over its processes; each reads at least one ahead."""
    data: Literal["auto", "stream", "device"] = "auto"
    """Whether the whole set is first loaded into the device's memory; auto: on a GPU, where it fits and pays."""
    step_timeout_seconds: float = Field(60, ge=0)
    """With several processes, exit when a step takes longer and no rank waits for data. 0 waits forever."""


class RunConfig(Section):
    """A whole run. `identity` is what a resumed run must share with its checkpoint."""

    network: NetworkConfig = NetworkConfig()
    recipe: RecipeConfig = RecipeConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    IDENTITY: ClassVar[tuple[str, ...]] = ("network", "recipe")

    @model_validator(mode="after")
    def _best_metric_is_measured(self) -> "RunConfig":
        schedule = self.schedule
        if schedule.best_metric != "swd" and not schedule.extractor:
            raise ValueError(
                f"schedule.best_metric={schedule.best_metric} needs schedule.extractor: the path or URL of an extractor"
            )
        return self

    @model_validator(mode="after")
    def _streams_divide_batch(self) -> "RunConfig":
        if refusal := batch_refusal(self.recipe.batch, self.recipe.streams):
            raise ValueError(refusal)
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide what is learned, as {"section.key": value}."""
        sections = {name: getattr(self, name) for name in self.IDENTITY}
        settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section}
        for name in ("network.class_images", "network.aspect"):
            del settings[name]  # they follow from the data, which has a fingerprint
        return settings

    def check_processes(self, num_processes: int) -> None:
        """Raise ConfigConflict unless batch, streams and accumulation divide over `num_processes` ranks."""
        batch, micro_batches = self.recipe.batch, self.runtime.accumulate
        if refusal := ranks_refusal(num_processes, self.recipe.streams):
            raise ConfigConflict(refusal)
        if (batch // num_processes) % micro_batches:
            raise ConfigConflict(
                f"runtime.accumulate={micro_batches} does not divide the {batch // num_processes} images of a process "
                f"(recipe.batch={batch} over {num_processes})"
            )


def explain(config: RunConfig) -> str:
    """Return the settings as YAML that `--config` reads, each with its meaning and its choices as a comment."""
    lines: list[str] = []
    for name, section in config:
        lines += [f"# {type(section).__doc__}", f"{name}:"]
        properties = type(section).model_json_schema()["properties"]
        for key, value in section:
            schema = properties[key]
            choices = f" One of: {', '.join(map(str, schema['enum']))}." if "enum" in schema else ""
            lines += [f"  # {schema['description']}{choices}", f"  {key}: {json.dumps(value)}"]
    return "\n".join(lines)


def _leaves() -> dict[str, str]:
    """Map every accepted spelling of a key (`section.key`, and `key` alone) to `section.key`."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    full = [f"{s}.{k}" for s, model in sections.items() for k in model.model_fields]  # type: ignore[union-attr]
    return {spelling: name for name in full for spelling in (name, name.split(".")[1])}


def preset_names() -> list[str]:
    """Return the names that `--preset` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: list[str] | None = None,
    *,
    base: RunConfig | None = None,
    of_data: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Return a validated RunConfig: `base` or defaults, then the preset, the file, and `key=value` overrides.

    `of_data` are settings of the network that the data set decides, unless the file or an override names them.
    Raises UsageError that names the file or override, the key, and the nearest valid one.
    """
    merged: dict[str, dict[str, Any]] = base.model_dump() if base is not None else {}
    if preset is not None:
        if preset not in preset_names():
            raise UsageError(f"--preset {preset}: no such preset{_nearest(preset, preset_names())}")
        _merge(merged, PRESETS / f"{preset}.yaml", f"preset {preset}")
    merged.setdefault("network", {}).update(of_data or {})
    if file is not None:
        _merge(merged, file, f"--config {file}")
    keys = _leaves()
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"{override!r} is not an override: expected key=value, such as recipe.batch=64")
        if key not in keys:
            raise UsageError(f"{override}: no such key {key!r}{_nearest(key, list(keys))}")
        section, leaf = keys[key].split(".")
        merged.setdefault(section, {})[leaf] = _scalar(text, override)
    return validate(merged, "the configuration")


def validate(values: dict[str, Any], origin: str) -> RunConfig:
    """Return `values` as a RunConfig, or raise UsageError with every problem on one line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{origin}: {'; '.join(_explain(e) for e in error.errors())}") from None


def _explain(error: Any) -> str:
    """Put one pydantic error into words that name the key, what was found and what was expected."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"no such key {key!r}{_nearest(key, list(_leaves()))}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={_REPR.repr(error['input'])}: {message[0].lower()}{message[1:]}" if key else message


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loader would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"it names {twice!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """Return what YAML `text` holds. Raises ValueError."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _scalar(text: str, origin: str) -> Any:
    try:
        return _load_yaml(text)
    except ValueError:
        raise UsageError(f"{origin}: {text!r} is not a YAML value") from None


def _merge(into: dict[str, dict[str, Any]], path: Path, origin: str) -> None:
    try:
        loaded = _load_yaml(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{origin}: cannot be read as YAML: {error}") from None
    for section, values in (loaded or {}).items() if isinstance(loaded, dict | None) else [("", None)]:
        if section not in RunConfig.model_fields or not isinstance(values, dict):
            raise UsageError(f"{origin}: {section!r} is not one of the sections {', '.join(RunConfig.model_fields)}")
        into.setdefault(section, {}).update(values)
