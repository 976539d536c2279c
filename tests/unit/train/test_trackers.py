"""TensorBoard for real; MLflow and Weights & Biases with stand-ins."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from sterna.core.errors import ConfigError
from sterna.train.loop import train


def test_tensorboard_has_every_step_once_also_after_a_resume(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny.recipe(tmp_path, log={"tensorboard": True}, run={"steps": 3})
    train(recipe)
    train(tiny.recipe(tmp_path, log={"tensorboard": True}, run={"steps": 5}), resume=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
    assert scalars[-1].value < scalars[0].value


class Recorder(ModuleType):
    """A module whose functions note their calls."""

    def __init__(self, name, calls):
        super().__init__(name)
        self._calls = calls

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self._calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_trackers_see_recipe_steps_and_end(tiny, tmp_path, monkeypatch, tracker):
    calls = []
    monkeypatch.setitem(sys.modules, tracker, Recorder(tracker, calls))
    recipe = tiny.recipe(
        tmp_path, run={"steps": 2}, log={tracker: True, "project": "tern"},
        data={"held_out": 0.1}, eval={"max_rows": 2},
    )  # fmt: skip
    train(recipe)
    names = [name for name, *_ in calls]
    log = {"mlflow": "log_metrics", "wandb": "log"}[tracker]
    steps = [(args[0], kwargs["step"]) for name, args, kwargs in calls if name == log]
    assert [step for _, step in steps] == [1, 2, 2]
    assert "tokens_per_s" in steps[0][0] and any("eval" in key for key in steps[2][0])
    assert "tern" in str(calls[0]) and "0.003" in str(calls)
    assert names[-1] == {"mlflow": "end_run", "wandb": "finish"}[tracker]


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(tiny, tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(
        ConfigError, match=rf"log\.{tracker} is set, but {tracker} is not installed"
    ):
        train(tiny.recipe(tmp_path, log={tracker: True}))
