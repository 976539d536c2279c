"""Freed memory stays with the process: a second step of the same sizes takes no new pages."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest

PROGRAM = """
import resource, sys
import torch
from sterna.core.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    blocks = [torch.ones(12 << 20) for _ in range(3)]  # 48 MB each, beyond malloc's own limit
    del blocks
for _ in range(12):  # aligned blocks leave gaps until neighbours join
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("gnu" not in (sysconfig.get_config_var("SOABI") or ""), reason="needs glibc")
def test_a_second_step_takes_no_new_pages():
    faults = {}
    for word in ("keep", "give"):
        command = [sys.executable, "-c", PROGRAM, word]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[word] = int(done.stdout)
    pages = 3 * (48 << 20) // 4096
    assert faults["keep"] < pages / 20
    assert faults["give"] > pages / 2 or faults["give"] >= 3 * 24  # large pages: one fault each
