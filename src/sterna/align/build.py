"""From a recipe to a run: folder, models, engine, data, rewards, hooks, in this order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sterna.align.adapted import load_policy, shared_critic, shares_base
from sterna.align.answers import Answers
from sterna.align.auditor import Auditor
from sterna.align.changes import changed
from sterna.align.config import PromptSection, RlRecipe
from sterna.align.critic import load_critic
from sterna.align.distill.learner import DistillLearner
from sterna.align.distill.teach import GivenDraw, load_teacher
from sterna.align.draw import Draw, make_draw, make_toolbox, speaks_chat
from sterna.align.engines import RolloutEngine, make_engine
from sterna.align.keep import keep
from sterna.align.kl import KLController
from sterna.align.learner import Learner, Trained
from sterna.align.memory.away import Frozen
from sterna.align.memory.start import placed
from sterna.align.models import distribution_of, is_exact, logprobs_of, make_models
from sterna.align.prompts import PromptStream, that_fit
from sterna.align.ptx import make_ptx
from sterna.align.ranks import NoReward, on_main, threads_of_rank
from sterna.align.records import Dump, RlMetrics, RlProgress, Samples
from sterna.align.reward import Reward
from sterna.align.rewards import make_rewards
from sterna.align.rlhooks import RlHook
from sterna.align.rlreport import RlReport
from sterna.align.rltrainer import RlParts, RlTrainer
from sterna.align.tasks.base import Task
from sterna.align.tasks.table import make_task
from sterna.core.errors import ConfigError
from sterna.core.log import get_logger
from sterna.core.rundir import write_atomic
from sterna.kernels.device import check_device, set_threads
from sterna.model.decoder import Decoder
from sterna.model.hub import resolve_model
from sterna.parallel.mesh import Mesh
from sterna.text.save import tokenizer_files
from sterna.text.tokenizer import Tokenizer, load_tokenizer
from sterna.train import checkpoint
from sterna.train.config import OptimSection
from sterna.train.ema import Ema
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW
from sterna.train.parts import trained
from sterna.train.recipe import to_toml

_log = get_logger(__name__)
Schemas = Sequence[Mapping[str, Any]] | None
# What a resumed run may change: how long, where to, and what changes no bit of it.
FREE = (
    "run.steps",
    "run.output",
    "run.threads",
    "run.timeout_s",
    "rollout.workers",
    "rollout.kv_tokens",
    "rollout.transport",
    "memory.*",
    "run.dump",
    "run.samples",
    "checkpoint.*",
    "eval.*",
    "show.*",
    "run.report",
)


def build(
    recipe: RlRecipe,
    resume: bool = False,
    rewards: Sequence[Reward] = (),
    hooks: Sequence[RlHook] = (),
    at: Path | None = None,
    mesh: Mesh | None = None,
) -> RlTrainer:
    """Everything `align_rl` needs, ready to start. Errors as `align_rl`.

    `at`: a checkpoint to go on from, not the newest; the run's folder is then left as it is.
    `mesh`: the ranks, of which the first alone writes and rewards.
    """
    mesh = mesh or Mesh.single(recipe.model.device)
    check_device(recipe.model.device)
    set_threads(recipe.run.threads or threads_of_rank())
    source = at or on_main(mesh, lambda: _source(recipe, resume))
    recipe = on_main(mesh, lambda: placed(recipe, source))
    if source is not None:
        _check_recipe(recipe, source)
    torch.manual_seed(recipe.run.seed)
    device = torch.device(recipe.model.device)
    base = resolve_model(recipe.model.path)
    tokenizer = load_tokenizer(
        resolve_model(recipe.model.tokenizer) if recipe.model.tokenizer else base
    )
    policy = load_policy(recipe, base, source, device)
    if at is None and mesh.is_main:
        write_atomic(recipe.run.output / "recipe.toml", to_toml(recipe))
    hybrid = make_engine(recipe, policy, tokenizer)
    asked = that_fit(recipe.prompts, hybrid.max_model_len, recipe.rollout.max_tokens)
    teacher = _teacher(recipe, policy, tokenizer)
    learner = _learner(recipe, policy, hybrid, tokenizer, device, teacher)
    task = make_task(recipe.prompts.task, recipe.prompts.options) if recipe.prompts.task else None
    toolbox = make_toolbox(recipe)
    ask = make_draw(recipe, hybrid, tokenizer, toolbox)
    told = toolbox.schemas if toolbox and speaks_chat(recipe, tokenizer) else None
    weights = trained(policy)
    judges = rewards if mesh.is_main else [NoReward()]
    return RlTrainer(
        RlParts(
            recipe=recipe,
            tokenizer=tokenizer,
            hybrid=hybrid,
            draw=_draw(recipe, policy, ask, tokenizer),
            ask=ask,
            models=make_models(recipe, policy, hybrid, learner, base, device, teacher),
            learner=learner,
            ema=Ema(weights, recipe.optim.ema_decay) if recipe.optim.ema_decay else None,
            prompts=PromptStream(asked, tokenizer, task, tools=told),
            eval_prompts=_eval_prompts(recipe, asked, tokenizer, task, told),
            rewards=make_rewards(recipe, judges, task, tokenizer, policy),
            kl=_controller(recipe),
            hooks=(*_builtin_hooks(recipe), *hooks) if mesh.is_main else (),
            files=tokenizer_files(tokenizer),
            source=source,
        ),
        mesh.is_main,
    )


def _source(recipe: RlRecipe, resume: bool) -> Path | None:
    """The checkpoint to go on from. ConfigError for a used folder."""
    folder = recipe.run.output / "checkpoints"
    checkpoint.remove_leftovers(folder)
    newest = checkpoint.newest(folder)
    if newest is None or not resume:
        if newest is not None:
            raise ConfigError(
                f"{recipe.run.output} holds a run already ({newest.name}); go on with --resume, or "
                "give another run.output",
                param="run.output",
            )
        return None
    return newest


def _check_recipe(recipe: RlRecipe, folder: Path) -> None:
    """ConfigError naming the keys that may not differ from the checkpoint's."""
    saved = RlRecipe.model_validate(checkpoint.read_meta(folder)["recipe"])
    bad = {
        key: values
        for key, values in changed(saved, recipe).items()
        if not any(fnmatch(key, pattern) for pattern in FREE)
    }
    if bad:
        named = ", ".join(f"{key} ({old!r}, now {new!r})" for key, (old, new) in bad.items())
        raise ConfigError(
            f"the recipe differs from that of {folder}: {named}. Only {', '.join(FREE)} may "
            "change; restore it, or start a new run with model.path = that checkpoint"
        )


