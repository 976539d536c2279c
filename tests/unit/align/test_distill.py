"""On-policy distillation: a student that writes, a teacher that corrects."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tests.unit.align.runs import Low, recipe, tiny

from sterna.align.rl import align_rl
from sterna.core.errors import ConfigError, KernelError, RowError
from sterna.kernels.load import load_kernels
from sterna.train.longseq.divergence import Logits, chunked_jsd


def lines(folder):
    text = (folder / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def taught(folder, steps=12, teacher_seed=3, teacher_shape=None, **distill):
    if not (folder / "teacher").exists():
        tiny.write_model(folder / "teacher", teacher_seed, **(teacher_shape or {}))
    section = {"teacher": str(folder / "teacher"), **distill}
    return recipe(
        folder, distill=section, algorithm={"kind": "distill"}, optim={"lr": 3e-3},
        rollout={"prompts_per_step": 8, "group_size": 2, "max_tokens": 12},
        run={"steps": steps}, checkpoint={"every": 0},
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_student_comes_nearer_to_its_teacher(tmp_path, beta):
    align_rl(taught(tmp_path, beta=beta))
    found = [line["reverse_kl"] for line in lines(tmp_path)]
    assert found[0] > 0.01
    assert found[-1] < 0.5 * found[0]


def test_sampled_tokens_teach_too(tmp_path):
    settings = taught(tmp_path, loss="sampled", steps=30)
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)  # a teacher that is surer: some nats away, more than the noise
    tensors["model.embed_tokens.weight"] *= 5
    save_file(tensors, file, {"format": "pt"})
    rollout = settings.rollout.model_copy(update={"group_size": 12})
    optim = settings.optim.model_copy(update={"lr": 1e-2})
    align_rl(settings.model_copy(update={"rollout": rollout, "optim": optim}))
    found = lines(tmp_path)
    kl = [line["kl"] for line in found]
    # Noise of a sum of five: about 1.1 nats of 72; it falls by 8.
    assert sum(kl[-5:]) < 0.94 * sum(kl[:5])
    if load_kernels().level == "cpu":
        assert found[0]["ratio/max"] == found[0]["ratio/min"] == 1.0


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path):
    align_rl(taught(tmp_path, teacher_seed=0, steps=1))
    (line,) = lines(tmp_path)
    assert line["reverse_kl"] == 0.0
    assert line["grad_norm"] == 0.0


def test_a_teacher_of_another_size_teaches(tmp_path):
    align_rl(taught(tmp_path, teacher_shape={"hidden_size": 96, "num_hidden_layers": 3}, steps=1))
    assert lines(tmp_path)[0]["reverse_kl"] > 0


def test_a_share_of_completions_comes_from_the_rows(tmp_path):
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = taught(tmp_path, lmbda=0.5, steps=2)
    prompts = settings.prompts.model_copy(update={"path": str(path), "task": ""})
    seen = []

    class Look(Low):
        def __call__(self, samples):
            seen.extend(samples)
            return super().__call__(samples)

    align_rl(settings.model_copy(update={"prompts": prompts}), rewards=[Look()])
    given = [s for s in seen if s.completion == s.row["completion"]]
    assert 4 <= len(given) < len(seen)
    assert all(s.rollout.completion[-1] == 256 for s in given)  # the end is taught
    if load_kernels().level == "cpu":
        assert lines(tmp_path)[0]["sampling/sampling_logp_difference/max"] == 0.0
    path.write_text('{"prompt": "1"}\n' * 20)
    with pytest.raises(RowError, match="completion"):
        align_rl(settings.model_copy(update={
            "prompts": prompts,
            "run": settings.run.model_copy(update={"output": tmp_path / "other"}),
        }))  # fmt: skip


def test_what_cannot_teach_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"288 logits and the student 272"):
        align_rl(taught(tmp_path, teacher_shape={"vocab_size": 288}, steps=1))
    with pytest.raises(ValidationError, match=r"needs distill\.teacher"):
        recipe(tmp_path, algorithm={"kind": "distill"})
    with pytest.raises(ValidationError, match=r"distill\.teacher is read by"):
        recipe(tmp_path, distill={"teacher": "x"})
    with pytest.raises(ValidationError, match="no reference beside"):
        recipe(tmp_path, distill={"teacher": "x"}, algorithm={"kind": "distill", "kl_coef": 0.1})
    with pytest.raises(ValidationError, match="all of the student's distribution"):
        recipe(
            tmp_path, distill={"teacher": "x", "loss": "sampled", "lmbda": 0.5},
            algorithm={"kind": "distill"},
        )  # fmt: skip
    (tmp_path / "teacher" / "tokenizer.json").write_text(
        (tmp_path / "model" / "tokenizer.json").read_text().replace("<|end|>", "<|fin|>")
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        align_rl(taught(tmp_path, steps=1))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_the_formula(beta):
    load_kernels()
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias = make(6, 4), make(9, 4), make(9)
    teacher = Logits(make(6, 5), make(9, 5), softcap=2.0)
    row_weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])

    def loss(h, w, b):
        return chunked_jsd(Logits(h, w, b, 3.0), teacher, row_weights, beta, 1.7, 2).loss

    inputs = tuple(x.requires_grad_(True) for x in (hidden, weight, bias))
    assert torch.autograd.gradcheck(loss, inputs, rtol=1e-6, atol=1e-8)
    with pytest.raises(KernelError, match="one vocabulary"):
        chunked_jsd(Logits(hidden, weight[:8]), teacher, row_weights, beta)
