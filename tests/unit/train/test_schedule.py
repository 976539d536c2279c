from __future__ import annotations

import math

import pytest

from sterna.core.errors import ConfigError
from sterna.train.config import ScheduleSection
from sterna.train.schedule import horizon, lr_at


def curve(total=20, **settings):
    section = ScheduleSection(**settings)
    return [lr_at(step, 2.0, section, total) for step in range(total)]


def test_warmup_is_linear_and_reaches_the_peak():
    lrs = curve(kind="constant", warmup_steps=4)
    assert lrs[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and lrs[-1] == 2.0


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_starts_at_the_peak_and_ends_at_the_floor(kind):
    lrs = curve(kind=kind, warmup_steps=4, min_ratio=0.1)
    assert lrs[3] == lrs[4] == 2.0
    assert lrs[-1] == pytest.approx(0.2)
    assert lrs[3:] == sorted(lrs[3:], reverse=True)
    assert (lrs[11] + lrs[12]) / 2 == pytest.approx(1.1, rel=1e-6)  # half way, by symmetry
    share = 4 / 15
    height = (1 + math.cos(math.pi * share)) / 2 if kind == "cosine" else 1 - share
    assert lrs[8] == pytest.approx(2 * (0.1 + 0.9 * height))


def test_wsd_stays_and_then_falls():
    lrs = curve(kind="wsd", warmup_steps=2, decay_steps=5, min_ratio=0.0)
    assert lrs[1:16] == [2.0] * 15
    assert lrs[15:] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_steps_beyond_the_horizon_stay_at_the_floor():
    section = ScheduleSection(kind="cosine", min_ratio=0.25)
    assert lr_at(500, 2.0, section, 20) == pytest.approx(0.5)


def test_a_schedule_that_does_not_fit_is_refused(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path, schedule={"kind": "wsd", "warmup_steps": 5, "decay_steps": 9})
    with pytest.raises(ConfigError, match="take 14 steps, the schedule has 6"):
        horizon(recipe)
    assert horizon(tiny.recipe(tmp_path, schedule={"total_steps": 900})) == 900