def _learner(
    recipe: RlRecipe,
    policy: Decoder,
    hybrid: RolloutEngine,
    tokenizer: Tokenizer,
    device: torch.device,
    teacher: Frozen | None,
) -> Learner:
    critic = None
    if recipe.algorithm.kind == "ppo":
        if shares_base(recipe):
            model = shared_critic(recipe, policy)
        else:
            path = recipe.critic.path or recipe.model.path
            model = load_critic(resolve_model(path), recipe.model.dtype, device, tokenizer)
        critic = _trained(recipe, model, recipe.critic.optim, recipe.run.seed + 1)
    kind: Callable[..., Learner] = Learner
    if teacher is not None and recipe.distill.loss == "full":
        kind = partial(DistillLearner, teacher, recipe.distill)
    return kind(
        _trained(recipe, policy, recipe.optim, recipe.run.seed),
        critic,
        recipe.algorithm,
        distribution_of(recipe),
        _correction(recipe, hybrid),
        recipe.run.seed,
        device,
        make_ptx(recipe.ptx, policy, tokenizer, device),
    )


def _teacher(recipe: RlRecipe, policy: Decoder, tokenizer: Tokenizer) -> Frozen | None:
    if not recipe.distill.teacher:
        return None
    return Frozen.of(load_teacher(recipe, policy, tokenizer), recipe, recipe.memory.reference)


def _trained(
    recipe: RlRecipe, model: torch.nn.Module, settings: OptimSection, seed: int
) -> Trained:
    keep(model, recipe.algorithm.micro_tokens, recipe.memory.budget_gb > 0)
    optimizer = AdamW(trained(model), settings, seed)
    return Trained(model, optimizer, Gradients(model.parameters()), settings.grad_clip)


def _correction(recipe: RlRecipe, hybrid: RolloutEngine) -> str:
    asked = recipe.algorithm.correction
    if asked != "auto":
        return asked
    return "none" if is_exact(recipe, hybrid) else "token_truncate"


def _draw(recipe: RlRecipe, policy: Decoder, ask: Draw, tokenizer: Tokenizer) -> Draw:
    if recipe.distill.lmbda == 1:
        return ask
    scored = partial(logprobs_of, policy, recipe=recipe, device=torch.device(recipe.model.device))
    return GivenDraw(ask, recipe.distill.lmbda, tokenizer, scored)


def _eval_prompts(
    recipe: RlRecipe, asked: PromptSection, tokenizer: Tokenizer, task: Task | None, told: Schemas
) -> PromptStream | None:
    if not (recipe.eval.every or recipe.show.every):
        return None
    return PromptStream(asked, tokenizer, task, "eval", told)


def _controller(recipe: RlRecipe) -> KLController:
    settings = recipe.algorithm
    return KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)


def _builtin_hooks(recipe: RlRecipe) -> list[RlHook]:
    folder = recipe.run.output
    hooks: list[RlHook] = [RlMetrics(folder), RlProgress(), Auditor(folder)]
    hooks += [Samples(folder, recipe.run.samples)] if recipe.run.samples else []
    hooks += [Dump(folder)] if recipe.run.dump else []
    hooks += [Answers(folder, recipe.show)] if recipe.show.every else []
    hooks += [RlReport()] if recipe.run.report else []
    return hooks
