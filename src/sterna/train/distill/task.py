"""`kind = "distill"` in the trainer: what is built, what the loss is, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sterna.core.errors import ConfigError
from sterna.model.decoder import Decoder
from sterna.model.hf_weights import SafetensorsSource
from sterna.model.hub import resolve_model
from sterna.model.save import hf_config
from sterna.model.speculator import SpeculatorConfig
from sterna.model.speculator_file import fill, read_speculator_config, speculator_hf_config
from sterna.model.swiftkv_config import SwiftKVConfig
from sterna.model.weights import export, read_parameter
from sterna.parallel.mesh import Mesh
from sterna.quant.load import PLAIN, load_quantized
from sterna.train.config import Recipe
from sterna.train.distill.fit import fit_start
from sterna.train.distill.frequent import frequent_tokens
from sterna.train.distill.measure import MeasureDrafts, MeasureStudent
from sterna.train.distill.speculator import SpeculatorPair, speculator_loss
from sterna.train.distill.swiftkv import (
    SwiftKVPair,
    own_parameters,
    swiftkv_loss,
)
from sterna.train.hooks import Hook
from sterna.train.longseq.config import LongseqSection
from sterna.train.step import Loss
from sterna.train.task import Task, Weights, plain_form


def distillation(recipe: Recipe) -> Task:
    """The task of the recipe's `distill.kind`."""
    return SwiftKVTask() if recipe.distill.kind == "swiftkv" else SpeculatorTask()


class SwiftKVTask:
    """A student whose later layers read keys and values of one hidden state."""

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The recipe's model as teacher, and its student with the weights of `source`, if any."""
        teacher = _base(recipe, mesh)
        pair = SwiftKVPair(teacher, swift_config(recipe, teacher))
        if source is not None:
            _fill_student(pair, source)
        elif recipe.distill.fit_tokens:
            fit_start(pair, recipe, mesh)
        return pair

    def loss(self, recipe: Recipe) -> Loss:
        """KL and the hidden states' difference."""
        return partial(
            swiftkv_loss,
            temperature=recipe.distill.temperature,
            hidden_weight=recipe.distill.hidden_weight,
            chunk_rows=recipe.longseq.head_rows or None,
        )

    def weights(self, model: nn.Module) -> Weights:
        """The whole student."""
        assert isinstance(model, SwiftKVPair)
        student = model.student
        return Weights(export(student, student.config.hf_names), hf_config(student), {})

    def final(self, model: nn.Module) -> Weights | None:
        """Checkpoints hold the whole student."""
        return None

    def hooks(self, recipe: Recipe) -> Sequence[Hook]:
        """Held-out loss, KL and accuracy against the teacher."""
        return (MeasureStudent(recipe.run.output),)


class SpeculatorTask:
    """Heads that draft the next tokens from the model's hidden states."""

    def build(self, recipe: Recipe, mesh: Mesh, source: Path | None) -> nn.Module:
        """The recipe's model, frozen, and a speculator: new, or that of `source`."""
        base = _base(recipe, mesh)
        if mesh.sp.size > 1:
            raise ConfigError(
                "a speculator reads the tokens after each position, which sequence parallelism "
                "cuts apart; use parallel.sp = 1"
            )
        config = speculator_config(recipe, base)
        if source is not None:
            config = read_speculator_config(source / "config.json")
        elif recipe.distill.draft_vocab:
            config = replace(config, draft_tokens=frequent_tokens(recipe))
        pair = SpeculatorPair(base, config, recipe.run.seed)
        if source is not None:
            fill(pair.speculator, source)
        return pair

    def loss(self, recipe: Recipe) -> Loss:
        """Cross entropy of all drafts."""
        return partial(speculator_loss, chunk_rows=recipe.longseq.head_rows or None)

    def weights(self, model: nn.Module) -> Weights:
        """The speculator alone."""
        assert isinstance(model, SpeculatorPair)
        tensors = ((name, p.detach()) for name, p in model.speculator.named_parameters())
        return Weights(tensors, speculator_hf_config(model.speculator.config), {})

    def final(self, model: nn.Module) -> Weights | None:
        """Checkpoints hold the speculator."""
        return None

    def hooks(self, recipe: Recipe) -> Sequence[Hook]:
        """Simulated acceptance on the held-out rows."""
        return (MeasureDrafts(recipe.run.output),)


def swift_config(recipe: Recipe, teacher: Decoder) -> SwiftKVConfig:
    """The recipe's SwiftKV settings for a model."""
    layers = recipe.distill.layers or teacher.config.num_hidden_layers // 2
    return SwiftKVConfig(layers, recipe.distill.group_size)


def speculator_config(recipe: Recipe, base: Decoder) -> SpeculatorConfig:
    """The recipe's speculator settings for a model."""
    distill, config = recipe.distill, base.config
    return SpeculatorConfig(
        cell="mlp" if distill.kind == "mlp_speculator" else "lstm",
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        inner_size=distill.inner_size or config.hidden_size,
        num_drafts=distill.drafts,
        scales_input=distill.scales_input,
        shares_base=distill.shares_base,
        base_family=config.family.name,
    )


def _base(recipe: Recipe, mesh: Mesh) -> Decoder:
    """The frozen model. ConfigError for settings that mean nothing here or are not proven."""
    if mesh.data.size > 1 and recipe.parallel.shard != "none":
        raise ConfigError(
            "distillation keeps whole weights on every rank; set parallel.shard = 'none'",
            param="parallel.shard",
        )
    if recipe.longseq != LongseqSection.model_validate({"head_rows": recipe.longseq.head_rows}):
        raise ConfigError(
            "[longseq] checkpoints and tiles do not work with distillation yet; only "
            "longseq.head_rows does. Shorten data.seq_len instead",
            param="longseq",
        )
    refused = {
        "model.config": recipe.model.config is not None,
        "model.backend = 'hf'": recipe.model.backend == "hf",
        "model.neftune_alpha": recipe.model.neftune_alpha > 0,
        "log.sample_prompts": bool(recipe.log.sample_prompts),
    }
    for name, is_set in refused.items():
        if is_set:
            raise ConfigError(f"{name} has no meaning for kind = 'distill'; leave it out")
    path = resolve_model(recipe.model.path)
    return plain_form(load_quantized(path, recipe.model.dtype, mesh.device, PLAIN).decoder, path)


@torch.no_grad()
def _fill_student(pair: SwiftKVPair, folder: Path) -> None:
    """The student's own parameters from a checkpoint folder."""
    source = SafetensorsSource(folder)
    names = pair.student.config.hf_names
    for name, parameter in own_parameters(pair.student).items():
        parameter.copy_(read_parameter(source, name, names, parameter.shape, parameter.dtype))
