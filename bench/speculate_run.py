"""One pass over prompts with one set of drafters: what bench/speculate.py repeats."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from sterna.engine.config import EngineConfig
from sterna.engine.drafters.choose import build_drafters
from sterna.engine.engine import Engine
from sterna.engine.request import DraftResult, EngineRequest, SamplingParams, StepStats
from sterna.engine.speculate import Speculator
from sterna.model.decoder import Decoder
from sterna.text.chat import ChatRenderer

P = ParamSpec("P")
T = TypeVar("T")
Outputs = dict[str, list[int]]
Chat = list[dict[str, str]]
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over a task. "decode" is what steps without prompt tokens did."""

    num_tokens: int
    seconds: float
    decode_tokens: int
    decode_s: float
    num_decode_steps: int
    drafting_s: float  # proposing, and keeping account
    num_drafted: int
    num_accepted: int
    num_drafts: int
    by_source: dict[str, tuple[int, int, int]]  # drafts, their tokens, those accepted

    @property
    def speed(self) -> float:
        """Tokens a second, prompts' time included."""
        return self.num_tokens / self.seconds

    @property
    def decode_speed(self) -> float:
        """Tokens a second of steps without prompt tokens."""
        return self.decode_tokens / self.decode_s


class Talk:
    """A conversation: user messages that no scripted answer follows are answered by the model."""

    def __init__(self, chat: Chat) -> None:
        self._left = list(chat)
        self._said: Chat = []

    def next_prompt(self) -> Chat | None:
        """All messages up to the next one to answer, or None at the end."""
        while self._left:
            self._said.append(self._left.pop(0))
            is_followed = bool(self._left) and self._left[0]["role"] == "assistant"
            if self._said[-1]["role"] == "user" and not is_followed:
                return self._said
        return None

    def answer(self, text: str) -> None:
        """What the model said."""
        self._said.append({"role": "assistant", "content": text})


class Variants:
    """The drafters of one engine, exchanged between runs; each run's remember nothing."""

    def __init__(self, engine: Engine, speculators: dict[str, str]) -> None:
        """`speculators`: folder by kind of cell."""
        self.engine = engine
        self.drafting_s = 0.0
        self._renderer = ChatRenderer(engine.tokenizer)
        self._speculators = speculators
        assert engine.speculator is not None, "built with drafters"
        self._speculator = engine.speculator
        for name in ("propose", "extend", "note_step", "finish"):
            setattr(self._speculator, name, self._timed(getattr(self._speculator, name)))

    def use(self, variant: str) -> None:
        """`plain`, or names of drafters joined by +: suffix, ngram, mlp, lstm."""
        names = [] if variant.startswith(PLAIN) else variant.split("+")
        own = ["learned" if name in self._speculators else name for name in names]
        folder = next((self._speculators[n] for n in names if n in self._speculators), None)
        settings = {"speculation": ",".join(own) or "off", "speculator": folder}
        config = EngineConfig(**{**self.engine.config.model_dump(), **settings})
        decoder = self.engine.runner.decoder
        assert isinstance(decoder, Decoder), "loaded by build_engine"
        drafters = build_drafters(config, self.engine.tokenizer, decoder, "bench")
        fresh = Speculator(drafters, config, self._speculator.cost)
        vars(self._speculator).update(vars(fresh))
        self.engine.pool.clear_cache()

    def run(
        self, chats: list[Chat], batch: int, num_tokens: int, temperature: float
    ) -> tuple[Run, Outputs]:
        """All conversations, `batch` at a time and turn by turn, in the current variant.

        A turn finds those before it in the prefix cache. Only the engine's time counts.
        """
        steps: list[StepStats] = []
        self.engine.on_step.append(steps.append)
        found: Outputs = {}
        gained: list[int] = []
        self.drafting_s = seconds = 0.0
        params = SamplingParams(
            temperature=temperature, max_tokens=num_tokens, seed=1,
            speculation=bool(self._speculator.drafters),
        )  # fmt: skip
        for first in range(0, len(chats), batch):
            talks = {str(first + i): Talk(c) for i, c in enumerate(chats[first : first + batch])}
            while prompts := self._next_prompts(talks, len(found)):
                started = time.perf_counter()
                for name, prompt in prompts.items():
                    request = EngineRequest(
                        request_id=name, prompt_token_ids=tuple(prompt), params=params
                    )
                    self.engine.add(request)
                gained += self._drain(found)
                seconds += time.perf_counter() - started
                for name in prompts:
                    text = self.engine.tokenizer.decode(found.get(name, []))
                    talks[name.split(".")[0]].answer(text)
        self.engine.on_step.pop()
        return self._as_run(steps, gained, seconds), found

    def _next_prompts(self, talks: dict[str, Talk], turn: int) -> dict[str, list[int]]:
        """Of the conversations that go on; `turn` makes the names of requests differ."""
        found = {}
        for name, talk in talks.items():
            if (chat := talk.next_prompt()) is not None:
                text = self._renderer.render(chat)
                found[f"{name}.{turn}"] = self.engine.tokenizer.encode(text, False)
        return found

    def _drain(self, found: Outputs) -> list[int]:
        """Run until nobody waits; how many tokens each step gave."""
        gained = []
        while self.engine.has_work:
            new = [
                (o.request_id, token)
                for o in self.engine.step() for d in o.deltas for token in d.token_ids
            ]  # fmt: skip
            gained.append(len(new))
            for name, token in new:
                found.setdefault(name, []).append(token)
        return gained

    def _as_run(self, steps: list[StepStats], gained: list[int], seconds: float) -> Run:
        decoding = [(s, n) for s, n in zip(steps, gained, strict=True) if not s.num_prompt_tokens]
        drafts = [draft for step in steps for draft in step.drafts]
        return Run(
            num_tokens=sum(gained),
            seconds=seconds,
            decode_tokens=sum(n for _, n in decoding),
            decode_s=sum(s.duration for s, _ in decoding),
            num_decode_steps=len(decoding),
            drafting_s=self.drafting_s,
            num_drafted=sum(d.num_tokens for d in drafts),
            num_accepted=sum(d.num_accepted for d in drafts),
            num_drafts=len(drafts),
            by_source=_by_source(drafts),
        )

    def _timed(self, call: Callable[P, T]) -> Callable[P, T]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            started = time.perf_counter()
            found = call(*args, **kwargs)
            self.drafting_s += time.perf_counter() - started
            return found

        return timed


def _by_source(drafts: list[DraftResult]) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    for draft in drafts:
        num, tokens, accepted = found.get(draft.source, (0, 0, 0))
        counts = (num + 1, tokens + draft.num_tokens, accepted + draft.num_accepted)
        found[draft.source] = counts
    return found
