"""The speculator learns while the engine serves: a copy is trained on what was served.

A thread of the lowest priority works only while the engine has nothing to do: each of its steps
(some 0.1 s) begins after IDLE_S without an engine step. A round is ROUND_STEPS of AdamW on rows of
the ring, then the copy and the served head are compared on the newest rows kept aside. The copy is
swapped in when more of its drafts come true, by more than the standard error of the difference;
otherwise it is thrown away and the next round begins from the served head again.

The weights that are served change between two proposals on the engine's thread. Output never
depends on them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from sterna.core.log import get_logger
from sterna.engine.drafters.draft_step import base_rows
from sterna.engine.drafters.ring import Recorder, Ring
from sterna.engine.sequence import Sequence
from sterna.kernels.backend import backend_for
from sterna.model.decoder import Decoder
from sterna.model.speculator import Speculator
from sterna.model.speculator_update import Base, Update, num_accepted

log = get_logger(__name__)

IDLE_S: Final = 0.25
ROUND_STEPS, BATCH_ROWS, LR = 32, 64, 1e-4
# Rows that are new since the last round, and rows to compare on, before a round begins.
MIN_NEW_ROWS, MIN_HELD_OUT, MAX_HELD_OUT = 512, 128, 1024
_POLL_S: Final = 0.1
_LOWEST: Final = 19


@dataclass(frozen=True, slots=True)
class LearnStats:
    """For /metrics and the page. Accepted drafts are means a proposal over the rows kept aside."""

    num_rows: int = 0  # in the ring
    num_rounds: int = 0
    num_swaps: int = 0
    num_rollbacks: int = 0
    served_accepted: float = 0.0  # of the head in use, at the last comparison
    learned_accepted: float = 0.0  # of the copy that was compared with it


class Learner:
    """See the module docstring. `served` is the speculator in use; it is copied."""

    def __init__(self, served: Speculator, decoder: Decoder, num_rows: int) -> None:
        config = served.config
        sizes = (config.hidden_size, config.num_drafts + 1, decoder.dtype)
        self._train = Ring(num_rows, *sizes)
        self._held_out = Ring(max(MAX_HELD_OUT // 4, num_rows // 8), *sizes)
        self._recorder = Recorder(self._train, self._held_out, config.num_drafts)
        self._served = deepcopy(served).float()
        self._decoder = decoder
        self._base: Base | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._rows_used = 0
        self._last_step = 0.0
        self._update: Speculator | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="sterna-learner", daemon=True)
        self.stats = LearnStats()

    def start(self) -> None:
        """Begin to learn. Once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; its step in progress is waited for."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    # ---- on the engine's thread --------------------------------------------------------------

    def note_step(self, stats: object) -> None:
        """The engine is at work; a hook of its steps."""
        self._last_step = time.monotonic()

    def observe(self, seq: Sequence, hidden: Tensor) -> None:
        """See ReadsHidden."""
        self._recorder.observe(seq, hidden)

    def finish(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._recorder.finish(seq)

    def take_update(self, load: Callable[[Speculator], None]) -> None:
        """Hand a better head to `load`, if there is one."""
        update, self._update = self._update, None
        if update is not None:
            load(update)

    # ---- on the learner's thread -------------------------------------------------------------

    def round(self, wait: Callable[[], bool]) -> bool:
        """Train a copy and compare; True when it was swapped in. `wait` before each step: False
        gives the round up.
        """
        base = self._new_base()
        update = Update(self._served, base, LR)
        self._rows_used = self._train.num_added
        for _ in range(ROUND_STEPS):
            if not wait():
                return False
            update.step(*self._train.sample(BATCH_ROWS, self._generator))
        learned = update.speculator.requires_grad_(False)
        old, new = (self._accepted(s, base, wait) for s in (self._served, learned))
        if old is None or new is None:
            return False
        is_better = _is_larger(new - old)
        self._note(is_better, float(old.mean()), float(new.mean()))
        if is_better:
            self._served = learned
            self._update = learned
        return is_better

    def is_ready(self) -> bool:
        """There are rows for another round."""
        num_new = self._train.num_added - self._rows_used
        return num_new >= MIN_NEW_ROWS and len(self._held_out) >= MIN_HELD_OUT

    def _main(self) -> None:
        _lower_priority()
        with own_kernels():
            self._learn()

    def _learn(self) -> None:
        while not self._stop.wait(_POLL_S):
            self.stats = replace(self.stats, num_rows=len(self._train))
            if not self.is_ready():
                continue
            try:
                self.round(self._wait_idle)
            except Exception:  # serving goes on with the head it has
                log.exception("learning from what is served has failed and is off")
                return

    def _wait_idle(self) -> bool:
        while time.monotonic() - self._last_step < IDLE_S:
            if self._stop.wait(_POLL_S):
                return False
        return not self._stop.is_set()

    def _accepted(self, s: Speculator, base: Base, wait: Callable[[], bool]) -> Tensor | None:
        hidden, tokens = self._held_out.newest(MAX_HELD_OUT)
        parts = []
        parts_of = (torch.split(x, BATCH_ROWS) for x in (hidden, tokens))
        for h, t in zip(*parts_of, strict=True):
            if not wait():
                return None
            parts.append(num_accepted(s, base, h, t))
        return torch.cat(parts)

    def _new_base(self) -> Base:
        """Made once: with the whole vocabulary it is the head in float32 again."""
        if self._base is None:
            config, decoder = self._served.config, self._decoder
            head = None
            if config.shares_base:
                ids = self._served.draft_ids
                ids = torch.arange(config.vocab_size, dtype=torch.int32) if ids is None else ids
                head = base_rows(decoder, ids).float()
            softcap = decoder.config.logits_softcap
            self._base = Base(head, lambda ids: decoder.embed_tokens(ids).float(), softcap)
        return self._base

    def _note(self, is_better: bool, served: float, learned: float) -> None:
        last = self.stats
        self.stats = replace(
            last,
            num_rounds=last.num_rounds + 1,
            num_swaps=last.num_swaps + is_better,
            num_rollbacks=last.num_rollbacks + (not is_better),
            served_accepted=served,
            learned_accepted=learned,
        )
        what = "swapped in" if is_better else "thrown away"
        log.info("speculator: accepted %.3f -> %.3f on rows kept aside, %s", served, learned, what)


def _is_larger(difference: Tensor) -> bool:
    """Paired, by more than the standard error of the mean."""
    error = float(difference.std()) / len(difference) ** 0.5
    mean = float(difference.mean())
    return mean > error and mean > 0


def own_kernels() -> AbstractContextManager[None]:
    """This thread's ops do not wait for the engine's, nor the engine's for them."""
    backend = backend_for("cpu")
    if backend.name != "cpu":
        return nullcontext()
    from sterna.kernels.cpu_backend import CpuBackend

    assert isinstance(backend, CpuBackend)
    return backend.alone()


def _lower_priority() -> None:
    """On Linux a thread has a priority of its own; elsewhere the pauses alone must do."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
