"""`tiny` (model, chats, recipes) for the tests of this folder, whatever the import mode."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sterna.kernels.load import load_kernels


def load_tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny", Path(__file__).with_name("tiny.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    load_kernels()
    torch.set_num_threads(1)
    return load_tiny()
