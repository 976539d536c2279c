"""The models of a run and what of each is in memory: counted on decoders without storage.

policy      weights of the trainer and of the engine at once; with an adapter a frozen base
critic      a trunk and a score; on the policy's base an adapter and a score alone
reference   a second model, or the policy with its adapter off: nothing
rewards     one model each; an adapter of the policy's base where that is what was trained
teacher     distillation's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sterna.align.adapted import is_adapter_folder, shares_base
from sterna.align.config import RlRecipe
from sterna.model.config import ModelConfig
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.model.load import DTYPES, load_config, open_checkpoint, quant_method
from sterna.model.peft import WEIGHTS_NAME, read_peft
from sterna.model.swiftkv import new_decoder
from sterna.model.value import is_value_folder, value_config
from sterna.quant.formats import WeightFormat, parse_format
from sterna.quant.linear import weight_shapes
from sterna.train.adapter import add_adapter
from sterna.train.adapter_config import AdapterConfig
from sterna.train.config import ModelSection, OptimSection
from sterna.train.longseq.config import Tier
from sterna.train.memory import MOMENT_BYTES, Shape
from sterna.train.pretrain import read_config


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose sizes stand for a path of a recipe: a folder, file or config.json."""

    path: Path
    adapter: float = 0.0  # numbers of the adapter that lies there, on the model of `path`


Locate = Callable[[str], Origin]  # ModelError where nothing is known


@dataclass(frozen=True, slots=True)
class Held:
    """A model and the bytes it takes. `shape` has its sizes, also where the weights are shared."""

    name: str
    shape: Shape
    dtype_bytes: int
    own: float  # bytes of the weights that are not another model's
    matrices: float  # numbers in its matrices, the tables included
    trained: float = 0.0  # numbers that take gradients
    states: float = 0.0  # bytes of their optimizer, masters included
    is_adapted: bool = False
    shares_base: bool = False  # with the policy
    tier: Tier = "memory"

    @property
    def ropes(self) -> float:
        """Bytes of its float32 rope tables."""
        return 4.0 * self.shape.positions * self.shape.head_dim

    @property
    def block(self) -> float:
        """Bytes of one block's weights."""
        return float(self.shape.block_weights * self.dtype_bytes)

    @property
    def can_move(self) -> bool:
        """Whether its weights may wait elsewhere: frozen, and nobody else's."""
        return self.name != "policy" and not self.states and not self.shares_base

    @property
    def away(self) -> float:
        """Bytes that wait in its tier: all weights but the last norm."""
        return self.own if self.tier != "memory" else 0.0


def located(path: str) -> Origin:
    """A path of a recipe as it is on this machine; a config.json stands for its model."""
    if path.endswith(".json"):
        return Origin(Path(path))
    folder = resolve_model(path)
    if not is_adapter_folder(folder):
        return Origin(folder)
    base = str(read_peft(folder).config.get("base_model_name_or_path") or "")
    return Origin(resolve_model(base), (folder / WEIGHTS_NAME).stat().st_size / 4)


def config_of(path: Path) -> ModelConfig:
    """The sizes of a model or value model, from its header alone. Errors as the loaders'."""
    if path.suffix == ".json":
        return read_config(path)
    if is_value_folder(path):
        return value_config(path)
    if path.is_dir() and quant_method(load_config(path)) is not None:
        return load_config(path)
    return open_checkpoint(path)[0]


def held_models(recipe: RlRecipe, locate: Locate = located) -> list[Held]:
    """Every model that a process of the run holds, the policy first. Errors as the loaders'."""
    policy = _policy(recipe, locate)
    found = [policy]
    if recipe.algorithm.kind == "ppo":
        found.append(_critic(recipe, policy, locate))
    settings = recipe.algorithm
    if (settings.kl_coef or settings.kl_target) and (recipe.adapter is None or recipe.reference):
        path = recipe.reference or recipe.model.path
        found.append(_frozen("reference", path, recipe, locate, recipe.memory.reference))
    if recipe.distill.teacher:
        path = recipe.distill.teacher
        found.append(_frozen("teacher", path, recipe, locate, recipe.memory.reference))
    return [*found, *_rewards(recipe, policy, locate)]


