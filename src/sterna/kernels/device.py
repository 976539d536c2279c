"""What a process computes on: the device, and how many CPU threads."""

from __future__ import annotations

import os

import torch

from sterna.core.errors import ConfigError
from sterna.core.log import get_logger
from sterna.core.machine import num_usable_cpus
from sterna.kernels.backend import backend_for
from sterna.kernels.load import load_kernels

_log = get_logger(__name__)


def check_device(name: str) -> None:
    """ConfigError when this PyTorch has no such device."""
    if name == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(name).index or 0) >= count:
        raise ConfigError(
            f"device is {name!r}, but PyTorch {torch.__version__} finds {count} CUDA devices here; "
            "use cpu, or install a driver and a CUDA build of PyTorch",
            param="device",
        )


def set_threads(threads: int) -> None:
    """Use `threads` CPU threads for kernels and PyTorch; 0 = all that this process may use.

    More than that many would wait for each other, minutes a step: they are not started. Processes
    that torchrun started on this machine (LOCAL_WORLD_SIZE) share the CPUs for the same reason.
    """
    usable = max(1, num_usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads > usable:
        _log.warning("threads is %d, this process may use %d CPUs: taking these", threads, usable)
    count = min(threads or usable, usable)
    torch.set_num_threads(count)
    load_kernels()
    set_kernel_threads = getattr(backend_for("cpu"), "set_threads", None)
    if set_kernel_threads is not None:  # the reference back end has no threads of its own
        set_kernel_threads(count)
