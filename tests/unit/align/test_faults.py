"""Bad input and faults: named, counted, survived or stopped with nothing lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.unit.align.runs import Low, recipe, tiny

from sterna.align.config import AlgorithmSection, RewardSection
from sterna.align.experience import Models, make_experience
from sterna.align.learner import Learner, Trained
from sterna.align.reward import Rewards
from sterna.align.rewards_io import HttpReward
from sterna.align.rl import align_rl
from sterna.align.rlhooks import RlHook
from sterna.align.rollout import Rollout
from sterna.core.errors import CheckpointError, ConfigError, RewardError
from sterna.kernels.load import load_kernels
from sterna.kernels.scores import Distribution
from sterna.model.load import load_model
from sterna.train.config import OptimSection
from sterna.train.gradients import Gradients
from sterna.train.optim import AdamW
from sterna.train.parts import trained

HANGS = """
import time
def f(prompts, completions, answer):
    time.sleep(600)
"""


def lines(folder):
    return [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")


def with_reward(made, **section):
    return made.model_copy(update={"rewards": (RewardSection.model_validate(section),)})


class FailsOnce(Low):
    """Raises at its third call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, samples):
        self.calls += 1
        if self.calls == 3:
            raise ConnectionError("the judge is gone")
        return super().__call__(samples)


def test_a_reward_that_fails_late_loses_no_step(tmp_path):
    """No checkpoint was due: what was trained is saved all the same, and goes on bit by bit."""
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    settings = {"checkpoint": {"every": 0}, "run": {"steps": 4}}
    for folder in (whole, failed):
        folder.mkdir()
    align_rl(recipe(whole, **settings), rewards=[Low()])
    reward = FailsOnce()
    with pytest.raises(RewardError, match="low raised ConnectionError: the judge is gone"):
        align_rl(recipe(failed, **settings), rewards=[reward])
    assert (failed / "run" / "checkpoints" / "step-00000002").is_dir()
    align_rl(recipe(failed, **settings), rewards=[reward], resume=True)
    assert [x["reward"] for x in lines(failed)] == [x["reward"] for x in lines(whole)]
    a, b = weights(whole), weights(failed)
    assert all(torch.equal(a[name], b[name]) for name in a)


