"""The L2-SVM of the paper's probe: linear, one class against the rest, squared hinge loss, solved in the primal."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.errors import UsageError
from pipeline.evaluation.device import device

ITERATIONS = 400
COLUMNS = 4_096
"""Features that are float64 at a time."""


class LinearSVM:
    """Minimizes |w|²/2 + C Σ max(0, 1 - y(wx + b))² for each class, b regularized with w, as liblinear does.

    Liblinear needs hours for the paper's 50,000 images with 28,672 features. L-BFGS on all classes at once needs a few
    hundred matrix products, which a GPU computes where there is one.
    """

    def __init__(self, classes: NDArray[Any], weights: Tensor) -> None:
        self.classes = classes
        self._weights = weights

    def decision(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the margins (N, classes), or (N, 1) for two classes."""
        return np.asarray((_with_ones(features) @ self._weights).cpu().numpy(), np.float32)

    def accuracy(self, features: NDArray[np.float32], labels: NDArray[Any]) -> float:
        """Return the share of `labels` that are predicted."""
        margins = self.decision(features)
        best = (margins[:, 0] > 0).astype(int) if len(self.classes) == 2 else margins.argmax(1)
        return float((self.classes[best] == labels).mean())


def fit(features: NDArray[np.float32], labels: NDArray[Any], cs: Sequence[float]) -> list[LinearSVM]:
    """Return an SVM of `labels` (N,) and `features` (N, F) for every C; they share the costly part."""
    classes = np.unique(labels)
    x = _with_ones(features)
    targets = classes[1:] if len(classes) == 2 else classes
    y = torch.from_numpy(np.where(labels[:, None] == targets[None], 1.0, -1.0)).to(x)
    if len(x) >= x.shape[1]:
        return [LinearSVM(classes, _minimize(x, y, c)) for c in cs]
    # The solution is a combination of the rows: with fewer rows than columns, solve in their coordinates.
    # In float64: with rows of fewer dimensions than there are rows, what float32 rounds away makes it indefinite.
    gram = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for part in torch.split(x, COLUMNS, 1):
        gram.addmm_(part.double(), part.double().T)
    rows = torch.linalg.cholesky(gram + 1e-7 * gram.diagonal().mean() * torch.eye(len(x)).to(gram))
    svms = []
    for c in cs:
        solved = _minimize(rows.to(x), y, c).double()
        svms.append(LinearSVM(classes, x.T @ torch.linalg.solve_triangular(rows.T, solved, upper=True).to(x)))
    return svms


def _minimize(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Return the weights (F, classes) for rows x (N, F) and signs y (N, classes)."""
    weights = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    # The classes are independent problems, but one line search over their sum is enough for all of them.
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=ITERATIONS,
        history_size=20,
        tolerance_grad=1e-4 * c,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        short_of_margin = torch.relu(1 - y * (x @ weights))
        loss: Tensor = 0.5 * weights.square().sum() + c * short_of_margin.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weights.detach()


def balanced_draw(labels: NDArray[Any], count: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `count` rows in the order of `order`, as many of every class; the first classes get the remainder.

    Raises UsageError when a class has too few rows.
    """
    classes, have = np.unique(labels, return_counts=True)
    share, extra = divmod(count, len(classes))
    wanted = share + (np.arange(len(classes)) < extra)
    if share == 0:
        raise UsageError(f"--labels {count}: fewer than the {len(classes)} classes; expected at least one of each")
    if (have < wanted).any():
        rarest = int(have.argmin())
        raise UsageError(
            f"--labels {count}: a balanced draw takes {wanted.max()} of each of the {len(classes)} classes, but only "
            f"{have[rarest]} are {classes[rarest]!s} among the {len(labels)} images to draw from; expected at most "
            f"{have[rarest] * len(classes)}"
        )
    return np.concatenate([order[labels[order] == value][:own] for value, own in zip(classes, wanted, strict=True)])


def choose_c(scores: Sequence[tuple[float, float]]) -> float:
    """Return the C with the best validation score; among equals the smallest, which gives the simplest model."""
    best = max(score for _, score in scores)
    return min(c for c, score in scores if score == best)


def _with_ones(features: NDArray[np.float32]) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(device())
    return torch.cat([x, torch.ones(len(x), 1, device=x.device)], 1)
