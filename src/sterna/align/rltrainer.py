"""The state of a run of reinforcement learning: one method a line of the loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import torch

from sterna.align.ahead import Ahead
from sterna.align.beside import publish_beside
from sterna.align.config import RlRecipe
from sterna.align.draw import Draw
from sterna.align.engines import RolloutEngine
from sterna.align.experience import Experience, Models, make_experience, share_without_spread
from sterna.align.figures import draft_figures, step_figures
from sterna.align.hybrid import Sampling
from sterna.align.kl import KLController
from sterna.align.learner import Learns
from sterna.align.prompts import Prompt, PromptStream
from sterna.align.reward import Rewards, RewardSum, Sample
from sterna.align.rlhooks import RlHook
from sterna.align.rlresult import RlOutcome, RlResult
from sterna.align.rlstate import RlCounters, restore, snapshot
from sterna.align.rollout import Rollout
from sterna.core.errors import CheckpointError, ConfigError, NonFiniteError, TrainError
from sterna.core.heap import give_back_memory
from sterna.core.log import get_logger
from sterna.core.rundir import FolderLock
from sterna.data.order import mix
from sterna.parallel.mesh import Mesh
from sterna.text.tokenizer import Tokenizer
from sterna.train.checkpoint import newest, publish
from sterna.train.checkpointer import Checkpointer
from sterna.train.ema import Ema
from sterna.train.schedule import lr_at
from sterna.train.signals import StopSignals

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RlParts:
    """Everything of one run; `build.py` makes it."""

    recipe: RlRecipe
    tokenizer: Tokenizer
    hybrid: RolloutEngine
    draw: Draw  # a step's completions
    ask: Draw  # those of evals and shown answers: the policy's own
    models: Models
    learner: Learns
    ema: Ema | None
    prompts: PromptStream
    eval_prompts: PromptStream | None
    rewards: RewardSum
    kl: KLController
    hooks: Sequence[RlHook]
    files: dict[str, str]  # tokenizer files of the saved model
    source: Path | None  # the checkpoint that is continued


@dataclass(slots=True)
class _Step:
    """What the step under way has shown so far."""

    drawn: list[Rollout] = field(default_factory=list)
    learnt: dict[str, float] = field(default_factory=dict)
    noted: dict[str, float] = field(default_factory=dict)  # of its rollouts
    seconds: dict[str, float] = field(default_factory=dict)
    prompts_at: int | None = None  # where its prompts begin, until it is learnt
    is_learning: bool = False


class RlTrainer:
    """One run. Hooks may read everything; `evaluate` and `save` are theirs to call."""

    def __init__(self, parts: RlParts, is_main: bool = True) -> None:
        """`is_main`: this process writes the run's folder."""
        self.parts = parts
        self.recipe = parts.recipe
        self.counters = RlCounters()
        self.outcome: RlOutcome | None = None
        self.last: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}
        self.tell_end: Callable[[RlResult], object] = lambda result: None  # to other ranks
        self._step = _Step()
        self._saved_step = -1
        self.ahead = Ahead(self._draw, is_beside=parts.recipe.rollout.workers > 0)
        output = parts.recipe.run.output
        self._is_main = is_main
        self._lock = FolderLock(output)
        self._checkpointer = Checkpointer(
            output / "checkpoints", parts.recipe.checkpoint, Mesh.single(), self._saved
        )

    def start(self) -> None:
        """Restore the checkpoint that is continued, if any, and tell the hooks."""
        if self.parts.source is not None:
            restore(self.parts.source, self)
            self._saved_step = self.counters.step
            _log.info("continuing from %s", self.parts.source)
        for hook in self.parts.hooks:
            hook.on_start(self)

    def has_steps(self) -> bool:
        """Whether another step is to be made."""
        if self.outcome is None and self.counters.step >= self.recipe.run.steps:
            self.outcome = "done"
        return self.outcome is None

    def next_prompts(self) -> list[Prompt]:
        """The prompts of the step."""
        stream = self.parts.prompts
        queued = self.ahead.position
        self._step = _Step(prompts_at=stream.position if queued is None else queued)
        with self._timed("prompts"):
            prompts = self.ahead.prompts or self._take_prompts()
        self._step.noted["prompts/too_long"] = float(stream.num_too_long)
        return prompts

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The completions, by prompt and sample; then the KV cache's memory is free to train in."""
        with self._timed("generate"):
            is_queued = self.ahead.prompts is not None
            rollouts = self.ahead.take() if is_queued else self._draw_now(prompts)
            self._begin_next_step()
            self.parts.hybrid.sleep()
            if self.recipe.rollout.speculation:
                self._step.noted |= draft_figures(self.parts.hybrid.drafts.take())
        self._step.drawn = rollouts
        if self.recipe.rollout.staleness:
            now = self.parts.hybrid.version
            ages = [now - rollout.policy_version for rollout in rollouts]
            self._step.noted["sampling/staleness"] = sum(ages) / len(ages)
        return rollouts

    def _begin_next_step(self) -> None:
        """With staleness: have the next step's completions drawn by the weights as they are."""
        step = self.counters.step + 1
        if self.recipe.rollout.staleness and step < self.recipe.run.steps:
            position = self.parts.prompts.position
            prompts = self._take_prompts()
            self.parts.hybrid.prepare()
            self.ahead.begin(prompts, position, step)

    def _take_prompts(self) -> list[Prompt]:
        return self.parts.prompts.take(self.recipe.rollout.prompts_per_step)

    def reward(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Rewards:
        """What they are worth. RewardError where a reward fails and the run has to stop."""
        with self._timed("reward"):
            return self.parts.rewards(self.samples(prompts, rollouts))

    def make_experience(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: Rewards
    ) -> Experience:
        """Log-probs, values and advantages; with dynamic sampling, of groups drawn anew."""
        rollouts, rewards = self._refilled(prompts, list(rollouts), rewards)
        with self._timed("score"):
            experience = make_experience(
                rollouts, rewards, self.parts.models, self.recipe.algorithm, self.parts.kl.coef
            )
            self._give_back()
        if not len(experience.rollouts):
            raise TrainError(
                f"step {self.counters.step + 1}: no completion is left to train on; every reward "
                "failed. Mend the rewards, then continue with --resume"
            )
        return experience

    def learn(self, experience: Experience) -> None:
        """Update policy and critic; the engine then serves the new policy."""
        recipe, step = self.recipe, self.counters.step
        total = recipe.schedule.total_steps or recipe.run.steps
        lr = lr_at(step, recipe.optim.lr, recipe.schedule, total)
        critic_lr = lr_at(step, recipe.critic.optim.lr, recipe.schedule, total)
        has_critic = self.parts.learner.critic is not None
        trains_policy = not has_critic or step >= recipe.critic.warmup_steps
        self._step.is_learning = True
        with self._timed("train"):
            try:
                self._step.learnt = self.parts.learner.learn(
                    experience, step, self.parts.kl.coef, lr, critic_lr,
                    recipe.rollout.max_tokens, trains_policy,
                )  # fmt: skip
            except NonFiniteError as error:
                raise self._explained(error) from error
            if self.parts.ema is not None:
                self.parts.ema.update(self.parts.learner.policy.optimizer)
            self.parts.hybrid.publish()
            self._give_back()
        self._step.learnt["learning_rate"] = lr
        self._adapt_kl(experience)
        self._step.is_learning, self._step.prompts_at = False, None

    def relearn(self, experience: Experience) -> dict[str, float]:
        """Learn from a dumped experience; returns what the learner says of it."""
        self._step = _Step()
        self.learn(experience)
        return self._step.learnt

    def after_step(self, experience: Experience) -> None:
        """Count, tell the hooks, which log, evaluate and save."""
        self.counters.step += 1
        self.counters.num_completions += len(experience.rollouts)
        self.counters.num_tokens += sum(rollout.num_tokens for rollout in self._step.drawn)
        self.counters.seconds += sum(self._step.seconds.values())
        self.last = step_figures(
            experience,
            self._step.drawn,
            {**self._step.noted, **self._step.learnt},
            self._step.seconds,
        )
        self.last["num_tokens"] = float(self.counters.num_tokens)
        for hook in self.parts.hooks:
            hook.after_step(self, self.counters.step, self.last, experience)
        every = self.recipe.eval.every
        if every and self.counters.step % every == 0:
            self.evaluate()
        every = self.recipe.checkpoint.every
        if every and self.counters.step % every == 0:
            self.save()
        self._checkpointer.poll()

    def heed(self, signals: StopSignals) -> None:
        """End the run when it was asked to."""
        if signals.caught is not None:
            is_interrupt = signals.caught == signal.SIGINT
            self.outcome = self.outcome or ("interrupted" if is_interrupt else "terminated")

    def evaluate(self) -> dict[str, float]:
        """Mean rewards on held-out prompts; empty without them."""
        stream = self.parts.eval_prompts
        if stream is None:
            return {}
        settings = self.recipe.eval
        self.ahead.wait()
        stream.position = 0
        prompts = stream.take(settings.prompts)
        sampling = self._sampling(settings.temperature)
        seeds = [mix(self.recipe.run.seed, prompt.index, 5) for prompt in prompts]
        self.parts.hybrid.prepare()
        rollouts = self.parts.ask(prompts, 1, sampling, seeds)
        self.parts.hybrid.sleep()
        rewards = self.parts.rewards(self.samples(prompts, rollouts))
        self.last_eval = {
            "reward": float(rewards.total.mean()),
            **{f"rewards/{name}/mean": float(v.mean()) for name, v in rewards.parts.items()},
        }
        for hook in self.parts.hooks:
            hook.on_eval(self, self.counters.step, self.last_eval)
        return self.last_eval

    def answers(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The policy's greedy answers, for hooks."""
        self.ahead.wait()
        self.parts.hybrid.prepare()
        rollouts = self.parts.ask(prompts, 1, self._sampling(0.0), [0] * len(prompts))
        self.parts.hybrid.sleep()
        return rollouts

    def samples(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Sample]:
        """Rollouts as rewards see them."""
        decode = self.parts.tokenizer.decode
        return [
            Sample(
                prompt=prompts[rollout.prompt_idx].text,
                completion=decode(rollout.completion.tolist()),
                row=prompts[rollout.prompt_idx].row,
                rollout=rollout,
                turns=tuple(decode(rollout.completion[a:b].tolist()) for a, b in rollout.turns()),
            )
            for rollout in rollouts
        ]

    def save(self) -> None:
        """Write a checkpoint of the state as it is; nothing when this step has one."""
        if self._saved_step != self.counters.step:
            self._saved_step = self.counters.step
            self._checkpointer.save(snapshot(self), None)

    def finish(self) -> RlResult:
        """Save the end, write the final model, tell the hooks."""
        self.save()
        self._checkpointer.wait()
        latest = newest(self._checkpointer.parent)
        output = self.recipe.run.output
        if latest is not None:
            publish(latest, output / "model")
            publish_beside(self.parts, latest)
        for hook in self.parts.hooks:
            hook.on_end(self)
        result = RlResult(
            outcome=self.outcome or "done",
            steps=self.counters.step,
            reward=self.last.get("reward"),
            eval_reward=self.last_eval.get("reward"),
            output=output,
            model=output / "model",
            checkpoint=latest,
        )
        self.tell_end(result)
        return result

    def _draw_now(self, prompts: Sequence[Prompt], attempt: int = 0) -> list[Rollout]:
        self.parts.hybrid.prepare()
        return self._draw(prompts, self.counters.step, attempt)

    def _draw(self, prompts: Sequence[Prompt], step: int, attempt: int = 0) -> list[Rollout]:
        seed = self.recipe.run.seed
        seeds = [mix(seed, step, prompt.index, attempt) for prompt in prompts]
        sampling = self._sampling(self.recipe.rollout.temperature)
        return self.parts.draw(prompts, self.recipe.rollout.group_size, sampling, seeds)

    def _sampling(self, temperature: float) -> Sampling:
        rollout = self.recipe.rollout
        return Sampling(
            max_tokens=rollout.max_tokens,
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop=rollout.stop,
            ignore_eos=rollout.ignore_eos,
        )

    def _refilled(
        self, prompts: Sequence[Prompt], rollouts: list[Rollout], rewards: Rewards
    ) -> tuple[list[Rollout], Rewards]:
        """DAPO's dynamic sampling: groups whose rewards are all equal are drawn anew."""
        for attempt in range(1, self.recipe.algorithm.dynamic_sampling + 1):
            if not share_without_spread(rollouts, rewards.total):
                break
            flat = _flat_groups(rollouts, rewards)
            with self._timed("generate"):
                again = self._draw_now([prompts[i] for i in flat], attempt)
                self.parts.hybrid.sleep()
            moved = [replace(rollout, prompt_idx=flat[rollout.prompt_idx]) for rollout in again]
            kept = [i for i, rollout in enumerate(rollouts) if rollout.prompt_idx not in flat]
            fresh = self.reward(prompts, moved)
            rollouts = [*(rollouts[i] for i in kept), *moved]
            rewards = _joined(rewards, kept, fresh)
            self._step.drawn = [*self._step.drawn, *moved]
        return rollouts, rewards

    def _give_back(self) -> None:
        """A stated budget is held by the phases one by one: none keeps what it has freed."""
        if self.recipe.memory.budget_gb and self.recipe.model.device == "cpu":
            give_back_memory()

    def _adapt_kl(self, experience: Experience) -> None:
        if experience.ref_logprobs is None:
            return
        d = experience.old_logprobs - experience.ref_logprobs
        kl = float(experience.layout.sums(d).mean())
        self._step.learnt["kl_coef"] = self.parts.kl.coef  # of this step
        self.parts.kl.update(kl, len(experience.rollouts))

    def _explained(self, error: NonFiniteError) -> NonFiniteError:
        """Save what is whole before the run ends."""
        self.save()
        self._checkpointer.wait()
        where = newest(self._checkpointer.parent)
        return NonFiniteError(f"step {self.counters.step + 1}: {error.message}; saved in {where}")

    def _rescue(self) -> None:
        """After an error: save the steps made, so that --resume begins the failed one anew.

        Not in the middle of an update, whose weights are of no step; `learn` sees to those.
        Rollouts drawn ahead are dropped: drawing them may be what failed.
        """
        is_half_restored = self.parts.source is not None and self._saved_step < 0
        if self._step.is_learning or not self.counters.step or is_half_restored:
            return
        at = self._step.prompts_at
        at = self.ahead.position if at is None else at
        if at is not None:
            self.parts.prompts.position = at
        self.ahead.drop()
        try:
            self.save()
        except CheckpointError as error:
            _log.error("%s", error)

    def _saved(self, folder: Path) -> None:
        for hook in self.parts.hooks:
            hook.on_save(self, folder)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self._step.seconds[name] = self._step.seconds.get(name, 0.0) + spent

    def __enter__(self) -> RlTrainer:
        """Keep the run's folder to this run. ConfigError while another process writes there."""
        if self._is_main and not self._lock.take():
            output = self.recipe.run.output
            self.__exit__(None, None, None)
            raise ConfigError(
                f"another process is training into {output}; wait for it, or give another "
                "run.output",
                param="run.output",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            self._rescue()
        for hook in self.parts.hooks:
            hook.close()
        self._checkpointer.close()
        if self.parts.learner.ptx is not None:
            self.parts.learner.ptx.close()
        self._lock.release()
        self.ahead.close()
        self.parts.draw.close()
        self.parts.hybrid.close()


def _flat_groups(rollouts: Sequence[Rollout], rewards: Rewards) -> list[int]:
    """Prompts of the step whose completions are all worth the same."""
    seen: dict[int, list[float]] = {}
    for rollout, value in zip(rollouts, rewards.total.tolist(), strict=True):
        seen.setdefault(rollout.prompt_idx, []).append(value)
    return [idx for idx, values in seen.items() if max(values) == min(values)]


def _joined(old: Rewards, kept: Sequence[int], new: Rewards) -> Rewards:
    rows = torch.tensor(kept, dtype=torch.int64)
    return Rewards(
        torch.cat([old.total[rows], new.total]),
        {name: torch.cat([old.parts[name][rows], new.parts[name]]) for name in old.parts},
        torch.cat([old.is_kept[rows], new.is_kept]),
    )
