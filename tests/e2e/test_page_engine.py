"""The engine view and the looks of the page in headless Chromium, against a scripted server."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode adds no test folder
from page_browser import Page, set_view, wait_until
from page_server import TOKEN_BUDGET, FakeServer

pytest_plugins = ["page_fixtures"]
pytestmark = pytest.mark.browser
LEFT, HOME = "\ue012", "\ue011"

# Pixels of a chart, within 2 levels a channel of a CSS color.
COUNT_PIXELS = """
  const [id, name] = arguments;
  const canvas = document.getElementById(id);
  canvas.style.color = `var(${name})`;
  const wanted = getComputedStyle(canvas).color.match(/\\d+/g).map(Number);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4)
    count += data[i + 3] === 255 && [0, 1, 2].every((c) => Math.abs(data[i + c] - wanted[c]) < 3);
  return count;"""


@pytest.fixture
def engine(page: Page, fake: FakeServer) -> Page:
    """The engine view under load, with steps drawn."""
    fake.is_loaded = True
    page.open(fake.url + "/#engine")
    page.wait("document.querySelector('#readout').innerText.startsWith('Step ')")
    return page


def test_steps_are_drawn_as_they_happen(engine: Page) -> None:
    engine.wait("+document.querySelector('#readout').innerText.match(/Step ([0-9]+)/)[1] > 60")
    decode = engine.js(COUNT_PIXELS, "chart-batch", "--decode")
    prompt = engine.js(COUNT_PIXELS, "chart-batch", "--prefill")
    # Five steps filled to the budget hold about ten times the tokens of fifty decode steps.
    assert 0 < decode < prompt
    assert engine.js(COUNT_PIXELS, "chart-duration", "--time") > 0
    assert engine.js(COUNT_PIXELS, "chart-kv", "--kv") > 0
    assert engine.text("#engine-live") == "running"
    assert float(engine.text("#tile-decode-rate").replace(",", "")) > 50
    assert engine.text("#figure-itl_p99") == "71 ms"
    assert "4,096 blocks of 16: 65,536 tokens" in engine.text("#facts")


def test_the_cursor_reads_steps_by_keyboard(engine: Page) -> None:
    engine.wait("+document.querySelector('#readout').innerText.match(/Step ([0-9]+)/)[1] > 20")
    engine.click("#engine-pause")
    chart = engine.driver.find_element("id", "chart-batch")
    chart.send_keys(LEFT)
    newest = step_number(engine)
    chart.send_keys(LEFT + LEFT)
    assert step_number(engine) == newest - 2
    spoken = chart.get_attribute("aria-valuetext")
    assert spoken is not None and f"prompt of {TOKEN_BUDGET}" in spoken
    chart.send_keys(HOME)
    assert engine.text("#readout") == "No step ran here."


def step_number(page: Page) -> int:
    match = re.match(r"Step ([\d,]+):", page.text("#readout"))
    assert match, page.text("#readout")
    return int(match[1].replace(",", ""))


def test_pause_freezes_and_time_windows_average(engine: Page) -> None:
    engine.click("#engine-pause")
    frozen = engine.text("#readout")
    engine.js("return new Promise((done) => setTimeout(done, 300))")
    assert engine.text("#readout") == frozen
    assert engine.text("#engine-live") == "paused"
    engine.click("#engine-pause")
    engine.click(".segments label:nth-of-type(2)")
    engine.wait("document.querySelector('#readout').innerText.startsWith('Mean of ')")


def test_steps_stream_only_while_seen(engine: Page, fake: FakeServer) -> None:
    assert wait_until(lambda: fake.watchers == 1)
    engine.click("[data-view=chat]")
    assert wait_until(lambda: fake.watchers == 0)


def test_sample_load_mixes_short_and_long_prompts(page: Page, fake: FakeServer) -> None:
    page.open(fake.url + "/#engine")
    page.wait("document.querySelector('.dot').dataset.state === 'up'")
    page.click("#engine-load")
    page.wait("document.querySelector('#readout').innerText.startsWith('Step ')")
    page.wait("document.querySelector('#engine-load').innerText === 'Sample load'")
    lengths = [[len(prompt) for prompt in body["prompt"]] for body in fake.bodies]
    assert len(lengths[0]) == 8 and max(lengths[0]) < 50
    assert [len(some) for some in lengths[1:]] == [3, 2] and min(lengths[1]) > 5000


def test_nothing_comes_from_elsewhere_and_nothing_breaks_the_policy(engine: Page) -> None:
    names = engine.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    origin = engine.js("return location.origin")
    assert len(names) > 20 and all(name.startswith(origin + "/") for name in names)


@pytest.mark.parametrize("width", [360, 640, 900, 1280])
def test_no_view_scrolls_sideways(page: Page, fake: FakeServer, width: int) -> None:
    set_view(page.driver, width, 740)
    page.ask("some markdown")
    wide = """return [...document.querySelectorAll("#scroll, main, body, #settings")]
      .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.id)"""
    assert page.js(wide) == []
    page.click("#settings-toggle")
    assert page.js(wide) == []
    page.click("[aria-label='Close settings']")
    page.click("[data-view=engine]")
    assert page.js(wide) == []


def test_streaming_moves_nothing_that_is_read(page: Page, fake: FakeServer) -> None:
    page.js("""window.shift = 0; new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
    }).observe({ type: "layout-shift" })""")
    fake.pause_s = 0.02
    page.ask("some markdown")
    page.js("return new Promise((done) => setTimeout(done, 700))")  # past hadRecentInput
    page.click(".message.assistant [aria-label=Regenerate]")
    page.wait_for_answers(1)
    assert page.js("return window.shift") < 0.05  # "good" is below 0.1


def test_theme_follows_the_system_until_chosen(page: Page, fake: FakeServer) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = page.js(paper)
    set_view(page.driver, 1280, 800, theme="dark")
    dark = page.js(paper)
    assert light != dark
    page.click("#theme")
    assert page.js(paper) == light
    page.open(fake.url, keep_storage=True)
    assert (
        page.js(paper) == light
        and page.js("return document.documentElement.dataset.theme") == "light"
    )
    page.click("#theme")
    assert page.js(paper) == dark


# Text on its surface; WCAG AA asks for 4.5 (3 for the lines of controls).
PAIRS = [
    ("--ink", "--paper", 4.5), ("--ink", "--accent-wash", 4.5), ("--ink-soft", "--paper", 4.5),
    ("--ink-soft", "--surface", 4.5), ("--ink-soft", "--raised", 4.5), ("--accent", "--paper", 4.5),
    ("--accent", "--accent-wash", 4.5), ("--accent-ink", "--accent", 4.5),
    ("--bad", "--bad-wash", 4.5), ("--wait", "--wait-wash", 4.5), ("--line-strong", "--surface", 3),
    ("--decode", "--surface", 3), ("--kv", "--surface", 3), ("--p99", "--surface", 3),
]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(page: Page, theme: str) -> None:
    set_view(page.driver, 1280, 800, theme=theme)
    resolve = """const probe = document.body.appendChild(document.createElement("i"));
      probe.style.color = `var(${arguments[0]})`;
      return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number)"""
    names = {name for pair in PAIRS for name in pair[:2]}
    light = {name: luminance(page.js(resolve, name)) for name in names}
    for front, back, least in PAIRS:
        high, low = sorted((light[front], light[back]), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def luminance(rgb: list[Any]) -> float:
    """WCAG 2 relative luminance of 8-bit sRGB."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
