"""Rewards that users bring: a Python function, a server, and the built-in tasks' own."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from http.client import HTTPException
from pathlib import Path
from typing import Any

from sterna.align.reward import Sample
from sterna.core.errors import ConfigError, RewardError

Scored = Callable[..., Sequence[float]]


class FunctionReward:
    """`name(prompts, completions, **columns) -> list of numbers` of a Python file of the user.

    Columns are lists of the rows' other values, by name. A call over its time is an error; its
    thread cannot be stopped and ends with the process.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        file, _, name = path.rpartition(":")
        if not file or not name:
            raise ConfigError(
                f"rewards.path is {path!r}; a function is given as file.py:name", param="rewards"
            )
        self.name = name
        self._function = _load(Path(file), name)
        self._timeout_s = timeout_s

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float]:
        """RewardError when it takes too long; what the function raises goes through."""
        names = dict.fromkeys(key for sample in samples for key in sample.row)
        columns = {name: [sample.row.get(name) for sample in samples] for name in names}
        prompts = [sample.prompt for sample in samples]
        completions = [sample.completion for sample in samples]
        return _within(
            self._timeout_s, self.name, lambda: self._function(prompts, completions, **columns)
        )


def _within(seconds: float, name: str, call: Callable[[], Sequence[float]]) -> Sequence[float]:
    """What a call gives or raises. RewardError when it takes longer.

    A daemon thread: an executor's would be waited for when the process ends, so a function that
    hangs would hang the run that stopped because of it.
    """
    future: Future[Sequence[float]] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except FutureTimeout as error:
        if future.done():  # the function's own TimeoutError
            raise
        raise RewardError(f"{name} took more than its {seconds:g} s") from error


class HttpReward:
    """POST {"samples": [{"prompt", "completion", "row"}, ...]} -> {"rewards": [...]}.

    Tried again after 0.5, 1, 2, ... seconds where the server does not answer, is overloaded (429)
    or fails (5xx).
    """

    name = "http"

    def __init__(self, url: str, timeout_s: float, retries: int) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"rewards.path is {url!r}; kind http needs an http:// or https:// URL",
                param="rewards",
            )
        self._url = url
        self._timeout_s = timeout_s
        self._retries = retries

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float]:
        """RewardError when the server did not answer with as many numbers."""
        told = [
            {"prompt": s.prompt, "completion": s.completion, "row": dict(s.row)} for s in samples
        ]
        body = json.dumps({"samples": told}).encode()
        for attempt in range(self._retries + 1):
            try:
                answer = self._post(body)
                return [float(value) for value in answer["rewards"]]
            except urllib.error.HTTPError as error:
                last: Exception = error
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, HTTPException) as error:  # the latter: it went away while answering
                last = error
            except (KeyError, TypeError, ValueError) as error:
                raise RewardError(f'{self._url} answered no {{"rewards": [...]}}') from error
            if attempt < self._retries:
                time.sleep(0.5 * 2**attempt)
        raise RewardError(f"{self._url} gave no rewards in {attempt + 1} tries: {last}") from last

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, body, headers)
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
            return json.load(answer)


def _load(file: Path, name: str) -> Scored:
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"{file} is no Python file; give file.py:name", param="rewards")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{file} has no function {name}", param="rewards")
    found: Scored = function
    return found
