"""What PPO has beside its losses: mixed-in text, averages, critic, warm-up, where rewards stand."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.align.runs import Low, recipe, tiny

from sterna.align import config
from sterna.align.config import RlRecipe
from sterna.align.learner import values_of
from sterna.align.replay import replay
from sterna.align.rl import align_rl
from sterna.align.rlhooks import RlHook
from sterna.core.errors import ConfigError
from sterna.model.load import load_model
from sterna.model.value import load_value_model
from sterna.train.config import Section
from sterna.train.recipe import make_recipe

PPO = {"kind": "ppo", "kl_coef": 0.05}


def lines(folder):
    found = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == "step"]


def ptx(folder, **changed):
    chats = tiny.write_chats(folder / "chats.jsonl", 20)
    data = {"sources": [{"path": str(chats)}], "seq_len": 96, "window_tokens": 1, "prefetch": 0}
    return {"coef": 1.0, "rows": 2, "data": data, **changed}


class Nothing(Low):
    def __call__(self, samples):
        return [0.0] * len(samples)


def test_text_is_learnt_beside_the_rewards(tmp_path):
    # Equal rewards leave only the text to learn from.
    made = recipe(tmp_path, ptx=ptx(tmp_path), run={"steps": 12}, optim={"lr": 3e-3})
    align_rl(made, rewards=[Nothing()])
    found = [line["ptx_loss"] for line in lines(tmp_path)]  # 24 rows of 9: begun anew
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_the_mixed_gradient_is_the_sum_of_both(tmp_path):
    norms = {}
    for coef in (0.0, 1e-9, 1.0, 2.0):
        folder = tmp_path / str(coef)
        folder.mkdir()
        made = recipe(folder, ptx=ptx(folder, coef=coef), run={"steps": 1})
        align_rl(made, rewards=[Nothing()])
        norms[coef] = lines(folder)[0]["grad_norm"]
    assert norms[0.0] == 0
    assert norms[2.0] == pytest.approx(2 * norms[1.0], rel=1e-5)
    assert norms[1e-9] == pytest.approx(1e-9 * norms[1.0], rel=1e-4)


def test_a_run_with_everything_resumes_to_the_same_bits(tmp_path):
    algorithm = {**PPO, "epochs": 2, "reward_clip": 0.4, "kl_target": 1.0}
    optim = {"lr": 1e-3, "ema_decay": 0.5}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    made = {
        name: recipe(tmp_path / name, ptx=ptx(tmp_path), algorithm=algorithm, optim=optim)
        for name in ("whole", "cut")
    }
    align_rl(made["whole"], rewards=[Low()])
    once = made["cut"].run.model_copy(update={"steps": 1})
    align_rl(made["cut"].model_copy(update={"run": once}), rewards=[Low()])
    align_rl(made["cut"], rewards=[Low()], resume=True)
    for part in ("model", "ema", "critic"):
        one, other = (
            load_file(tmp_path / name / "run" / part / "model.safetensors") for name in made
        )
        assert all(torch.equal(one[key], other[key]) for key in one), part


class Keep(RlHook):
    """The trainer and the experiences of a run."""

    def __init__(self):
        self.experiences = []
        self.trainer = None

    def after_step(self, trainer, step, figures, experience):
        self.trainer = trainer
        self.experiences.append(experience)


def test_average_and_critic_are_left_beside_the_model(tmp_path):
    kept = Keep()
    made = recipe(tmp_path, algorithm=PPO, optim={"lr": 1e-3, "ema_decay": 0.5})
    align_rl(made, rewards=[Low()], hooks=[kept])
    parts = kept.trainer.parts
    average = load_model(tmp_path / "run/ema", "float32", torch.device("cpu")).decoder
    last = load_model(tmp_path / "run/model", "float32", torch.device("cpu")).decoder
    for name, weight in average.named_parameters():
        assert torch.equal(weight, parts.ema.averages[name]), name
    assert any(
        not torch.equal(a, b) for a, b in zip(average.parameters(), last.parameters(), strict=True)
    )
    critic = load_value_model(tmp_path / "run/critic", "float32")
    assert torch.equal(critic.score, parts.learner.critic.model.score)
    assert (tmp_path / "run/ema/tokenizer.json").is_file()


@pytest.mark.parametrize("shared", [False, True])
def test_one_forward_of_the_critic_serves_values_and_update(tmp_path, monkeypatch, shared):
    """Where a step is one update of one micro-batch: the same bits as two forwards."""
    extra = {"adapter": {"rank": 4}, "critic": {"shared": True}} if shared else {}
    asked, found = values_of, []
    for is_once in (True, False):
        folder = tmp_path / str(is_once)
        folder.mkdir()
        with monkeypatch.context() as patch:
            if is_once:  # the learner's own forward would be a second one
                patch.setattr("sterna.align.learner.values_of", None)
            else:
                patch.setattr("sterna.align.models.values_of", lambda *a: asked(*a).detach())
            align_rl(recipe(folder, algorithm=PPO, **extra), rewards=[Low()])
        keys = ("value_loss", "value_grad_norm", "grad_norm", "loss", "reward")
        found.append([[line[key] for key in keys] for line in lines(folder)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][2]


def test_an_adapters_average_is_an_adapter(tmp_path):
    made = recipe(
        tmp_path, algorithm=PPO, adapter={"rank": 2, "alpha": 4}, run={"steps": 1},
        optim={"lr": 1e-2, "ema_decay": 0.5},
    )  # fmt: skip
    align_rl(made, rewards=[Low()])
    one, other = (
        load_file(tmp_path / "run" / part / "adapter_model.safetensors")
        for part in ("ema", "model")
    )
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    names = {path.name for path in (tmp_path / "run/critic").iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors"} <= names
    assert "model.safetensors" not in names  # it shares the policy's base


def test_warm_up_trains_the_critic_alone(tmp_path):
    critic = {"warmup_steps": 2, "optim": {"lr": 1e-2}}
    made = recipe(tmp_path, algorithm=PPO, critic=critic, run={"dump": True})
    align_rl(made, rewards=[Low()])
    found = lines(tmp_path)
    assert ["grad_norm" in line for line in found] == [False, False, True]
    assert all(line["value_grad_norm"] > 0 for line in found)
    start = load_file(tmp_path / "model/model.safetensors")
    warm = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    assert all(torch.equal(start[name], warm[name]) for name in warm)
    dump = tmp_path / "run/rollouts/step-00000002.safetensors"
    assert replay(made, dump).is_identical


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_the_reward_stands_at_the_last_token_and_the_end_is_trained(tmp_path, clip):
    """Also where padding is the same token as the end."""
    tiny.write_model(tmp_path / "model", pad_token_id=256)
    kept = Keep()
    algorithm = {**PPO, "gamma": 1.0, "lam": 1.0, "reward_clip": clip, "whiten": False}
    made = recipe(
        tmp_path, algorithm=algorithm, run={"steps": 1},
        rollout={"prompts_per_step": 16, "group_size": 8, "max_tokens": 40},
    )  # fmt: skip

    class Shorter(Low):
        def __call__(self, samples):
            return [1.0 if not s.rollout.is_truncated else -1.0 for s in samples]

    align_rl(made, rewards=[Shorter()], hooks=[kept])
    (experience,) = kept.experiences
    ended = [i for i, r in enumerate(experience.rollouts) if not r.is_truncated]
    assert ended and len(ended) < len(experience.rollouts)
    ends = experience.layout.starts[1:] - 1
    assert bool(experience.layout.mask[ends].all())
    for i in ended:
        assert experience.rollouts[i].completion[-1] == 256
    wanted = torch.tensor([-1.0] * len(experience.rollouts))
    wanted[ended] = 1.0
    wanted = wanted.clamp(-clip, clip) if clip else wanted
    # KL is 0 at first, so with gamma = lam = 1 every token's return is the completion's reward.
    assert torch.allclose(experience.returns, experience.layout.spread(wanted))
    assert torch.equal(experience.returns[ends], wanted)
    values = experience.values
    assert torch.allclose(experience.advantages, experience.returns - values)


def test_endings_are_learnt_where_padding_is_the_end_token(tmp_path):
    tiny.write_model(tmp_path / "model", pad_token_id=256)

    class Ended(Low):
        def __call__(self, samples):
            return [float(not s.rollout.is_truncated) for s in samples]

    made = recipe(
        tmp_path, algorithm={"kind": "reinforce"}, run={"steps": 30}, optim={"lr": 3e-3},
        rollout={"prompts_per_step": 8, "group_size": 8, "max_tokens": 24}, checkpoint={"every": 0},
    )  # fmt: skip
    align_rl(made, rewards=[Ended()])
    found = [line["completions/eos_ratio"] for line in lines(tmp_path)]
    assert sum(found[-3:]) / 3 > 0.6 > 0.3 > sum(found[:3]) / 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {"config": "c.json"}}, "model.config has no effect"),
        ({"model": {"backend": "hf"}}, 'model.backend = "hf" has no effect'),
        ({"model": {"neftune_alpha": 5.0}}, "model.neftune_alpha has no effect"),
        ({"critic": {"optim": {"ema_decay": 0.9}}}, "critic.optim.ema_decay has no effect"),
        ({"ptx": {"coef": 1.0}}, "nothing to learn from"),
    ],
)
def test_settings_without_effect_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe({"prompts": {"task": "length"}, **section}, RlRecipe)


def test_every_setting_is_read():
    source = Path(config.__file__)
    others = [p.read_text() for p in source.parent.rglob("*.py") if p != source]
    sections = [
        kind for _, kind in inspect.getmembers(config, inspect.isclass)
        if issubclass(kind, Section) and kind.__module__ == config.__name__
    ]  # fmt: skip
    for section in sections:
        for name in section.model_fields:
            assert any(re.search(rf"\.{name}\b", text) for text in others), (section, name)
