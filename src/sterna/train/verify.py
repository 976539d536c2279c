"""The parity certificate: a recipe's features against plain one-process training, at small size.

The user's model, cut to its first layers and tokens, takes three clipped AdamW steps on a few short
packed rows (uneven lengths, positions without target): plainly, then with each feature of the
recipe alone, then with all together, on ranks of this machine. The trainer's step (chunked head,
counts, accumulation) is one of them; the optimizer is PyTorch's AdamW throughout. Loss, evaluation,
every gradient and every weight afterwards have to agree to rounding. Native models run in float64,
so that a pass proves the algebra and not the luck of a tolerance; models behind transformers in
float32, since their code rounds there.

The certificate speaks of these computations alone: not of bfloat16, of the kernels of a device
(tests/parity holds these to their references), or of sizes beyond those of the trial.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sterna.core.errors import ConfigError, TrainError
from sterna.core.rundir import write_atomic
from sterna.model.hub import resolve_model
from sterna.parallel.config import ParallelConfig
from sterna.parallel.launch import LocalRanks, RankError
from sterna.train.autoplan import is_chosen
from sterna.train.config import Recipe
from sterna.train.longseq.config import LongseqSection
from sterna.train.sft import is_foreign
from sterna.train.trial import Errors, Result, Row, Trial, compare, run_trial
from sterna.train.trialmodel import TrialModel
from sterna.train.verifystates import states_errors
from sterna.version import __version__

LIMITS = {"float64": 1e-10, "float32": 1e-5}
MAX_RANKS = 8  # processes of this machine; larger meshes are shrunk, and the certificate says so
NUM_LAYERS, VOCAB_SIZE = 2, 512
TILE = 13  # tokens; no row of ROWS is a multiple
ROWS = (
    Row((5, 18, 14)),
    Row((33,), trained=(2, 5)),
    Row((21, 9), drop=0.0),
    Row((1, 39), trained=(0, 9)),
)
RUN = "sterna.train.trial:run_trial"
STATES = "offloaded states"


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One feature, or all, against plain training."""

    feature: str
    world: int
    errors: Errors | None  # None when it could not run; `failure` says why
    limit: float
    seconds: float
    failure: str = ""

    @property
    def is_passed(self) -> bool:
        """Whether every error is within the limit."""
        return self.errors is not None and self.errors.worst <= self.limit


@dataclasses.dataclass(frozen=True, slots=True)
class Certificate:
    """What was compared and how it came out."""

    model: str
    dtype: str
    num_layers: int
    vocab_size: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    date: str
    versions: dict[str, str]

    @property
    def is_passed(self) -> bool:
        """Whether every check is."""
        return all(check.is_passed for check in self.checks)

    def save(self, folder: Path) -> None:
        """Write parity.json and parity.txt, each whole or not at all."""
        content = {**dataclasses.asdict(self), "is_passed": self.is_passed}
        write_atomic(folder / "parity.json", json.dumps(content, indent=2) + "\n")
        write_atomic(folder / "parity.txt", self.text())

    def text(self) -> str:
        """A table for people."""
        head = ("feature", "ranks", "loss", "eval", "gradients", "weights", "limit", "")
        lines = [head, *(_line(check) for check in self.checks)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        shape = f"{self.model}: first {self.num_layers} layers, {self.vocab_size} tokens"
        title = f"Parity with plain training, {self.date}\n{shape}, {self.dtype}; relative errors"
        failures = [f"{check.feature}: {check.failure}" for check in self.checks if check.failure]
        verdict = "PASSED" if self.is_passed else "FAILED"
        return "\n".join([title, "", *table, "", *failures, *self.notes, verdict]) + "\n"

    def require(self) -> None:
        """TrainError naming the checks that failed, if any did."""
        failed = [check.feature for check in self.checks if not check.is_passed]
        if failed:
            raise TrainError(
                f"parity with plain training failed for {', '.join(failed)}; the run is not "
                "started, since it would train something else. See parity.txt in the run folder"
            )


def verify(recipe: Recipe, report: Callable[[str], None] = lambda _: None) -> Certificate:
    """Compare every feature the recipe enables with plain training; takes about a minute.

    `report` is told each feature before it runs. Raises ConfigError for a recipe with parts the
    certificate does not cover, ModelError for a model that cannot be read or is refused.
    """
    _refuse_uncovered(recipe)
    notes: list[str] = []
    plain = _plain(recipe)
    reference = run_trial(plain)
    assert reference is not None
    checks = []
    with LocalRanks() as ranks:
        for feature, trial, world in _trials(recipe, plain, notes):
            report(feature)
            checks.append(_check(ranks, reference, feature, trial, world))
    if recipe.offload.states != "memory":
        report(STATES)
        checks.append(_check_states(recipe))
    model = plain.model
    return Certificate(
        model=model.path or str(recipe.model.config),
        dtype=plain.dtype,
        num_layers=model.num_layers or 0,
        vocab_size=model.vocab_size or 0,
        checks=tuple(checks),
        notes=tuple(notes),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"sterna": __version__, "torch": torch.__version__},
    )


