"""Tools between the turns of two gloo ranks: the turns of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.align.runs import Low, recipe

from sterna.align.draw import EngineDraw
from sterna.align.dump import read_dump
from sterna.align.rl import align_rl
from sterna.align.tools.protocol import PlainProtocol
from sterna.align.tools.toolbox import Toolbox, ToolRequest
from sterna.align.tools.turns import ToolTurns
from sterna.parallel.launch import LocalRanks

HERE = str(Path(__file__).resolve())


class Often(PlainProtocol):
    """A random model writes no call: here, one that ends in a common byte is one."""

    stop = tuple("abcdefghijkl")

    def calls(self, text):
        return [ToolRequest("shout", text[-5:])] if text and text[-1] in self.stop else []


def run(folder, staleness):
    """On every rank."""
    file = Path(folder) / "mine.py"
    toolbox = Toolbox([f"{file}:shout"], 5.0)

    def make_draw(made, hybrid, tokenizer, _):
        turns = ToolTurns(hybrid, tokenizer, toolbox, Often(tokenizer, 40), 3)
        return EngineDraw(hybrid, None, turns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sterna.align.build.make_draw", make_draw)
        patch.setattr("sterna.align.ranks.make_draw", make_draw)
        made = recipe(
            Path(folder), rollout={"max_tokens": 120, "staleness": staleness},
            run={"steps": 2, "dump": True}, optim={"lr": 1e-4},
        )  # fmt: skip
        steps = align_rl(made, rewards=[Low()]).steps
    toolbox.close()
    return steps


@pytest.mark.parametrize("staleness", [0, 1])
def test_two_ranks_take_the_turns_of_one(tmp_path, monkeypatch, staleness):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    written = []
    with LocalRanks() as ranks:
        for world in (1, 2):
            folder = tmp_path / str(world)
            folder.mkdir()
            recipe(folder)
            (folder / "mine.py").write_text("def shout(text):\n    return 'you said ' + text\n")
            assert ranks.run(world, f"{HERE}:run", str(folder), staleness) == [2] * world
            dump = folder / "run" / "rollouts" / "step-00000001.safetensors"
            written.append(read_dump(dump)[0])
    assert any(len(rollout.turns()) > 1 for rollout in written[0].rollouts)
    for a, b in zip(written[0].rollouts, written[1].rollouts, strict=True):
        assert a.completion.tolist() == b.completion.tolist()
        assert a.logprobs.tolist() == b.logprobs.tolist()
    assert written[0].advantages.tolist() == written[1].advantages.tolist()
