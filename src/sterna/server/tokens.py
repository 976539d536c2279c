"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sterna.core.errors import RequestError
from sterna.server.adapters import route
from sterna.server.replies import DetokenizeReply, TokenizeReply
from sterna.server.schema import DetokenizeBody, TokenizeBody
from sterna.server.service import Service


async def answer_tokenize(service: Service, request: Request) -> Response:
    """Token ids of a text or of a rendered conversation."""
    body = await service.body(TokenizeBody, request)
    route(service, body.model)
    ids = await _ids(service, body)
    texts = [service.prompts.tokenizer.token_text(i) for i in ids]
    reply = TokenizeReply(
        count=len(ids),
        max_model_len=service.model.max_model_len,
        tokens=list(ids),
        token_strs=texts if body.return_token_strs else None,
    )
    return Response(reply.to_json(), media_type="application/json")


async def answer_detokenize(service: Service, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    body = await service.body(DetokenizeBody, request)
    route(service, body.model)
    reply = DetokenizeReply(prompt=await service.prompts.decode(body.tokens))
    return Response(reply.to_json(), media_type="application/json")


async def _ids(service: Service, body: TokenizeBody) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        return await service.prompts.chat_ids(
            body.messages,
            body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
        )
    special = body.add_special_tokens is not False
    return await service.prompts.text_ids(body.prompt or "", add_special_tokens=special)
