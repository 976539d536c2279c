"""Speculators: the cells, the loss, simulated acceptance, the checkpoint, a whole run."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sterna.core.errors import ConfigError, ModelFileError
from sterna.model.save import save_model, save_tensors
from sterna.model.speculator import Speculator, SpeculatorConfig
from sterna.model.speculator_file import load_speculator, speculator_hf_config
from sterna.train.distill.frequent import frequent_tokens
from sterna.train.distill.speculator import SpeculatorPair, acceptance, ahead, speculator_loss
from sterna.train.loop import train

from .tiny import recipe

KINDS = [(cell, shares) for cell in ("mlp", "lstm") for shares in (True, False)]


def new_pair(decoder, cell="mlp", shares_base=True, num_drafts=3, inner=48):
    config = SpeculatorConfig(
        cell, 64, 160, inner, num_drafts, True, shares_base, decoder.config.family.name
    )
    return SpeculatorPair(decoder, config, seed=1)


def norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight + module.bias


@pytest.mark.parametrize(("cell", "shares_base"), KINDS)
def test_states_are_those_of_the_definition(decoder_of, packed, tokens_of, cell, shares_base):
    pair = new_pair(decoder_of("llama"), cell, shares_base)
    s, batch = pair.speculator, packed([tokens_of(12)])
    for part in s.modules():
        if type(part).__name__ == "ShiftedNorm":
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.uniform_(-0.5, 0.5)
    h = pair.hidden(batch)
    state = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() / 2**0.5
    share = 0.5 ** (0.5 / 3)
    scale = ((1 - share**2) * 48 / 2) ** 0.5 / share
    assert share**6 == pytest.approx(0.5)  # after three drafts half of the energy is left
    memory = 0.0
    for draft in range(3):
        tokens = ahead(batch.tokens, batch, draft + 1, 0)
        if shares_base:
            rows = pair.base.embed_tokens.weight[tokens]
            rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * 48**-0.5
            emb = rows @ s.emb_proj.weight.T * scale
        else:
            emb = s.emb.weight[tokens] * scale
        z = state @ (s.first_proj if draft == 0 else s.proj).weight.T
        if cell == "mlp":
            state = F.gelu(norm(z + emb, s.norm))
        else:
            f, i, o, fresh = (z + torch.cat([emb] * 4, 1)).split(48, 1)
            memory = memory * f.sigmoid() + F.gelu(norm(fresh, s.cell_norm)) * i.sigmoid()
            state = F.gelu(norm(memory, s.norm)) * o.sigmoid()
        wanted = state @ s.out_proj.weight.T if shares_base else state
        assert (pair.drafted(batch)[draft] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("cell", "shares_base"), KINDS)
def test_loss_and_gradients_are_plain_cross_entropy(
    decoder_of, packed, tokens_of, cell, shares_base
):
    pair = new_pair(decoder_of("llama"), cell, shares_base)
    batch = packed([tokens_of(9), tokens_of(2, 2), tokens_of(11, 3)])
    targets = torch.tensor([*tokens_of(9)[1:], -100, 5, -100, *tokens_of(11, 3)[1:], -100])
    targets[4] = -100
    own = list(pair.speculator.parameters())
    loss = speculator_loss(pair, batch, targets)
    found = torch.autograd.grad(loss, own)
    head = pair.speculator.head_weight(pair.head_weight())
    total, starts = torch.zeros(()), [0, 9, 11, 22]
    for draft, rows in enumerate(pair.drafted(batch)):
        for begin, end in itertools.pairwise(starts):
            for t in range(begin, end - draft - 1):
                if (wanted := targets[t + draft + 1]) != -100:
                    total = total + F.cross_entropy(rows[t] @ head.T, wanted)
    assert loss.item() == pytest.approx(total.item() / 3, rel=1e-5)
    for a, b in zip(found, torch.autograd.grad(total / 3, own), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7
    assert all(p.grad is None and not p.requires_grad for p in pair.base.parameters())


def test_every_family_trains_one(decoder_of, packed, tokens_of, family_name, tmp_path):
    pair = new_pair(decoder_of(family_name))
    batch, targets = packed([tokens_of(20)]), torch.tensor(tokens_of(20, 2))
    speculator_loss(pair, batch, targets).backward()
    for name, parameter in pair.speculator.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    found = acceptance(pair, batch, targets)
    assert 1 <= found.tokens_per_step <= 4


def test_acceptance_counts_what_an_engine_would_accept(decoder_of, packed):
    """Drafts made right or wrong on purpose; the walk done by hand."""
    pair = new_pair(decoder_of("llama"))
    tokens = list(range(10, 22))
    targets = torch.tensor([*tokens[1:], -100])
    # drafts 1 and 2 are right at every position; 3 at none. Position t: x_(t+1) and two more.
    vectors = torch.zeros(3, 12, 64)
    guesses = torch.full((3, 12), 5)
    for draft in (0, 1):
        for t in range(12):
            guesses[draft, t] = min(10 + t + 2 + draft, 159)
    weight = torch.nn.functional.normalize(pair.head_weight().detach(), dim=1)
    pair.base.lm_head.weight.data.copy_(weight)
    vectors = weight[guesses]
    pair.drafted = lambda batch: vectors
    found = acceptance(pair, packed([tokens]), targets)
    # 11 trained tokens: 3 + 3 + 3 + 2 (the document ends)
    assert (found.steps, found.tokens) == (4, 11)
    assert found.tried == [10, 9, 8]
    assert found.right == [10, 9, 0]
    assert found.tokens_per_step == pytest.approx(11 / 4)


@pytest.mark.parametrize(("cell", "shares_base"), KINDS)
def test_checkpoint_comes_back(decoder_of, packed, tokens_of, tmp_path, cell, shares_base):
    pair = new_pair(decoder_of("llama"), cell, shares_base)
    tensors = ((name, p.detach()) for name, p in pair.speculator.named_parameters())
    save_tensors(tensors, speculator_hf_config(pair.speculator.config), tmp_path)
    again = load_speculator(tmp_path, "float32")
    batch = packed([tokens_of(12)])
    expected = pair.drafted(batch)
    assert again.config == pair.speculator.config
    pair.speculator = again
    assert torch.equal(pair.drafted(batch), expected)


def test_other_folders_and_other_models_are_refused(decoder_of, tmp_path):
    save_model(decoder_of("llama"), tmp_path)
    with pytest.raises(ModelFileError, match="speculator"):
        load_speculator(tmp_path)
    config = SpeculatorConfig("mlp", 64, 999, 48, base_family="llama")
    with pytest.raises(ConfigError, match="was made for"):
        config.check_base(decoder_of("llama"))
    assert sum(p.numel() for p in Speculator(config).parameters()) < 64 * 999


@pytest.mark.parametrize("shares_base", [True, False])
def test_a_draft_vocabulary(decoder_of, packed, tokens_of, tmp_path, shares_base):
    """Tokens outside of it are no targets; the loss is that over the rows of the head kept."""
    base, some = decoder_of("llama"), tuple(range(1, 160, 3))
    config = replace(new_pair(base, shares_base=shares_base).speculator.config, draft_tokens=some)
    pair = SpeculatorPair(base, config, seed=1)
    s, text = pair.speculator, tokens_of(40)
    ids = torch.tensor([0, 1, 4, 159, 157, -100])
    assert s.outputs_of(ids, -100).tolist() == [-100, 0, 1, -100, 52, -100]
    assert s.tokens_of(torch.tensor([0, 1, 52])).tolist() == [1, 4, 157]
    batch = packed([text])
    targets = torch.tensor([*text[1:], -100])
    head = s.head_weight(base.head_weight())
    assert len(head) == len(some)
    want = 0.0
    for i, drafted in enumerate(pair.drafted(batch)):
        for t in range(len(text) - i - 2):
            token = text[t + i + 2]
            if token in some:
                row = torch.log_softmax(drafted[t] @ head.T, -1)
                want -= row[some.index(token)].item()
    assert speculator_loss(pair, batch, targets).item() == pytest.approx(want / 3, rel=1e-4)
    tensors = ((name, p.detach()) for name, p in s.named_parameters())
    save_tensors(tensors, speculator_hf_config(config), tmp_path)
    assert load_speculator(tmp_path, "float32").config == config
    with pytest.raises(ConfigError, match="ascending"):
        replace(config, draft_tokens=(5, 3))


def test_the_draft_vocabulary_is_what_the_data_hold_most_of(tmp_path):
    made = recipe(
        tmp_path, kind="distill", run={"steps": 2},
        distill={"kind": "mlp_speculator", "draft_vocab": 20, "drafts": 2},
        data={"train_on": "all"},
    )  # fmt: skip
    found = frequent_tokens(made)
    assert len(found) == 20 and list(found) == sorted(found)
    assert frequent_tokens(made) == found
    assert load_speculator(train(made).model, "float32").config.draft_tokens == found
    again = made.model_copy(
        update={"distill": made.distill.model_copy(update={"draft_vocab": 10**6})}
    )
    with pytest.raises(ConfigError, match="lower it"):
        frequent_tokens(again)


@pytest.mark.parametrize("kind", ["mlp_speculator", "lstm_speculator"])
def test_a_run_raises_acceptance_and_resumes_to_the_bit(tmp_path, kind):
    def settings(steps):
        return recipe(
            tmp_path,
            kind="distill",
            distill={"kind": kind, "drafts": 2},
            run={"steps": steps},
            schedule={"total_steps": 24},
            data={"held_out": 0.1, "train_on": "all"},
            eval={"every": 12, "max_rows": 4},
            checkpoint={"every": 12},
            optim={"lr": 1e-2},
        )

    whole = train(settings(24))
    lines = [json.loads(line) for line in (whole.output / "distill.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens_per_step"] > lines[0]["tokens_per_step"]
    expected = load_speculator(whole.model, "float32").state_dict()
    whole.output.rename(tmp_path / "first")
    train(settings(12))
    again = load_speculator(train(settings(24), resume=True).model, "float32").state_dict()
    assert [name for name in expected if not torch.equal(expected[name], again[name])] == []
