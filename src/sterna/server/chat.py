"""POST /v1/chat/completions: one path for whole and streamed answers.

Both are made from the same events (text, call started, call arguments), so a streamed answer
joins to exactly what the whole answer would have been.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sterna.core.errors import RequestError, SternaError
from sterna.engine.request import Delta, EngineRequest, FinishReason, RequestOutput, TokenLogprob
from sterna.server.adapters import route
from sterna.server.convert import deadline, sampling_params, structured_spec
from sterna.server.errors import sterna_error_body
from sterna.server.generation import Generation
from sterna.server.replies import (
    AssistantMessage,
    ChatChoice,
    ChatReply,
    FinishName,
    FunctionCallReply,
    ToolCallReply,
)
from sterna.server.schema import ChatBody, StreamOptions
from sterna.server.service import Service, new_id
from sterna.server.stream import DONE, ChunkWriter, EventStream, chat_choice, encode_json, watching
from sterna.server.toolchoice import ToolPlan, merge_constraints, plan_tools
from sterna.text.tools import (
    CallArguments,
    CallStart,
    ContentText,
    ToolEvent,
    ToolParser,
    collect,
)


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A validated chat request on its way through the engine."""

    body: ChatBody
    reply_id: str
    created: int
    model: str
    plan: ToolPlan
    generation: Generation

    @property
    def num_choices(self) -> int:
        return self.body.n or 1

    def choices(self) -> list[ChoiceState]:
        """Fresh state for each of the n choices."""
        return [
            ChoiceState(i, self.plan.parser(), self.plan.max_calls) for i in range(self.num_choices)
        ]


@dataclass(slots=True)
class ChoiceState:
    """One choice's progress: deltas in, events out."""

    index: int
    parser: ToolParser | None
    max_calls: int | None
    num_calls: int = 0
    has_begun: bool = False

    def events(self, delta: Delta) -> list[ToolEvent]:
        """What `delta` adds; the rest of the text comes with the finish."""
        if self.parser is None:
            return [ContentText(delta.text)] if delta.text else []
        found = self.parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            found = [*found, *self.parser.finish()]
        kept = [event for event in found if self._is_kept(event)]
        self.num_calls += sum(isinstance(event, CallStart) for event in kept)
        return kept

    def finish_name(self, reason: FinishReason) -> FinishName:
        """OpenAI's word for why the choice ended."""
        if reason is FinishReason.LENGTH:
            return "length"
        return "tool_calls" if self.num_calls else "stop"

    def _is_kept(self, event: ToolEvent) -> bool:
        if self.max_calls is None or isinstance(event, ContentText):
            return True
        return event.index < self.max_calls


async def answer_chat(service: Service, request: Request) -> Response:
    """The route. Errors before the first token have their own HTTP status, also in a stream."""
    job = await _prepare(service, await service.body(ChatBody, request))
    if job.body.stream:
        return EventStream(_pieces(service, job), job.generation.disconnect)
    async with watching(request.receive, job.generation.disconnect):
        reply = await _collect(service, job)
    return Response(reply.to_json(), media_type="application/json")


async def _prepare(service: Service, body: ChatBody) -> ChatJob:
    model, adapter = route(service, body.model)
    plan = plan_tools(body, service.tool_style)
    _check_fields(body)
    service.engine.check_room()
    prompt = await service.prompts.chat_ids(
        body.messages,
        plan.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
    )
    reply_id = new_id("chatcmpl")
    engine_request = EngineRequest(
        request_id=reply_id,
        prompt_token_ids=prompt,
        params=sampling_params(
            body,
            max_tokens=_max_tokens(body),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            structured=merge_constraints(structured_spec(body), plan),
        ),
        cache_salt=body.cache_salt or "",
        adapter=adapter,
        priority=body.priority,
        deadline_s=deadline(body, service.config),
    )
    return ChatJob(
        body=body,
        reply_id=reply_id,
        created=int(time.time()),
        model=model,
        plan=plan,
        generation=service.generation([engine_request]),
    )


