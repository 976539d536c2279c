"""`sterna doctor`: which kernels run here and why, and all else a bug report needs."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sterna.cli.flags import AsJson
from sterna.core.errors import SternaError
from sterna.core.log import setup_logging
from sterna.core.machine import available_memory_bytes, fingerprint
from sterna.core.rundir import home
from sterna.engine.config import EngineConfig
from sterna.version import __version__

_LIBRARIES = ("torch", "tokenizers", "safetensors", "llguidance", "fastapi", "uvicorn", "uvloop",
              "pydantic", "numpy", "transformers")  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
EXIT_UNUSABLE = 1


def doctor(model: str = "", /, *, as_json: AsJson = False) -> int:
    """Say which kernels run here, and why.

    Parameters
    ----------
    model
        Folder, GGUF file or name to look for; empty is the default model.
    as_json
        Print one JSON object.
    """
    setup_logging("ERROR")
    report = examine(model)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0 if report["model"]["found"] and not report["kernels"]["fault"] else EXIT_UNUSABLE


def examine(model: str) -> dict[str, Any]:
    """All findings, as JSON values. Nothing raises: a fault is a finding."""
    return {
        "sterna": __version__,
        "machine": fingerprint().as_dict(),
        "available_memory_gib": round(available_memory_bytes() / 2**30, 1),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "compiler": _compiler(),
        "cache_folder": str(home()),
        "accelerator": _accelerator(),
        "kv_cache_dtypes": _kv_cache_dtypes(),
        "kernels": _kernels(),
        "model": _model(model),
    }


def _kv_cache_dtypes() -> list[str]:
    field = EngineConfig.model_fields["kv_cache_dtype"]
    return list(get_args(field.annotation))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The first line of the C++ compiler's --version; None without one."""
    path = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if path is None:
        return None
    try:
        command = [path, "--version"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return path
    return answer.stdout.partition("\n")[0] or path


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _kernels() -> dict[str, Any]:
    from sterna.kernels.load import describe

    try:
        rows = describe()
    except SternaError as error:
        return {"ops": [], "fault": error.message}
    return {"ops": [asdict(row) for row in rows], "isa": _isa(), "fault": None}


def _isa() -> str | None:
    """The instruction set that the C++ kernels chose; None on the reference kernels."""
    from sterna.kernels.backend import backend_for

    kernels = getattr(backend_for("cpu"), "kernels", None)
    return None if kernels is None else str(kernels.isa)


def _model(name: str) -> dict[str, Any]:
    from sterna.model.hub import resolve_model

    try:
        path = resolve_model(name)
    except SternaError as error:
        return {"asked": name, "found": None, "fault": error.message}
    return {"asked": name, "found": str(path), "fault": None, "prompt_layers": _prompt_layers(path)}


def _prompt_layers(path: Path) -> str | None:
    """Of a SwiftKV folder; None of other models, damaged ones too: loading says what is wrong."""
    from sterna.model.load import load_config

    try:
        config = load_config(path) if path.is_dir() else None
    except SternaError:
        return None
    if config is None or config.swiftkv is None:
        return None
    return config.swiftkv.line(config.num_hidden_layers)


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(report):
        facts.add_row(name, escape(value))
    console.print(facts)
    _show_kernels(console, report["kernels"])


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    libraries = (f"{name} {version or '-'}" for name, version in report["libraries"].items())
    model = report["model"]
    return [
        ("sterna", f"{report['sterna']} on Python {report['python']}"),
        ("machine", fingerprint().line()),
        ("free memory", f"{report['available_memory_gib']} GiB"),
        ("accelerator", report["accelerator"] or "none"),
        ("C++ compiler", report["compiler"] or "none found; kernels can not be rebuilt here"),
        ("libraries", ", ".join(libraries)),
        ("KV cache", f"--kv-cache-dtype {' | '.join(report['kv_cache_dtypes'])}"),
        ("cache folder", report["cache_folder"]),
        ("model", model["found"] or f"not found: {model['fault']}"),
        *([("prompt layers", layers)] if (layers := model.get("prompt_layers")) else []),
    ]


def _show_kernels(console: Console, kernels: dict[str, Any]) -> None:
    if kernels["fault"]:
        console.print(f"kernels: {kernels['fault']}", style="red", markup=False)
        return
    table = Table("op", "back end", "why")
    for row in kernels["ops"]:
        backend = row["backend"]
        isa = f" ({kernels['isa']})" if backend == "cpu" and kernels["isa"] else ""
        table.add_row(row["op"], backend + isa, row["why"])
    console.print(table)
