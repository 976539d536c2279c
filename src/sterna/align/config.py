"""The recipe of reinforcement learning: one section a concern. Imports no torch.

Field descriptions are the help text and the docs table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sterna.align.memory.config import MemorySection
from sterna.data.config import DataConfig, SourceConfig
from sterna.train.adapter_config import AdapterConfig
from sterna.train.config import (
    CheckpointSection,
    ModelSection,
    OptimSection,
    ScheduleSection,
    Section,
)

Algorithm = Literal["ppo", "grpo", "rloo", "reinforce", "distill"]


class PromptSection(Section):
    """Where prompts come from: one of path, sources and task."""

    path: str = Field(
        default="", description="JSONL of rows with `prompt` (text, messages or token ids); "
        "other columns go to the rewards",
    )  # fmt: skip
    sources: tuple[SourceConfig, ...] = Field(
        default=(), description="files of any kind and format, as [[data.sources]]: of prompts, or "
        "of rows with answers, of which the prompt is taken; endless, whatever their epochs",
    )  # fmt: skip
    task: str = Field(default="", description="a built-in task that makes prompts and rewards them")
    options: dict[str, int | float | str] = Field(
        default_factory=dict, description="of the task, such as {max_number = 99}"
    )
    system: str = Field(default="", description="system prompt of text prompts")
    render: Literal["auto", "chat", "plain"] = Field(
        default="auto", description="text prompts through the chat template, where there is one"
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template"
    )
    max_tokens: int = Field(default=512, gt=0, description="longer prompts are dropped, counted")
    seed: int = Field(default=0, ge=0, description="of the order and of a task's prompts")
    held_out: float = Field(
        default=0.1, ge=0, lt=1, description="sources: share of the prompts kept for [eval]"
    )
    split: tuple[float, ...] = Field(
        default=(), description="sources: shares of the parts that prompts are divided into, as "
        "data.split; with the same seed and sources no prompt is in two",
    )  # fmt: skip
    split_part: int = Field(default=0, ge=0, description="which part is read, from 0")
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="sources: malformed rows stop the run, or are counted"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> PromptSection:
        if bool(self.path) + bool(self.task) + bool(self.sources) != 1:
            raise ValueError("give one of prompts.path, prompts.sources and prompts.task")
        if not self.sources and (self.split or self.split_part):
            raise ValueError("prompts.split parts prompts.sources, and there are none")
        if self.split_part and self.split_part >= len(self.split):
            raise ValueError(
                f"split_part = {self.split_part}, but split has {len(self.split)} parts (from 0)"
            )
        return self


class RolloutSection(Section):
    """How completions are made."""

    prompts_per_step: int = Field(default=8, gt=0, description="different prompts of one step")
    group_size: int = Field(default=4, gt=0, description="completions of each prompt")
    max_tokens: int = Field(default=128, gt=0, description="longest completion")
    temperature: float = Field(default=1.0, gt=0, description="of the sampling distribution")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus; log-probs follow it")
    top_k: int = Field(default=0, ge=0, description="0 = off; log-probs follow it")
    stop: tuple[str, ...] = Field(default=(), description="strings that end a completion")
    ignore_eos: bool = Field(
        default=False, description="every completion has max_tokens tokens: for speed benches"
    )
    weights: str = Field(
        default="auto",
        description="policy = the trainer's own; packed = a copy of the same bits that is read "
        "faster; auto = packed where that pays (on a CPU, without adapter), else policy; "
        "merged = a copy with the adapter folded in; fp6, int8, ... = a quantised copy. "
        "Copies are made anew after each step, the mismatch of the last two corrected",
    )
    speculation: bool = Field(
        default=False,
        description="guess tokens ahead from siblings and earlier epochs: same tokens; only "
        "as many as measured steps say will pay",
    )
    staleness: int = Field(
        default=0, ge=0, le=1, description="1 = a step's completions are drawn by the weights "
        "before the last update, beside its training with `workers`; corrected by importance",
    )  # fmt: skip
    workers: int = Field(
        default=0, ge=0, le=64, description="processes beside the trainer's, on this machine, that "
        "make the completions; 0 = the trainer's own; the same tokens",
    )  # fmt: skip
    transport: Literal["shared", "broadcast"] = Field(
        default="shared", description="how weights reach `workers`: a mapped file of this machine, "
        "or a gloo group",
    )  # fmt: skip
    token_budget: int = Field(default=1024, gt=0, description="tokens of an engine step")
    kv_tokens: int = Field(
        default=0, ge=0, description="tokens the KV cache holds; 0 = what a step's rollouts need"
    )
    tools: tuple[str, ...] = Field(
        default=(), description="Python functions that the policy may call, file.py:name each"
    )
    max_turns: int = Field(
        default=4, gt=0, description="turns of a completion with tools; max_tokens counts them "
        "all, the tools' answers included",
    )  # fmt: skip
    tool_protocol: Literal["auto", "chat", "plain"] = Field(
        default="auto", description="chat = the template's own calls; plain = <call>name text"
        "</call>; auto = chat where prompts go through a chat template",
    )  # fmt: skip
    tool_timeout_s: float = Field(default=10.0, gt=0, description="of one call")
    tool_tokens: int = Field(default=128, gt=0, description="longest answer of one call")


class AlgorithmSection(Section):
    """From rewards to gradients."""

    kind: Algorithm = Field(
        default="grpo", description="ppo (critic, GAE), grpo, rloo, reinforce (batch baseline), or "
        "distill (a teacher instead of rewards; see [distill])",
    )  # fmt: skip
    kl_coef: float = Field(default=0.0, ge=0, description="weight of the KL to the reference")
    kl_in: Literal["auto", "reward", "loss"] = Field(
        default="auto", description="auto = reward for ppo, rloo and reinforce, loss for grpo"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="in the loss; in the reward it is k1"
    )
    kl_unbiased: bool = Field(
        default=True,
        description="k1 and k3 in the loss times the ratio: their mean gradient is then the KL's, "
        "as k2's is; false = DeepSeekMath's, k3's is then that of KL(reference || policy)",
    )
    kl_target: float | None = Field(
        default=None, gt=0, description="nats a completion; adapts kl_coef (arXiv 1909.08593)"
    )
    kl_horizon: int = Field(default=10_000, gt=0, description="completions of that adaptation")
    eps_low: float = Field(default=0.2, gt=0, lt=1, description="clip of the ratio from below")
    eps_high: float = Field(default=0.2, gt=0, description="and above; DAPO: 0.28")
    dual_clip: float = Field(default=0.0, ge=0, description="bound for bad actions; 3 is usual")
    loss: Literal["clip", "cispo"] = Field(default="clip", description="arXiv 2506.13585 = cispo")
    ratio: Literal["token", "sequence"] = Field(default="token", description="sequence = GSPO")
    aggregate: Literal["token", "sequence", "fixed"] = Field(
        default="token", description="mean over tokens (DAPO), completions (GRPO), or Dr.GRPO's"
    )
    scale: Literal["group", "batch", "none"] = Field(
        default="group", description="deviation that group advantages are divided by"
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="bonus on the entropy")
    epochs: int = Field(default=1, gt=0, description="passes over a step's rollouts")
    minibatches: int = Field(default=1, gt=0, description="optimizer steps a pass")
    micro_tokens: int = Field(default=4096, gt=0, description="tokens run at once")
    gamma: float = Field(default=1.0, gt=0, le=1, description="ppo: discount")
    lam: float = Field(default=0.95, ge=0, le=1, description="ppo: lambda of GAE")
    value_clip: float = Field(default=0.2, ge=0, description="ppo: 0 = plain squared error")
    whiten: bool = Field(default=True, description="ppo, reinforce: normalise advantages")
    reward_clip: float = Field(default=0.0, ge=0, description="rewards are held within +-this")
    missing_eos_penalty: float = Field(
        default=0.0, ge=0, description="taken from completions that ended by length"
    )
    mask_truncated: bool = Field(
        default=False, description="do not train completions that ended by length"
    )
    dynamic_sampling: int = Field(
        default=0, ge=0, description="times that groups of equal rewards are drawn anew (DAPO)"
    )
    correction: Literal[
        "auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = Field(
        default="auto",
        description="importance weights of rollouts whose log-probs are not the trainer's; auto = "
        "none where they are equal bits, else token_truncate",
    )
    correction_high: float = Field(default=2.0, gt=0, description="cap of that weight")
    correction_low: float = Field(default=0.0, ge=0, description="bottom of the masks")


class DistillSection(Section):
    """Whom a student learns from, on what it writes itself."""

    teacher: str = Field(default="", description="model with the student's tokenizer")
    loss: Literal["full", "sampled"] = Field(
        default="full", description="divergence over the vocabulary, or log p - log q of each "
        "sampled token as its advantage (other vocabulary sizes)",
    )  # fmt: skip
    beta: float = Field(
        default=1.0, ge=0, le=1, description="full: 1 = KL(student || teacher), 0 = KL(teacher || "
        "student), between them GKD's divergence (arXiv 2306.13649)",
    )  # fmt: skip
    lmbda: float = Field(
        default=1.0, ge=0, le=1, description="full: share of prompts that the student answers "
        "itself; the others teach the rows' `completion`",
    )  # fmt: skip
    temperature: float = Field(default=1.0, gt=0, description="full: of both distributions")


class CriticSection(Section):
    """PPO's value function."""

    path: str = Field(
        default="", description="model (or reward model) it starts from; empty = the policy's own"
    )
    optim: OptimSection = Field(
        default=OptimSection(lr=1e-5), description="of the critic; see [optim]"
    )
    shared: bool | None = Field(
        default=None, description="an adapter and a score on the policy's base, which has an "
        "[adapter]; auto = where the critic starts from that base",
    )  # fmt: skip
    warmup_steps: int = Field(
        default=0, ge=0, description="first steps that train the critic alone"
    )


