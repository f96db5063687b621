"""What a run shows of itself: pictures of the same 64 samples, and quality numbers for `best`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.imaging import grid, save_png
from pipeline.common.randomness import Purpose
from pipeline.common.ranks import ranks_of
from pipeline.config import ScheduleConfig
from pipeline.data.dataset import Dataset
from pipeline.model.networks import Generator
from pipeline.model.sampling import sample

if TYPE_CHECKING:
    from accelerate import Accelerator

GRID_SIDE = 8


def save_grid(generator: Generator, seed: int, path: Path) -> None:
    """Write a PNG of the run's 64 fixed samples."""
    save_png(path, grid(sample(generator, seed, Purpose.GRID, 0, GRID_SIDE**2), GRID_SIDE))


class QualityMeter:
    """SWD and MS-SSIM of a generator against the first images of the data set, the work shared by all ranks.

    With `schedule.extractor`, FID and KID as well. The data set's own order is already shuffled, so its first images
    are a fair draw. The reals' share is computed once.
    """

    def __init__(self, dataset: Dataset, schedule: ScheduleConfig, seed: int, accelerator: "Accelerator") -> None:
        """Raises what `pipeline.evaluation.metrics.extractors.load_extractor` raises, before the first step."""
        self.dataset = dataset
        self.samples = min(schedule.evaluate_samples, dataset.images)
        self.seed = seed
        self.accelerator = accelerator
        self._reference: Any = None
        self._features: Any = None
        if schedule.extractor:
            from pipeline.training.feature_meter import FeatureMeter

            self._features = FeatureMeter(schedule.extractor, schedule.extractor_sha256 or None, seed, accelerator)

    def measure(self, generator: Generator) -> dict[str, float]:
        """Return the numbers that `pipeline.training.quality.quality` describes, equal on all ranks.

        With an extractor also {"fid", "kid_x1000"}.
        """
        from pipeline.training.quality import quality, reference

        ranks = ranks_of(self.accelerator)
        if self._reference is None:
            reals = self._reals()
            if self._features is not None:
                self._features.see_reals(reals)
            self._reference = reference(reals, seed=self.seed, ranks=ranks)
        share = -(-self.samples // ranks.world_size)
        start = min(ranks.rank * share, self.samples)
        count = min(share, self.samples - start)
        mine = np.zeros((share, *self._image_shape(generator)), np.uint8)
        mine[:count] = sample(generator, self.seed, Purpose.EVALUATE, start, count)
        gathered = self.accelerator.gather(torch.from_numpy(mine).to(self.accelerator.device))
        fakes = gathered.cpu().numpy()[: self.samples]
        more = self._features.measure(fakes) if self._features is not None else {}
        return {**quality(self._reference, fakes, seed=self.seed, ranks=ranks), **more}

    def _reals(self) -> NDArray[np.uint8]:
        from pipeline.data.shard_reader import iterate

        parts: list[NDArray[np.uint8]] = []
        for images in iterate(self.dataset):
            parts.append(images)
            if sum(map(len, parts)) >= self.samples:
                break
        return np.concatenate(parts)[: self.samples]

    @staticmethod
    def _image_shape(generator: Generator) -> tuple[int, int, int]:
        return generator.config.image_size, generator.config.image_size, generator.config.channels
