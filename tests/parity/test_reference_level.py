"""The families once more on the reference kernels, which serve machines without a compiler.

The level is chosen once a process, so this runs in its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_families_equal_transformers_on_the_reference_kernels():
    test = Path(__file__).with_name("test_families.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(test), "-k", "greedy", "-p", "no:cacheprovider"],
        env={**os.environ, "STERNA_KERNELS": "reference"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:]
