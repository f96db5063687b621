"""Networks behind published numbers, and when ours may stand beside those: decided by content, not by a file's name."""

from dataclasses import dataclass

from pipeline.common.errors import TryAgainError, UnavailableError, UserError
from pipeline.common.storage import atomic_path, locate, made_directory, sha256_bytes, spare_bytes
from pipeline.data.loading.shard_cache import default_directory


@dataclass(frozen=True)
class PublishedNetwork:
    """A file that everyone can fetch, and the protocol whose numbers it makes."""

    url: str
    sha256: str
    megabytes: int
    protocol: str
    """Whose numbers these are, and what happens to the images."""
    images: int
    """Samples that the protocol counts."""


NETWORKS = {
    "inception": PublishedNetwork(
        url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        megabytes=96,
        protocol=(
            "TensorFlow's Inception of 2015-12-05 as the StyleGAN line runs it: uint8 images of their own size, which "
            "the network resizes itself (bilinear, no antialiasing), all real images, 50,000 samples"
        ),
        images=50_000,
    ),
}
"""What `--extractor` knows by name.

clean-fid runs the same file after a bicubic resize with antialiasing, and torch-fidelity and StudioGAN run other
files: their numbers differ from these by several percent.
"""


def published(sha256: str) -> PublishedNetwork | None:
    """Return the published network with this content, or None."""
    return next((network for network in NETWORKS.values() if network.sha256 == sha256), None)


def why_not_comparable(sha256: str, resize: int | None, samples: int) -> str:
    """Return what keeps a measurement apart from published numbers, '' if nothing does."""
    network = published(sha256)
    if network is None:
        return "the extractor is not the network of published numbers (--extractor inception is)"
    if resize is not None:
        return f"the images were resized to {resize} pixels before the network resizes them (--resize)"
    if samples < network.images:
        return f"{samples:,} samples, where published numbers have {network.images:,} (--count)"
    return ""


def fetch_network(name: str) -> bytes:
    """Return the file of a published network, from the user's cache or from its URL. It is kept if there is room.

    Raises UnavailableError when it cannot be fetched, with what to do.
    """
    network = NETWORKS[name]
    kept = default_directory() / "extractors" / f"{network.sha256}.pt"
    if kept.is_file() and sha256_bytes(data := kept.read_bytes()) == network.sha256:
        return data
    try:
        store, file = locate(network.url)
        if spare_bytes(kept.parent) < network.megabytes * 1_000_000:
            return _checked(store.read(file), network)
        with made_directory(kept.parent), atomic_path(kept) as temporary:
            store.fetch(file, temporary)
            return _checked(temporary.read_bytes(), network)
    except UserError as error:
        raise UnavailableError(
            f"--extractor {name}: cannot fetch it ({error}). Bring {network.url} ({network.megabytes} MB) to this "
            f"machine and name the file: --extractor FILE --extractor-sha256 {network.sha256}"
        ) from None


def _checked(data: bytes, network: PublishedNetwork) -> bytes:
    if sha256_bytes(data) != network.sha256:
        raise TryAgainError("another file came back")
    return data
