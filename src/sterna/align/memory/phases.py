"""What each phase of a step of reinforcement learning takes, from sizes alone.

A run goes through the phases one after the other, so its peak is what it holds the whole time plus
the largest of

    start       a frozen model that goes to a tier is in memory once, before the optimizer's states
    rollout     the KV cache
    scoring     a forward of a micro-batch by the largest of policy, reference, critic and rewards
    training    gradients, what autograd keeps of a micro-batch, and the head's chunk of logits;
                policy and critic one after the other
    saving      the copy that a background write reads (`checkpoint.is_async`); it may live on into
                the next step, so it is added to all of the others

Without a stated budget a process on a CPU keeps what it has freed (keep.py), so its rollouts have
the largest other phase beside them; with one freed memory is given back between phases.

Held the whole time: weights, optimizer states, averages, frozen models, the rollout copy, the
engine's buffers, the rollouts themselves (also those queued by `staleness`). Processes of
`rollout.workers` are counted with the machine they share. Of the KV cache (2 b G C bytes a layer
and token) a CPU takes what a step writes, a GPU all blocks. bench/align/memory.py measures the
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sterna.align.config import RlRecipe
from sterna.align.memory.held import Held, stored_bytes
from sterna.align.memory.work import Load, Parts, forward_bytes, logprob_bytes, update_parts
from sterna.align.rollout_engine import engine_config, planned_weights
from sterna.engine.engine import buffer_tokens
from sterna.engine.memory import EngineShape
from sterna.quant.formats import parse_format
from sterna.train.memory import RUNTIME_BYTES, Shape

ROLLOUT_BYTES = 40.0  # of a token: ids, mask, log-probs, and the [N] tensors of an experience
PROCESS_BYTES = 350 << 20  # of a worker before its model: the interpreter, torch
COPIES = ("policy", "packed", "merged")  # rollout.weights that name no format


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of one process by part: held the whole time, and of each phase beside that."""

    held: Parts
    phases: dict[str, Parts]
    workers: Parts = field(default_factory=dict)  # of other processes of this machine
    host: Parts = field(default_factory=dict)
    disk: Parts = field(default_factory=dict)

    def of(self, phase: str) -> float:
        """All of the device's bytes in a phase."""
        parts = (self.held, self.workers, self.phases[phase])
        return sum(value for each in parts for value in each.values())

    @property
    def peak(self) -> float:
        """The most of all phases."""
        return max(map(self.of, self.phases))

    @property
    def peak_phase(self) -> str:
        """Where."""
        return max(self.phases, key=self.of)


def needs_of(recipe: RlRecipe, models: Sequence[Held], *, has_full_prompts: bool = False) -> Needs:
    """The memory of a run whose models are `models` (held.py), the policy first.

    `has_full_prompts`: all prompts have prompts.max_tokens; else the most that any lengths take.
    """
    load, policy = _load(recipe, has_full_prompts), models[0]
    critic = next((model for model in models if model.name == "critic"), None)
    copy, has_entropy = _saved(recipe, models), recipe.algorithm.entropy_coef > 0
    phases = {
        "start": _start(models),
        "rollout": {"KV cache": kv_bytes(recipe, policy.shape, policy.dtype_bytes)},
        "scoring": _scoring(recipe, models, load),
        "training": update_parts(policy, load, has_head=True, has_entropy=has_entropy),
    }
    if critic is not None:
        phases["critic"] = update_parts(critic, load, has_head=False)
    if not (load.is_gpu or recipe.memory.budget_gb):  # freed memory stays (keep.py)
        most = max(sum(parts.values()) for name, parts in phases.items() if name != "rollout")
        phases["rollout"]["freed, not given back"] = most
    host = _waiting(models, "host")
    if load.is_gpu:
        host |= copy
    elif copy:
        phases = {
            name: parts if name == "start" else {**parts, **copy} for name, parts in phases.items()
        }
    held = _held(recipe, models, load)
    return Needs(held, phases, _workers(recipe, policy), host, _waiting(models, "disk"))


def kv_bytes(recipe: RlRecipe, shape: Shape, dtype_bytes: int, prompts: int = 0) -> float:
    """Of the KV cache: all blocks of a GPU, on a CPU those that `prompts` (a step's) write."""
    config, rollout = engine_config(recipe), recipe.rollout
    assert config.num_kv_blocks is not None, "engine_config counts blocks"
    tokens = config.num_kv_blocks * config.block_size
    if recipe.model.device == "cpu":
        answers = rollout.group_size * (rollout.max_tokens + config.block_size)
        asked = recipe.prompts.max_tokens + config.block_size + answers
        tokens = min(tokens, (prompts or rollout.prompts_per_step) * asked)
    return 2.0 * dtype_bytes * shape.kv_heads * shape.head_dim * shape.layers * tokens


