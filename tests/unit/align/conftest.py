"""The kit of the offline tests, loaded by path: test folders are no packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sterna.kernels.load import load_kernels


@pytest.fixture(scope="session")
def offline():
    load_kernels()
    torch.set_num_threads(1)
    path = Path(__file__).with_name("offline_kit.py")
    spec = importlib.util.spec_from_file_location("offline_kit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
