"""What machine this is: the fingerprint printed with every measured figure."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

_ISA_FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512vbmi",
    "avx512_vbmi2", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """One line of facts about the host; figures of different fingerprints are not compared."""

    cpu: str
    arch: str
    num_cpus: int
    memory_gib: float
    isa: tuple[str, ...]
    python: str
    system: str

    def as_dict(self) -> dict[str, object]:
        """For JSON results."""
        return asdict(self)

    def line(self) -> str:
        """For logs and tables."""
        return (
            f"{self.cpu}, {self.num_cpus} CPUs, {self.memory_gib:.0f} GiB, "
            f"{self.arch} [{' '.join(self.isa)}]"
        )


def fingerprint() -> Machine:
    """Read the host's facts; unknown ones are empty, never an error."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return Machine(
        cpu=_cpu_name(info),
        arch=platform.machine(),
        num_cpus=num_usable_cpus(),
        memory_gib=round(_memory_bytes() / 2**30, 1),
        isa=tuple(name for name in _ISA_FLAGS if name in flags),
        python=platform.python_version(),
        system=platform.system(),
    )


def num_usable_cpus() -> int:
    """CPUs this process may run on (affinity, not the machine's total)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping; 0 when the system does not tell."""
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_name(info: dict[str, str]) -> str:
    name = info.get("model name") or platform.processor() or "unknown CPU"
    family, model = info.get("cpu family"), info.get("model")
    return f"{name} (family {family} model {model})" if family and model else name


def _cpuinfo() -> dict[str, str]:
    pairs = (line.split(":", 1) for line in _read_lines("/proc/cpuinfo") if ":" in line)
    first: dict[str, str] = {}
    for key, value in pairs:
        first.setdefault(key.strip(), value.strip())
    return first


def _memory_bytes() -> int:
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
