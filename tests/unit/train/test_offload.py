"""Offloaded states and weights: the same bits, resume, adapters, refusals, disks that fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sterna.core.errors import ConfigError, TrainError
from sterna.train import optim
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients
from sterna.train.hooks import Hook
from sterna.train.longseq.apply import apply_longseq
from sterna.train.longseq.config import LongseqSection
from sterna.train.loop import train
from sterna.train.metrics import read_metrics
from sterna.train.offload.homes import MemoryHome, TierHome, new_home
from sterna.train.offload.lanes import ThreadLane
from sterna.train.offload.slab import Slab
from sterna.train.offload.weights import LEAST, WeightTier
from sterna.train.optim import AdamW

CPU = torch.device("cpu")
DISK = {"states": "disk", "weights": "disk"}


def named_weights(dtype):
    torch.manual_seed(0)
    shapes = {"a.weight": (33, 70), "b.weight": (5,), "c.weight": (1000, 3), "frozen": (4, 4)}
    named = [(n, nn.Parameter(torch.randn(s).to(dtype))) for n, s in shapes.items()]
    named[-1][1].requires_grad_(False)
    return named


def steps(home, settings, dtype, count=3):
    named = named_weights(dtype)
    optimizer = AdamW(named, settings, 7, home)
    grads = Gradients([p for _, p in named])
    draw = torch.Generator().manual_seed(1)
    for step in range(count):
        for name, p in named:
            if p.requires_grad and not (name == "b.weight" and step == 1):  # one without gradient
                p.grad = torch.randn(p.shape, generator=draw).to(dtype)
        optimizer.step(grads, step, 1e-2, 0.5 if step == 2 else 1.0)
    return named, optimizer.state_dict()


@pytest.mark.parametrize("tier", ["disk", "host"])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_step_has_the_bits_of_the_one_in_memory(
    tmp_path, monkeypatch, dtype, states, master, tier
):
    monkeypatch.setattr(optim, "SLICE", 512)  # weights of several slices, the last one uneven
    settings = OptimSection(states=states, master=master, weight_decay=0.1)
    # host: the way of pinned memory, on a thread in the place of the CUDA stream
    home = new_home("disk", CPU, tmp_path) if tier == "disk" else TierHome(CPU, ThreadLane())
    want, got = steps(MemoryHome(), settings, dtype), steps(home, settings, dtype)
    for (name, a), (_, b) in zip(want[0], got[0], strict=True):
        assert torch.equal(a, b), name
    assert want[1].keys() == got[1].keys()
    for name, kept in want[1].items():
        for key, tensor in kept.items():
            assert torch.equal(tensor, got[1][name][key]), (name, key)


def test_a_piece_is_fetched_while_its_neighbour_is_updated(tmp_path):
    events = []

    class Lane(ThreadLane):
        def run(self, job):
            events.append(job.func.__name__)
            return super().run(job)

    home = TierHome(CPU, Lane())
    kept = home.new(30, torch.float32, CPU)
    for tensors in home.walk([{"x": (kept, slice(i, i + 10))} for i in (0, 10, 20)]):
        events.append("update")
        tensors["x"] += 1
    assert events == ["fetch", "fetch", "update", "flush", "fetch", "update", "flush", "update",
                      "flush"]  # fmt: skip
    assert torch.equal(kept.tensor, torch.ones(30))


def mapped_bytes(slab):
    """Resident pages of the slab's maps, by /proc/self/smaps."""
    inode, found, is_ours = str(os.fstat(slab._file.fileno()).st_ino), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_ours = inode in line.split()
        elif is_ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_pages_that_a_save_read_are_given_back(tmp_path):
    slab = Slab(tmp_path)
    view = slab.view(slab.claim(1 << 20), 1 << 20)
    view[:] = 7
    assert mapped_bytes(slab) == 1 << 20
    slab.drop()
    assert mapped_bytes(slab) == 0
    assert int(view.sum()) == 7 << 20


def test_a_failing_disk_is_an_error_of_the_step(tmp_path, monkeypatch):
    home = new_home("disk", CPU, tmp_path)
    named = named_weights(torch.float32)
    optimizer = AdamW(named, OptimSection(), 0, home)
    named[0][1].grad = torch.ones_like(named[0][1])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TrainError, match=r"No space left.*offload\.folder"):
        optimizer.step(Gradients([p for _, p in named]), 0, 1e-2)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainError, match=r"No space left.*offload\.folder"):
        AdamW(named, OptimSection(), 0, home)


class StopAfter(Hook):
    def __init__(self, step):
        self.step = step

    def after_step(self, trainer, stats):
        if stats.step == self.step:
            trainer.stop("interrupted")


