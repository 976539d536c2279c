"""`sterna complete`: one prompt to stdout as it is written, or a JSONL file of requests."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sterna.cli.batchrun import BatchRun, BatchSummary
from sterna.cli.endpoint import Endpoint, open_endpoint
from sterna.cli.flags import DEFAULT_ENGINE, AsJson, ConfigFiles, EngineOptions
from sterna.cli.sampling import DEFAULT_SAMPLING, Sampling, SamplingOptions
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging
from sterna.engine.config import EngineConfig

DEFAULT_MAX_TOKENS = 256
EXIT_SOME_FAILED = 1


def complete(
    prompt: str = "",
    /,
    *,
    model: str = "",
    url: str = "",
    api_key: str = "",
    chat: bool = False,
    input: Path | None = None,
    output: Path | None = None,
    concurrency: Annotated[int, Parameter(validator=Number(gte=1))] = 32,
    as_json: AsJson = False,
    config: ConfigFiles = (),
    sampling: Sampling = DEFAULT_SAMPLING,
    engine: EngineOptions = DEFAULT_ENGINE,
) -> int:
    """Complete one prompt, or a file of OpenAI batch requests.

    Parameters
    ----------
    prompt
        Text to continue; empty reads it from a pipe.
    model
        Folder, GGUF file or name; empty is the default model.
    url
        A server to ask instead of loading the model here.
    api_key
        Bearer token for --url.
    chat
        Send the prompt as a user's message, through the chat template.
    input
        JSONL of requests; a run that was cut off goes on where it stopped.
    output
        JSONL of results, appended to.
    concurrency
        Requests in flight for --input.
    as_json
        Print the whole answer (or the batch summary) as JSON.
    """
    setup_logging("WARNING")
    if input is not None or output is not None:
        if input is None or output is None:
            raise ConfigError("--input and --output go together; give both")
        job = _batch(input, output, concurrency, sampling, as_json)
    else:
        job = _single(prompt or _piped_prompt(), chat, sampling, as_json)
    return asyncio.run(_with_endpoint(job, url, api_key, model, engine))


async def _with_endpoint(job: Any, url: str, api_key: str, model: str, engine: EngineConfig) -> int:
    async with open_endpoint(url, api_key, model, engine) as endpoint:
        return int(await job(endpoint))


def _piped_prompt() -> str:
    text = "" if sys.stdin.isatty() else sys.stdin.read()
    if not text:
        raise ConfigError('no prompt; give one (sterna complete "Once upon") or pipe it in')
    return text


def _single(prompt: str, is_chat: bool, sampling: SamplingOptions, as_json: bool) -> Any:
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    content = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    fields = {"max_tokens": DEFAULT_MAX_TOKENS, **content, **sampling.body()}

    async def job(endpoint: Endpoint) -> int:
        body = {"model": endpoint.model, **fields}
        if as_json:
            return _print_json(await endpoint.post(path, body))
        async for event in endpoint.stream(path, body):
            for choice in event.get("choices", ()):
                print(choice_text(choice), end="", flush=True)
        print()
        return 0

    return job


def _print_json(response: Any) -> int:
    print(json.dumps(response.json(), ensure_ascii=False, indent=2))
    return 0 if response.status_code == 200 else EXIT_SOME_FAILED


def choice_text(choice: dict[str, Any]) -> str:
    """The new text of one streamed choice, chat or plain."""
    if "delta" in choice:
        return str(choice["delta"].get("content") or "")
    return str(choice.get("text") or "")


def _batch(
    source: Path, output: Path, concurrency: int, sampling: SamplingOptions, as_json: bool
) -> Any:
    defaults = sampling.body()

    async def job(endpoint: Endpoint) -> int:
        with _progress(is_shown=not as_json) as progress:
            task = progress.add_task(source.name, total=None)

            def show(summary: BatchSummary) -> None:
                done = summary.skipped + summary.completed + summary.failed
                progress.update(task, total=summary.total, completed=done)

            run = BatchRun(endpoint, defaults, concurrency, show)
            summary = await run.run(source, output)
        _print_summary(summary, output, as_json)
        return EXIT_SOME_FAILED if summary.failed else 0

    return job


def _print_summary(summary: BatchSummary, output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary.as_dict()))
        return
    print(
        f"{summary.completed} completed, {summary.failed} failed, {summary.skipped} were done "
        f"before, of {summary.total}; results in {output}"
    )


class RateColumn(ProgressColumn):
    """Finished items a second."""

    def render(self, task: Task) -> Text:
        """`2.4/s`, or blank before the first."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


@contextmanager
def _progress(is_shown: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (is_shown and console.is_terminal),
    ) as progress:
        yield progress
