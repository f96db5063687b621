"""Numbers that others have published for DCGAN, and when ours may be compared with them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """The numbers of one published measurement."""

    what: str
    values: dict[str, float]
    source: str


MODEL_ZOO = "open-mmlab's model zoo, DCGAN 64x64"
PAPER = "Radford et al. 2015"

SWD_PYRAMID = "mmagic"
"""The pyramid of the numbers in SWD."""
SWD = (
    PublishedResult("CelebA, cropped", {"swd": 23.26, "swd_64": 8.93, "swd_32": 10.53, "swd_16": 50.32}, MODEL_ZOO),
    PublishedResult("LSUN bedroom", {"swd": 58.60, "swd_64": 42.79, "swd_32": 34.55, "swd_16": 98.46}, MODEL_ZOO),
)
MS_SSIM = (
    PublishedResult("CelebA, cropped", {"ms_ssim": 0.2899}, MODEL_ZOO),
    PublishedResult("LSUN bedroom", {"ms_ssim": 0.2095}, MODEL_ZOO),
)
PROBE = (
    PublishedResult("CIFAR-10, D trained on ImageNet-1k, L2-SVM", {"accuracy": 0.828}, f"{PAPER}, table 1"),
    PublishedResult("CIFAR-10, k-means, one layer (Coates & Ng 2011)", {"accuracy": 0.806}, f"{PAPER}, table 1"),
    PublishedResult("CIFAR-10, k-means, three layers (Coates & Ng 2011)", {"accuracy": 0.820}, f"{PAPER}, table 1"),
    PublishedResult("CIFAR-10, view-invariant k-means (Hui 2013)", {"accuracy": 0.819}, f"{PAPER}, table 1"),
    PublishedResult("CIFAR-10, Exemplar CNN (Dosovitskiy et al. 2015)", {"accuracy": 0.843}, f"{PAPER}, table 1"),
    PublishedResult("SVHN, 1,000 labels, D trained on CIFAR-10", {"error": 0.2248}, f"{PAPER}, table 2"),
    PublishedResult("SVHN, 1,000 labels, supervised CNN", {"error": 0.2887}, f"{PAPER}, table 2, validation images"),
)
NEAREST_CLASS = (
    PublishedResult("MNIST, DCGAN, 50,000 samples", {"error": 0.0298}, f"{PAPER}, table 3"),
    PublishedResult("MNIST, DCGAN, 10 million samples", {"error": 0.0148}, f"{PAPER}, table 3"),
    PublishedResult("MNIST, another GAN, 50,000 samples", {"error": 0.0628}, f"{PAPER}, table 3"),
    PublishedResult("MNIST, another GAN, 10 million samples", {"error": 0.0565}, f"{PAPER}, table 3"),
    PublishedResult("MNIST, 50,000 real images", {"error_real": 0.031}, f"{PAPER}, table 3"),
)

PUBLISHED_IMAGES = 16_384
SWD_NOTE = (
    "Compare SWD only of the same pyramid, data set, crop, image size and number of images: smaller sets score higher. "
    "'real against real' compares the two halves of "
    "the real images: a perfect generator would score that in the row 'samples against half', which uses as many "
    "images. Against all real images a perfect generator would score less."
)


def why_not_comparable(pyramid: str, patches: int, directions: int, size: tuple[int, int], images: int) -> str:
    """Return why an SWD of so many samples may not stand beside those in `SWD`, whatever the data set; '' if it may."""
    if pyramid != SWD_PYRAMID:
        return f"published numbers of DCGAN are of another pyramid (--pyramid {SWD_PYRAMID})"
    if (patches, directions) != (128, 512):
        return f"{patches} patches and {directions} directions, where published numbers have 128 and 512"
    if size != (64, 64):
        return "published numbers are of 64x64 pixels"
    if images != PUBLISHED_IMAGES:
        return f"{images:,} images a side, where published numbers have {PUBLISHED_IMAGES:,}"
    return ""


MS_SSIM_IMAGES = 10_000
"""Images that the numbers in MS_SSIM are the mean of, in pairs."""


def why_not_comparable_ms_ssim(size: tuple[int, int], images: int) -> str:
    """Return why an MS-SSIM of so many samples may not stand beside those in `MS_SSIM`; '' if it may."""
    if size != (64, 64):
        return "published numbers are of 64x64 pixels"
    if images < MS_SSIM_IMAGES:
        return f"{images:,} images, where published numbers have {MS_SSIM_IMAGES:,}"
    return ""


MS_SSIM_NOTE = (
    "MS-SSIM of random pairs says how alike the samples are, not how good they are. Compare it with that of the real "
    "images: a value far above it means that the generator repeats itself."
)
