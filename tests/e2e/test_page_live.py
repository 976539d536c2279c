"""The page against the real server: SmolLM2 answers, the engine view shows its steps, keys work.

`STERNA_SCREENSHOTS=docs/img pytest tests/e2e/test_page_live.py` renews the pictures of the docs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import live_server
import pytest
from live_server import LiveServer

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode adds no test folder
from page_browser import Page, set_view, wait_until

SCREENSHOTS = os.environ.get("STERNA_SCREENSHOTS")
pytest_plugins = ["page_fixtures"]
pytestmark = pytest.mark.browser


def keep_screenshot(page: Page, name: str) -> None:
    if SCREENSHOTS:
        aside = {"type": "mouseMoved", "x": 5, "y": 400}
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", aside)
        time.sleep(0.3)  # hover fades
        page.driver.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))


@pytest.fixture
def live(chromium: Page, smollm: LiveServer) -> Page:
    set_view(chromium.driver, 1280, 890)
    chromium.open(smollm.url)
    chromium.errors()
    return chromium


@pytest.mark.real
def test_a_real_conversation(live: Page, smollm: LiveServer) -> None:
    live.click("#settings-toggle")
    live.type("#set-temperature", "0")
    live.type("#set-max_tokens", "120")
    live.click("#settings-toggle")
    answer = live.ask("Give me three facts about the ocean as a list.")
    assert "ocean" in answer and live.count(".message.assistant li") >= 3
    again = live.ask("Write a Python function that reverses a string.")
    assert "revers" in again
    stats = live.text(".message:last-child .stats")
    assert "cached)" in stats, "the second turn shares its prefix with the first"
    live.js("document.activeElement.blur()")
    keep_screenshot(live, "page")
    assert live.errors() == []


@pytest.mark.real
def test_stop_frees_the_engine(live: Page, smollm: LiveServer) -> None:
    live.send("Write a very long story about the sea, with many chapters.")
    live.wait("document.querySelector('.streaming .body').innerText.length > 20")
    live.click("#send[aria-label=Stop]")
    assert smollm.wait_idle(5)["kv_usage"] == 0


@pytest.mark.real
def test_the_engine_view_shows_the_sample_load(live: Page, smollm: LiveServer) -> None:
    set_view(live.driver, 1280, 944)
    live.click("[data-view=engine]")
    live.wait("document.querySelector('.dot').dataset.state === 'up'")
    live.click("#engine-load")
    # A fused step: decodes and a prompt's chunk together, filled to the budget.
    fused = r"document.querySelector('#readout').innerText.match(/: [5-9] decode \+ \d\d+ prompt/)"
    live.wait(fused, 60)
    if SCREENSHOTS:  # the second wave of long prompts, when latencies of the first are known
        live.wait(f"!{fused}", 60)
        live.wait(fused, 60)
        time.sleep(1)
        keep_screenshot(live, "engine")
    live.click("#engine-load")
    live.wait("document.querySelector('#engine-load').innerText === 'Sample load'")
    assert live.text("#engine-message") == ""
    assert live.text("#figure-itl_p99") != "\u2013"
    assert smollm.wait_idle(5)["kv_usage"] == 0
    assert live.errors() == []


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[LiveServer]:
    """A server of the tiny model that asks for a key."""
    folder = tmp_path_factory.mktemp("locked")
    options = ("--api-key", "s3cret", "--token-budget", "64", "--threads", "1")
    server = live_server.start(folder, *options, model=str(tiny_model))
    yield server
    server.stop()


def test_a_key_in_the_address_opens_the_page_once(chromium: Page, locked: LiveServer) -> None:
    driver = chromium.driver
    driver.get(locked.url)
    assert "API key" in driver.page_source and not driver.find_elements("id", "prompt")
    driver.get(locked.url + "/?api_key=s3cret")
    chromium.wait("document.querySelector('.dot').dataset.state === 'up'")
    assert "s3cret" not in driver.current_url
    chromium.click("#settings-toggle")
    chromium.type("#set-max_tokens", "8")
    chromium.click("#settings-toggle")
    chromium.ask("hello")
    assert "8 tokens" in chromium.text(".stats")
    assert wait_until(lambda: not driver.find_elements("css selector", "dialog[open]"))


def test_the_plain_pages_are_dark_and_narrow_too(chromium: Page, locked: LiveServer) -> None:
    """The question for the key and /docs: the canvas follows the scheme, nothing overflows."""
    driver = chromium.driver
    driver.delete_all_cookies()
    set_view(driver, 390, 844, theme="dark")
    for path in ("/", "/docs"):
        driver.get(locked.url + path)
        chromium.js("document.querySelectorAll('details').forEach(d => { d.open = true })")
        # Canvas is the page's own background: black in a dark scheme, if the root has one.
        chromium.js("document.body.style.background = 'Canvas'")
        assert chromium.js("return getComputedStyle(document.body).backgroundColor") != (
            "rgb(255, 255, 255)"
        )
        scheme = "return getComputedStyle(document.documentElement).colorScheme"
        assert chromium.js(scheme) == "light dark"
        assert chromium.js("return document.documentElement.scrollWidth") <= 390
        driver.get(locked.url + "/?api_key=s3cret")  # /docs needs it
    set_view(driver, 1280, 890)
