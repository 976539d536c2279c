"""Python functions that a policy may call, run in processes of their own.

A tool that takes too long is killed with its process, which is started anew; one that raises,
exits or crashes gives an error text. Either way the answer is a message to the model, never the end
of the run. Tools keep no state that a rollout may rely on: any process may run any call.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from sterna.core.errors import ConfigError

_LOAD_S = 60.0  # importing a user's file may import a lot
_CHUNK = 1 << 16
_PROCESSES = 2


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A call as the model wrote it. `arguments`: an object, a text, or None where unreadable."""

    name: str
    arguments: Mapping[str, Any] | str | None
    id: str = ""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model is told."""

    text: str
    is_error: bool = False


class Toolbox:
    """The tools of a recipe. `schemas` describe them as OpenAI's API does."""

    def __init__(
        self, places: Sequence[str], timeout_s: float, processes: int = _PROCESSES
    ) -> None:
        """`places`: file.py:name each. ConfigError for one that cannot be loaded, or two of a
        name."""
        self._timeout_s = timeout_s
        self._children = [_Child(places) for _ in range(processes)]
        self._free: SimpleQueue[_Child] = SimpleQueue()
        for child in self._children:
            self._free.put(child)
        try:
            self.schemas = self._children[0].start()
        except (OSError, ValueError, TimeoutError) as error:
            self.close()
            raise ConfigError(f"rollout.tools: {error}", param="rollout.tools") from error
        self.names = tuple(schema["function"]["name"] for schema in self.schemas)
        if len(set(self.names)) < len(self.names):
            self.close()
            raise ConfigError(
                f"rollout.tools names a function twice: {', '.join(self.names)}; rename one",
                param="rollout.tools",
            )

    def run(self, calls: Sequence[ToolRequest]) -> list[ToolResult]:
        """The results, in the calls' order."""
        with ThreadPoolExecutor(len(self._children), thread_name_prefix="tools") as pool:
            return list(pool.map(self._one, calls))

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.kill()

    def _one(self, call: ToolRequest) -> ToolResult:
        if call.name not in self.names:
            return ToolResult(
                f"error: there is no tool {call.name!r}; there are: {', '.join(self.names)}", True
            )
        if call.arguments is None:
            return ToolResult("error: the arguments are not a JSON object", True)
        child = self._free.get()
        try:
            reply = child.ask({"name": call.name, "arguments": call.arguments}, self._timeout_s)
        except TimeoutError:
            child.kill()
            return ToolResult(f"error: {call.name} took more than {self._timeout_s:g} s", True)
        except (OSError, ValueError) as error:
            child.kill()
            return ToolResult(f"error: {call.name} ended its process ({error})", True)
        finally:
            self._free.put(child)
        if "error" in reply:
            return ToolResult(f"error: {reply['error']}", True)
        return ToolResult(reply["result"])


class _Child:
    """One process; started when it is first needed, and again after it was killed."""

    def __init__(self, places: Sequence[str]) -> None:
        self._places = list(places)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> list[dict[str, Any]]:
        """Start it; returns the tools' schemas. ValueError for what cannot be loaded."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sterna.align.tools.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C ends the run after its step, not a tool within it
        )
        reply = self._exchange({"load": self._places}, _LOAD_S)
        if "error" in reply:
            raise ValueError(reply["error"])
        tools: list[dict[str, Any]] = reply["tools"]
        return tools

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Its reply. TimeoutError; OSError or ValueError when the process ended instead."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        return self._exchange(request, timeout_s)

    def kill(self) -> None:
        """End it, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        deadline, found = time.monotonic() + timeout_s, b""
        while not found.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise TimeoutError(f"no answer in {timeout_s:g} s")
            piece = os.read(process.stdout.fileno(), _CHUNK)
            if not piece:
                raise ValueError(f"exit status {process.wait()}")
            found += piece
        reply: dict[str, Any] = json.loads(found)
        return reply
