"""README.md of a model on the Hub: its metadata, what it is, how it was measured, and code that samples from it."""

from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.common.errors import escaped
from pipeline.common.randomness import Purpose
from pipeline.config import NetworkConfig

LIBRARY = "dcgan-pipeline"
TASK = "unconditional-image-generation"
METRIC_NAMES = {"swd": "SWD × 1000", "ms_ssim": "MS-SSIM of samples", "fid": "FID", "kid_x1000": "KID × 1000"}
PROTOCOLS = {
    "swd": "sliced Wasserstein distance of patches over a Laplacian pyramid, mean of its levels; fewer patches and "
    "directions than published, so it compares checkpoints of this library only",
    "ms_ssim": "mean MS-SSIM of pairs of samples; the nearer to that of the real images, the better",
    "fid": "by the feature network that training named; not a published number unless that was Inception",
    "kid_x1000": "by the feature network that training named; not a published number unless that was Inception",
}
EXAMPLE_IMAGES = 64


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of how its weights came about. All of it is text and numbers for people."""

    data: str
    """Name of the data set."""
    images: int
    """Images in it."""
    metrics: dict[str, float]
    """Measured at this checkpoint, by name."""
    samples: int
    """Samples that they were measured on."""


def model_card(
    network: NetworkConfig,
    *,
    title: str,
    license: str | None,
    datasets: list[str],
    images_seen: int | None,
    sha256: str,
    training: Training | None,
) -> str:
    """Return the text of README.md. `sha256` is that of the weights file."""
    height, width, channels = network.image_shape
    seen = f"{images_seen:,} images seen in training" if images_seen else "images seen in training: not recorded"
    lines = [f"# {escaped(title)}", "", "![Samples, not selected](samples.png)", ""]
    kind = "A conditional DCGAN" if network.label else "A DCGAN"
    lines += [
        f"{kind} ([Radford et al. 2015](https://arxiv.org/abs/1511.06434)) that makes images of {width}x{height} "
        f"pixels with {channels} channel{'s' if channels > 1 else ''} from {network.latent_dim} random numbers.",
        "",
        "| file | what it is |",
        "|---|---|",
        f"| `generator.safetensors` | weights of the generator; {seen}; SHA-256 `{sha256}` |",
        "| `model.onnx` | the same as one ONNX file: `z` float32 (batch, "
        f"{network.latent_dim}) to `image` uint8 (batch, {height}, {width}, {channels}) |",
        "| `model.json` | its card: versions, hashes, and how far its images are from PyTorch's |",
        "| `samples.png` | samples, not selected |",
        "",
        "## Use",
        "With onnxruntime, numpy and pillow:",
        "",
        "```python",
        example(network).rstrip(),
        "```",
        "",
    ]
    if network.label:
        titles = ", ".join(escaped(name) for name in network.class_titles)
        lines += [
            f"It is conditioned on {', '.join(map(escaped, network.label))}; the classes, from 0 on: {titles}.",
            "",
        ]
    if training is not None:
        lines += ["## Training", f"On {training.images:,} images of `{escaped(training.data)}`.", ""]
        if training.metrics:
            lines += ["| metric | value | protocol |", "|---|---|---|"]
            lines += [
                f"| {METRIC_NAMES[name]} | {value:.4g} | {training.samples:,} samples of the averaged weights; "
                f"{PROTOCOLS[name]} |"
                for name, value in training.metrics.items()
            ]
            lines += [""]
    metadata = _metadata(network, license, datasets, training, title)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1_000)
    return f"---\n{front}---\n\n" + "\n".join(lines)


def _metadata(
    network: NetworkConfig, license: str | None, datasets: list[str], training: Training | None, title: str
) -> dict[str, Any]:
    """Return the Hub's metadata, in the order of its documentation."""
    metadata: dict[str, Any] = {"license": license} if license else {}
    metadata |= {"library_name": LIBRARY, "pipeline_tag": TASK}
    metadata["tags"] = ["dcgan", "gan", "onnx", "image-generation", *(["class-conditional"] if network.label else [])]
    if datasets:
        metadata["datasets"] = datasets
    if training is None or not training.metrics:
        return metadata
    metadata["metrics"] = list(training.metrics)
    name = datasets[0] if datasets else escaped(training.data)
    results = [
        {
            "type": metric,
            "name": METRIC_NAMES[metric],
            "value": round(value, 6),
            "args": {"samples": training.samples, "protocol": PROTOCOLS[metric]},
        }
        for metric, value in training.metrics.items()
    ]
    task = {"type": TASK, "name": "Image generation"}
    entry = {"task": task, "dataset": {"type": name, "name": name}, "metrics": results}
    metadata["model-index"] = [{"name": escaped(title), "results": [entry]}]
    return metadata


def example(network: NetworkConfig) -> str:
    """Return ten lines of Python that make the first images of seed 0 with onnxruntime, numpy and pillow alone.

    z is that of `pipeline.model.latents`: the same images as `dcgan-generate --backend onnxruntime`, of a conditional
    model those of its first class.
    """
    dim, words = network.latent_dim, -(-network.latent_dim // 4) * 4
    normal = network.latent_distribution == "normal"
    unit = f"((bits[:, :{dim}] >> np.uint64(11)) + 0.5) * 2.0**-{53 if normal else 52}"
    z = f"np.vectorize(NormalDist().inv_cdf)({unit})" if normal else f"{unit} - 1.0"
    label = ""
    if len(network.label) > 1:
        label = f', "label": np.zeros((count, {len(network.label)}), np.float32)'
    elif network.label:
        label = ', "label": np.zeros(count, np.int64)'
    return (
        ("from statistics import NormalDist\n\n" if normal else "")
        + "import numpy as np\nimport onnxruntime\nfrom PIL import Image\n\n"
        + f"seed, count = 0, {EXAMPLE_IMAGES}\n"
        + f"bits = np.random.Philox(key=np.array([seed, {int(Purpose.SAMPLE)}], np.uint64)).random_raw(count * {words})"
        + ".reshape(count, -1)\n"
        + f"z = {z}\n"
        + 'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
        + f'images = session.run(["image"], {{"z": z.astype(np.float32){label}}})[0]\n'
        + "for index, image in enumerate(images):\n"
        + '    Image.fromarray(image.squeeze()).save(f"{index:06d}.png")\n'
    )