def _check_fields(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    check_stream_fields(body.stream, body.stream_options, body.prompt_logprobs)


def check_stream_fields(
    is_stream: bool | None, options: StreamOptions | None, prompt_logprobs: int | None
) -> None:
    """RequestError for fields that only fit the other kind of answer."""
    if options is not None and not is_stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if prompt_logprobs is not None and is_stream:
        raise RequestError(
            "prompt_logprobs come with whole answers only; set stream to false",
            param="prompt_logprobs",
        )


def _max_tokens(body: ChatBody) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if None not in (new, old) and new != old:
        raise RequestError(
            f"max_completion_tokens is {new} and max_tokens {old}; give one", param="max_tokens"
        )
    return old if new is None else new


# -- streamed ---------------------------------------------------------------------------------


async def _pieces(service: Service, job: ChatJob) -> AsyncGenerator[bytes, None]:
    """The stream's bytes. An error before the first piece is raised, a later one is an event."""
    options = job.body.stream_options or StreamOptions()
    writer = ChunkWriter.open(
        job.reply_id,
        "chat.completion.chunk",
        job.created,
        job.model,
        with_usage=options.include_usage,
    )
    stream = _ChatStream(service, job, writer, options.continuous_usage_stats)
    has_begun = False
    try:
        async with aclosing(job.generation.outputs()) as outputs:
            async for _, output in outputs:
                if piece := stream.piece(output):
                    has_begun = True
                    yield piece
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


@dataclass(slots=True)
class _ChatStream:
    """Turns outputs into chunks."""

    service: Service
    job: ChatJob
    writer: ChunkWriter
    has_usage: bool
    choices: list[ChoiceState] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = self.job.choices()

    def piece(self, output: RequestOutput) -> bytes:
        """The chunks of one output, sent in one write."""
        usage = self.job.generation.usage() if self.has_usage else None
        choices = [text for delta in output.deltas for text in self._chunks(delta)]
        return b"".join([self.writer.chunk(choice, usage) for choice in choices])

    def _chunks(self, delta: Delta) -> list[str]:
        state = self.choices[delta.index]
        logprobs = self._logprobs(delta)
        texts = [_event_delta(event) for event in state.events(delta)]
        if logprobs != "null" and not texts:
            texts = ['{"content":""}']
        # The first chunk of several carries the log-probabilities of all the delta's tokens.
        chunks = [
            chat_choice(delta.index, text, logprobs=logprobs if i == 0 else "null")
            for i, text in enumerate(texts)
        ]
        if delta.finish_reason is not None:
            finish = f'"{state.finish_name(delta.finish_reason)}"'
            stop = encode_json(delta.stop_reason)
            chunks.append(chat_choice(delta.index, "{}", finish=finish, stop=stop))
        if chunks and not state.has_begun:
            state.has_begun = True
            chunks.insert(0, chat_choice(delta.index, '{"role":"assistant","content":""}'))
        return chunks

    def _logprobs(self, delta: Delta) -> str:
        if not delta.logprobs:
            return "null"
        return self.service.logprobs.chat(delta.logprobs).model_dump_json()


def _event_delta(event: ToolEvent) -> str:
    """OpenAI's `delta` for one event, as JSON text."""
    if isinstance(event, ContentText):
        return f'{{"content":{encode_json(event.text)}}}'
    if isinstance(event, CallArguments):
        function = f'{{"arguments":{encode_json(event.text)}}}'
        return f'{{"tool_calls":[{{"index":{event.index},"function":{function}}}]}}'
    call = {
        "index": event.index,
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }
    return f'{{"tool_calls":[{encode_json(call)}]}}'


# -- whole ------------------------------------------------------------------------------------


async def _collect(service: Service, job: ChatJob) -> ChatReply:
    gathered = [_Gathered(state) for state in job.choices()]
    prompt_logprobs = None
    async with aclosing(job.generation.outputs()) as outputs:
        async for _, output in outputs:
            if output.prompt_logprobs is not None:
                prompt_logprobs = service.logprobs.prompt(output.prompt_logprobs)
            for delta in output.deltas:
                gathered[delta.index].add(delta)
    return ChatReply(
        id=job.reply_id,
        created=job.created,
        model=job.model,
        choices=[one.choice(service) for one in gathered],
        usage=job.generation.usage(),
        prompt_logprobs=prompt_logprobs,
        sterna=job.generation.timing(),
    )


@dataclass(slots=True)
class _Gathered:
    """One choice of a whole answer, in the making."""

    state: ChoiceState
    events: list[ToolEvent] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Add what one step brought."""
        self.events.extend(self.state.events(delta))
        self.logprobs.extend(delta.logprobs or ())
        self.last = delta

    def choice(self, service: Service) -> ChatChoice:
        """The finished choice."""
        assert self.last is not None and self.last.finish_reason is not None
        has_logprobs = self.last.logprobs is not None or bool(self.logprobs)
        return ChatChoice(
            index=self.state.index,
            message=self._message(),
            logprobs=service.logprobs.chat(self.logprobs) if has_logprobs else None,
            finish_reason=self.state.finish_name(self.last.finish_reason),
            stop_reason=self.last.stop_reason,
        )

    def _message(self) -> AssistantMessage:
        said = collect(self.events)
        calls = [
            ToolCallReply(
                id=call.id, function=FunctionCallReply(name=call.name, arguments=call.arguments)
            )
            for call in said.calls
        ]
        content = None if calls and not said.content.strip() else said.content
        return AssistantMessage(content=content, tool_calls=calls or None)
