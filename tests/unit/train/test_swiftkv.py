"""SwiftKV: what the student computes, how it starts, its checkpoint, its loss, a whole run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from sterna.core.errors import ConfigError, SternaError
from sterna.kernels import reference
from sterna.model.load import load_model
from sterna.model.save import save_model
from sterna.model.swiftkv_config import SwiftKVConfig, owners
from sterna.parallel.mesh import Mesh
from sterna.train.distill.fit import RIDGE, LeastSquares
from sterna.train.distill.measure import last_quality
from sterna.train.distill.swiftkv import (
    SwiftKVPair,
    own_parameters,
    swiftkv_loss,
)
from sterna.train.loop import train
from sterna.train.recipe import make_recipe, merge_into

from .tiny import recipe, write_chats, write_model

# float32 sums in another order through at most 4 layers, logits of order 1
TOLERANCE = 2e-5


def stir(pair, seed=7):
    generator = torch.Generator().manual_seed(seed)
    for p in own_parameters(pair.student).values():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("group_size", [1, 2])
def test_values_are_those_of_the_definition(decoder_of, packed, tokens_of, family_name, group_size):
    """The formulae of model/swiftkv.py in plain PyTorch, one layer at a time, for every family."""
    pair = SwiftKVPair(decoder_of(family_name), SwiftKVConfig(2, group_size))
    stir(pair)
    batch = packed([tokens_of(30), tokens_of(9, 2)])
    with torch.no_grad():
        found = pair.hidden(batch)
        expected = by_definition(pair, batch)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def by_definition(pair, batch):
    student, config = pair.student, pair.config
    k = student.swift.num_key_value_layers
    h = student.first(batch)
    s = student.norm_swiftkv(h)
    kv_of, kv_size = owners(config, student.swift), config.num_key_value_heads * config.head_dim
    groups = list(dict.fromkeys(kv_of.values()))
    for i in range(k, config.num_hidden_layers):
        block, owner = student.layers[i], student.layers[kv_of[i]].attn
        attn = block.attn
        q = F.linear(block.attn_norm(h), attn.q_swiftkv.weight, attn.q_swiftkv.bias)
        first = groups.index(kv_of[i]) * 2 * kv_size
        weight, bias = (
            None if p is None else p[first : first + 2 * kv_size]
            for p in (student.kv_swiftkv.weight, student.kv_swiftkv.bias)
        )
        keys = F.linear(s, weight[:kv_size], None if bias is None else bias[:kv_size])
        values = F.linear(s, weight[kv_size:], None if bias is None else bias[kv_size:])
        norms = [None if n is None else n.weight for n in (attn.q_norm, owner.k_norm)]
        qkv = reference.rope(
            torch.cat([q, keys, values], 1), batch.positions, student.rope_of(i), *norms,
            attn.eps, attn.has_unit_offset, *attn.heads,
        )  # fmt: skip
        o = reference.attention(
            qkv, batch.query_starts, *attn.heads, attn.scale, attn.window, attn.softcap
        )
        h = block.finish(h, o)
    return student.norm(h)


def test_the_last_layer_alone_starts_as_the_teacher(decoder_of, packed, tokens_of, family_name):
    """k = L - 1, no groups: queries, keys and values of the last layer see what they always saw."""
    teacher = decoder_of(family_name)
    batch = packed([tokens_of(25)])
    with torch.no_grad():
        expected = teacher.hidden(batch)
        (_, student), (_, taught) = SwiftKVPair(teacher, SwiftKVConfig(3)).both(batch)
    assert torch.equal(taught, expected)
    assert (student - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_groups_end_where_the_rotation_changes(decoder_of):
    gemma = decoder_of("gemma3").config  # global, local, local, global
    assert owners(gemma, SwiftKVConfig(1, 2)) == {1: 1, 2: 1, 3: 3}
    assert owners(gemma, SwiftKVConfig(1, 9)) == {1: 1, 2: 1, 3: 3}
    llama = decoder_of("llama").config
    assert owners(llama, SwiftKVConfig(1, 2)) == {1: 1, 2: 1, 3: 3}
    assert owners(llama, SwiftKVConfig(2, 1)) == {2: 2, 3: 3}


def test_group_weights_start_as_means(decoder_of):
    teacher = decoder_of("llama")
    student = SwiftKVPair(teacher, SwiftKVConfig(2, 2)).student
    rows = [teacher.layers[i].attn.qkv.weight[128:] for i in (2, 3)]
    assert torch.equal(student.kv_swiftkv.weight, torch.stack(rows).mean(0))
    assert torch.equal(
        student.attention(3).q_swiftkv.weight, teacher.layers[3].attn.qkv.weight[:128]
    )


@pytest.mark.parametrize("group_size", [1, 2])
def test_checkpoint_comes_back_and_is_nobody_elses(
    decoder_of, packed, tokens_of, tmp_path, family_name, group_size
):
    pair = SwiftKVPair(decoder_of(family_name), SwiftKVConfig(1, group_size))
    stir(pair)
    batch = packed([tokens_of(20)])
    student = pair.student
    save_model(student, tmp_path)
    again = load_model(tmp_path, "float32").decoder
    with torch.no_grad():
        assert torch.equal(again(batch), student(batch))
    (name,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert "SwiftKV" in name
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert {f"{kind}_proj_swiftkv" for kind in "qkv"} <= {n.split(".")[-2] for n in stored}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"version": 2}, "reads version 1"),
        ({"version": 1}, "has no 'num_key_value_layers'"),
        ({"num_key_value_layers": 4}, "1 to 3 can be kept"),
    ],
)
def test_a_damaged_section_is_refused(decoder_of, tmp_path, section, words):
    pair = SwiftKVPair(decoder_of("llama"), SwiftKVConfig(1))
    save_model(pair.student, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["swiftkv"] = section if "version" in section else {**values["swiftkv"], **section}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SternaError, match=words):
        load_model(tmp_path)


def test_output_rows_select_without_changing_values(decoder_of, packed, tokens_of):
    pair = SwiftKVPair(decoder_of("llama"), SwiftKVConfig(2))
    batch = packed([tokens_of(20), tokens_of(9, 2)])
    rows = torch.tensor([28, 3], dtype=torch.int32)
    with torch.no_grad():
        whole = pair.hidden(batch)
        assert torch.equal(pair.hidden(replace(batch, output_rows=rows)), whole[rows])


@pytest.mark.parametrize("layers", [0, 4])
def test_impossible_layers_are_refused(decoder_of, layers):
    with pytest.raises(ConfigError, match="1 to 3 can be kept"):
        SwiftKVPair(decoder_of("llama"), SwiftKVConfig(layers))


def relative(found, wanted):
    return ((found - wanted).square().sum(1) / wanted.square().sum(1)).sum()


def test_loss_is_its_formula_and_trains_what_is_new(decoder_of, packed, tokens_of, family_name):
    pair = SwiftKVPair(decoder_of(family_name), SwiftKVConfig(2, 2))
    stir(pair)
    batch = packed([tokens_of(20), tokens_of(9, 2)])
    targets = torch.tensor(tokens_of(29, 3))
    targets[::3] = -100
    loss = swiftkv_loss(pair, batch, targets, temperature=2.0, hidden_weight=0.5)
    loss.backward()
    (late, hidden), (taught_late, taught) = pair.both(batch)
    mask = targets != -100
    p, q = (
        torch.log_softmax(pair.student.logits(h)[mask].double() / 2, -1) for h in (taught, hidden)
    )
    miss = relative(late[mask], taught_late[mask])
    expected = 4 * (p.exp() * (p - q)).sum() + 0.5 * miss.double()
    assert abs(loss.item() - expected.item()) <= 1e-4 * abs(expected.item())
    expected.backward(inputs=list(own_parameters(pair.student).values()))
    for name, parameter in own_parameters(pair.student).items():
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_gradients_are_those_of_the_formula(decoder_of, packed, tokens_of):
    pair = SwiftKVPair(decoder_of("llama"), SwiftKVConfig(2))
    stir(pair)
    batch, targets = packed([tokens_of(20)]), torch.tensor(tokens_of(20, 3))
    ours = list(own_parameters(pair.student).values())
    loss = swiftkv_loss(pair, batch, targets, temperature=2.0, hidden_weight=1.0)
    found = torch.autograd.grad(loss, ours)
    (late, hidden), (taught_late, taught) = pair.both(batch)
    p, q = (torch.log_softmax(pair.student.logits(h) / 2, -1) for h in (taught, hidden))
    plain = 4 * (p.exp() * (p - q)).sum() + relative(late, taught_late)
    for a, b in zip(found, torch.autograd.grad(plain, ours), strict=True):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max() + 1e-7


def distill_recipe(folder, steps=8, **distill):
    if not (folder / "model").exists():
        write_model(folder / "model", num_hidden_layers=4)
        write_chats(folder / "chats.jsonl")
    return recipe(
        folder,
        kind="distill",
        distill={"layers": 1, "fit_tokens": 0, **distill},
        run={"steps": steps},
        schedule={"total_steps": 8},
        data={"held_out": 0.1},
        eval={"every": 4, "max_rows": 4},
        checkpoint={"every": 4},
        optim={"lr": 3e-3},
    )


def measured(run):
    return [json.loads(line) for line in (run / "distill.jsonl").read_text().splitlines()]


def test_a_run_lowers_the_loss_measures_and_resumes_to_the_bit(tmp_path):
    whole = train(distill_recipe(tmp_path))
    lines = measured(whole.output)
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert lines[-1]["kl"] < lines[0]["kl"]
    assert last_quality(whole.output).kl == lines[-1]["kl"]
    expected = load_model(whole.model, "float32").decoder.state_dict()
    whole.output.rename(tmp_path / "first")
    train(distill_recipe(tmp_path, 4))
    resumed = train(distill_recipe(tmp_path), resume=True)
    again = load_model(resumed.model, "float32").decoder.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], again[name])] == []
    assert measured(resumed.output) == lines


def test_a_fitted_student_starts_nearer(tmp_path):
    lines = [measured(train(distill_recipe(tmp_path, 1)).output)[0]]
    (tmp_path / "run").rename(tmp_path / "copied")
    lines.append(measured(train(distill_recipe(tmp_path, 1, fit_tokens=4096)).output)[0])
    assert lines[1]["kl"] < lines[0]["kl"] / 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"longseq": {"checkpoint": True}}, "do not work with distillation yet"),
        ({"model": {"neftune_alpha": 5.0}}, "neftune_alpha has no meaning"),
    ],
)
def test_what_distillation_cannot_prove_is_refused(tmp_path, change, words):
    values = distill_recipe(tmp_path).model_dump(mode="json")
    merge_into(values, change)
    with pytest.raises(ConfigError, match=words):
        train(make_recipe(values))


@pytest.mark.parametrize("group_size", [1, 2])
def test_the_fit_is_the_least_squares_solution(
    decoder_of, packed, tokens_of, family_name, group_size
):
    """Against torch's own least squares, on rows that stand for the ridge (see fit.py)."""
    pair = SwiftKVPair(decoder_of(family_name), SwiftKVConfig(2, group_size))
    student, linear = pair.student, pair.student.kv_swiftkv
    batches = [packed([tokens_of(60, seed)]) for seed in range(4)]
    start = torch.cat([p.detach()[:, None] if p.dim() == 1 else p.detach()
                       for p in linear.parameters()], 1).double().T  # fmt: skip
    fit, seen, wanted = LeastSquares(pair), [], []
    with torch.no_grad():
        for batch in batches:
            fit.add(batch)
            x = student.first(batch)
            s = student.norm_swiftkv(x).double()
            seen.append(s if linear.bias is None else torch.cat([s, torch.ones(60, 1)], 1))
            kv = dict(pair.teacher_kv(x, batch))
            width = linear.out_features // len(student.groups)
            members = [[i for i, o in student.owners.items() if o == g] for g in student.groups]
            wanted.append(
                torch.cat([sum(kv[i][:, -width:] for i in m) / len(m) for m in members], 1).double()
            )
    assert fit.solve(Mesh.single()) == 240
    s, y = torch.cat(seen) / 240**0.5, torch.cat(wanted) / 240**0.5
    root = (RIDGE * (s * s).sum(0).mean()).sqrt()
    s, y = torch.cat([s, root * torch.eye(s.shape[1])]), torch.cat([y, root * start])
    expected = torch.linalg.lstsq(s, y).solution
    assert (linear.weight.T - expected[: linear.weight.shape[1]]).abs().max() <= 1e-5