class PtxSection(Section):
    """A language-model loss beside the policy's (InstructGPT's ptx, arXiv 2203.02155, eq. 2)."""

    coef: float = Field(
        default=0.0, ge=0, description="its weight in every update of the policy; 0 = none. Means "
        "are weighed: InstructGPT's 27.8 is one of sums",
    )  # fmt: skip
    rows: int = Field(default=1, gt=0, description="packed rows beside each update")
    data: DataConfig | None = Field(
        default=None, description="texts, or chats of which answers count; begun anew at their end"
    )

    @model_validator(mode="after")
    def _has_data(self) -> PtxSection:
        if self.coef and self.data is None:
            raise ValueError(
                "ptx.coef is set, but nothing to learn from; give [[ptx.data.sources]]"
            )
        return self


class RewardSection(Section):
    """One reward; a completion's is the weighted sum."""

    kind: Literal["task", "function", "model", "http"] = Field(
        default="task", description="the task's own, a Python function, a reward model, a server"
    )
    path: str = Field(
        default="", description="function: file.py:name; model: folder; http: URL of the server"
    )
    weight: float = Field(default=1.0, description="in the sum; 0 = only logged (a gold metric)")
    timeout_s: float = Field(default=30.0, gt=0, description="of an http call or a function")
    retries: int = Field(default=3, ge=0, description="of an http call")
    on_error: Literal["fail", "drop"] = Field(
        default="fail", description="a reward that raises or is NaN: stop, or drop the completion"
    )


