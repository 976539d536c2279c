"""Reward models, DPO and KTO as tasks of the one Trainer: model, loss, files of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from sterna.align.adapted import value_files
from sterna.align.offline.config import OfflineRecipe
from sterna.align.offline.losses import KtoLoss, PreferenceLoss
from sterna.align.offline.measure import MeasureReward
from sterna.align.offline.ranking import RewardLoss
from sterna.align.offline.reference import (
    AdapterOff,
    FrozenCopy,
    Reference,
    precomputed,
    weights_hash,
)
from sterna.core.errors import CheckpointError, ConfigError
from sterna.core.machine import fingerprint
from sterna.data.loader import Loader
from sterna.data.pack import PackedRow
from sterna.kernels.load import load_kernels
from sterna.model.decoder import Decoder
from sterna.model.hf import HFDecoder
from sterna.model.hub import resolve_model
from sterna.model.value import (
    HEAD_NAME,
    SCORE,
    ValueModel,
    load_value_model,
)
from sterna.parallel.collectives import barrier
from sterna.parallel.mesh import Mesh
from sterna.text.tokenizer import load_tokenizer
from sterna.train.adapter import merge_adapter
from sterna.train.build import eval_data, positions_of, tokenizer_path
from sterna.train.config import LossSection, Recipe
from sterna.train.hooks import Hook
from sterna.train.longseq.config import LongseqSection
from sterna.train.lora import Lora
from sterna.train.rowloss import RowLoss
from sterna.train.sft import Sft, is_foreign
from sterna.train.step import Loss
from sterna.train.task import Task, Weights


def choose_task(recipe: OfflineRecipe) -> Task:
    """The task of a recipe's kind."""
    return RewardTask() if recipe.kind == "reward" else PreferenceTask()


class PreferenceTask:
    """DPO and KTO: the model of `sft` or `lora`, beside a frozen reference."""

    def __init__(self) -> None:
        self._policy: Sft = Sft()
        self._reference: Reference | None = None

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The policy; the reference is read or computed here too. Errors as `Sft.build`."""
        recipe = _checked(recipe, mesh)
        self._policy = Lora(recipe.adapter) if recipe.adapter is not None else Sft()
        model = self._policy.build(recipe, mesh, source)
        _check_long(recipe, model)
        self._reference = _reference(recipe, mesh, model, source)
        return model

    def loss(self, recipe: Recipe) -> Loss | RowLoss:
        """On pairs, or on labelled answers."""
        assert isinstance(recipe, OfflineRecipe) and self._reference is not None
        kind = KtoLoss if recipe.kind == "kto" else PreferenceLoss
        return kind(recipe.preference, self._reference, recipe.longseq.head_rows or None)

    def weights(self, model: nn.Module) -> Weights:
        """The policy's."""
        return self._policy.weights(model)

    def final(self, model: nn.Module) -> Weights | None:
        """The policy's, merged where it is adapted."""
        return self._policy.final(model)

    def hooks(self, recipe: Recipe) -> Sequence[Hook]:
        """None: the figures are those of the loss."""
        return ()


class RewardTask:
    """A reward model: a trunk, whole or with an adapter, and a score that is always trained."""

    def __init__(self) -> None:
        self._base = ""
        self._is_adapted = False
        self._loss = RewardLoss()

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """From a language model, or from a value model that is trained on."""
        recipe = _checked(recipe, mesh)
        self._loss = RewardLoss(recipe.reward.loss)
        if recipe.log.sample_prompts:
            raise ConfigError("a reward model answers nothing; leave out log.sample_prompts")
        if recipe.adapter is not None:
            self._base, self._is_adapted = recipe.model.path, True
            return _adapted(recipe, Lora(recipe.adapter), mesh, source)
        path = source or resolve_model(recipe.model.path)
        backend = "hf" if recipe.model.backend == "hf" else "native"
        if recipe.model.backend == "auto" and not _is_native(recipe, path):
            backend = "hf"
        model = load_value_model(path, recipe.model.dtype, mesh.device, backend)
        _check_long(recipe, model.trunk)
        return model

    def loss(self, recipe: Recipe) -> Loss | RowLoss:
        """On pairs."""
        return self._loss

    def weights(self, model: nn.Module) -> Weights:
        """The sequence classification folder; of an adapted trunk, the adapter and the score."""
        assert isinstance(model, ValueModel)
        return value_files(model, self._base)

    def final(self, model: nn.Module) -> Weights | None:
        """The whole model, the adapter merged; None where checkpoints hold it."""
        assert isinstance(model, ValueModel)
        if not self._is_adapted:
            return None
        assert isinstance(model.trunk, Decoder)
        merge_adapter(model.trunk)
        return value_files(model, "")

    def hooks(self, recipe: Recipe) -> Sequence[Hook]:
        """Accuracy and calibration on held-out pairs and others."""
        assert isinstance(recipe, OfflineRecipe)
        return (MeasureReward(recipe, self._loss),)


def _is_native(recipe: Recipe, path: Path) -> bool:
    from sterna.model.value import is_native_value_folder, is_value_folder

    if is_value_folder(path):
        return is_native_value_folder(path)
    return not is_foreign(recipe, path)


