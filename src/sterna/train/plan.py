"""What a row of S tokens needs on given machines, and which settings make it fit.

`plan` spreads a row over as few ranks (sp) as it can, and for each number of them tries the
settings of `ladder` from the fastest to the most frugal, until the peak fits; `replan` is the next
rung for a run that met the limit all the same. Memory is `memory.estimate`; time is counted:

    dense        6 N_m T FLOPs, 8 when blocks run again; N_m without a looked-up embedding
    attention    3.5 x 2 n^2 O a block and document (causal; forward 1, backward 2.5), 4.5 x when
                 it runs again
    time         FLOPs / (peak rate x efficiency), for the two efficiencies assumed (EFFICIENCY)

One device may also keep optimizer states, then the blocks' weights, in the memory of the host (a
GPU) or on disk: tried after all settings that move nothing; the bytes moved are printed, their time
is not in the step's, since copies run beside the computation.
Nothing here was run on a GPU: rates and memory of one are its maker's figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sterna.core.errors import ConfigError
from sterna.train.longseq.config import LongseqSection
from sterna.train.memory import KEPT, Estimate, Job, Layout, Shape, estimate
from sterna.train.offload.config import OffloadSection

GIB = float(1 << 30)
# Measured against predicted on a CPU: bench/train/planner.py. The margin a plan keeps free.
MEMORY_ERROR = 0.10
EFFICIENCY = (0.35, 0.55)  # of the peak rate, slow and fast end
TILE = 4096


@dataclass(frozen=True, slots=True)
class Machines:
    """What a run may use. Bytes and FLOP/s are of one device, host and disk of one node."""

    devices: int = 1  # a node
    nodes: int = 1
    memory: float = 80e9
    host: float = 0.0
    disk: float = 0.0
    flops: float = 989e12
    is_gpu: bool = True

    @property
    def world(self) -> int:
        """Devices in all."""
        return self.devices * self.nodes


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings that fit, and what they are expected to need."""

    settings: LongseqSection
    layout: Layout
    dp: int
    estimate: Estimate
    seconds: tuple[float, float]  # a step, fast and slow
    offload: OffloadSection

    @property
    def peak(self) -> tuple[float, float]:
        """Bytes of a device: expected, and with the margin."""
        return self.estimate.peak, self.estimate.peak * (1 + MEMORY_ERROR)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing fits: what came nearest, and what it lacks."""

    nearest: Plan
    reasons: tuple[str, ...]


def ladder(
    is_gpu: bool, has_disk: bool, sharded: bool, has_experts: bool = False
) -> Iterator[LongseqSection]:
    """Settings from the fastest to the most frugal; mlp_tile is refused where rows meet experts."""
    mlp = 0 if has_experts else TILE
    yield _rung()
    yield _rung(checkpoint=True)
    if mlp:
        yield _rung(checkpoint=True, mlp_tile=mlp)
    yield _rung(checkpoint=True, mlp_tile=mlp, attention_tile=TILE)
    least = _rung(checkpoint=True, mlp_tile=mlp, attention_tile=TILE, head_rows=512)
    yield least
    if is_gpu:
        yield least.model_copy(update={"tier": "host"})
    if not sharded:
        yield least.model_copy(update={"every": 2})
        yield least.model_copy(update={"every": 4})
    if has_disk:
        yield least.model_copy(update={"tier": "disk"})


def offloads(machines: Machines) -> Iterator[OffloadSection]:
    """What may be offloaded, least first: nothing, states, states and weights of one device."""
    yield KEPT
    tier = "host" if machines.is_gpu else "disk"
    has_room = machines.host > 0 if machines.is_gpu else machines.disk > 0
    if machines.world == 1 and has_room:
        yield OffloadSection.model_validate({"states": tier})
        yield OffloadSection.model_validate({"states": tier, "weights": tier})


def _rung(**values: Any) -> LongseqSection:
    return LongseqSection.model_validate(values)


def plan(shape: Shape, job: Job, machines: Machines) -> Plan | Refusal:
    """The fastest settings that fit with the margin, or why none does.

    sp is tried from 1 up to what divides the devices; more ranks than heads need ring attention,
    which is left out. Raises ConfigError for sizes that are not positive.
    """
    if min(job.tokens, machines.devices, machines.nodes) < 1 or machines.memory <= 0:
        raise ConfigError(
            f"{job.tokens} tokens on {machines.world} devices of {machines.memory / GIB:.1f} GiB; "
            "give positive numbers"
        )
    nearest: Plan | None = None
    for sp in _degrees(shape, machines.world):
        layout, is_cut = Layout(sp, machines.world), machines.world > 1
        rungs = list(ladder(machines.is_gpu, machines.disk > 0, is_cut, shape.has_experts))
        for offload, settings in itertools.product(offloads(machines), rungs):
            if offload.weights != "memory" and not settings.checkpoint:
                continue
            found = _plan_of(shape, job, machines, settings, layout, offload)
            if not _lacks(found, machines):
                return found
            if nearest is None or _excess(found, machines) < _excess(nearest, machines):
                nearest = found
    assert nearest is not None
    return Refusal(nearest, _lacks(nearest, machines))


def replan(
    settings: LongseqSection,
    is_gpu: bool,
    has_disk: bool,
    sharded: bool,
    has_experts: bool = False,
) -> LongseqSection | None:
    """The next more frugal rung after `settings`; None at the end. A folder is kept."""
    rungs = list(ladder(is_gpu, has_disk, sharded, has_experts))
    bare = settings.model_copy(update={"folder": None, "auto": False})
    at = rungs.index(bare) if bare in rungs else _rung_like(rungs, bare)
    if at + 1 >= len(rungs):
        return None
    return rungs[at + 1].model_copy(update={"folder": settings.folder})


def _rung_like(rungs: list[LongseqSection], settings: LongseqSection) -> int:
    """The last rung that is no more frugal than settings of one's own."""
    same = [i for i, rung in enumerate(rungs) if rung.checkpoint == settings.checkpoint]
    tiled = [i for i in same if bool(rungs[i].mlp_tile) == bool(settings.mlp_tile)]
    return (tiled or same)[0]


