"""`sterna plan`: whether a row fits on given machines, with which settings, in what time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from sterna.cli.flags import AsJson
from sterna.cli.plan_recipe import plan_recipe_files
from sterna.core.errors import ConfigError
from sterna.core.log import setup_logging


def plan(
    *model: str,
    seq_len: int = 8192,
    longest_document: int = 0,
    gpus: int = 0,
    nodes: int = 1,
    hbm: float = 80,
    host_ram: float = 0,
    disk: float = 0,
    tflops: float = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    states: Literal["float32", "bfloat16", "8bit"] = "float32",
    master: bool = True,
    micro_batches: int = 1,
    as_json: AsJson = False,
) -> int:
    """Predict memory and time of training on rows of SEQ-LEN tokens, and choose the settings.

    Of a recipe (RECIPE.toml, with key=value behind it): the memory of each step and phase, of
    `sterna train` and `sterna align` alike. Exit code 1 when nothing fits; the nearest settings and
    what they lack are printed.

    Parameters
    ----------
    model
        Folder, .gguf file, name, or a config.json alone; empty is the default model. Or recipes,
        layered left to right, of which --hbm (with --gpus), --host-ram and --disk give the budget.
    seq_len
        Tokens of a packed row.
    longest_document
        Tokens of the longest document in it, over which attention runs; 0 = one document.
    gpus
        GPUs a node; 0 = this machine's CPU.
    nodes
        Machines of that kind.
    hbm
        Memory of a GPU in GB (10^9 bytes).
    host_ram
        Memory of a node for checkpoints and optimizer states in GB; 0 = none of it. For a CPU: all
        it may use; 0 = free.
    disk
        Space of a node for checkpoints and optimizer states in GB; 0 = none.
    tflops
        Peak bfloat16 rate of a device; 0 = an H100's 989, or this CPU's measured by a matmul.
    dtype
        Of weights and activations.
    states
        How the optimizer keeps its moments.
    master
        Whether bfloat16 weights have float32 masters.
    micro_batches
        Of a step; more than one sum their gradients in float32.
    as_json
        Print one JSON object.
    """
    from sterna.train import plan as planner
    from sterna.train.memory import Job

    setup_logging("WARNING")
    if any(word.endswith(".toml") for word in model):
        memory = hbm if gpus else host_ram
        host = host_ram * 1e9 if gpus else 0.0
        return plan_recipe_files(model, memory * 1e9, host, disk * 1e9, as_json)
    if len(model) > 1:
        raise ConfigError(f"{len(model)} models; give one, or recipes (.toml) with key=value")
    shape = _shape(model[0] if model else "", dtype)
    machines = _machines(gpus, nodes, hbm, host_ram, disk, tflops)
    job = Job(
        seq_len, 2 if dtype == "bfloat16" else 4, states, master, micro_batches > 1,
        longest_document or None,
    )  # fmt: skip
    found = planner.plan(shape, job, machines)
    chosen = found if isinstance(found, planner.Plan) else found.nearest
    reasons = () if isinstance(found, planner.Plan) else found.reasons
    longest = planner.longest_row(shape, job, machines)
    if as_json:
        print(json.dumps(_as_dict(chosen, reasons, longest), indent=2))
    else:
        _show(shape, chosen, reasons, longest, machines)
    return 1 if reasons else 0


def _shape(model: str, dtype: str) -> Any:
    """The sizes of a native model, else of one behind transformers."""
    from sterna.core.errors import UnsupportedModelError
    from sterna.model.hub import resolve_model
    from sterna.model.load import open_checkpoint
    from sterna.train.foreign_shape import shape_of_folder
    from sterna.train.memory import Shape
    from sterna.train.pretrain import read_config

    path = Path(model)
    is_config = model.endswith(".json") and path.is_file()
    path = path if is_config else resolve_model(model)
    try:
        return Shape.of(read_config(path) if is_config else open_checkpoint(path)[0])
    except UnsupportedModelError:
        if path.suffix == ".gguf":
            raise
        return shape_of_folder(path, dtype)


def _machines(
    gpus: int, nodes: int, hbm: float, host_ram: float, disk: float, tflops: float
) -> Any:
    from sterna.core.machine import available_memory_bytes
    from sterna.train.flops import measure_peak
    from sterna.train.plan import Machines

    if min(gpus, hbm, host_ram, disk, tflops) < 0 or nodes < 1:
        raise ConfigError("--gpus, --hbm, --host-ram, --disk and --tflops are not negative")
    if gpus:
        flops = tflops * 1e12 or 989e12
        return Machines(gpus, nodes, hbm * 1e9, host_ram * 1e9, disk * 1e9, flops)
    if nodes > 1:
        raise ConfigError(f"--nodes {nodes} without --gpus; a plan for CPUs is one of this machine")
    import torch

    memory = host_ram * 1e9 or float(available_memory_bytes())
    flops = tflops * 1e12 or measure_peak(torch.bfloat16, torch.device("cpu"))
    return Machines(1, 1, memory, 0.0, disk * 1e9, flops, is_gpu=False)


def _as_dict(chosen: Any, reasons: tuple[str, ...], longest: int) -> dict[str, Any]:
    return {
        "fits": not reasons,
        "reasons": list(reasons),
        "longseq": chosen.settings.model_dump(mode="json", exclude_defaults=True),
        "offload": chosen.offload.model_dump(mode="json", exclude_defaults=True),
        "parallel": {"dp": chosen.dp, "sp": chosen.layout.sp, "shards": chosen.layout.shards},
        "peak_bytes": {"expected": chosen.peak[0], "with_margin": chosen.peak[1]},
        "peak_in": chosen.estimate.peak_moment,
        "parts": chosen.estimate.parts,
        "host_bytes": chosen.estimate.host,
        "disk_bytes": chosen.estimate.disk,
        "moved_bytes": chosen.estimate.moved,
        "step_seconds": list(chosen.seconds),
        "longest_row": longest,
    }


def _show(shape: Any, chosen: Any, reasons: tuple[str, ...], longest: int, machines: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from sterna.train.plan import EFFICIENCY, GIB, MEMORY_ERROR

    console = Console()
    head = "[red]does not fit[/red]" if reasons else "[green]fits[/green]"
    console.print(f"{shape.weights / 1e9:.3g} B weights on {machines.world} x "
                  f"{machines.memory / GIB:.1f} GiB: {head}")  # fmt: skip
    for reason in reasons:
        console.print(f"  lacking: {reason}", highlight=False)
    table = Table("", "nearest" if reasons else "plan", box=None)
    settings = chosen.settings.model_dump(mode="json", exclude_defaults=True)
    table.add_row("[longseq]", json.dumps(settings) if settings else "(nothing)")
    away = chosen.offload.model_dump(mode="json", exclude_defaults=True)
    table.add_row("[offload]", json.dumps(away) if away else "(nothing)")
    table.add_row("[parallel]", f"dp {chosen.dp}, sp {chosen.layout.sp}, weights over "
                  f"{chosen.layout.shards}")  # fmt: skip
    peak = [value / GIB for value in chosen.peak]
    table.add_row("peak a device", f"{peak[0]:.2f} GiB in the {chosen.estimate.peak_moment}, "
                  f"{peak[1]:.2f} with the margin of {MEMORY_ERROR:.0%}")  # fmt: skip
    for name, value in chosen.estimate.parts.items():
        table.add_row(f"  {name}", f"{value / GIB:.2f} GiB")
    table.add_row("other tiers", f"host {chosen.estimate.host / GIB:.1f} GiB, disk "
                  f"{chosen.estimate.disk / GIB:.1f} GiB a device; offloading "
                  f"moves {chosen.estimate.moved / GIB:.1f} GiB a step")  # fmt: skip
    fast, slow = chosen.seconds
    table.add_row("step", f"{fast:,.1f} to {slow:,.1f} s a micro-batch ({EFFICIENCY[0]:.0%} to "
                  f"{EFFICIENCY[1]:.0%} of {machines.flops / 1e12:,.2f} TFLOP/s)")  # fmt: skip
    table.add_row("longest row", f"{longest:,} tokens on these machines")
    console.print(table)
    console.print("Counted from sizes (train/memory.py); the time of "
                  "offloading is not in it; for GPUs nothing of this was measured.",
                  style="dim")  # fmt: skip
