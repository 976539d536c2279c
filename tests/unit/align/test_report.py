"""What people see of a run: report, answers over steps, alarms, names of figures."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
from tests.unit.align.runs import Low, recipe

from sterna.align.answers_page import answers_part
from sterna.align.auditor import DRIFT, WINDOW, Audit, Auditor, audit
from sterna.align.rl import align_rl
from sterna.align.rlhooks import RlHook


def lines(folder, name="metrics.jsonl"):
    text = (folder / "run" / name).read_text()
    return [json.loads(line) for line in text.split("\n") if line]


class Stop(RlHook):
    def after_step(self, trainer, step, figures, experience):
        if step == 1:
            trainer.outcome = "interrupted"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run of four steps, resumed after the first, with everything to see."""
    folder = tmp_path_factory.mktemp("shown")
    values = {
        "run": {"steps": 4, "report": True},
        "show": {"every": 2, "count": 3},
        "eval": {"every": 2, "prompts": 4},
        "algorithm": {"kind": "ppo", "kl_coef": 0.05},
    }
    align_rl(recipe(folder, **values), hooks=[Stop()])
    align_rl(recipe(folder, **values), resume=True)
    return folder


def test_answers_are_kept_once_a_step(shown):
    found = lines(shown, "answers.jsonl")
    # The interrupted run ended at step 1, which a resumed one keeps.
    assert [line["step"] for line in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert len({line["prompt"] for line in found}) == 3
    assert all(line["reward"] is not None for line in found)
    page = (shown / "run" / "answers.html").read_text()
    assert page.count('data-step="4"') == 3
    assert "<script src" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_answers_do_not_change_what_is_learnt(shown, tmp_path):
    values = {"run": {"steps": 4}, "algorithm": {"kind": "ppo", "kl_coef": 0.05}}
    align_rl(recipe(tmp_path, **values))
    plain = [line for line in lines(tmp_path) if line["kind"] == "step"]
    seen = [line for line in lines(shown) if line["kind"] == "step"]
    assert [line["grad_norm"] for line in plain] == [line["grad_norm"] for line in seen]


def test_the_users_own_prompts_are_answered(tmp_path):
    show = {"every": 1, "prompts": ["Hello", "<b>&"]}
    align_rl(recipe(tmp_path, show=show, run={"steps": 1}), rewards=[Low()])
    found = lines(tmp_path, "answers.jsonl")
    assert [(line["step"], line["prompt"]) for line in found] == [
        (0, "Hello"), (0, "<b>&"), (1, "Hello"), (1, "<b>&"),
    ]  # fmt: skip
    assert {line["reward"] for line in found} == {None}
    page = (tmp_path / "run" / "answers.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page


def test_the_report_shows_everything(shown):
    page = (shown / "run" / "report.html").read_text()
    for heading in ("Alarms", "Reward", "Policy", "Completions", "Critic", "Time",
                    "Rollouts against trainer", "Answers over steps", "Samples by step",
                    "Settings that differ"):  # fmt: skip
        assert f"<h2>{heading}" in page, heading
    for chart in ("kl", "entropy", "explained_variance", "seconds of a step", "rewards/arithmetic"):
        assert chart in page, chart
    assert page.count("<details") == 4
    assert "algorithm.kl_coef" in page
    ids = page.count("<svg")
    assert ids > 15


def test_texts_with_odd_line_ends_survive_a_resume(tmp_path):
    path = tmp_path / "run" / "samples.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"step": 1, "x": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    from sterna.align.records import keep_until

    keep_until(path, 1)
    assert lines(tmp_path, "samples.jsonl") == [{"step": 1, "x": "a\u2028b\x85c"}]


def test_answers_are_escaped_and_marked():
    line = {"step": 0, "prompt": "p</script>", "answer": "<i>", "tokens": 1, "truncated": True}
    part = answers_part([line, {**line, "step": 5, "reward": 0.25}])
    assert "<i>" not in part
    assert "p&lt;/script&gt;" in part
    assert "reward 0.250, unchanged" in part
    assert "ended by length" in part
    assert answers_part([]) == ""


def figures(**changed):
    base = {
        "kind": "step", "reward": 0.0, "completions/clipped_ratio": 0.1,
        "completions/eos_ratio": 0.9, "completions/mean_length": 20.0,
        "completions/repetition": 0.05, "completions/distinct_2": 0.8,
    }  # fmt: skip
    return {**base, **changed}


def rung(make, steps=4 * WINDOW):
    return audit({"step": i + 1, **figures(**make(i))} for i in range(steps))


def wobble(i):
    return 0.05 * (-1) ** i


def test_a_gold_metric_that_falls_under_a_rising_reward_rings():
    def parting(i):
        up = 0.02 * i
        return {"reward": up + wobble(i), "rewards/gold/mean": -up + wobble(i)}

    def together(i):
        up = 0.02 * i
        return {"reward": up + wobble(i), "rewards/gold/mean": up + wobble(i)}

    found = rung(parting)
    assert [alarm.kind for alarm in found] == ["gold"] * len(found)
    assert found[0].step == 2 * WINDOW
    assert all(b.step - a.step >= WINDOW for a, b in pairwise(found))
    assert rung(together) == []
    assert rung(lambda i: {"reward": 0.02 * i}) == []


@pytest.mark.parametrize(
    ("kind", "name", "start", "end"),
    [
        ("length", "completions/mean_length", 20.0, 45.0),
        ("length", "completions/mean_length", 20.0, 8.0),
        ("repetition", "completions/repetition", 0.05, 0.1 + DRIFT),
        ("eos", "completions/eos_ratio", 0.9, 0.6 - 0.01),
        ("alike", "completions/distinct_2", 0.8, 0.39),
        ("clipped", "completions/clipped_ratio", 0.1, 0.95),
    ],
)
def test_drift_rings_once(kind, name, start, end):
    found = rung(lambda i: {name: start if i < 2 * WINDOW else end})
    assert [alarm.kind for alarm in found] == [kind]
    assert found[0].step > 2 * WINDOW
    assert rung(lambda i: {name: start}) == []
    again = rung(lambda i: {name: end if i // WINDOW in (2, 3, 7, 8) else start}, 9 * WINDOW)
    assert [alarm.kind for alarm in again] == [kind, kind]


def test_a_resumed_auditor_knows_what_was_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [figures(**{"completions/mean_length": 20.0 if i < 12 else 60.0}) for i in range(20)]
    path.write_text("".join(json.dumps({"step": i + 1, **s}) + "\n" for i, s in enumerate(steps)))
    hook = Auditor(tmp_path)
    hook.on_start(SimpleNamespace(counters=SimpleNamespace(step=20)))
    whole = Audit()
    wanted = [a for i, s in enumerate(steps) for a in whole.look(i + 1, s)]
    assert hook.alarms == wanted
    assert len(wanted) == 1
    hook.after_step(SimpleNamespace(), 21, steps[-1], SimpleNamespace())
    assert hook.alarms == wanted


def test_names_are_trls(shown):
    (line,) = [line for line in lines(shown) if line["kind"] == "step" and line["step"] == 1]
    for name in (
        "reward", "reward_std", "frac_reward_zero_std", "rewards/arithmetic/mean",
        "rewards/arithmetic/std", "completions/mean_length", "completions/min_length",
        "completions/max_length", "completions/clipped_ratio",
        "completions/mean_terminated_length", "completions/min_terminated_length",
        "completions/max_terminated_length", "clip_ratio/low_mean", "clip_ratio/low_min",
        "clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/region_mean", "entropy", "kl",
        "num_tokens", "sampling/sampling_logp_difference/mean",
        "sampling/importance_sampling_ratio/mean", "policy/approxkl_avg", "policy/clipfrac_avg",
        "policy/entropy_avg", "val/clipfrac_avg", "val/ratio", "loss/policy_avg", "loss/value_avg",
        "objective/kl", "objective/entropy", "objective/non_score_reward",
        "objective/rlhf_reward", "objective/scores", "val/num_eos_tokens", "learning_rate",
    ):  # fmt: skip
        assert name in line, name