def _refuse_uncovered(recipe: Recipe) -> None:
    """Parts that change what is trained need a reference of their own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("start --verify without torchrun: it starts its own ranks here")
    uncovered = [f"kind = {recipe.kind}"] if recipe.kind == "distill" else []
    uncovered += ["a quantised base"] if recipe.model.weights not in ("auto", "bf16") else []
    uncovered += ["model.neftune_alpha"] if recipe.model.neftune_alpha else []
    if uncovered:
        raise ConfigError(
            f"the parity certificate does not cover {', '.join(uncovered)}; verify the recipe "
            "without, or start the run without --verify"
        )


def _plain(recipe: Recipe) -> Trial:
    path = None if recipe.model.config is not None else resolve_model(recipe.model.path)
    is_hf = path is not None and is_foreign(recipe, path)
    values: dict[str, Any] | None = None
    if recipe.model.config is not None:
        values = json.loads(recipe.model.config.read_text())
        layers = min(NUM_LAYERS, int(values["num_hidden_layers"]))
        vocab = min(VOCAB_SIZE, int(values["vocab_size"]))
        values = {**values, "num_hidden_layers": layers, "vocab_size": vocab}
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][:layers]
    model = TrialModel(
        config=values,
        path="" if path is None else str(path),
        backend="hf" if is_hf else "native",
        num_layers=NUM_LAYERS,
        vocab_size=VOCAB_SIZE,
    )
    adapter = None if recipe.adapter is None else recipe.adapter.model_dump()
    if adapter is not None:
        adapter |= {"dropout": 0.0, "layers": ()}  # what it adapts is unchanged by either
    return Trial(
        ROWS,
        model,
        dtype="float32" if is_hf else "float64",
        adapter=adapter,
        loss=recipe.loss.model_dump(),
        seed=recipe.run.seed,
    )


def _trials(recipe: Recipe, plain: Trial, notes: list[str]) -> Iterator[tuple[str, Trial, int]]:
    """Each enabled feature alone, then all: (name, trial, number of ranks)."""
    config = recipe.parallel
    sp, dp = _shrunk(config, notes)
    cut = "none" if config.shard == "none" else "full"
    inner = {"ulysses": config.ulysses} if config.ulysses else {}
    yield "trainer's step", dataclasses.replace(plain, chunked_head=7), 1
    long = _long(recipe.longseq, notes)
    if long:
        yield "long rows", dataclasses.replace(plain, longseq=long), 1
    if sp > 1:
        alone = {"sp": sp, "shard": "none", **inner}
        yield f"sequence over {sp}", dataclasses.replace(plain, parallel=alone), sp
    if dp > 1:
        alone = {"dp": dp, "shard": "none"}
        yield f"rows over {dp}", dataclasses.replace(plain, parallel=alone), dp
    if cut == "full" and dp * sp > 1:
        alone = {"dp": max(2, dp), "shard": "full"}
        yield "sharded weights", dataclasses.replace(plain, parallel=alone), max(2, dp)
    folder = _offload_folder(recipe, plain, dp * sp, notes)
    if folder:
        yield (
            "offloaded weights",
            dataclasses.replace(plain, longseq={"checkpoint": True}, offload_folder=folder),
            1,
        )
    together = {"dp": dp, "sp": sp, "shard": cut, **inner}
    everything = dataclasses.replace(
        plain, parallel=together, chunked_head=7, longseq=long, offload_folder=folder
    )
    yield "all", everything, dp * sp


def _offload_folder(recipe: Recipe, plain: Trial, world: int, notes: list[str]) -> str:
    """Where the trial's weights wait; empty when the recipe leaves them in memory."""
    settings = recipe.offload
    if settings.weights == "memory":
        return ""
    if world > 1 or plain.model.backend == "hf":
        raise ConfigError(
            "offload.weights is for native models on one rank, as the run would say; set it to "
            "memory",
            param="offload.weights",
        )
    if not recipe.longseq.checkpoint:
        raise ConfigError(
            "offload.weights needs longseq.checkpoint: a block's weights come twice a step",
            param="longseq.checkpoint",
        )
    if settings.weights == "host":
        notes.append("note: weights waited on disk, the recipe has them in pinned memory")
    folder = settings.folder or recipe.run.output
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _long(settings: LongseqSection, notes: list[str]) -> dict[str, Any]:
    """The recipe's checkpoints and tiles for rows of the trial: tiles that cut these."""
    long = settings.model_dump(exclude={"head_rows", "folder"}, exclude_defaults=True)
    if settings.auto and not is_chosen(settings):
        long |= {"checkpoint": True, "mlp_tile": TILE, "attention_tile": TILE}
        notes.append("note: longseq.auto was tried as checkpoints and tiles, its frugal end")
    if long.pop("tier", "memory") != "memory":
        notes.append("note: checkpoints were kept in memory, whatever longseq.tier says")
    for key in ("mlp_tile", "attention_tile"):
        if long.get(key):
            long[key] = min(long[key], TILE)
    return long


