"""From a recipe to a trainer: mesh, folder, model, data, optimizer, hooks, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sterna.core.errors import ConfigError
from sterna.core.log import get_logger
from sterna.core.rundir import write_atomic
from sterna.data.config import DataConfig
from sterna.data.loader import Loader
from sterna.data.pack import PackedRow
from sterna.kernels.device import check_device, set_threads
from sterna.model.hf import HFConfig
from sterna.model.hub import resolve_model
from sterna.parallel.mesh import Mesh, open_mesh
from sterna.text.save import tokenizer_files
from sterna.text.tokenizer import Tokenizer, load_tokenizer
from sterna.train.config import Recipe
from sterna.train.distill.task import distillation
from sterna.train.ema import Ema
from sterna.train.flops import FlopCounter, measure_peak
from sterna.train.hooks import Hook
from sterna.train.lora import Lora
from sterna.train.metrics import MetricsFile
from sterna.train.neftune import Neftune, embedding_of
from sterna.train.offload.place import offload
from sterna.train.optim import AdamW
from sterna.train.parts import Parts, trained
from sterna.train.pretrain import Pretrain
from sterna.train.progress import ProgressBar
from sterna.train.recipe import to_toml
from sterna.train.report import Generate, Report
from sterna.train.resume import find_source
from sterna.train.routines import Checkpoints, Evaluation
from sterna.train.schedule import horizon
from sterna.train.sft import Sft
from sterna.train.spread import shards_of, spread, use_longseq
from sterna.train.step import TrainStep
from sterna.train.task import Task
from sterna.train.trackers import MLflow, TensorBoard, Wandb, has_tensorboard
from sterna.train.trainer import Trainer

_log = get_logger(__name__)
TASKS: dict[str, type[Task]] = {"sft": Sft, "pretrain": Pretrain}


def build(
    recipe: Recipe,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    task: Task | None = None,
    generate: Generate | None = None,
) -> Trainer:
    """Everything `train` needs, ready to start. Errors as `train`."""
    check_device(recipe.model.device)
    set_threads(recipe.run.threads)
    steps = horizon(recipe)
    owns_mesh = not dist.is_initialized()
    mesh = open_mesh(recipe.parallel, recipe.model.device)
    _check_rows(recipe, mesh)
    source = find_source(recipe, resume, mesh)
    task = task or choose_task(recipe)
    torch.manual_seed(recipe.run.seed + mesh.rank)
    model = task.build(recipe, mesh, source)
    tokenizer = load_tokenizer(tokenizer_path(recipe))
    _check_vocabulary(tokenizer, model)
    positions = positions_of(recipe, model)
    if mesh.is_main:
        write_atomic(recipe.run.output / "recipe.toml", to_toml(recipe))
    away = offload(recipe, model, mesh)
    num_shards = shards_of(recipe.parallel, mesh).size
    recipe = use_longseq(model, recipe, mesh, num_shards, away.weights)
    shards = spread(model, recipe.parallel, mesh)
    weights = trained(model)
    return Trainer(
        Parts(
            recipe=recipe,
            mesh=mesh,
            owns_mesh=owns_mesh,
            shards=shards,
            task=task,
            model=model,
            step=_new_step(recipe, mesh, model, task, shards.size > 1),
            optimizer=AdamW(weights, recipe.optim, recipe.run.seed, away.home, away.places),
            ema=Ema(weights, recipe.optim.ema_decay) if recipe.optim.ema_decay else None,
            loader=_loader(recipe.data, tokenizer, mesh, "train", positions),
            eval_rows=_eval_rows(recipe, tokenizer, mesh, positions),
            flops=FlopCounter(model),
            peak_flops=_peak_flops(recipe, model, mesh),
            hooks=(*task.hooks(recipe), *_builtin_hooks(recipe, mesh, generate), *hooks),
            horizon=steps,
            files=tokenizer_files(tokenizer),
            source=source,
        )
    )


def choose_task(recipe: Recipe) -> Task:
    """The task of a recipe's kind and adapter; ConfigError for a kind whose task lives in align."""
    if recipe.kind not in (*TASKS, "distill"):
        raise ConfigError(
            f"kind = {recipe.kind} compares answers; run it with `sterna train`, or pass "
            "sterna.align.offline.task.choose_task(recipe)",
            param="kind",
        )
    if recipe.adapter is not None:
        return Lora(recipe.adapter)
    if recipe.kind == "distill":
        return distillation(recipe)
    return TASKS[recipe.kind]()


