"""Write netG_epoch_0.pth as pytorch/examples' dcgan does: the same module names, keys and file name.

python examples_dcgan.py FOLDER [NGF]
"""

import sys
from pathlib import Path

import torch
from torch import nn

NZ, NC = 100, 3


class Generator(nn.Module):
    """64x64 images; its layers live in `main`, as in the example."""

    def __init__(self, ngf: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(NZ, ngf * 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 8),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, NC, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.main(noise)
        return images


def main(folder: Path, ngf: int) -> Path:
    """Initialize, see some noise (so that BatchNorm has statistics), save the state_dict."""
    torch.manual_seed(0)
    generator = Generator(ngf)
    for _ in range(10):
        generator(torch.randn(16, NZ, 1, 1))
    with torch.no_grad():
        generator.get_parameter("main.12.weight").mul_(20)  # full contrast
    path = folder / "netG_epoch_0.pth"
    torch.save(generator.state_dict(), path)
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 64)
