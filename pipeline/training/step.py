"""One adversarial update: the paper's semantics, arranged for speed (docs/architecture.md, "The adversarial step")."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import RecipeConfig, RunConfig
from pipeline.model.ema import EMA
from pipeline.model.losses import load_loss, needs_real_logits
from pipeline.model.networks import build_discriminator, build_generator, initialize
from pipeline.model.sampling import to_float
from pipeline.model.spectral import Spectral
from pipeline.training.accelerator import reduce_gradients, set_kernels
from pipeline.training.update.augment import VALUES, augment
from pipeline.training.update.chances import Use, draw_chances, flip, values_of
from pipeline.training.update.graph import Repeated, on_stream, use_graph
from pipeline.training.update.inputs import Inputs
from pipeline.training.update.penalty import gradient_penalty, leaf
from pipeline.training.update.weights import Weights, lowered

if TYPE_CHECKING:
    from accelerate import Accelerator

SUMMED = ("loss_d", "loss_g", "d_real", "d_fake", "grad_norm_d", "grad_norm_g", "nonfinite", "skipped")
"""What an update adds to the statistics, in this order."""

OF_D, OF_G = ("loss_d", "d_real", "d_fake", "grad_norm_d"), ("loss_g", "grad_norm_g")
"""Those that only an update of D, or of G, adds to."""

STATISTICS = (*SUMMED, "deviation_real", "deviation_fake")
"""All statistics, in this order. The last two are of the last update before a log boundary alone."""

Part = tuple[Any, ...]
"""A micro-batch: reals (n, channels, height, width) in [-1, 1], z (n, latent_dim), labels of reals, labels of fakes."""


def turns(recipe: RecipeConfig, position: int) -> tuple[bool, bool]:
    """Return whether the update at `position`, the images seen before, is one of D, and whether it is one of G.

    Both; with `recipe.alternate` one of them in turn, G first, each on images and z of its own, as in the code of the
    paper's authors (k = 1).
    """
    odd = position // recipe.batch % 2 == 1
    return (odd, not odd) if recipe.alternate else (True, True)


class AdversarialStep:
    """Both networks, their optimizers and the EMA; `update` does one update on one global batch.

    Such an update is a fixed list of operations of the device on memory that stays where it is: nothing of it
    depends on a number of the host, and the host reads nothing. That is what a CUDA graph can record.
    """

    def __init__(self, config: RunConfig, accelerator: "Accelerator") -> None:
        """Raises ConfigConflict for runtime.graph=on where there is none."""
        recipe, runtime, network = config.recipe, config.runtime, config.network
        self.accelerator = accelerator
        self.scaler = accelerator.scaler
        self.device = accelerator.device
        self.loss = load_loss(recipe.loss)
        self._pairs = needs_real_logits(self.loss)
        self.micro_batches = runtime.accumulate
        self.memory_format = torch.channels_last if runtime.channels_last else torch.contiguous_format
        self.graphed = use_graph(runtime, accelerator)
        set_kernels(accelerator, tf32=recipe.tf32)
        self.precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        self._stream = torch.cuda.Stream(self.device) if self.graphed else None  # type: ignore[no-untyped-call]
        with on_stream(self._stream):
            self._build(config)
        shape = (recipe.batch // accelerator.num_processes, *network.image_shape)
        self.recipe = recipe
        self._rank = accelerator.process_index, accelerator.num_processes
        self._values = sum(values_of(recipe).values())
        z_dtype = self.precision or self.dtype
        self._labeled = bool(network.label)
        sizes = network.latent_dim, z_dtype, self.device, self._values, self.dtype, network.label_dim
        self.inputs = Inputs(shape, *sizes)
        self.statistics = torch.zeros(len(STATISTICS), device=self.device, dtype=torch.float32)
        """The sums over updates of this rank's means: float32 (len(STATISTICS),). Who reads them sets them to 0."""
        self._sums, self._deviations = self.statistics[: len(SUMMED)], self.statistics[len(SUMMED) :]
        self._fakes: list[Tensor] = []  # those of the last update
        self._never = torch.zeros((), device=self.device)
        self._share = torch.full((), 1.0 / self.micro_batches, dtype=self.dtype, device=self.device)
        self._autocast: AbstractContextManager[object] = (
            nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)
        )
        self._gammas = recipe.r1 * recipe.penalty_interval, recipe.r2 * recipe.penalty_interval
        both = not recipe.alternate
        self._run = Repeated(partial(self._update, of_g=both), self._stream)
        self._run_penalized = Repeated(partial(self._update, self._gammas, of_g=both), self._stream)
        self._run_generator = Repeated(partial(self._update, of_d=False), self._stream)  # only where they alternate

    def _build(self, config: RunConfig) -> None:
        """Make the networks and what belongs to them."""
        recipe, runtime, processes = config.recipe, config.runtime, self.accelerator.num_processes
        self.generator = build_generator(config.network)
        self.discriminator = build_discriminator(config.network)
        self.dtype = next(self.generator.parameters()).dtype
        initialize(self.generator, recipe.seed, lane=0)
        initialize(self.discriminator, recipe.seed, lane=1)
        self.discriminator.freeze(recipe.freeze_d)  # before it is copied or wrapped
        spectral = [layer for layer in self.discriminator.modules() if isinstance(layer, Spectral)]
        self._spectral = [layer for layer in spectral if layer.weight.requires_grad]  # what is frozen stays as it is
        # The order matters: the average copies plain modules, compiling wraps nothing, DDP comes last.
        for network in (self.generator, self.discriminator):
            network.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.ema = EMA(self.generator, recipe.ema_half_life_images, recipe.ema_ramp_up, recipe.batch)
        if recipe.sync_batchnorm and processes > 1:
            for network in (self.generator, self.discriminator):
                nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        # What the passes go through. The gradients of several processes are summed in float32, so only one lowers.
        passes: list[nn.Module] = [self.generator, self.discriminator]
        if self.precision is torch.bfloat16 and (processes == 1 or runtime.compress_gradients):
            passes = [lowered(network, self.precision) for network in passes]
        if runtime.compile:
            for each in passes:
                each.compile()

        def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
            betas, fused = (recipe.beta1, recipe.beta2), runtime.fused_optimizer
            decay = recipe.weight_decay
            return torch.optim.Adam(
                network.parameters(), rate, betas, weight_decay=decay, fused=fused, capturable=self.graphed
            )

        self.optimizer_g = adam(self.generator, recipe.learning_rate_g)
        self.optimizer_d = adam(self.discriminator, recipe.learning_rate_d)
        self._weights_g = Weights(self.generator, passes[0], self.optimizer_g, self.scaler)
        self._weights_d = Weights(self.discriminator, passes[1], self.optimizer_d, self.scaler)
        self._pass_g, self._pass_d = passes
        # Wrapped apart: each network has a reducer of its own.
        self._ddp_g, self._ddp_d = (
            reduce_gradients(network, self.accelerator, compress=runtime.compress_gradients) for network in passes
        )

    def update(
        self,
        reals: NDArray[np.uint8] | Tensor,
        z: NDArray[np.float32],
        position: int,
        labels: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> None:
        """Update D, then G, then the average, on this rank's share of a global batch; or one of both (`turns`).

        reals (n, height, width, channels) uint8, an array or a tensor, which may be the device's; z (n, latent_dim)
        float32. `position`, the images seen before, decides what options beyond the paper do. `labels` are those of
        the reals and of the fakes of a conditional network, each (n, label_dim). The means over this rank's share are
        added to `statistics`; one that is not finite counts as 0.
        """
        recipe, chances = self.recipe, None
        if self._values:
            chances = draw_chances(recipe, position, *self._rank)
        with on_stream(self._stream):
            self.inputs.feed(reals, z, chances, None if labels is None else np.concatenate(labels, axis=1))
            of_d, _ = turns(recipe, position)
            number = position // recipe.batch // (2 if recipe.alternate else 1)  # of D's update
            penalized = any(self._gammas) and number % recipe.penalty_interval == 0
            self._fakes = (self._run_penalized if penalized else self._run)() if of_d else self._run_generator()

    def scale_learning_rates(self, factor: float) -> None:
        """Step `factor` times as far as the recipe says, from now on."""
        rates = {self.optimizer_g: self.recipe.learning_rate_g, self.optimizer_d: self.recipe.learning_rate_d}
        for optimizer, rate in rates.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
        # A graph has the rates, and where the moments lie, as constants.
        for run in (self._run, self._run_penalized, self._run_generator):
            run.forget()

    def _update(
        self, gammas: tuple[float, float] = (0.0, 0.0), *, of_d: bool = True, of_g: bool = True
    ) -> list[Tensor]:
        """Update one network or both on what `inputs` holds, D with gradient penalties of these weights.

        Return the fakes of each micro-batch.
        """
        parts = list(zip(self._reals(), self.inputs.z.chunk(self.micro_batches), *self._labels(), strict=True))
        fakes: list[Tensor] = []
        found: dict[str, Tensor] = {}
        self._weights_g.cast()
        self._weights_d.cast()
        if of_d:
            fakes, found = self._update_discriminator(parts, gammas, keep=of_g and self.micro_batches == 1)
        if of_g:
            if of_d:
                self._weights_d.cast()
            made, found_g = self._update_generator(parts, fakes if self.micro_batches == 1 else [])
            fakes, found = fakes or made, found | found_g
        self.ema.update(self._weights_g.tensors)

        bad = [weights.found_inf for weights, turn in ((self._weights_d, of_d), (self._weights_g, of_g)) if turn]
        found["nonfinite"] = bad[0] if len(bad) == 1 else torch.maximum(*bad)
        if self.scaler is not None:  # its overflows are its ordinary search for a scale, until it skips all updates
            found["skipped"] = found["nonfinite"]
            losses = [found[name] for name in ("loss_d", "loss_g") if name in found]
            found["nonfinite"] = ~torch.isfinite(mean(losses))
        values = torch.stack([found.get(name, self._never).float() for name in SUMMED])
        self._sums += torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        return [fake.detach() for fake in fakes]

    def _update_discriminator(
        self, parts: list[Part], gammas: tuple[float, float], *, keep: bool
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Update D; return the fakes of each micro-batch, with the graph that made them if `keep`, and statistics."""
        fakes: list[Tensor] = []
        losses: list[Tensor] = []
        outputs: list[Tensor] = []  # D's probabilities of real and fake images, in turn
        for layer in self._spectral:
            layer.iterate()  # here alone: all passes up to D's next update have the same u
        for index, (real, z, *labels) in enumerate(parts):
            with self._reduce_only_last(self._ddp_d, index):
                with self._autocast:  # left before the backward pass; inside it, each weight is cast once
                    # (n / micro_batches, channels, height, width) in [-1, 1]
                    fake = self._ddp_g(z, *labels[1]) if keep else self._fake(z, *labels[1])
                    images = [leaf(one, self.dtype) if any(gammas) else one for one in (real, fake.detach())]
                    seen = [self._seen(one, index, use) for one, use in zip(images, (Use.REAL, Use.FAKE), strict=True)]
                    logits = [self._ddp_d(one, *label).to(self.dtype) for one, label in zip(seen, labels, strict=True)]
                terms = [gradient_penalty(*each) for each in zip(logits, images, gammas, strict=True) if each[-1]]
                losses.append(self._backward(self.loss.discriminator_loss(*logits), *terms))
            fakes.append(fake)
            outputs += [one.detach().sigmoid().mean() for one in logits]
        found = {"loss_d": mean(losses), "d_real": mean(outputs[::2]), "d_fake": mean(outputs[1::2])}
        return fakes, found | {"grad_norm_d": self._weights_d.apply()}

    def _update_generator(self, parts: list[Part], fakes: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Update G through D as it is, on `fakes` or new ones; return the fakes of each micro-batch, and statistics."""
        made: list[Tensor] = []
        losses: list[Tensor] = []
        self._weights_d.require_gradients(False)  # they would be 8 % of the step's work
        for index, (real, z, *labels) in enumerate(parts):
            with self._reduce_only_last(self._ddp_g, index):
                with self._autocast:
                    fake = fakes[index] if fakes else self._ddp_g(z, *labels[1])
                    inputs = [(self._seen(fake, index, Use.FAKE_OF_GENERATOR), *labels[1])]
                    if self._pairs:
                        inputs.append((self._seen(real, index, Use.REAL_OF_GENERATOR), *labels[0]))
                    logits = [self._pass_d(*each).to(self.dtype) for each in inputs]  # without D's reducer
                losses.append(self._backward(self.loss.generator_loss(*logits)))
            made.append(fake)
        self._weights_d.require_gradients(True)
        return made, {"loss_g": mean(losses), "grad_norm_g": self._weights_g.apply()}

    def _reals(self) -> tuple[Tensor, ...]:
        """Return the real images of each micro-batch, (n / micro_batches, channels, height, width) in [-1, 1]."""
        pixels = flip(self.inputs.reals, self.inputs.chances[:, 0]) if self.recipe.flips else self.inputs.reals
        return to_float(pixels, self.dtype, self.memory_format).chunk(self.micro_batches)

    def _labels(self) -> list[list[tuple[Tensor, ...]]]:
        """Return what the networks read beside the reals, and beside the fakes, of each micro-batch: (label,) or ()."""
        if not self._labeled:
            return [[()] * self.micro_batches] * 2
        return [[(part,) for part in half.chunk(self.micro_batches)] for half in self.inputs.labels.chunk(2, 1)]

    def _seen(self, images: Tensor, index: int, use: Use) -> Tensor:
        """Return what D sees of the images of micro-batch `index`."""
        if not self.recipe.augment:
            return images
        first = int(self.recipe.flips) + use * VALUES
        chances = self.inputs.chances[:, first : first + VALUES].chunk(self.micro_batches)[index]
        return augment(images, chances, self.recipe.augment)

    @torch.no_grad()
    def examine(self, *, images: bool = False) -> Tensor:
        """Return whether all weights of both networks are finite: a scalar, 1 or 0, left on the device.

        With `images`, put the deviations of the last update's reals and fakes into `statistics` too, which takes a
        pass over them.
        """
        with on_stream(self._stream):
            if images:
                values = [mean([deviation(one) for one in batch]) for batch in (self._reals(), self._fakes)]
                self._deviations.copy_(torch.nan_to_num(torch.stack(values), nan=0.0, posinf=0.0, neginf=0.0))
            weights = [*self._weights_g.tensors, *self._weights_d.tensors]
            return torch.isfinite(nn.utils.get_total_norm(weights)).float()

    def _backward(self, loss: Tensor, *penalties: Tensor) -> Tensor:
        """Add the gradients of a micro-batch's share of the loss and penalties; return the loss alone, detached.

        In one pass: DDP reduces a weight's gradient once, when all that adds to it has been added.
        """
        total = sum(penalties, start=loss)
        scaled = total if self.scaler is None else self.scaler.scale(total)
        scaled.backward(self._share)
        return loss.detach()

    @torch.no_grad()
    def _fake(self, z: Tensor, *label: Tensor) -> Tensor:
        """Return fakes for D's update alone.

        Accumulation keeps no graphs: micro-batches are made again for G's update, from the same z and weights.
        """
        images: Tensor = self._pass_g(z, *label)
        return images

    def _reduce_only_last(self, network: nn.Module, index: int) -> AbstractContextManager[object]:
        """Reduce gradients over ranks only with the last micro-batch of an accumulated batch."""
        if index + 1 < self.micro_batches and isinstance(network, nn.parallel.DistributedDataParallel):
            waiting: AbstractContextManager[object] = network.no_sync()
            return waiting
        return nullcontext()


def mean(scalars: list[Tensor]) -> Tensor:
    """Return the mean of scalars, one of which is its own."""
    return scalars[0] if len(scalars) == 1 else torch.stack(scalars).mean()


def deviation(images: Tensor) -> Tensor:
    """Return the standard deviation over images (n, channels, height, width), averaged over pixels: float32 scalar.

    Near 0 all images are the same. Not `std(0)`: of 16 images it takes 3 to 5 times as long on a CPU.
    """
    pixels = images.float()
    centered = pixels - pixels.mean(0)
    return centered.square_().mean(0).sqrt_().mean()
