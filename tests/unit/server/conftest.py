"""The application over the fake engine, called in process."""

from __future__ import annotations

import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from sterna.server.app import create_app
from sterna.server.config import ServerConfig

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeAsyncEngine


@pytest.fixture
def engine():
    return FakeAsyncEngine()


@pytest.fixture
def connect(engine):
    """`async with connect(setting=...) as client`: a client of a new app over `engine`."""

    @asynccontextmanager
    async def make(**settings):
        config = ServerConfig.model_validate({"served_model_name": ("tern",), **settings})
        app = create_app(engine, config)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            client.app = app
            yield client

    return make


@pytest.fixture
def events():
    """The data of a streamed answer, parsed; [DONE] as the string."""

    def parse(text: str) -> list:
        blocks = [block for block in text.split("\n\n") if block]
        data = [block.removeprefix("data: ") for block in blocks]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    return parse
