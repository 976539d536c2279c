"""`sterna chat`: a conversation in the terminal, streamed, with commands that start with `/`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sterna.cli.complete import choice_text
from sterna.cli.endpoint import Endpoint, open_endpoint, served
from sterna.cli.failures import describe_validation
from sterna.cli.flags import DEFAULT_ENGINE, ConfigFiles, EngineOptions
from sterna.cli.sampling import DEFAULT_SAMPLING, Sampling, SamplingOptions
from sterna.core.errors import SternaError
from sterna.core.log import setup_logging
from sterna.core.lookup import unknown
from sterna.core.rundir import write_atomic

PATH = "/v1/chat/completions"


def chat(
    model: str = "",
    /,
    *,
    url: str = "",
    api_key: str = "",
    system: str = "",
    config: ConfigFiles = (),
    sampling: Sampling = DEFAULT_SAMPLING,
    engine: EngineOptions = DEFAULT_ENGINE,
) -> int:
    """Talk to a model in this terminal. `/help` lists the commands.

    Parameters
    ----------
    model
        Folder, GGUF file or name; empty is the default model. An adapter's folder means its base
        with it. With --lora name=folder the first adapter answers; /model changes who does.
    url
        A server to ask instead of loading the model here.
    api_key
        Bearer token for --url.
    system
        The system message.
    """
    setup_logging("WARNING")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    console = Console(highlight=False)
    with asyncio.Runner() as runner:
        opened = open_endpoint(url, api_key, model, engine)
        with console.status("loading the model"):
            endpoint = runner.run(opened.__aenter__())
        try:
            Conversation(console, endpoint, runner, sampling, system).loop()
        finally:
            runner.run(opened.__aexit__(None, None, None))
    return 0


@dataclass(slots=True)
class Conversation:
    """The messages so far and the settings they are answered with."""

    console: Console
    endpoint: Endpoint
    runner: asyncio.Runner
    sampling: SamplingOptions
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    is_over: bool = False
    last_stats: str = "nothing answered yet"

    def loop(self) -> None:
        """Read, answer, until /quit or the end of input. KeyboardInterrupt at the prompt ends."""
        self.console.print(f"[bold]{self.endpoint.model}[/] - /help lists the commands")
        while not self.is_over:
            try:
                line = self.console.input("[bold green]> [/]").strip()
            except EOFError:
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One line of the user: a command, or a message to answer."""
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                self._ask(line)
        except SternaError as error:
            self.console.print(error.message, style="red", markup=False)

    def _ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            answer = self.runner.run(self._answer())
        except KeyboardInterrupt:
            self.console.print("\n[dim]stopped[/]")
        finally:
            if not answer:  # an unanswered question would break the turn order of templates
                self.messages.pop()
        if answer:
            self.messages.append({"role": "assistant", "content": answer})

    async def _answer(self) -> str:
        started = time.perf_counter()
        first: float | None = None
        pieces: list[str] = []
        num_events = 0
        async for event in self.endpoint.stream(PATH, self._body()):
            text = "".join(choice_text(choice) for choice in event.get("choices", ()))
            if text:
                first = first or time.perf_counter()
                num_events += 1
                pieces.append(text)
                self.console.print(text, end="", markup=False, soft_wrap=True)
        self.console.print()
        if first is not None:
            self.last_stats = _stats(started, first, time.perf_counter(), num_events)
        return "".join(pieces)

    def _body(self) -> dict[str, Any]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.endpoint.model, "messages": head + self.messages}
        return {**body, **self.sampling.body()}

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            self.console.print(unknown("command", name, COMMANDS), markup=False)
            return
        command[1](self, argument.strip())

    def show_help(self, argument: str) -> None:
        """The commands."""
        for name, (explanation, _) in COMMANDS.items():
            self.console.print(f"  /{name:8} {explanation}", markup=False)

    def clear(self, argument: str) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def set_system(self, argument: str) -> None:
        """Replace the system message; the conversation starts again."""
        self.system = argument
        self.messages.clear()

    def set_sampling(self, argument: str) -> None:
        """`/set temperature=0.7`: change one sampling option; alone, show them."""
        name, _, value = argument.partition("=")
        if not name:
            self.console.print(json.dumps(self.sampling.body()), markup=False)
            return
        name = name.strip().replace("-", "_")
        if name not in SamplingOptions.model_fields:
            said = unknown("option", name, SamplingOptions.model_fields)
            self.console.print(said, markup=False)
            return
        given = (value.strip(),) if name == "stop" else value.strip()
        fields = {**self.sampling.model_dump(), name: given}
        try:
            self.sampling = SamplingOptions.model_validate(fields)
        except ValueError as error:  # pydantic's ValidationError is one
            self.console.print(describe_validation(error), markup=False)

    def choose(self, argument: str) -> None:
        """`/model NAME`: who answers from now on; alone, who may."""
        names = self.runner.run(served(self.endpoint.client))
        if not argument:
            said = "\n".join(f"{'*' if n == self.endpoint.model else ' '} {n}" for n in names)
            self.console.print(said, markup=False)
        elif argument in names:
            self.endpoint = replace(self.endpoint, model=argument)
        else:
            self.console.print(unknown("model", argument, names), markup=False)

    def retry(self, argument: str) -> None:
        """Answer the last question again."""
        if len(self.messages) < 2:
            self.console.print("nothing was answered yet", markup=False)
            return
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self._ask(question)

    def save(self, argument: str) -> None:
        """Write the conversation to a JSON file."""
        path = Path(argument or "chat.json")
        try:
            write_atomic(path, json.dumps(self._body()["messages"], indent=1, ensure_ascii=False))
        except OSError as error:
            raise SternaError(f"cannot write {path}: {error.strerror}") from error
        self.console.print(f"saved to {path}", markup=False)

    def show_stats(self, argument: str) -> None:
        """Speed of the last answer."""
        self.console.print(self.last_stats, markup=False)

    def quit(self, argument: str) -> None:
        """Leave."""
        self.is_over = True


COMMANDS: dict[str, tuple[str, Callable[[Conversation, str], None]]] = {
    "help": ("this list", Conversation.show_help),
    "clear": ("forget the conversation", Conversation.clear),
    "system": ("TEXT: replace the system message and start again", Conversation.set_system),
    "set": ("NAME=VALUE: change a sampling option", Conversation.set_sampling),
    "model": (
        "NAME: another model or adapter answers; alone: which",
        Conversation.choose,
    ),
    "retry": ("answer the last question again", Conversation.retry),
    "save": ("FILE: write the conversation as JSON", Conversation.save),
    "stats": ("speed of the last answer", Conversation.show_stats),
    "quit": ("leave (also Ctrl-D)", Conversation.quit),
}


def _stats(started: float, first: float, ended: float, num_events: int) -> str:
    rate = (num_events - 1) / (ended - first) if num_events > 1 and ended > first else 0.0
    return f"first token after {first - started:.2f} s, then {rate:.0f} pieces/s"
