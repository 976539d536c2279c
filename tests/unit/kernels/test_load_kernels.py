"""The choice of the kernel level, each in a fresh process: it is made once a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from sterna.core.errors import KernelError
from sterna.kernels.load import describe, load_kernels
from sterna.kernels.optable import OPS


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_describe_names_every_op_once():
    rows = describe()
    assert [row.op for row in rows] == [op.name for op in OPS]
    assert all(row.backend in ("reference", "cpu") and row.why for row in rows)


def test_unknown_level_is_answered_with_the_nearest():
    with pytest.raises(KernelError, match="unknown kernel level 'cpuu'; did you mean 'cpu'"):
        load_kernels("cpuu")


def test_environment_forces_the_reference():
    code = (
        "from sterna.kernels.load import describe, load_kernels; "
        "print(load_kernels().level, {r.backend for r in describe()}, describe()[0].why)"
    )
    done = run(code, STERNA_KERNELS="reference")
    assert done.stdout.strip() == "reference {'reference'} asked for"
    assert done.stderr == ""


def test_a_level_that_cannot_run_is_refused():
    code = "from sterna.kernels.load import load_kernels; load_kernels('cuda')"
    assert "KernelError: kernel level 'cuda' is not part of this version" in run(code).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device_is_refused():
    code = "from sterna.kernels.load import load_kernels; load_kernels('triton')"
    found = run(code, TRITON_INTERPRET="").stderr
    assert "KernelError: kernel level 'triton' asked, but" in found


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_triton_serves_the_cpu_where_it_is_interpreted():
    code = (
        "from sterna.kernels.load import describe; "
        "print({r.op: r.backend for r in describe() if r.backend != 'reference'})"
    )
    done = run(code, STERNA_KERNELS="triton", TRITON_INTERPRET="1")
    wanted = "{'attention': 'triton', 'shared_attention': 'triton'}"
    assert done.stdout.strip() == wanted, done.stderr


def test_cpu_users_never_import_triton():
    code = (
        "import sys; from sterna.kernels.load import load_kernels; load_kernels(); "
        "print('triton' in sys.modules)"
    )
    assert run(code, STERNA_KERNELS="").stdout.strip() == "False"


def test_the_level_cannot_change_within_a_process():
    code = (
        "from sterna.kernels.load import load_kernels; load_kernels('reference'); "
        "load_kernels('cpu')"
    )
    assert "already runs 'reference'" in run(code, STERNA_KERNELS="").stderr


def test_a_missing_extension_warns_once_and_falls_back():
    code = (
        "import logging, sys; logging.basicConfig(); import sterna.kernels.load as load; "
        "load._EXTENSION = 'sterna.kernels.not_built'; "
        "print(load.load_kernels().level, load.load_kernels().level)"
    )
    done = run(code, STERNA_KERNELS="")
    assert done.stdout.strip() == "reference reference"
    assert done.stderr.count("the C++ extension is not built") == 1


def test_forcing_a_missing_extension_is_an_error():
    code = (
        "import sterna.kernels.load as load; load._EXTENSION = 'sterna.kernels.not_built'; "
        "load.load_kernels('cpu')"
    )
    assert "kernel level 'cpu' asked, but the C++ extension is not built" in run(code).stderr
