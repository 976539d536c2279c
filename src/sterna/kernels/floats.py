"""Float32 rows as text: what a server sends when it is asked for numbers instead of bytes.

Python needs 90 us for 384 numbers, a fifth of what embedding 16 tokens takes; C++ needs 15.
"""

from __future__ import annotations

import importlib
import importlib.util
import json

import numpy as np
from numpy.typing import NDArray


def json_rows(values: NDArray[np.float32]) -> list[bytes]:
    """One JSON list a row of finite values [N, D]; each number reads back as the same float32."""
    if importlib.util.find_spec("sterna.kernels._cpu") is None:
        return [json.dumps([float(str(x)) for x in row]).encode() for row in values]
    native = importlib.import_module("sterna.kernels._cpu")
    ready = np.ascontiguousarray(values, np.float32)
    text: bytes = native.json_rows(ready.ctypes.data, *ready.shape)
    return text.splitlines()
