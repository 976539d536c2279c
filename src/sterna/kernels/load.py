"""Chooses the back end of every op and says why.

`STERNA_KERNELS` forces a level: reference, cpu, triton or cuda. Unset, the best available is
taken: C++ on the CPU, and Triton's attention on a CUDA device. A missing C++ extension costs one
warning and speed, a missing Triton the memory of S x S scores; neither costs correctness.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass

import torch

from sterna.core.errors import KernelError
from sterna.core.log import get_logger
from sterna.core.lookup import unknown
from sterna.kernels.optable import OPS, library
from sterna.kernels.triton import backend as triton

LEVELS = ("reference", "cpu", "triton", "cuda")
_EXTENSION = "sterna.kernels._cpu"
_REGISTRAR = "sterna.kernels.cpu_backend"
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpBackend:
    """Which kernel an op runs on the CPU, and why that one."""

    op: str
    backend: str
    why: str


@dataclass(frozen=True, slots=True)
class LoadedKernels:
    """The level in use ("reference", "cpu" or "triton") and the reason; what CUDA tensors run."""

    level: str
    why: str
    cuda: str = "reference"


def load_kernels(level: str | None = None) -> LoadedKernels:
    """Register the kernels of `level`, else of STERNA_KERNELS, else the best available.

    Idempotent; the first call of the process decides. Raises KernelError for an unknown level, a
    forced level that this machine cannot run, or one that differs from the level already loaded.
    """
    asked = level or os.environ.get("STERNA_KERNELS") or None
    if asked is not None and asked not in LEVELS:
        raise KernelError(unknown("kernel level", asked, LEVELS))
    loaded = _load_once(asked)
    if asked not in (None, loaded.level):
        raise KernelError(
            f"kernel level {asked!r} asked, but this process already runs {loaded.level!r}; "
            "set STERNA_KERNELS before the first model is loaded"
        )
    return loaded


def describe() -> tuple[OpBackend, ...]:
    """Op x back end x why, for `sterna doctor`. Loads the kernels when nothing has yet."""
    loaded = load_kernels()
    return tuple(_describe_op(op.name, loaded) for op in OPS)


# The process-wide choice, as process-wide as the dispatcher it configures; written once.
_chosen: list[LoadedKernels] = []


def _load_once(asked: str | None) -> LoadedKernels:
    if not _chosen:
        library()
        _chosen.append(_choose(asked))
    return _chosen[0]


def _choose(asked: str | None) -> LoadedKernels:
    if asked == "reference":
        return LoadedKernels("reference", "asked for")
    if asked == "cuda":
        raise KernelError(
            "kernel level 'cuda' is not part of this version; a CUDA device runs Triton's "
            "attention and the reference's other ops (leave STERNA_KERNELS unset)"
        )
    if asked == "triton":
        return _only_triton()
    fault, cuda = _register_cpu(), _register_cuda() if asked is None else "reference"
    if fault is None:
        return LoadedKernels("cpu", "best available" if asked is None else "asked for", cuda)
    if asked == "cpu":
        raise KernelError(f"kernel level 'cpu' asked, but {fault}")
    _log.warning("%s; running the slow reference kernels", fault)
    return LoadedKernels("reference", fault, cuda)


def _only_triton() -> LoadedKernels:
    """Triton wherever it can run, the reference for all else."""
    fault = triton.missing()
    if fault is None and not (triton.is_interpreted() or torch.cuda.is_available()):
        fault = "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    if fault is not None:
        raise KernelError(f"kernel level 'triton' asked, but {fault}")
    triton.register("cpu" if triton.is_interpreted() else "cuda")
    return LoadedKernels("triton", "asked for", "triton")


def _register_cuda() -> str:
    """Triton's kernels for CUDA tensors, if there can be any; says what these run."""
    if not torch.cuda.is_available():
        return "reference"
    fault = triton.missing()
    if fault is not None:
        _log.warning("%s; attention on CUDA holds S x S scores", fault)
        return "reference"
    triton.register("cuda")
    return "triton"


def _register_cpu() -> str | None:
    """Put the C++ kernels under the CPU key; the reason when that is impossible."""
    for name in (_EXTENSION, _REGISTRAR):
        if importlib.util.find_spec(name) is None:
            return f"the C++ extension is not built ({name} is missing): reinstall with a compiler"
    try:
        importlib.import_module(_EXTENSION)
    except ImportError as error:
        return f"the C++ extension does not load ({error}): reinstall with a compiler"
    importlib.import_module(_REGISTRAR).register()
    return None


def _describe_op(name: str, loaded: LoadedKernels) -> OpBackend:
    is_apart = name in triton.OPS and loaded.cuda != "reference"
    on_cuda = f"; on CUDA {loaded.cuda}" if is_apart else ""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"sterna::{name}", "CPU"):
        backend = "triton" if loaded.level == "triton" else "cpu"
        return OpBackend(name, backend, loaded.why + on_cuda)
    why = loaded.why if loaded.level != "cpu" else "the C++ back end has no kernel for it"
    return OpBackend(name, "reference", why + on_cuda)
