"""Align's losses against what TRL's trainers computed (align.json; make_align_golden.py made it).

Pure functions run in float64 where TRL's input was float64: 1e-6 relative is then the JSON's and
TRL's rounding. Losses of a whole model are float32 forwards on both sides.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sterna.align.flat import layout_of, token_weights
from sterna.align.kl import kl_estimate
from sterna.align.loss import PolicyLossSettings, policy_loss
from sterna.align.offline.config import PreferenceSection
from sterna.align.offline.losses import KtoLoss, PreferenceLoss
from sterna.align.offline.ranking import RewardLoss
from sterna.align.offline.reference import FrozenCopy
from sterna.data.beside import Exchange, Whole, side_by_side
from sterna.data.pack import join
from sterna.kernels.load import load_kernels
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.value import SCORE, ValueModel
from sterna.model.weights import assign
from sterna.parallel.mesh import Mesh
from sterna.train.step import TrainStep

GOLDEN = json.loads(Path(__file__).with_name("align.json").read_text())
CLOSE = {"rel": 1e-6, "abs": 1e-8}
# Log-probs of some 15 nats in float32 differ by an ulp or two (1e-6) between two implementations.
MODEL_CLOSE = {"rel": 1e-6, "abs": 3e-6}


def weights(name, shape, turn):
    """As in make_align_golden.py."""
    number = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = sum(ord(letter) for letter in name) + turn
    wave = torch.sin(number * 12.9898 + phase) * 0.2
    return (wave + ("norm" in name)).to(torch.float32).reshape(shape)


class Waves:
    """A checkpoint of such weights."""

    label = "waves"

    def __init__(self, turn):
        self.turn = turn
        c = SimpleNamespace(**GOLDEN["config"])
        kv = c.num_key_value_heads * c.head_dim
        self.shapes = {
            "embed_tokens": (c.vocab_size, c.hidden_size), "k_proj": (kv, c.hidden_size),
            "v_proj": (kv, c.hidden_size), "q_proj": (c.hidden_size, c.hidden_size),
            "o_proj": (c.hidden_size, c.hidden_size),
            "gate_proj": (c.intermediate_size, c.hidden_size),
            "up_proj": (c.intermediate_size, c.hidden_size),
            "down_proj": (c.hidden_size, c.intermediate_size),
        }  # fmt: skip
        self.norm = (c.hidden_size,)

    def read(self, name, dtype):
        return weights(name, self.shapes.get(name.split(".")[-2], self.norm), self.turn).to(dtype)


def decoder(turn):
    load_kernels()
    config = parse_config(GOLDEN["config"], "golden")
    made = Decoder(config, torch.float32, "meta", rope_device="cpu")
    assign(made, Waves(turn), config.family.hf_names, torch.device("cpu"))
    return made


def document(*exchanges, note=0.0):
    parts = [
        Exchange(*(np.array(x, np.int32) for x in (prompt, answer, answer)))
        for prompt, answer in exchanges
    ]
    return side_by_side(parts, Whole(parts[0].prompt, parts[0].prompt, 0, "golden"), note)


def pairs(notes=(0.0, 0.0, 0.0)):
    return [
        join([document((p, c), (p, r), note=note)])
        for (p, c, r), note in zip(GOLDEN["pairs"], notes, strict=True)
    ]


def preference(name, micro_rows=1, **settings):
    policy = decoder(GOLDEN["policy_turn"])
    turn = "policy_turn" if name == "first_step" else "reference_turn"
    reference = FrozenCopy(decoder(GOLDEN[turn]), None)
    loss = PreferenceLoss(PreferenceSection(beta=0.5, **settings), reference)
    step = TrainStep(policy, Mesh.single(), micro_rows, loss)
    return step, step.run(pairs())


@pytest.mark.parametrize("micro_rows", [1, 3])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("first_step", {}),
        ("sigmoid", {}),
        ("ipo", {"loss": "ipo"}),
        ("cdpo", {"label_smoothing": 0.1}),
    ],
)
def test_dpo(name, settings, micro_rows):
    wanted = GOLDEN[name]
    step, found = preference(name, micro_rows, **settings)
    assert found.loss == pytest.approx(wanted["loss"], **MODEL_CLOSE)
    if name == "cdpo":
        return
    for figure, value in found.figures.items():
        assert value == pytest.approx(wanted[figure], **MODEL_CLOSE), figure
    norm = float(step.gradients.square_sum()) ** 0.5
    assert norm == pytest.approx(wanted["grad_norm"], rel=1e-5)
    if name == "first_step":
        assert found.figures["rewards/margins"] == 0.0


def test_kto():
    wanted = GOLDEN["kto"]
    settings = PreferenceSection(
        beta=wanted["beta"], desirable_weight=wanted["desirable_weight"],
        undesirable_weight=wanted["undesirable_weight"],
    )  # fmt: skip
    loss = KtoLoss(settings, FrozenCopy(decoder(GOLDEN["reference_turn"]), None))
    rows = [
        join([document((prompt, answer), other, note=float(label))])
        for (prompt, answer, label), other in zip(wanted["answers"], wanted["others"], strict=True)
    ]
    step = TrainStep(decoder(GOLDEN["policy_turn"]), Mesh.single(), 2, loss)
    found = step.run(rows)
    assert found.loss == pytest.approx(wanted["loss"], **MODEL_CLOSE)
    for figure, value in found.figures.items():
        assert value == pytest.approx(wanted[figure], **MODEL_CLOSE), figure


@pytest.mark.parametrize(("name", "has_margin"), [("reward", False), ("reward_margin", True)])
def test_reward(name, has_margin):
    model = ValueModel(decoder(GOLDEN["reward_turn"]))
    model.score.data.copy_(weights(SCORE, tuple(model.score.shape), GOLDEN["reward_turn"]))
    rows = pairs(GOLDEN["margins"]) if has_margin else pairs()
    found = TrainStep(model, Mesh.single(), 2, RewardLoss()).run(rows)
    assert found.loss == pytest.approx(GOLDEN[name]["loss"], **MODEL_CLOSE)
    for figure in ("accuracy", "margin", "mean_reward"):
        assert found.figures[figure] == pytest.approx(GOLDEN[name][figure], **MODEL_CLOSE), figure


POLICY = {  # TRL's loss_type -> ours: aggregate, ratio, kind
    "grpo": ("sequence", "token", "clip"), "bnpo": ("token", "token", "clip"),
    "dr_grpo": ("fixed", "token", "clip"), "dapo": ("token", "token", "clip"),
    "cispo": ("token", "token", "cispo"), "gspo": ("sequence", "sequence", "clip"),
}  # fmt: skip


def tokens():
    given = GOLDEN["tokens"]
    layout = layout_of(given["lengths"])
    new, old, ref = (torch.tensor(given[k], dtype=torch.float64) for k in ("new", "old", "ref"))
    advantages = layout.spread(torch.tensor(given["advantages"], dtype=torch.float64))
    return layout, new.requires_grad_(), old, ref, advantages


@pytest.mark.parametrize("name", GOLDEN["policy"])
def test_policy_losses(name):
    wanted = GOLDEN["policy"][name]
    aggregate, ratio, kind = POLICY[name.removesuffix("_kl")]
    layout, new, old, ref, advantages = tokens()
    weight = token_weights(layout, aggregate, GOLDEN["tokens"]["max_length"]).double()
    settings = PolicyLossSettings(kind=kind, ratio=ratio, eps_low=0.2, eps_high=0.28)
    found = policy_loss(layout, new, old, advantages, weight, settings)
    loss = found.loss
    if beta := wanted["settings"].get("beta"):
        kl = kl_estimate(new, ref, "k3")
        loss = loss + beta * (weight * kl).sum()
        assert float(kl.mean().detach()) == pytest.approx(wanted["kl"], **CLOSE)
    assert float(loss.detach()) == pytest.approx(wanted["loss"], **CLOSE)
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.tolist() == pytest.approx(wanted["grad"], **CLOSE)


def test_rloo_on_policy():
    layout, new, _, _, advantages = tokens()
    weight = token_weights(layout, "fixed", 1).double()  # a sum over tokens, a mean over answers
    found = policy_loss(layout, new, new.detach(), advantages, weight, PolicyLossSettings())
    (grad,) = torch.autograd.grad(found.loss, new)
    assert grad.tolist() == pytest.approx(GOLDEN["rloo"]["grad"], **CLOSE)
