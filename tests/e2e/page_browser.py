"""Chromium for the page's tests: found on the machine, headless, quiet, with a fresh profile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def find_browser() -> tuple[str, str] | None:
    """Paths of the browser and of chromedriver, or None when either is missing."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def open_browser(profile: Path, *, width: int = 1280, height: int = 800) -> Any:
    """A driver with an empty profile in `profile`; close it with `.quit()`."""
    from selenium import webdriver

    found = find_browser()
    assert found is not None, "call find_browser first"
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=found[1])
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(20)
    return driver


def set_view(
    driver: Any, width: int, height: int, *, scale: float = 1, theme: str = "light"
) -> None:
    """Emulate a viewport exactly (a window would add its frame) and a color scheme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_until(condition: Callable[[], bool], timeout_s: float = 5) -> bool:
    """Poll; for what happens on the server's side."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class Page:
    """The page under test, by the words its tests use. Waiting polls a JS expression."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, *, keep_storage: bool = False) -> None:
        """Load `url`; without `keep_storage` as a first visit: nothing stored yet."""
        # By way of a file of the same origin: leaving the page makes it save, so clear after that.
        self.driver.get(url.split("#")[0].split("?")[0].rstrip("/") + "/web/icon.svg")
        if not keep_storage:
            self.js("localStorage.clear(); sessionStorage.clear()")
        self.driver.get(url)
        self.wait("document.documentElement.dataset.ready !== undefined")

    def js(self, script: str, *args: Any) -> Any:
        """Run a script; an expression needs `return`."""
        return self.driver.execute_script(script, *args)

    def wait(self, expression: str, timeout_s: float = 10) -> Any:
        """The first truthy value of the expression (an error in it counts as not yet)."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := self.js(f"try {{ return {expression} }} catch {{ return null }}"):
                return value
            time.sleep(0.03)
        raise AssertionError(f"not within {timeout_s} s: {expression}")

    def text(self, selector: str) -> str:
        """The visible text of the first match; empty when there is none."""
        return str(
            self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def count(self, selector: str) -> int:
        """How many elements match."""
        return int(self.js("return document.querySelectorAll(arguments[0]).length", selector))

    def click(self, selector: str) -> None:
        """Click the first match, as a user would (fails when something covers it)."""
        self.driver.find_element("css selector", selector).click()

    def type(self, selector: str, text: str) -> None:
        """Type into a field; special keys as selenium's `Keys`."""
        self.driver.find_element("css selector", selector).send_keys(text)

    def press(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def send(self, text: str) -> None:
        """Type a message and press Enter."""
        self.type("#prompt", text + "\ue007")

    def ask(self, text: str) -> str:
        """Send a message and wait for the whole answer; returns its text."""
        before = self.count(".message.assistant")
        self.send(text)
        return self.wait_for_answers(before + 1)

    def wait_for_answers(self, number: int) -> str:
        """Wait for so many answers, the last one whole; returns its text."""
        self.wait(f"document.querySelectorAll('.message.assistant').length >= {number}")
        self.wait("!document.querySelector('.streaming, .send.stop')")
        return self.text(".message.assistant:last-child .body")

    def errors(self) -> list[str]:
        """Console errors since the last call, without the failed loads that tests provoke."""
        logs = self.driver.get_log("browser")
        return [
            log["message"]
            for log in logs
            if log["level"] == "SEVERE" and "Failed to load resource" not in log["message"]
        ]