class RlRunSection(Section):
    """How long and where to."""

    output: Path = Field(default=Path("runs/align"), description="folder of the run")
    steps: int = Field(default=100, gt=0, description="rollout steps")
    seed: int = Field(default=0, ge=0, description="of rollouts, order and minibatches")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 = all usable CPUs")
    timeout_s: float = Field(
        default=1800.0, gt=0, description="longest call on another process; the run then ends and "
        "names it",
    )  # fmt: skip
    dump: bool = Field(default=False, description="keep every step's rollouts, for replay")
    report: bool = Field(default=True, description="write report.html when the run ends")
    samples: int = Field(default=4, ge=0, description="completions a step kept in samples.jsonl")


class RlEvalSection(Section):
    """Rewards on prompts that are not trained on."""

    every: int = Field(default=0, ge=0, description="steps between evals; 0 = none")
    prompts: int = Field(default=32, gt=0, description="held-out prompts of one eval")
    temperature: float = Field(default=0.0, ge=0, description="0 = greedy")


class ShowSection(Section):
    """How answers to fixed prompts change over the steps: answers.html."""

    every: int = Field(default=0, ge=0, description="steps between them; 0 = not shown")
    prompts: tuple[str, ...] = Field(
        default=(), description="texts that are answered; empty = held-out prompts, with rewards"
    )
    count: int = Field(default=4, gt=0, description="how many held-out prompts")