def losses(folder):
    return [x["loss"] for x in read_metrics(folder / "metrics.jsonl") if x["kind"] == "step"]


def tensors(folder):
    return load_file(folder / "model/model.safetensors")


def run_of(tiny, folder, name, **sections):
    sections["run"] = {"steps": 5, "output": str(folder / name), **sections.get("run", {})}
    return tiny.recipe(folder, **sections)


RUNS = {
    "float32": {},
    "bfloat16, 8 bits": {"model": {"dtype": "bfloat16"}, "optim": {"states": "8bit"}},
    "no master": {"model": {"dtype": "bfloat16"}, "optim": {"states": "bfloat16", "master": False}},
    "segments, disk": {"longseq": {"every": 2, "tier": "disk", "mlp_tile": 16}},
    "averages, eval": {
        "optim": {"ema_decay": 0.9}, "data": {"held_out": 0.2}, "eval": {"every": 2, "max_rows": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS.keys())
def test_a_run_from_disk_is_the_run_in_memory(tiny, tmp_path, sections):
    longseq = {"checkpoint": True, "attention_tile": 16, **sections.get("longseq", {})}
    sections = {**sections, "longseq": longseq}
    model = tiny.write_model(tmp_path / "deep", num_hidden_layers=4)
    sections["model"] = {**sections.get("model", {}), "path": str(model)}
    train(run_of(tiny, tmp_path, "memory", **sections))
    train(run_of(tiny, tmp_path, "disk", **sections, offload=DISK))
    assert losses(tmp_path / "disk") == losses(tmp_path / "memory")
    want, got = tensors(tmp_path / "memory"), tensors(tmp_path / "disk")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_run_goes_on_in_another_tier(tiny, tmp_path):
    sections = {"longseq": {"checkpoint": True}, "model": {"dtype": "bfloat16"}}
    train(run_of(tiny, tmp_path, "whole", **sections))
    train(run_of(tiny, tmp_path, "parts", **sections, offload=DISK), hooks=[StopAfter(2)])
    train(run_of(tiny, tmp_path, "parts", **sections), resume=True, hooks=[StopAfter(4)])
    train(run_of(tiny, tmp_path, "parts", **sections, offload=DISK), resume=True)
    want, got = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("every", [1, 2])
def test_gradients_of_weights_that_only_pose_as_present(
    decoder_of, packed, tokens_of, tmp_path, every
):
    """What a GPU needs: autograd notes the device of a weight before its block has it."""
    settings = LongseqSection(checkpoint=True, every=every)
    found = []
    for is_far in (False, True):
        model, tier = decoder_of(), None
        model.requires_grad_(True)
        if is_far:
            home = new_home("disk", CPU, tmp_path)
            tier = WeightTier(list(model.layers), home, lambda t: t.numel() >= LEAST)
            tier._is_far = True
            assert len(tier.places) == 4 * 4  # qkv, out, gate_up and down of four blocks
        apply_longseq(model, settings, weights=tier)
        for _ in range(2):
            model.hidden(packed([tokens_of(5), tokens_of(9)])).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert (grad is None and found[1][name] is None) or torch.equal(grad, found[1][name]), name


@pytest.mark.parametrize("states", ["memory", "disk"])
@pytest.mark.parametrize("weights", ["auto", "fp6"])
def test_an_adapter_over_a_base_on_disk(tiny, tmp_path, weights, states):
    folder = tiny.write_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    sections = {
        "model": {"path": str(folder), "weights": weights},
        "adapter": {"rank": 4},
        "longseq": {"checkpoint": True},
    }
    train(run_of(tiny, tmp_path, "memory", **sections))
    offload = {"states": states, "weights": "disk"}
    train(run_of(tiny, tmp_path, "disk", **sections, offload=offload))
    want, got = (load_file(tmp_path / name / "adapter/adapter_model.safetensors")
                 for name in ("memory", "disk"))  # fmt: skip
    assert all(torch.equal(want[name], got[name]) for name in want)
    merged = [tensors(tmp_path / name) for name in ("memory", "disk")]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"offload": DISK}, "longseq.checkpoint"),
        ({"offload": {"weights": "disk"}, "longseq": {"checkpoint": True}}, "the same tier"),
        ({"offload": {"states": "host"}}, "off a GPU"),
        ({"offload": DISK, "longseq": {"checkpoint": True}, "model": {"backend": "hf"}},
         "transformers"),
    ],
)  # fmt: skip
def test_what_cannot_be_proven_is_refused(tiny, tmp_path, sections, said):
    with pytest.raises(ConfigError, match=said):
        train(run_of(tiny, tmp_path, "run", **sections))