def parts_of(config: ModelConfig, adapter: AdapterConfig | None) -> tuple[Shape, float, float]:
    """(sizes with counted weights, numbers in matrices, numbers of the adapter)."""
    decoder = new_decoder(config, torch.float32, "meta")
    blocks = sum(p.numel() for p in decoder.layers.parameters())
    tables = _tables(decoder)
    shape = replace(
        Shape.of(config),
        counted_block=-(-blocks // len(decoder.layers)),
        counted_tables=tables,
        is_tied=decoder.lm_head is None,
    )
    matrices = sum(rows * columns for _, rows, columns, _ in weight_shapes(decoder))
    if adapter is None:
        return shape, float(matrices), 0.0
    add_adapter(decoder, adapter)
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    return shape, float(matrices), float(trained)


def stored_bytes(form: WeightFormat, matrices: float, width: int) -> float:
    """Of quantised matrices of about `width` columns: codes, and scales of rows or groups."""
    scale = {"float32": 4.0, "float16": 2.0, "e8m0": 1.0}[form.scale]
    return matrices * (form.bits / 8 + scale / (form.group_size or width))


def _tables(decoder: Decoder) -> int:
    heads = (decoder.embed_tokens, decoder.embed_positions, decoder.lm_head)
    return sum(p.numel() for head in heads if head is not None for p in head.parameters())


def states_of(optim: OptimSection, trained: float, dtype_bytes: int) -> float:
    """Bytes of moments and masters of so many trained numbers."""
    master = 4.0 if optim.master and dtype_bytes < 4 else 0.0
    return trained * (master + MOMENT_BYTES[optim.states])


def _policy(recipe: RlRecipe, locate: Locate) -> Held:
    path, size = locate(recipe.model.path).path, _size(recipe.model)
    shape, matrices, adapter = parts_of(config_of(path), recipe.adapter)
    if recipe.adapter is None:
        states = states_of(recipe.optim, shape.weights, size)
        return Held("policy", shape, size, float(shape.weights * size), matrices,
                    float(shape.weights), states)  # fmt: skip
    base = _base_bytes(recipe.model, path, shape, matrices)
    states = states_of(recipe.optim, adapter, 4)
    return Held("policy", shape, size, base + 4 * adapter, matrices, adapter, states, True)


def _base_bytes(model: ModelSection, path: Path, shape: Shape, matrices: float) -> float:
    """Of a frozen base: plain, as it is stored, or rounded at load; its tables stay plain."""
    plain = float(shape.weights * _size(model))
    if model.weights not in ("auto", "bf16"):
        inside = matrices - shape.table_weights
        return (
            plain
            - inside * _size(model)
            + stored_bytes(parse_format(model.weights), inside, shape.hidden)
        )
    if model.weights == "auto" and path.is_dir() and quant_method(load_config(path)) is not None:
        files = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return min(plain, files + float(shape.table_weights * _size(model)))
    return plain


def _critic(recipe: RlRecipe, policy: Held, locate: Locate) -> Held:
    optim, size = recipe.critic.optim, policy.dtype_bytes
    if _shares(recipe, locate):
        shape = _headless(policy.shape)
        trained = policy.trained + shape.hidden
        states = states_of(optim, trained, 4)
        return Held("critic", shape, size, 4 * trained, policy.matrices, trained, states, True)
    config = config_of(locate(recipe.critic.path or recipe.model.path).path)
    whole, matrices, _ = parts_of(config, None)
    shape = _headless(whole)
    states = states_of(optim, shape.weights, size) + states_of(optim, shape.hidden, 4)
    own = float(shape.weights * size + 4 * shape.hidden)
    return Held("critic", shape, size, own, matrices, float(shape.weights), states)


def _shares(recipe: RlRecipe, locate: Locate) -> bool:
    """As `shares_base`, also for models that do not exist yet."""
    path = recipe.critic.path
    if recipe.adapter is not None and path and locate(path) == locate(recipe.model.path):
        return recipe.critic.shared is not False
    return shares_base(recipe) if not path else bool(recipe.critic.shared)


def _frozen(name: str, path: str, recipe: RlRecipe, locate: Locate, tier: Tier) -> Held:
    shape, matrices, _ = parts_of(config_of(locate(path).path), None)
    size = _size(recipe.model)
    return Held(name, shape, size, float(shape.weights * size), matrices, tier=tier)


def _rewards(recipe: RlRecipe, policy: Held, locate: Locate) -> Iterator[Held]:
    sections = [section for section in recipe.rewards if section.kind == "model"]
    for i, section in enumerate(sections):
        name = "reward" if len(sections) == 1 else f"reward {i + 1}"
        origin, base = locate(section.path), locate(recipe.model.path)
        extra = 4 * (origin.adapter + policy.shape.hidden)
        if origin.adapter and recipe.adapter is not None and origin.path == base.path:
            yield Held(name, _headless(policy.shape), policy.dtype_bytes, extra, policy.matrices,
                       is_adapted=True, shares_base=True)  # fmt: skip
            continue
        plain = _frozen(name, section.path, recipe, locate, recipe.memory.rewards)
        shape = _headless(plain.shape)
        own = float(shape.weights * plain.dtype_bytes + 4 * (origin.adapter + shape.hidden))
        yield replace(plain, shape=shape, own=own, is_adapted=bool(origin.adapter))


def _headless(shape: Shape) -> Shape:
    """A value model's: the embedding is its only table."""
    tables = shape.counted_tables - (0 if shape.is_tied else shape.vocab * shape.hidden)
    return replace(shape, counted_tables=tables, is_tied=True)


def _size(model: ModelSection) -> int:
    return DTYPES[model.dtype].itemsize