class RlRecipe(Section):
    """Everything a run of reinforcement learning is made of."""

    model: ModelSection = ModelSection()
    reference: str = Field(
        default="", description="model of the KL term; empty = the policy as it starts"
    )
    prompts: PromptSection
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    critic: CriticSection = CriticSection()
    adapter: AdapterConfig | None = Field(
        default=None, description="the policy is a frozen base with this adapter"
    )
    distill: DistillSection = DistillSection()
    rewards: tuple[RewardSection, ...] = Field(
        default=(RewardSection(),), min_length=1, description="see [[rewards]]"
    )
    ptx: PtxSection = PtxSection()
    optim: OptimSection = OptimSection(lr=1e-6)
    schedule: ScheduleSection = ScheduleSection(kind="constant")
    memory: MemorySection = MemorySection()
    run: RlRunSection = RlRunSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: RlEvalSection = RlEvalSection()
    show: ShowSection = ShowSection()

    @model_validator(mode="after")
    def _fits(self) -> RlRecipe:
        kind, size = self.algorithm.kind, self.rollout.group_size
        if kind in ("grpo", "rloo") and size < 2:
            raise ValueError(f"{kind} compares a prompt's completions; set rollout.group_size >= 2")
        if self.algorithm.dynamic_sampling and kind != "grpo":
            raise ValueError("algorithm.dynamic_sampling refills groups of grpo only")
        if self.adapter is not None:
            _check_adapter(self.adapter)
        if self.algorithm.dynamic_sampling and self.rollout.staleness:
            raise ValueError(
                "algorithm.dynamic_sampling draws from the present weights, rollout.staleness = 1 "
                "from those before; leave one of them out"
            )
        if kind == "distill":
            _check_distill(self)
            return self
        if self.distill.teacher:
            raise ValueError('distill.teacher is read by algorithm.kind = "distill" only')
        has_task = bool(self.prompts.task)
        if not has_task and any(reward.kind == "task" for reward in self.rewards):
            raise ValueError('a reward of kind "task" needs prompts.task; give [[rewards]]')
        self._without_effect()
        return self

    def _without_effect(self) -> None:
        """ValueError for keys that this loop does not read."""
        model = self.model
        refused = {
            "model.config": model.config is not None,
            'model.backend = "hf"': model.backend == "hf",
            "model.neftune_alpha": model.neftune_alpha > 0,
            "critic.optim.ema_decay": self.critic.optim.ema_decay > 0,
        }
        for name, is_set in refused.items():
            if is_set:
                raise ValueError(f"{name} has no effect on reinforcement learning; leave it out")


def _check_adapter(adapter: AdapterConfig) -> None:
    """Refuse what would part a rollout's forward from that of its training step."""
    if adapter.kind != "lora":
        raise ValueError(
            'adapter.kind is "dora", which rollouts do not run bit for bit; use "lora"'
        )
    if adapter.dropout:
        raise ValueError(
            "adapter.dropout is above 0: a training step would not score what the policy drew; "
            "leave it out"
        )


def _check_distill(recipe: RlRecipe) -> None:
    """ValueError for settings of rewards' learning that distillation does not read."""
    if not recipe.distill.teacher:
        raise ValueError('algorithm.kind = "distill" needs distill.teacher')
    if recipe.algorithm.kl_coef or recipe.algorithm.kl_target:
        raise ValueError("distill has no reference beside its teacher; leave algorithm.kl_* out")
    if recipe.distill.lmbda < 1 and recipe.rollout.staleness:
        raise ValueError(
            "distill.lmbda < 1 asks the student in training; set rollout.staleness = 0"
        )
    is_cut = recipe.rollout.top_p < 1 or recipe.rollout.top_k > 0
    if recipe.distill.loss == "sampled" and (is_cut or recipe.distill.lmbda < 1):
        raise ValueError(
            'distill.loss = "sampled" reads tokens drawn from all of the student\'s distribution; '
            "set rollout.top_p = 1, rollout.top_k = 0 and distill.lmbda = 1"
        )
