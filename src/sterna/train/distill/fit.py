"""Where a SwiftKV student starts: its keys and values fitted to the teacher's by least squares.

The student's keys and values of a group are one linear map of s = norm_swiftkv(x_k); the teacher's
are linear maps of each layer's own input. Over some thousand tokens of the training data the best
map is known in closed form, before any step is taken:

    W = (S^T S / n + r I)^-1 (S^T Y / n + r W_0),   r = RIDGE * mean of diag(S^T S / n)

Y are the teacher's keys (before head norm and rotation) and values, their mean over a group; W_0 is
the mean of the teacher's own rows, to which directions that the text does not show are pulled.

SmolLM2-135M, k = 15 of 30, 8,192 tokens: held-out KL 1.699 -> 0.667, accuracy 28.1 -> 42.7 %
(teacher 55.1) in half a minute on one thread, without a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from rich.progress import Progress
from torch import Tensor

from sterna.core.log import get_logger
from sterna.data.loader import Loader
from sterna.model.batch import Batch
from sterna.model.hub import resolve_model
from sterna.parallel.collectives import total
from sterna.parallel.mesh import Mesh
from sterna.text.tokenizer import load_tokenizer
from sterna.train.config import Recipe
from sterna.train.distill.swiftkv import SwiftKVPair
from sterna.train.step import as_batch

RIDGE = 1e-3
_log = get_logger(__name__)


@torch.no_grad()
def fit_start(pair: SwiftKVPair, recipe: Recipe, mesh: Mesh) -> None:
    """Fit `kv_swiftkv` on `distill.fit_tokens` tokens of the training data, over all ranks."""
    count = -(-recipe.distill.fit_tokens // (recipe.data.seq_len * mesh.dp.size))
    sums = LeastSquares(pair)
    with Progress(transient=True, disable=not mesh.is_main) as bar:
        for batch in bar.track(_batches(recipe, mesh, count), total=count, description="fit"):
            sums.add(batch)
    num_tokens = sums.solve(mesh)
    _log.info("keys and values fitted to the teacher's on %d tokens", num_tokens)


def _batches(recipe: Recipe, mesh: Mesh, count: int) -> Iterator[Batch]:
    """This rank's first rows of the training data, each a batch."""
    tokenizer = load_tokenizer(resolve_model(recipe.model.tokenizer or recipe.model.path))
    with Loader(recipe.data, tokenizer, rank=mesh.dp.rank, world=mesh.dp.size) as loader:
        for row in islice(loader, count):
            yield as_batch([row], mesh.device)[0]


class LeastSquares:
    """The sums of the formula above, in float64."""

    def __init__(self, pair: SwiftKVPair) -> None:
        self._pair = pair
        self._linear = pair.student.kv_swiftkv
        rows, inputs = self._linear.weight.shape
        self._inputs = inputs + (self._linear.bias is not None)
        self._ss, self._sy = (
            torch.zeros(self._inputs, columns, dtype=torch.float64, device=pair.device)
            for columns in (self._inputs, rows)
        )
        self._count = 0

    def add(self, batch: Batch) -> None:
        """The tokens of a batch."""
        x = self._pair.student.first(batch)
        s = self._pair.student.norm_swiftkv(x).double()
        if self._linear.bias is not None:
            s = torch.cat([s, s.new_ones(len(s), 1)], dim=1)
        self._ss += s.T @ s
        self._sy += s.T @ self._targets(x, batch)
        self._count += len(s)

    @torch.no_grad()
    def solve(self, mesh: Mesh) -> int:
        """Put the fitted map in the student; returns the tokens it is fitted to."""
        count = torch.tensor(self._count, dtype=torch.float64, device=self._ss.device)
        ss, sy, n = (total(t, mesh.dp) for t in (self._ss, self._sy, count))
        linear = self._linear
        start = linear.weight.double().T
        if linear.bias is not None:
            start = torch.cat([start, linear.bias.double()[None]])
        ridge = RIDGE * ss.diagonal().mean() / n
        eye = torch.eye(self._inputs, dtype=ss.dtype, device=ss.device)
        found = torch.linalg.solve(ss / n + ridge * eye, sy / n + ridge * start)
        linear.weight.copy_(found[: linear.weight.shape[1]].T)
        if linear.bias is not None:
            linear.bias.copy_(found[-1])
        return int(n)

    def _targets(self, x: Tensor, batch: Batch) -> Tensor:
        """What the teacher's later layers make of x_k: keys and values of each group [T, N]."""
        student = self._pair.student
        width = self._linear.out_features // len(student.groups)
        found: dict[int, list[Tensor]] = {}
        for i, keys_values in self._pair.teacher_kv(x, batch):
            found.setdefault(student.owners[i], []).append(keys_values[:, -width:].double())
        return torch.cat([torch.stack(found[group]).mean(0) for group in student.groups], dim=1)
