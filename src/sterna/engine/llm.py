"""The engine without a server: `LLM(model).generate(prompts)` (FastGen's non-persistent mode).

The same Engine as behind the server, stepped by the caller's thread. Prompts are strings or lists
of token ids. All prompts of a call share its steps, so a list is much faster than a loop.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console

from sterna.core.errors import ConfigError, RequestError, SternaError, TaskError
from sterna.core.lookup import unknown
from sterna.engine.build import build_engine
from sterna.engine.build_embed import build_embedder
from sterna.engine.config import EngineConfig
from sterna.engine.embed import Embedder
from sterna.engine.embed_texts import embed_inputs, pair_scores
from sterna.engine.engine import Engine
from sterna.engine.progress import StepProgress, counting
from sterna.engine.request import (
    Delta,
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from sterna.engine.stream import merge_outputs
from sterna.engine.task import Task, resolve_task
from sterna.model.hub import resolve_model
from sterna.text.chat import ChatRenderer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One of a request's `n` completions."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt. `text`, `token_ids` are those of the first sample."""

    prompt_token_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    num_cached_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sample."""
        return self.samples[0].token_ids


class LLM:
    """A model for offline use. Not thread-safe; use as a context manager or call `close`.

    `model`: a folder, a GGUF file, a hub name, or "" for the default model. Settings are those of
    EngineConfig. Raises ModelError, ConfigError, KernelError.
    """

    def __init__(self, model: str = "", **settings: Any) -> None:
        config = _config(settings)
        is_embedder = _task(model, config) == "embed"
        self._embedder = build_embedder(model, config) if is_embedder else None
        self._engine = None if is_embedder else build_engine(model, config)
        self._is_closed = False
        self._ids = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine; ConfigError after `close`, TaskError for a model that embeds."""
        self._check_open()
        if self._engine is None:
            raise TaskError("this model was loaded to embed; use embed, rerank or pair_scores")
        return self._engine

    @property
    def embedder(self) -> Embedder:
        """What `embed` runs on; ConfigError after `close`, TaskError for a model that generates."""
        self._check_open()
        if self._embedder is None:
            raise TaskError('this model was loaded to generate; LLM(model, task="embed") embeds')
        return self._embedder

    def close(self) -> None:
        """Free the model and its KV cache. Further calls do nothing."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._embedder = None
        self._is_closed = True

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        truncate: int | None = None,
        progress: bool | None = None,
    ) -> NDArray[np.float32]:
        """float32 [N, D]: one vector a text (or list of token ids), in the order given.

        dimensions: only the first so many. prompt_name: one of the model's own prompts. truncate:
        cut longer texts to so many tokens, -1 = to the model's limit; None refuses them. Raises
        RequestError, TaskError when the model does not embed.
        """
        embedder, inputs = self.embedder, _as_prompts(texts)
        prompt = embedder.model.pooling.prompt(prompt_name)
        with counting(len(inputs), "texts", progress) as note:
            return embed_inputs(
                embedder, inputs, dimensions=dimensions, prompt=prompt, truncate=truncate, note=note
            )

    def pair_scores(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        truncate: int | None = None,
        progress: bool | None = None,
    ) -> NDArray[np.float32]:
        """float32 [N]: a cross encoder's score of each pair; else the cosine of the vectors."""
        with counting(len(pairs), "pairs", progress) as note:
            return pair_scores(self.embedder, pairs, truncate, note)

    def rerank(self, query: str, documents: Sequence[str]) -> list[tuple[int, float]]:
        """(index, score) of every document, the best first."""
        scores = self.pair_scores([(query, document) for document in documents])
        return [(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")]

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this LLM is closed; make a new one")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Complete each prompt; results are in the order of the prompts.

        `params`: one for all, or one a prompt. `progress`: a bar on stderr; None shows one when
        it is a terminal and the work takes over 2 s. Raises RequestError for a prompt or
        parameter that cannot be served (then nothing runs), StepError when a forward failed.
        """
        each = _as_prompts(prompts)
        requests = self._requests([self._encode(p) for p in each], params)
        outputs = self._run(requests, progress)
        return [_completion(request, outputs[request.request_id]) for request in requests]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        progress: bool | None = None,
        **template_kwargs: Any,
    ) -> list[Completion]:
        """Answer one conversation or several. A message is {"role": ..., "content": ...}."""
        rendered = [
            self._renderer.render([dict(m) for m in chat], tools, **template_kwargs)
            for chat in _as_chats(messages)
        ]
        prompts = [self.engine.tokenizer.encode(text, False) for text in rendered]
        return self.generate(prompts, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of one prompt's completion as they come. Closing the iterator aborts it."""
        (request,) = self._requests([self._encode(prompt)], params)
        self.engine.add(request)
        try:
            while self.engine.has_work:
                for output in self.engine.step():
                    for delta in output.deltas:
                        if delta.error is not None:
                            raise delta.error
                        yield delta
        finally:
            self.engine.abort(request.request_id)

    def score(self, prompt: Prompt, completion: Prompt) -> list[TokenLogprob]:
        """Log-probability of each token of `completion` after `prompt`.

        Strings are tokenised apart and joined, the completion without special tokens.
        """
        head = self._encode(prompt)
        tail = self._encode(completion, special=False)
        if not head or not tail:
            raise RequestError("prompt and completion need at least one token each to be scored")
        params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
        (scored,) = self.generate([[*head, *tail]], params, progress=False)
        assert scored.prompt_logprobs is not None, "asked for"
        return [entry for entry in scored.prompt_logprobs[len(head) :] if entry is not None]

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self.engine.tokenizer)

    def _encode(self, prompt: Prompt, special: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return self.engine.tokenizer.encode(prompt, special)
        return list(prompt)

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[EngineRequest]:
        """One checked request a prompt."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if bad := [each for each in params if not isinstance(each, SamplingParams)]:
            raise RequestError(f"params has {bad[0]!r}; give SamplingParams, one or one a prompt")
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(params)} params; give one, or one a prompt"
            )
        requests = [
            EngineRequest(
                request_id=f"llm-{next(self._ids)}", prompt_token_ids=tuple(prompt), params=each
            )
            for prompt, each in zip(prompts, params, strict=True)
        ]
        for request in requests:
            self.engine.check(request)
        return requests

    def _run(
        self, requests: Sequence[EngineRequest], progress: bool | None
    ) -> dict[str, list[RequestOutput]]:
        """Step until all have finished. An interrupt aborts them all."""
        found: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
        console = Console(stderr=True)
        is_shown = sys.stderr.isatty() if progress is None else progress
        try:
            for request in requests:
                self.engine.add(request)
            with closing(StepProgress(len(requests), console, is_shown)) as bar:
                while self.engine.has_work:
                    outputs = self.engine.step()
                    for output in outputs:
                        found[output.request_id].append(output)
                    bar.update(outputs)
        finally:
            for request in requests:
                self.engine.abort(request.request_id)
        return found


def _task(model: str, config: EngineConfig) -> Task:
    return resolve_task(resolve_model(model), config.task)


def _config(settings: dict[str, Any]) -> EngineConfig:
    """ConfigError for an unknown name (with the nearest known one) or a value out of range."""
    for name in settings:
        if name not in EngineConfig.model_fields:
            raise ConfigError(unknown("setting", name, EngineConfig.model_fields), param=name)
    try:
        return EngineConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        said = f"{name} is {first['input']!r}: {first['msg']}"
        raise ConfigError(said, param=name) from error


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A string or a list of ids is one prompt."""
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is {prompts!r}; give texts or lists of token ids")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _as_chats(messages: Messages | Sequence[Messages]) -> Sequence[Messages]:
    """A list of messages is one conversation."""
    if messages and isinstance(messages[0], Mapping):
        return [cast("Messages", messages)]
    return cast("Sequence[Messages]", messages)


def _completion(request: EngineRequest, outputs: list[RequestOutput]) -> Completion:
    merged = merge_outputs(outputs)
    for delta in merged.deltas:
        if delta.error is not None:
            raise _with_context(delta.error, request)
    by_index = sorted(merged.deltas, key=lambda delta: delta.index)
    return Completion(
        prompt_token_ids=request.prompt_token_ids,
        samples=tuple(_sample(delta) for delta in by_index),
        num_cached_tokens=merged.num_cached_tokens,
        prompt_logprobs=merged.prompt_logprobs,
    )


def _sample(delta: Delta) -> Sample:
    assert delta.finish_reason is not None, "a finished request has only finished samples"
    return Sample(
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=delta.finish_reason,
        logprobs=delta.logprobs,
        stop_reason=delta.stop_reason,
    )


def _with_context(error: SternaError, request: EngineRequest) -> SternaError:
    error.add_note(f"prompt of {len(request.prompt_token_ids)} tokens")
    return error