def _shrunk(config: ParallelConfig, notes: list[str]) -> tuple[int, int]:
    """(sp, dp) to try: the recipe's, or smaller ones where this machine has too few processes.

    dp ranks are alike, so two stand for many; rows bound dp at their number.
    """
    sp, dp = config.sp, min(config.dp or 1, 2)
    while sp > MAX_RANKS or sp * dp > MAX_RANKS:
        if dp > 1:
            dp = 1
        elif sp % 2 == 0:
            sp //= 2
        else:
            sp = MAX_RANKS
    if (sp, dp) != (config.sp, config.dp or 1):
        notes.append(
            f"note: tried with sp {sp} and dp {dp}, the recipe has sp {config.sp} and dp "
            f"{config.dp or 'as many as start'}"
        )
    return sp, dp


def _check(ranks: LocalRanks, reference: Result, feature: str, trial: Trial, world: int) -> Check:
    started, limit = time.perf_counter(), LIMITS[trial.dtype]
    try:
        result = run_trial(trial) if world == 1 else ranks.run(world, RUN, trial)[0]
    except RankError as error:
        failure = error.message.strip().splitlines()[-1]
        return Check(feature, world, None, limit, time.perf_counter() - started, failure)
    assert result is not None
    errors = compare(reference, result)
    return Check(feature, world, errors, limit, time.perf_counter() - started)


def _check_states(recipe: Recipe) -> Check:
    """States on disk give the bits of states in memory, whatever their format."""
    started = time.perf_counter()
    folder = recipe.offload.folder or recipe.run.output
    folder.mkdir(parents=True, exist_ok=True)
    errors = states_errors(recipe, folder)
    return Check(STATES, 1, errors, 0.0, time.perf_counter() - started)


def _line(check: Check) -> tuple[str, ...]:
    verdict = "passed" if check.is_passed else "FAILED"
    found = check.errors
    values = (
        ("-",) * 4
        if found is None
        else tuple(f"{x:.1e}" for x in (found.loss, found.eval_loss, found.grad, found.weight))
    )
    return (check.feature, str(check.world), *values, f"{check.limit:.0e}", verdict)
