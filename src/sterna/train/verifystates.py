"""The certificate's check of `offload.states`: the recipe's optimizer in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sterna.train.config import Recipe
from sterna.train.gradients import Gradients
from sterna.train.offload.homes import Home, MemoryHome, new_home
from sterna.train.optim import SLICE, AdamW
from sterna.train.trial import Errors

SHAPES = {"wide.weight": (3, SLICE // 2 + 5), "small.weight": (40, 33), "norm.weight": (33,)}
STEPS = 3


def states_errors(recipe: Recipe, folder: Path) -> Errors:
    """The weights' largest relative error after three steps of random gradients; 0 = equal bits.

    `folder`: where the states wait. TrainError when its disk has no room.
    """
    cpu = torch.device("cpu")
    want = _weights(recipe, MemoryHome())
    got = _weights(recipe, new_home("disk", cpu, folder))
    errors = {name: _error(got[name], tensor) for name, tensor in want.items()}
    worst = max(errors, key=errors.__getitem__)
    return Errors(0.0, 0.0, 0.0, worst, errors[worst], worst)


def _weights(recipe: Recipe, home: Home) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(recipe.run.seed)
    dtype = getattr(torch, recipe.model.dtype)
    named = [(n, nn.Parameter(torch.randn(s, generator=draw).to(dtype))) for n, s in SHAPES.items()]
    optimizer = AdamW(named, recipe.optim, recipe.run.seed, home)
    gradients = Gradients([p for _, p in named])
    for step in range(STEPS):
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype)
        optimizer.step(gradients, step, recipe.optim.lr)
    return {name: parameter.detach() for name, parameter in named}


def _error(value: Tensor, reference: Tensor) -> float:
    if torch.equal(value, reference):
        return 0.0
    difference = (value.double() - reference.double()).abs().max()
    return float(difference / reference.double().abs().max())
