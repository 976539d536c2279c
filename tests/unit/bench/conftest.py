"""The benchmark scripts are modules of their folder, as when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]
# Last: `table` is a module of both folders.
sys.path.append(str(BENCH / "quality"))
