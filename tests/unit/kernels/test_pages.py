"""Memory that is given back and taken again."""

import resource
from pathlib import Path

import torch

from sterna.kernels.pages import discard, restore


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_pages_go_back_and_read_as_zeros_at_the_same_address():
    tensor = torch.ones(16 << 20, dtype=torch.float32)  # 64 MiB
    address, before = tensor.data_ptr(), resident_bytes()
    freed = discard(tensor)
    assert freed > 60 << 20
    assert before - resident_bytes() > 56 << 20
    assert tensor.data_ptr() == address
    assert tensor[1024:-1024].abs().max() == 0
    restore(tensor)
    tensor.fill_(2.0)
    assert tensor.sum() == 2.0 * (16 << 20)


def test_less_than_a_page_is_zeroed():
    tensor = torch.ones(10)
    assert discard(tensor) == 0
    assert tensor.tolist() == [0.0] * 10
