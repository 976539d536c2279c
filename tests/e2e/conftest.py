"""Servers for the live tests: one process each for a whole session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode adds no test folder
import live_server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny random model's folder."""
    return live_server.write_tiny_model(tmp_path_factory.mktemp("tiny") / "tern")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_model):
    """A live server of the tiny model, with a small queue."""
    server = live_server.start(
        tmp_path_factory.mktemp("tiny-server"),
        "--max-queued-requests", "16", "--max-num-seqs", "16",
        "--token-budget", "64", "--threads", "1",
        "--kv-cache-bytes", str(8 << 20),
        model=str(tiny_model),
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="session")
def smollm(tmp_path_factory):
    """A live server of SmolLM2, as `sterna serve` starts it."""
    server = live_server.start(tmp_path_factory.mktemp("smollm-server"))
    yield server
    server.stop()