class Full(RlHook):
    """From a step on no file of this process may grow beyond some bytes: a full disk."""

    def __init__(self, step):
        self.step = step
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after_step(self, trainer, step, figures, experience):
        if step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.limit[1]))

    def close(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    whole, full = tmp_path / "whole", tmp_path / "full"
    for folder in (whole, full):
        folder.mkdir()
    align_rl(recipe(whole), rewards=[Low()])
    hook = Full(2)
    try:
        with pytest.raises(CheckpointError, match=r"too large.*step-00000001.*--resume"):
            align_rl(recipe(full), rewards=[Low()], hooks=[hook])
    finally:
        hook.close()
    kept = full / "run" / "checkpoints"
    assert [path.name for path in kept.iterdir() if not path.name.startswith(".")] == [
        "step-00000001"
    ]
    align_rl(recipe(full), rewards=[Low()], resume=True)
    assert [x["step"] for x in lines(full)] == [1, 2, 3]
    a, b = weights(whole), weights(full)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_function_that_hangs_is_named_and_the_process_ends(tmp_path):
    (tmp_path / "r.py").write_text(HANGS)
    made = recipe(tmp_path, run={"steps": 1})
    made = with_reward(made, kind="function", path=f"{tmp_path / 'r.py'}:f", timeout_s=0.3)
    (tmp_path / "recipe.json").write_text(made.model_dump_json())
    code = (
        "import sys; from sterna.align.config import RlRecipe;"
        "from sterna.align.rl import align_rl;"
        "align_rl(RlRecipe.model_validate_json(open(sys.argv[1]).read()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "recipe.json")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "reward f raised RewardError: f took more than its 0.3 s" in done.stderr


class Judge(BaseHTTPRequestHandler):
    """Answers as the path says: fails at first, hangs, or breaks off."""

    def do_POST(self):
        self.server.asked += 1
        size = int(self.headers["Content-Length"])
        samples = json.loads(self.rfile.read(size))["samples"]
        if self.path == "/slow":
            time.sleep(1.0)
        if self.path == "/busy" and self.server.asked == 1:
            self.send_error(503)
            return
        if self.path == "/refuses":
            self.send_error(403)
            return
        body = json.dumps({"rewards": [1.0] * len(samples)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 9 * (self.path == "/breaks")))
        self.end_headers()
        self.wfile.write(body if self.path != "/nonsense" else b"x" * len(body))

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    server = HTTPServer(("127.0.0.1", 0), Judge)
    server.asked = 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_http_rewards_are_asked_again(judge):
    assert HttpReward(judge.url + "/busy", 5.0, retries=1)([]) == []
    assert judge.asked == 2


@pytest.mark.parametrize(
    ("path", "retries", "asked", "said"),
    [
        ("/slow", 0, 1, "in 1 tries: timed out"),
        ("/breaks", 1, 2, "in 2 tries: IncompleteRead"),
        ("/refuses", 3, 1, "in 1 tries: HTTP Error 403"),
        ("/nonsense", 3, 1, "answered no"),
    ],
)
def test_http_rewards_that_fail_are_named(judge, path, retries, asked, said):
    with pytest.raises(RewardError, match=said):
        HttpReward(judge.url + path, 0.2, retries)([])
    assert judge.asked == asked


def rollout(i, prompt, completion, truncated=False):
    size = len(completion)
    return Rollout(
        i // 2, i % 2, np.array(prompt, np.int32), np.array(completion, np.int32),
        np.ones(size, np.bool_), np.full(size, -5.6, np.float32), 0, truncated,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce", "ppo"])
@pytest.mark.parametrize("micro_tokens", [1, 4096])
def test_empty_completions_and_an_end_token_first(tmp_path, kind, micro_tokens):
    """256 is the end token. An empty completion has no decision: it moves its group's mean only."""
    load_kernels()
    tiny.write_model(tmp_path / "model")
    model = load_model(tmp_path / "model", "float32").decoder
    rollouts = [
        rollout(0, [1, 2], []), rollout(1, [1, 2], [256]), rollout(2, [3], [4, 5, 256]),
        rollout(3, [3], [6], truncated=True),
    ]  # fmt: skip
    settings = AlgorithmSection(kind=kind, micro_tokens=micro_tokens, mask_truncated=True)
    values = torch.zeros(sum(len(r.completion) for r in rollouts))
    models = Models(None, None, (lambda _: values) if kind == "ppo" else None)
    rewards = Rewards(torch.tensor([0.0, 1.0, 2.0, 0.5]).double(), {}, torch.ones(4).bool())
    experience = make_experience(rollouts, rewards, models, settings, 0.0)
    own = Trained(
        model, AdamW(trained(model), OptimSection(), 0), Gradients(model.parameters()), 1.0
    )
    learner = Learner(own, None, settings, Distribution(), "none", 0, torch.device("cpu"))
    found = learner.learn(experience, 0, 0.0, 1e-3, 0.0, 8)
    assert 0 < found["grad_norm"] < 100
    assert all(torch.isfinite(torch.tensor(value)) for value in found.values())


@pytest.mark.parametrize("micro_tokens", [1, 4096])
def test_nothing_but_empty_completions_trains_nothing(tmp_path, micro_tokens):
    load_kernels()
    tiny.write_model(tmp_path / "model")
    model = load_model(tmp_path / "model", "float32").decoder
    settings = AlgorithmSection(micro_tokens=micro_tokens)
    rewards = Rewards(torch.tensor([0.0, 1.0]).double(), {}, torch.ones(2).bool())
    rollouts = [rollout(0, [1, 2], []), rollout(1, [1, 2], [])]
    experience = make_experience(rollouts, rewards, Models(None, None, None), settings, 0.0)
    before = [p.clone() for p in model.parameters()]
    own = Trained(
        model, AdamW(trained(model), OptimSection(), 0), Gradients(model.parameters()), 1.0
    )
    learner = Learner(own, None, settings, Distribution(), "none", 0, torch.device("cpu"))
    learner.learn(experience, 0, 0.0, 1e-3, 0.0, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_prompts_that_leave_no_room_are_counted(tmp_path):
    """The context is 256 tokens: with 6 new ones a prompt of 250 fits, one of 251 does not."""
    rows = [{"prompt": [7] * size} for size in (250, 251, 256, 300)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(
        tmp_path, run={"steps": 1}, rollout={"prompts_per_step": 2, "group_size": 2},
        prompts={"task": "", "path": str(tmp_path / "p.jsonl")},
        algorithm={"micro_tokens": 300},
        rewards=[{"kind": "function", "path": "unused.py:f"}],
    )  # fmt: skip
    result = align_rl(made, rewards=[Low()])
    assert result.outcome == "done"
    (line,) = lines(tmp_path)
    assert line["prompts/too_long"] >= 3
    with pytest.raises(ConfigError, match=r"rollout.max_tokens is 256.*together"):
        align_rl(recipe(tmp_path, rollout={"max_tokens": 256}, run={"output": str(tmp_path / "b")}))


@pytest.mark.parametrize("section", ["rewards", "critic"])
def test_another_tokenizer_is_refused(tmp_path, section):
    other = tiny.write_model(tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|user|>", "<|human|>"))
    made = recipe(tmp_path, algorithm={"kind": "ppo"})
    if section == "critic":
        critic = made.critic.model_copy(update={"path": str(other)})
        made = made.model_copy(update={"critic": critic})
    else:
        made = with_reward(made, kind="model", path=str(other))
    with pytest.raises(ConfigError, match="another tokenizer than the policy"):
        align_rl(made)
