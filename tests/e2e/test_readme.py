"""The README's commands, executed: what a newcomer types is what is tested.

Blocks under a `<!-- run -->` mark run as they stand, but for the server's address. `make serve`
itself is `sterna serve` after the set-up that CI does, and the live server of these tests is that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- run -->\n```(\w+)\n(.*?)```", README, re.S)
# What each block must print, in the order of the README.
EXPECTED = ("Tokyo", r"\w+", r"\w+", "avx|baseline|reference")

pytestmark = pytest.mark.real


def test_every_marked_block_has_an_expectation():
    assert len(BLOCKS) == len(EXPECTED)


@pytest.mark.parametrize("index", range(len(EXPECTED)))
def test_block_runs_and_prints_what_it_should(index, smollm, tmp_path):
    language, code = BLOCKS[index]
    code = code.replace("http://127.0.0.1:8000", smollm.url)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    environment["STERNA_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[index], done.stdout), done.stdout + done.stderr


def test_the_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_the_readme_links_only_to_files_that_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