def _load(recipe: RlRecipe, has_full_prompts: bool) -> Load:
    """The largest micro-batch that there can be: shorter prompts leave more room for answers."""
    rollout, settings, ptx = recipe.rollout, recipe.algorithm, recipe.ptx
    longest = recipe.prompts.max_tokens + rollout.max_tokens
    sequences = -(-rollout.prompts_per_step * rollout.group_size // settings.minibatches)
    tokens = min(max(settings.micro_tokens, longest), sequences * longest)
    answers = min(tokens, sequences * rollout.max_tokens)
    if has_full_prompts:
        tokens = tokens // longest * longest
        answers = tokens // longest * rollout.max_tokens
    micros = -(-sequences * longest // tokens)
    if ptx.coef and ptx.data is not None:
        micros += ptx.rows
        tokens, answers = max(tokens, ptx.data.seq_len), max(answers, ptx.data.seq_len)
    return Load(tokens, answers, micros, longest, recipe.model.device != "cpu")


def _held(recipe: RlRecipe, models: Sequence[Held], load: Load) -> Parts:
    policy, rollout = models[0], recipe.rollout
    found: Parts = {}
    for model in models:
        kept = model.own - model.away
        if model.tier != "memory":
            kept += 2 * model.block  # one computing, one arriving
        found[f"{model.name}: weights"] = kept + (0.0 if model.shares_base else model.ropes)
        if model.states:
            found[f"{model.name}: optimizer"] = model.states
    if recipe.optim.ema_decay:
        found["average"] = 4 * policy.trained
    weights = planned_weights(recipe)
    if weights != "policy":
        found["rollout copy"] = _copy(weights, policy)
    if not rollout.workers:
        found["engine"] = _engine(recipe, policy)
    tokens = load.longest * rollout.prompts_per_step * rollout.group_size
    found["rollouts"] = ROLLOUT_BYTES * tokens * (1 + rollout.staleness)
    found["runtime"] = float(RUNTIME_BYTES)
    return found


def _copy(weights: str, policy: Held) -> float:
    if weights in COPIES:
        return policy.matrices * policy.dtype_bytes
    return stored_bytes(parse_format(weights), policy.matrices, policy.shape.hidden)


def _engine(recipe: RlRecipe, policy: Held) -> float:
    """Buffers of the widest step: activations, and the logits of a row a sequence."""
    config, shape = engine_config(recipe), policy.shape
    sizes = EngineShape(shape.vocab, shape.positions or 1, config.num_kv_blocks or 2)
    rows = config.max_num_seqs
    if recipe.rollout.speculation:
        rows += config.max_draft_rows
    tokens = min(buffer_tokens(config, sizes), config.token_budget or 1)
    return (
        forward_bytes(shape, policy.dtype_bytes, tokens, policy.is_adapted)
        + 4.0 * rows * shape.vocab
    )


def _start(models: Sequence[Held]) -> Parts:
    """Every model is whole once, before it is moved to its tier."""
    whole = max((model.away for model in models), default=0.0)
    return {"loading": whole}


def _scoring(recipe: RlRecipe, models: Sequence[Held], load: Load) -> Parts:
    work: Parts = {}
    for model in models:
        if model.name == "policy" and not _asks_policy(recipe):
            continue
        bytes_ = forward_bytes(model.shape, model.dtype_bytes, load.tokens, model.is_adapted)
        if model.tier == "memory" or load.is_gpu:
            tables = 0.0
        else:
            tables = float(model.shape.table_weights * model.dtype_bytes)  # mapped, then dropped
        if load.is_gpu and model.tier != "memory":
            tables = float(model.shape.table_weights * model.dtype_bytes)
        has_head = model.name in ("policy", "reference", "teacher")
        head = logprob_bytes(model, load) if has_head else 8.0 * load.tokens * model.shape.hidden
        work[model.name] = bytes_ + tables + head
    if not work:
        return {}
    most = max(work, key=lambda name: work[name])
    return {f"forward of the {most}": work[most]}


def _asks_policy(recipe: RlRecipe) -> bool:
    """Whether rollouts are scored by the trainer too: their log-probs may not be its own."""
    rollout = recipe.rollout
    exact = planned_weights(recipe) in ("policy", "packed") and recipe.model.device == "cpu"
    return not exact or rollout.staleness > 0


def _saved(recipe: RlRecipe, models: Sequence[Held]) -> Parts:
    """The copy of a checkpoint that is written behind the run's back."""
    if not recipe.checkpoint.is_async:
        return {}
    trained = [model for model in models if model.states]
    kept = sum(model.states + model.own * (not model.is_adapted) for model in trained)
    kept += sum(4 * model.trained for model in trained if model.is_adapted)
    kept += 4 * models[0].trained if recipe.optim.ema_decay else 0.0
    return {"checkpoint": kept}


def _workers(recipe: RlRecipe, policy: Held) -> Parts:
    """Other processes of this machine: each has the weights and its prompts' share of KV."""
    rollout = recipe.rollout
    if not rollout.workers:
        return {}
    share = -(-rollout.prompts_per_step // rollout.workers)
    size = policy.dtype_bytes
    each = PROCESS_BYTES + RUNTIME_BYTES + policy.own + policy.ropes + _engine(recipe, policy)
    each += kv_bytes(recipe, policy.shape, size, share)
    weights = planned_weights(recipe)
    if weights != "policy":
        each += _copy(weights, policy)
    passed = 4 * policy.trained if policy.is_adapted else policy.own  # the file that carries them
    return {"workers": each * rollout.workers, "weights on their way": passed}


def _waiting(models: Sequence[Held], tier: str) -> Parts:
    return {f"{model.name}: weights": model.away for model in models if model.tier == tier}
