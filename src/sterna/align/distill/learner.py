"""On-policy distillation: the student writes, the teacher says how it would have gone on.

full      the divergence of both distributions on every token the student wrote: no variance
          of sampling in a token's gradient (GKD, arXiv 2306.13649)
sampled   the log-prob of the token alone: advantage log p - log q of each token, less the
          batch's mean, that is the reverse KL at discount 0; for teachers of another
          vocabulary size (nothing here: an ordinary Learner does it)
"""

from __future__ import annotations

from typing import Any

import torch

from sterna.align.config import DistillSection
from sterna.align.learner import Learner, Part
from sterna.align.memory.away import Frozen
from sterna.align.score import scored_batch
from sterna.train.longseq.divergence import Logits, chunked_jsd
from sterna.train.step import TrainModel


class DistillLearner(Learner):
    """A Learner whose loss is the divergence from a teacher."""

    def __init__(self, teacher: Frozen, distill: DistillSection, *of_learner: Any) -> None:
        super().__init__(*of_learner)
        self._frozen = teacher
        self._teacher: TrainModel = teacher.model  # type: ignore[assignment]
        self._distill = distill

    def learn(self, *of_learn: Any, **named: Any) -> dict[str, float]:
        """See Learner; the teacher is asked in every micro-batch."""
        with self._frozen.here():
            return super().learn(*of_learn, **named)

    def _policy_micro(self, part: Part, kl_coef: float, logs: dict[str, float]) -> None:
        own: TrainModel = self.policy.model
        with torch.no_grad():
            taught = self._logits(self._teacher, part)
        found = chunked_jsd(
            self._logits(own, part),
            taught,
            part.weights.to(self._device),
            self._distill.beta,
            self._distill.temperature,
        )
        torch.autograd.backward(found.loss)
        logs["loss"] += float(found.loss.detach())
        logs["reverse_kl"] += found.reverse_kl
        logs["entropy"] += found.entropy

    def _logits(self, model: TrainModel, part: Part) -> Logits:
        scored = scored_batch(model, part.rollouts, self._device)
        hidden = model.hidden(scored.batch).index_select(0, scored.rows)
        softcap = float(getattr(model.config, "logits_softcap", 0.0))
        return Logits(hidden, model.head_weight(), model.head_bias(), softcap)
