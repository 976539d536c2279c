"""Static rules of the page's files. No browser needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WEB = Path(__file__).parents[2] / "src" / "sterna" / "server" / "web"
SCRIPTS = sorted(WEB.glob("js/*.js"))
FILES = sorted(path for path in WEB.rglob("*") if path.suffix in {".js", ".css", ".html", ".svg"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_headed_and_makes_no_markup(path: Path) -> None:
    text = path.read_text("ascii")
    assert text.startswith("// ") and text.count("\n") < 250
    assert not re.search(r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_ascii_and_names_no_other_host(path: Path) -> None:
    text = path.read_text("ascii")
    hosts = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
    assert hosts == set()


def test_the_html_runs_under_a_strict_policy() -> None:
    html = (WEB / "index.html").read_text("ascii")
    assert "default-src 'none'" in html and "unsafe" not in html
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", html)


def test_every_module_is_preloaded_and_every_linked_file_exists() -> None:
    html = (WEB / "index.html").read_text("ascii")
    preloaded = set(re.findall(r'modulepreload" href="/web/js/([\w-]+\.js)"', html))
    assert preloaded == {path.name for path in SCRIPTS} - {"app.js", "theme-boot.js"}
    for name in re.findall(r'(?:href|src)="/web/([^"]+)"', html):
        assert (WEB / name).is_file(), name


def test_every_import_and_icon_exists() -> None:
    html = (WEB / "index.html").read_text("ascii")
    icons = set(re.findall(r'<symbol id="i-([\w-]+)"', html))
    for path in SCRIPTS:
        text = path.read_text("ascii")
        for name in re.findall(r'from "\./([\w-]+\.js)"', text):
            assert (WEB / "js" / name).is_file(), (path.name, name)
        for name in re.findall(r'(?:\bicon|iconButton)\("(\w+)"', text):
            assert name in icons, (path.name, name)