def _new_step(
    recipe: Recipe, mesh: Mesh, model: torch.nn.Module, task: Task, is_sharded: bool
) -> TrainStep:
    alpha, noise = recipe.model.neftune_alpha, None
    if alpha:
        noise = Neftune(embedding_of(model), alpha, recipe.run.seed, mesh.rank)
    return TrainStep(model, mesh, recipe.run.micro_rows, task.loss(recipe), noise, is_sharded)


def _check_rows(recipe: Recipe, mesh: Mesh) -> None:
    rows, dp = recipe.run.rows_per_step, mesh.dp.size
    if rows % dp:
        raise ConfigError(
            f"run.rows_per_step is {rows}, which {dp} data-parallel ranks cannot share evenly; "
            f"give a multiple of {dp}",
            param="run.rows_per_step",
        )


def tokenizer_path(recipe: Recipe) -> Path:
    """Where the recipe's tokenizer is; ConfigError for a model from scratch without one."""
    if recipe.model.tokenizer:
        return resolve_model(recipe.model.tokenizer)
    if recipe.model.config is not None:
        raise ConfigError(
            "a model from scratch has no tokenizer; name a folder or .gguf in model.tokenizer",
            param="model.tokenizer",
        )
    return resolve_model(recipe.model.path)


def _check_vocabulary(tokenizer: Tokenizer, model: Any) -> None:
    vocab_size = int(model.config.vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {vocab_size:,} rows for "
            "them; give the model's own tokenizer, or a model with a larger vocab_size",
            param="model.tokenizer",
        )


def positions_of(recipe: Recipe, model: Any) -> int | None:
    """Positions the model has, which no document may exceed; None = as many as are asked for."""
    positions: int | None = getattr(model.config, "num_positions", None)
    if isinstance(model.config, HFConfig):
        positions = getattr(model.config.hf, "max_position_embeddings", None)
    if positions is not None and positions < recipe.data.seq_len:
        _log.warning(
            "data.seq_len is %d, the model has %d positions: longer documents are too long (data."
            "too_long = %s); for more, raise max_position_embeddings in the model's config.json",
            recipe.data.seq_len, positions, recipe.data.too_long,
        )  # fmt: skip
    return positions


def _loader(
    data: DataConfig, tokenizer: Tokenizer, mesh: Mesh, part: str, positions: int | None
) -> Loader:
    dp = mesh.dp
    return Loader(data, tokenizer, rank=dp.rank, world=dp.size, part=part, max_document=positions)


def eval_data(recipe: Recipe) -> tuple[DataConfig, str] | None:
    """The data of evals and which part of them; None = no evals."""
    if recipe.eval.data is not None:
        return recipe.eval.data, "train"
    return (recipe.data, "held_out") if recipe.data.held_out else None


def _eval_rows(
    recipe: Recipe, tokenizer: Tokenizer, mesh: Mesh, positions: int | None
) -> list[PackedRow]:
    """This rank's held-out rows, read once: every eval is on the same."""
    found = eval_data(recipe)
    if found is None:
        return []
    data, part = found
    count = -(-recipe.eval.max_rows // mesh.dp.size)
    with _loader(data, tokenizer, mesh, part, positions) as loader:
        return list(islice(loader, count))


def _peak_flops(recipe: Recipe, model: torch.nn.Module, mesh: Mesh) -> float:
    """FLOP/s of all ranks together."""
    given = recipe.log.peak_tflops * 1e12
    dtype = next(model.parameters()).dtype
    return (given or measure_peak(dtype, mesh.device)) * mesh.data.size


def _builtin_hooks(recipe: Recipe, mesh: Mesh, generate: Generate | None) -> list[Hook]:
    """In the order of their calls: a step is logged before it is evaluated and saved."""
    routines: list[Hook] = [Evaluation(recipe.eval), Checkpoints(recipe.checkpoint)]
    if not mesh.is_main:
        return routines
    log, folder = recipe.log, recipe.run.output
    hooks: list[Hook] = [MetricsFile(folder, log.every), ProgressBar()]
    wants_board = has_tensorboard() if log.tensorboard is None else log.tensorboard
    hooks += [TensorBoard(folder)] if wants_board else []
    hooks += [MLflow(recipe)] if log.mlflow else []
    hooks += [Wandb(recipe)] if log.wandb else []
    return [*hooks, *routines, *([Report(generate)] if log.report else [])]
