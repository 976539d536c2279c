"""Fixtures of the page's tests: one browser and one scripted server for the whole run."""

from __future__ import annotations

from collections.abc import Iterator

import page_server
import pytest
from page_browser import Page, find_browser, open_browser, set_view
from page_server import FakeServer


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A headless browser; skips where none is installed."""
    if find_browser() is None:
        pytest.skip("no browser: install chromium and chromedriver (chromium-driver) to run this")
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="session")
def fake_process() -> Iterator[FakeServer]:
    """The scripted server, running."""
    fake = FakeServer()
    running = page_server.start(fake)
    yield fake
    running.should_exit = True


@pytest.fixture
def fake(fake_process: FakeServer) -> FakeServer:
    """The scripted server with its switches back at their defaults.

    `watchers` is the server thread's own count: written here, a decrement could be lost.
    """
    defaults = FakeServer(url=fake_process.url)
    for name in FakeServer.__dataclass_fields__.keys() - {"watchers"}:
        setattr(fake_process, name, getattr(defaults, name))
    return fake_process


@pytest.fixture
def page(chromium: Page, fake: FakeServer) -> Iterator[Page]:
    """The page as a first visit; afterwards the console must hold no error."""
    set_view(chromium.driver, 1280, 800)
    chromium.open(fake.url)
    chromium.errors()  # of the test before
    yield chromium
    assert chromium.errors() == []