def _degrees(shape: Shape, world: int) -> list[int]:
    """Sequence-parallel sizes: divisors of the world that divide the heads too."""
    return [n for n in range(1, world + 1) if world % n == 0 and shape.heads % n == 0]


def _plan_of(
    shape: Shape,
    job: Job,
    machines: Machines,
    settings: LongseqSection,
    layout: Layout,
    offload: OffloadSection,
) -> Plan:
    found = estimate(shape, job, settings, layout, offload)
    work = step_flops(shape, job, settings.checkpoint) / layout.sp
    fast, slow = (work / (machines.flops * e) for e in reversed(EFFICIENCY))
    return Plan(settings, layout, machines.world // layout.sp, found, (fast, slow), offload)


def step_flops(shape: Shape, job: Job, recomputes: bool) -> float:
    """FLOPs of a micro-batch, forward, backward and what is computed again."""
    head = shape.vocab * shape.hidden
    blocks = shape.layers * shape.block_weights
    dense = job.tokens * (6.0 * (blocks + head) + (2.0 * blocks if recomputes else 0.0))
    longest = job.longest or job.tokens
    pairs = job.tokens * (longest + 1) / 2
    once = 4.0 * pairs * shape.attention * shape.layers
    return dense + once * (4.5 if recomputes else 3.5)


def _excess(found: Plan, machines: Machines) -> float:
    """How many times over what is there the plan goes where it goes over most."""
    pairs = [(found.peak[1], machines.memory)]
    pairs += [(found.estimate.host * machines.devices, machines.host)]
    pairs += [(found.estimate.disk * machines.devices, machines.disk)]
    return max(need / max(there, 1.0) for need, there in pairs)


def _lacks(found: Plan, machines: Machines) -> tuple[str, ...]:
    """What `found` has too little of; empty when it fits."""
    need = found.peak[1]
    reasons = []
    if need > machines.memory:
        part = max(found.estimate.parts, key=lambda name: found.estimate.parts[name])
        reasons.append(
            f"{need / GIB:.1f} GiB a device in the {found.estimate.peak_moment}, "
            f"{machines.memory / GIB:.1f} are there; the largest part is {part} "
            f"({found.estimate.parts[part] / GIB:.1f} GiB)"
        )
    per_node = machines.devices
    if found.estimate.host * per_node > machines.host:
        reasons.append(
            f"{found.estimate.host * per_node / GIB:.1f} GiB of checkpoints and states a node in "
            f"host memory, {machines.host / GIB:.1f} are there"
        )
    if found.estimate.disk * per_node > machines.disk:
        reasons.append(
            f"{found.estimate.disk * per_node / GIB:.1f} GiB of checkpoints and states a node on "
            f"disk, {machines.disk / GIB:.1f} are there"
        )
    return tuple(reasons)


def longest_row(shape: Shape, job: Job, machines: Machines) -> int:
    """The most tokens that fit, to one part in 64."""
    low, high = 0, 1024
    while isinstance(plan(shape, replace(job, tokens=high), machines), Plan):
        low, high = high, high * 2
        if high > 1 << 34:
            return low
    while high - low > max(low // 64, 1):
        middle = (low + high) // 2
        fits = isinstance(plan(shape, replace(job, tokens=middle), machines), Plan)
        low, high = (middle, high) if fits else (low, middle)
    return low
