"""POST /v1/completions: one or many prompts, as text or token ids, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sterna.core.errors import RequestError, SternaError
from sterna.engine.request import (
    Delta,
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from sterna.server.adapters import route
from sterna.server.chat import check_stream_fields
from sterna.server.convert import deadline, sampling_params, structured_spec
from sterna.server.errors import sterna_error_body
from sterna.server.generation import Generation
from sterna.server.logprobs import CompletionLogprobList, with_top
from sterna.server.replies import CompletionChoice, CompletionReply, FinishName, PromptLogprobs
from sterna.server.schema import CompletionBody, StreamOptions
from sterna.server.service import Service, new_id
from sterna.server.stream import DONE, ChunkWriter, EventStream, encode_json, text_choice, watching

# OpenAI's default for this route.
DEFAULT_MAX_TOKENS = 16
# Sequences of one HTTP request; more belong in several requests or the batch CLI.
MAX_SEQUENCES = 1024


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A validated completion request on its way through the engine."""

    body: CompletionBody
    reply_id: str
    created: int
    model: str
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...]  # the prompts' texts when they are echoed
    generation: Generation

    @property
    def num_samples(self) -> int:
        return self.body.n or 1

    def texts(self, service: Service) -> list[TextState]:
        """Fresh state for every choice, prompt by prompt."""
        wants = self.body.logprobs is not None
        return [
            TextState(
                index=prompt_idx * self.num_samples + sample_idx,
                prompt=self.prompts[prompt_idx] if self.body.echo else (),
                echo=self.echoes[prompt_idx] if self.body.echo else "",
                logprobs=CompletionLogprobList(service.logprobs) if wants else None,
                num_top=self.body.logprobs or 0,
            )
            for prompt_idx in range(len(self.prompts))
            for sample_idx in range(self.num_samples)
        ]

    def states_of(
        self, states: list[TextState], prompt_idx: int, output: RequestOutput
    ) -> list[TextState]:
        """The samples of one prompt, which share its log-probabilities once they are known."""
        own = states[prompt_idx * self.num_samples :][: self.num_samples]
        if output.prompt_logprobs is not None:
            for state in own:
                state.prompt_logprobs = output.prompt_logprobs
        return own

    def prompt_logprobs(self, service: Service, state: TextState) -> PromptLogprobs | None:
        """vLLM's prompt_logprobs of a choice, when the body asks for them."""
        num_top, entries = self.body.prompt_logprobs, state.prompt_logprobs
        if num_top is None or entries is None:
            return None
        return service.logprobs.prompt(with_top(entries, num_top))


@dataclass(slots=True)
class TextState:
    """One choice's progress. The echoed prompt comes with the first delta."""

    index: int
    prompt: tuple[int, ...]
    echo: str
    logprobs: CompletionLogprobList | None
    num_top: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    has_begun: bool = False

    def add(self, delta: Delta) -> str:
        """The new text, the prompt included once when it is echoed."""
        text = delta.text
        if not self.has_begun:
            self.has_begun = True
            text = self.echo + text
            if self.logprobs is not None:
                # The engine may have been asked for more candidates by prompt_logprobs.
                scores = self.prompt_logprobs
                known = None if scores is None else with_top(scores, self.num_top)
                self.logprobs.add_prompt(self.prompt, known)
        if self.logprobs is not None:
            self.logprobs.add(delta.logprobs or ())
        return text


async def answer_completion(service: Service, request: Request) -> Response:
    """The route. Errors before the first token have their own HTTP status, also in a stream."""
    job = await _prepare(service, await service.body(CompletionBody, request))
    if job.body.stream:
        return EventStream(_pieces(service, job), job.generation.disconnect)
    async with watching(request.receive, job.generation.disconnect):
        reply = await _collect(service, job)
    return Response(reply.to_json(), media_type="application/json")


async def _prepare(service: Service, body: CompletionBody) -> CompletionJob:
    model, adapter = route(service, body.model)
    check_stream_fields(body.stream, body.stream_options, body.prompt_logprobs)
    service.engine.check_room()
    prompts, texts = await _prompts(service, body)
    _check_size(len(prompts) * (body.n or 1))
    params = _params(body)
    limit_s = deadline(body, service.config)
    reply_id = new_id("cmpl")
    requests = [
        EngineRequest(
            request_id=f"{reply_id}-{i}",
            prompt_token_ids=prompt,
            params=params,
            cache_salt=body.cache_salt or "",
            adapter=adapter,
            priority=body.priority,
            deadline_s=limit_s,
        )
        for i, prompt in enumerate(prompts)
    ]
    created = int(time.time())
    generation = service.generation(requests)
    return CompletionJob(body, reply_id, created, model, prompts, texts, generation)


