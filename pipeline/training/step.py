"""One adversarial update: the paper's semantics, arranged for speed (docs/architecture.md, "The adversarial step")."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.model.ema import EMA
from pipeline.model.losses import load_loss
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.model.sampling import to_float

if TYPE_CHECKING:
    from accelerate import Accelerator

STATISTICS = (
    "loss_d",
    "loss_g",
    "d_real",
    "d_fake",
    "grad_norm_d",
    "grad_norm_g",
    "nonfinite",
    "skipped",
    "deviation_real",
    "deviation_fake",
)
"""What a step returns, in this order."""


class AdversarialStep:
    """Both networks, their optimizers and the EMA; calling it does one update on one global batch."""

    def __init__(self, config: RunConfig, accelerator: "Accelerator") -> None:
        recipe, runtime = config.recipe, config.runtime
        self.accelerator = accelerator
        self.device = accelerator.device
        self.batch = recipe.batch
        self.loss = load_loss(recipe.loss)
        self.micro_batches = runtime.accumulate
        self.memory_format = torch.channels_last if runtime.channels_last else torch.contiguous_format

        self.generator = build_generator(config.network)
        self.discriminator = build_discriminator(config.network)
        self.dtype = next(self.generator.parameters()).dtype
        initialize(self.generator, recipe.seed, lane=0)
        initialize(self.discriminator, recipe.seed, lane=1)
        # The order matters: the average copies plain modules, compiling wraps nothing, DDP comes last.
        for network in (self.generator, self.discriminator):
            network.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.ema = EMA(self.generator, recipe.ema_half_life_images, recipe.ema_ramp_up)
        if recipe.sync_batchnorm and accelerator.num_processes > 1:
            for network in (self.generator, self.discriminator):
                nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        if runtime.compile:
            self.generator.compile()
            self.discriminator.compile()

        betas, fused = (recipe.beta1, recipe.beta2), runtime.fused_optimizer
        optimizer_g = torch.optim.Adam(self.generator.parameters(), recipe.learning_rate_g, betas, fused=fused)
        optimizer_d = torch.optim.Adam(self.discriminator.parameters(), recipe.learning_rate_d, betas, fused=fused)
        self.mask_nonfinite = fused and accelerator.scaler is None
        # Prepared apart: each network has a reducer of its own.
        self._ddp_g, self.optimizer_g = accelerator.prepare(self.generator, optimizer_g)
        self._ddp_d, self.optimizer_d = accelerator.prepare(self.discriminator, optimizer_d)

    def __call__(self, reals: NDArray[np.uint8], z: NDArray[np.float32], images_seen: int) -> Tensor:
        """Update D, then G, then the average, on this rank's share of a global batch.

        reals (n, size, size, channels) uint8; z (n, latent_dim) float32; `images_seen` counts this batch too.
        Returns the means over this rank's share, float32 of shape (len(STATISTICS),), left on the device.
        """
        real_micro_batches = self.to_device(reals).chunk(self.micro_batches)
        z_micro_batches = self._upload(z).to(self.dtype).chunk(self.micro_batches)
        fakes: list[Tensor] = []
        outputs: list[Tensor] = []

        for index, (real, z_micro_batch) in enumerate(zip(real_micro_batches, z_micro_batches, strict=True)):
            fake = self._fake(z_micro_batch)  # (n / micro_batches, channels, size, size) in [-1, 1]
            with self._reduce_only_last(self._ddp_d, index):
                real_logits, fake_logits = self._ddp_d(real), self._ddp_d(fake.detach())
                loss_d = self.loss.discriminator_loss(real_logits, fake_logits)
                self.accelerator.backward(loss_d / self.micro_batches)
            fakes.append(fake)
            with torch.no_grad():
                outputs.append(
                    torch.stack(
                        [
                            loss_d.detach(),
                            real_logits.sigmoid().mean(),
                            fake_logits.sigmoid().mean(),
                            deviation(real),
                            deviation(fake),
                        ]
                    )
                )
        norm_d, bad_d = self._apply(self.optimizer_d, self.discriminator)

        losses_g: list[Tensor] = []
        self.discriminator.requires_grad_(False)  # its weights' gradients would be 8 % of the step's work
        for index, z_micro_batch in enumerate(z_micro_batches):
            with self._reduce_only_last(self._ddp_g, index):
                fake = fakes[0] if self.micro_batches == 1 else self._ddp_g(z_micro_batch)
                loss_g = self.loss.generator_loss(self.discriminator(fake))  # without D's reducer
                self.accelerator.backward(loss_g / self.micro_batches)
            losses_g.append(loss_g.detach())
        self.discriminator.requires_grad_(True)
        norm_g, bad_g = self._apply(self.optimizer_g, self.generator)
        self.ema.update(self.generator, images_seen, self.batch)

        loss_d_mean, d_real, d_fake, deviation_real, deviation_fake = torch.stack(outputs).mean(0).unbind()
        loss_g_mean = torch.stack(losses_g).mean()
        bad, broken = torch.maximum(bad_d, bad_g), ~torch.isfinite(loss_d_mean + loss_g_mean)
        # A scaler's overflows are its ordinary search for a scale: updates that it skips, until it skips all.
        lost = (bad, torch.zeros_like(bad)) if self.accelerator.scaler is None else (broken, bad)
        values = (loss_d_mean, loss_g_mean, d_real, d_fake, norm_d, norm_g, *lost, deviation_real, deviation_fake)
        return torch.stack([value.detach().float() for value in values])

    def to_device(self, images: NDArray[np.uint8]) -> Tensor:
        """Return uint8 (n, size, size, channels) images as float (n, channels, size, size) in [-1, 1]."""
        return to_float(self._upload(images), self.dtype, self.memory_format)

    @torch.no_grad()
    def weights_finite(self) -> Tensor:
        """Return whether all weights of both networks are finite: a scalar, 1 or 0, left on the device."""
        weights = [*self.generator.parameters(), *self.discriminator.parameters()]
        return torch.isfinite(nn.utils.get_total_norm(weights)).float()

    def _upload(self, array: NDArray[Any]) -> Tensor:
        """Copy to the device without making the host wait, which takes pinned memory: the loader's is, z's is not."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()  # its allocator keeps the memory until the copy is done
        return tensor.to(self.device, non_blocking=True)

    def _fake(self, z: Tensor) -> Tensor:
        """Return the fake batch that both updates share, as in dcgan.torch and the tutorials.

        Accumulation keeps no graphs: micro-batches are made again for G's update, from the same z and weights.
        """
        if self.micro_batches == 1:
            shared: Tensor = self._ddp_g(z)
            return shared
        with torch.no_grad():
            images: Tensor = self.generator(z)
            return images

    def _reduce_only_last(self, network: nn.Module, index: int) -> ExitStack:
        """Reduce gradients over ranks only with the last micro-batch of an accumulated batch."""
        stack = ExitStack()
        if index + 1 < self.micro_batches:
            stack.enter_context(self.accelerator.no_sync(network))
        return stack

    def _apply(self, optimizer: torch.optim.Optimizer, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Step and clear an optimizer; return the gradients' L2 norm and whether it is not finite.

        Such an update changes nothing, if the optimizer is fused. Gradients are equal on all ranks by now, so all
        ranks skip the same updates, and none has to ask.
        """
        self.accelerator.unscale_gradients(optimizer)
        norm = nn.utils.get_total_norm([weight.grad for weight in network.parameters() if weight.grad is not None])
        bad = (~torch.isfinite(norm)).float()
        if self.mask_nonfinite:
            optimizer.optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused kernel then changes nothing
        optimizer.step()
        optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            norm = torch.where(torch.isfinite(norm), norm, 0.0)  # one overflow would make the interval's mean infinite
        return norm, bad


def deviation(images: Tensor) -> Tensor:
    """Return the standard deviation over images (n, channels, height, width), averaged over pixels: float32 scalar.

    Near 0 all images are the same. Not `std(0)`: of 16 images it takes 3 to 5 times as long on a CPU.
    """
    pixels = images.float()
    centered = pixels - pixels.mean(0)
    return centered.square_().mean(0).sqrt_().mean()
