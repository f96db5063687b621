"""What a run measures of itself: grids of the same 64 samples, and the quality by which `best` is chosen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.common.imaging import Pixels, grid, labeled_sheet, save_png
from pipeline.common.randomness import Purpose
from pipeline.common.ranks import ranks_of
from pipeline.config import RunConfig
from pipeline.data.dataset import Dataset
from pipeline.data.loading.loader import run_loader
from pipeline.model.networks import Generator
from pipeline.model.sampling import class_grid, sample

if TYPE_CHECKING:
    from accelerate import Accelerator

GRID_SIDE = 8


class Evaluator:
    """Draws the run's 64 fixed samples, and measures samples against a fair draw of the data set.

    SWD and MS-SSIM; with `schedule.extractor`, FID and KID as well. All ranks share the work; the reals' share is
    computed once.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, folder: Path, accelerator: "Accelerator") -> None:
        """Grids go into `folder`. Raises what `load_extractor` raises, before the first step."""
        schedule = config.schedule
        self.config = config
        self.dataset = dataset
        self.folder = folder
        self.samples = min(schedule.evaluate_samples, dataset.images)
        self.seed = config.recipe.seed
        self.accelerator = accelerator
        self._reference: Any = None
        self._features: Any = None
        if schedule.extractor:
            from pipeline.training.feature_meter import FeatureMeter

            sha256 = schedule.extractor_sha256 or None
            self._features = FeatureMeter(schedule.extractor, sha256, self.seed, ranks_of(accelerator))

    def draw_grid(self, generator: Generator, images_seen: int) -> Path:
        """Write FOLDER/IMAGES_SEEN.png, a grid of the fixed samples of `generator`, and return its path.

        The main process writes. Of a conditional generator, a row for each class, of the same z.
        """
        path = self.folder / f"{images_seen:09d}.png"
        if self.accelerator.is_main_process:
            if generator.config.label:
                picture = labeled_sheet(class_grid(generator, self.seed))
            else:
                picture = grid(sample(generator, self.seed, Purpose.GRID, 0, GRID_SIDE**2), GRID_SIDE)
            save_png(path, picture)
        return path

    def measure(self, generator: Generator) -> dict[str, float]:
        """Return the numbers that `pipeline.evaluation.metrics.quality.quality` describes, equal on all ranks.

        With an extractor also {"fid", "kid_x1000"}.
        """
        from pipeline.evaluation.metrics.quality import quality, reference

        ranks, device = ranks_of(self.accelerator), self.accelerator.device
        if self._reference is None:
            reals = self._reals()
            if self._features is not None:
                self._features.see_reals(reals)
            self._reference = reference(reals, seed=self.seed, ranks=ranks, device=device)
        share = -(-self.samples // ranks.world_size)
        start = min(ranks.rank * share, self.samples)
        count = min(share, self.samples - start)
        mine = np.zeros((share, *self.dataset.image_shape), np.uint8)
        mine[:count] = sample(generator, self.seed, Purpose.EVALUATE, start, count)
        gathered = self.accelerator.gather(torch.from_numpy(mine).to(device))
        fakes = gathered.cpu().numpy()[: self.samples]
        more = self._features.measure(fakes) if self._features is not None else {}
        return {**quality(self._reference, fakes, seed=self.seed, ranks=ranks, device=device), **more}

    def _reals(self) -> Pixels:
        """Return a fair draw of real images: the data set's first, or, where its order is others', the run's first."""
        if self.dataset.encoding == "tar":
            count = -(-self.samples // self.config.recipe.batch)
            end = count * self.config.recipe.batch
            with run_loader(self.config, self.dataset, start=0, rank=0, world_size=1, end=end) as loader:
                batches = [loader.next_batch() for _ in range(count)]
            return np.concatenate(batches)[: self.samples]
        from pipeline.data.shard_reader import iterate

        parts: list[Pixels] = []
        for images in iterate(self.dataset):
            parts.append(images)
            if sum(map(len, parts)) >= self.samples:
                break
        return np.concatenate(parts)[: self.samples]