def _params(body: CompletionBody) -> SamplingParams:
    # Echo with logprobs means the prompt's as well: how harnesses score a text.
    asked = (body.prompt_logprobs, body.logprobs if body.echo else None)
    wide = max((count for count in asked if count is not None), default=None)
    return sampling_params(
        body,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=wide,
        structured=structured_spec(body),
    )


def _check_size(num_sequences: int) -> None:
    if num_sequences > MAX_SEQUENCES:
        raise RequestError(
            f"prompts x n is {num_sequences:,}, the limit is {MAX_SEQUENCES:,}; split the request",
            param="prompt",
        )


async def _prompts(
    service: Service, body: CompletionBody
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Token ids of each prompt and, for echo, their texts."""
    given = _as_list(body.prompt)
    _check_size(len(given))
    ids = [await _ids(service, prompt, body.add_special_tokens) for prompt in given]
    if not body.echo:
        return tuple(ids), ()
    texts = [one if isinstance(one, str) else await service.prompts.decode(one) for one in given]
    return tuple(ids), tuple(texts)


def _as_list(prompt: object) -> list[str | tuple[int, ...]]:
    """All shapes of the field as a list; RequestError for an empty one."""
    if isinstance(prompt, str):
        return [prompt]
    assert isinstance(prompt, tuple)
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


async def _ids(
    service: Service, prompt: str | tuple[int, ...], add_special_tokens: bool
) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await service.prompts.text_ids(prompt, add_special_tokens=add_special_tokens)
    return prompt


def _finish_name(reason: FinishReason) -> FinishName:
    return "length" if reason is FinishReason.LENGTH else "stop"


# -- streamed ---------------------------------------------------------------------------------


async def _pieces(service: Service, job: CompletionJob) -> AsyncGenerator[bytes, None]:
    """The stream's bytes. An error before the first piece is raised, a later one is an event."""
    options = job.body.stream_options or StreamOptions()
    writer = ChunkWriter.open(
        job.reply_id, "text_completion", job.created, job.model, with_usage=options.include_usage
    )
    states = job.texts(service)
    has_begun = False
    try:
        async with aclosing(job.generation.outputs()) as outputs:
            async for prompt_idx, output in outputs:
                own = job.states_of(states, prompt_idx, output)
                usage = job.generation.usage() if options.continuous_usage_stats else None
                choices = [c for delta in output.deltas if (c := _chunk(own[delta.index], delta))]
                if choices:
                    has_begun = True
                    yield b"".join([writer.chunk(choice, usage) for choice in choices])
        if options.include_usage:
            yield writer.last(job.generation.usage(), job.generation.timing())
    except ClientDisconnect:
        return
    except SternaError as error:
        if not has_begun:
            raise
        service.view.metrics.refused(error.code)
        yield b"data: " + sterna_error_body(error) + b"\n\n"
    yield DONE


def _chunk(state: TextState, delta: Delta) -> str:
    """One choice as JSON text, or "" when nothing can be shown yet."""
    text = state.add(delta)
    if not text and delta.finish_reason is None and state.logprobs is None:
        return ""
    logprobs = "null" if state.logprobs is None else state.logprobs.take().model_dump_json()
    if delta.finish_reason is None:
        return text_choice(state.index, text, logprobs=logprobs)
    finish = f'"{_finish_name(delta.finish_reason)}"'
    stop = encode_json(delta.stop_reason)
    return text_choice(state.index, text, logprobs=logprobs, finish=finish, stop=stop)


# -- whole ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Gathered:
    """One choice of a whole answer, in the making."""

    state: TextState
    texts: list[str] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Add what one step brought."""
        self.texts.append(self.state.add(delta))
        self.last = delta

    def choice(self, service: Service, job: CompletionJob) -> CompletionChoice:
        """The finished choice."""
        assert self.last is not None and self.last.finish_reason is not None
        return CompletionChoice(
            index=self.state.index,
            text="".join(self.texts),
            logprobs=self.state.logprobs.take() if self.state.logprobs else None,
            finish_reason=_finish_name(self.last.finish_reason),
            stop_reason=self.last.stop_reason,
            prompt_logprobs=job.prompt_logprobs(service, self.state),
        )


async def _collect(service: Service, job: CompletionJob) -> CompletionReply:
    states = job.texts(service)
    gathered = [_Gathered(state) for state in states]
    async with aclosing(job.generation.outputs()) as outputs:
        async for prompt_idx, output in outputs:
            job.states_of(states, prompt_idx, output)
            for delta in output.deltas:
                gathered[prompt_idx * job.num_samples + delta.index].add(delta)
    return CompletionReply(
        id=job.reply_id,
        created=job.created,
        model=job.model,
        choices=[one.choice(service, job) for one in gathered],
        usage=job.generation.usage(),
        sterna=job.generation.timing(),
    )