def _adapted(recipe: Recipe, lora: Lora, mesh: Mesh, source: Path | None) -> ValueModel:
    """The adapted trunk with a fresh score, or that of `source`."""
    trunk = lora.build(recipe, mesh, source)
    assert isinstance(trunk, Decoder)
    model = ValueModel(trunk)
    if source is not None:
        try:
            model.score.data.copy_(load_file(source / HEAD_NAME)[SCORE])
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{source / HEAD_NAME}: {error}; resume from another one"
            ) from error
    return model


def _checked(recipe: Recipe, mesh: Mesh) -> OfflineRecipe:
    """ConfigError for what has no meaning here, or is not proven."""
    assert isinstance(recipe, OfflineRecipe)
    refused = {
        "model.config": recipe.model.config is not None,
        "model.neftune_alpha": recipe.model.neftune_alpha > 0,
        "[loss]": recipe.loss != LossSection(),
        "offload.weights": recipe.offload.weights != "memory",
        "parallel.sp above 1": mesh.sp.size > 1,
        'parallel.shard on several ranks (set it to "none")': mesh.data.size > 1
        and recipe.parallel.shard != "none",
    }
    for name, is_set in refused.items():
        if is_set:
            raise ConfigError(f"{name} does not work with kind = {recipe.kind}; leave it out")
    return recipe


def _check_long(recipe: OfflineRecipe, model: nn.Module) -> None:
    """ConfigError for checkpoints and tiles of a model behind transformers: proven for sft only."""
    head_only = LongseqSection.model_validate({"head_rows": recipe.longseq.head_rows})
    if isinstance(model, HFDecoder) and recipe.longseq != head_only:
        raise ConfigError(
            f"[longseq] beyond head_rows does not work with kind = {recipe.kind} of a model behind "
            "transformers; leave it out",
            param="longseq",
        )


def _reference(
    recipe: OfflineRecipe, mesh: Mesh, policy: nn.Module, source: Path | None
) -> Reference:
    """As preference.reference says."""
    chosen, rows = recipe.preference, recipe.longseq.head_rows or None
    has_own = bool(chosen.reference_path)
    is_adapted = recipe.adapter is not None and not has_own
    if chosen.reference == "adapter" or (chosen.reference == "auto" and is_adapted):
        assert isinstance(policy, Decoder)
        return AdapterOff(policy, rows)
    if chosen.reference != "precomputed":
        return FrozenCopy(_loaded(recipe, mesh), rows)
    model = _loaded(recipe, mesh) if has_own or source is not None or is_adapted else policy
    if not mesh.is_main:  # it reads what the main rank has written
        barrier(mesh.data)
    read = _all_rows(recipe, model)
    kept = precomputed(lambda: model, _facts(recipe, model), read, rows)
    if mesh.is_main:
        barrier(mesh.data)
    return kept


def _loaded(recipe: OfflineRecipe, mesh: Mesh) -> nn.Module:
    """The reference as a model of its own."""
    path = recipe.preference.reference_path or recipe.model.path
    model = recipe.model.model_copy(update={"path": path})
    plain = recipe.model_copy(update={"model": model, "adapter": None})
    if recipe.adapter is None or recipe.model.weights in ("auto", "stored"):
        return Sft().build(plain, mesh, None)
    raise ConfigError(
        'a copy of a quantised base is not made; use preference.reference = "adapter"'
    )


def _all_rows(recipe: OfflineRecipe, model: Any) -> Iterator[PackedRow]:
    """Every row that the run can meet, in one process."""
    from rich.console import Console
    from rich.progress import track

    tokenizer, limit = load_tokenizer(tokenizer_path(recipe)), positions_of(recipe, model)
    total = recipe.run.steps * recipe.run.rows_per_step
    options: dict[str, Any] = {"console": Console(stderr=True), "transient": True}
    with Loader(recipe.data, tokenizer, max_document=limit) as loader:
        rows = islice(loader, total)
        yield from track(rows, "reference", total, **options)
    held_out = eval_data(recipe)
    if held_out is not None:
        data, part = held_out
        with Loader(data, tokenizer, part=part, max_document=limit) as loader:
            # Ranks share eval rows evenly, rounded up.
            yield from islice(loader, recipe.eval.max_rows + recipe.run.rows_per_step)


def _facts(recipe: OfflineRecipe, model: nn.Module) -> str:
    """What kept log-probs depend on, as text."""
    tokenizer, limit = load_tokenizer(tokenizer_path(recipe)), positions_of(recipe, model)
    parts = [(recipe.data, "train"), *filter(None, [eval_data(recipe)])]
    identities = []
    for data, part in parts:
        with Loader(data, tokenizer, part=part, max_document=limit) as loader:
            identities.append(loader.state_dict()["identity"])
    run = recipe.run
    numbers = (run.steps * run.rows_per_step, recipe.eval.max_rows, run.rows_per_step, limit)
    machine = (load_kernels().level, fingerprint().isa, str(model.device))
    made_by = (recipe.model.dtype, torch.__version__, *machine)
    return json.dumps([weights_hash(model), identities, numbers, made_by])
