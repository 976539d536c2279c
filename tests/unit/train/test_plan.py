"""The planner: memory by size, the ladder of settings, and runs that plan themselves."""

from __future__ import annotations

import itertools
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sterna.cli.main import run
from sterna.core.errors import ConfigError, TrainError
from sterna.kernels import cpu_backend
from sterna.model.config import parse_config
from sterna.parallel.mesh import Axis
from sterna.train import autoplan, memory, plan
from sterna.train.build import build
from sterna.train.hooks import Hook
from sterna.train.longseq.config import LongseqSection
from sterna.train.loop import train
from sterna.train.memory import Job, Layout, Shape, estimate
from sterna.train.metrics import read_metrics
from sterna.train.offload.config import OffloadSection

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SHAPE = Shape.of(parse_config(LLAMA_8B, "8B"))
ALL = LongseqSection(checkpoint=True, mlp_tile=4096, attention_tile=4096, head_rows=512)


def test_the_weights_of_llama_8b_are_counted():
    assert SHAPE.weights == 8_030_261_248


def test_states_are_those_of_the_optimizer():
    """18 bytes a weight with gradients and float32 everything (training.md A11 counts 18)."""
    parts = estimate(SHAPE, Job(1024), LongseqSection(), Layout()).parts
    assert (parts["states"] + parts["gradients"]) / SHAPE.weights == pytest.approx(16, rel=0.01)


def test_checkpoints_of_half_a_million_tokens_are_122_gib():
    """2 h L S bytes (training.md, item 4)."""
    found = estimate(SHAPE, Job(500_000), ALL.model_copy(update={"tier": "host"}), Layout())
    assert found.host / 2**30 == pytest.approx(122, abs=0.5)


@pytest.mark.parametrize("tokens", [4096, 65_536, 1_000_000])
def test_every_rung_needs_less_on_the_device(tokens):
    rungs = list(plan.ladder(True, True, True))
    peaks = [estimate(SHAPE, Job(tokens), rung, Layout(1, 8)).peak for rung in rungs]
    assert all(b <= a * 1.001 for a, b in itertools.pairwise(peaks))


def test_alst_is_met_on_its_machines():
    """15 M tokens of Llama-8B on 4 nodes of 8 x 80 GB with 1.9 TB (training.md B1)."""
    machines = plan.Machines(8, 4, 80e9, 1.9e12)
    found = plan.plan(SHAPE, Job(15_000_000), machines)
    assert isinstance(found, plan.Plan)
    assert found.layout.sp == 32 and found.settings.tier == "host"
    assert 15_000_000 < plan.longest_row(SHAPE, Job(1), machines) < 20_000_000


def test_the_fastest_rung_that_fits_is_taken():
    roomy = plan.plan(SHAPE, Job(2048), plan.Machines(8, memory=80e9))
    assert isinstance(roomy, plan.Plan) and roomy.settings == LongseqSection()
    tight = plan.plan(SHAPE, Job(200_000), plan.Machines(8, memory=80e9))
    assert isinstance(tight, plan.Plan) and tight.settings.checkpoint


def test_what_does_not_fit_says_what_is_lacking():
    found = plan.plan(SHAPE, Job(500_000), plan.Machines(1, memory=80e9, host=1e9))
    assert isinstance(found, plan.Refusal)
    assert "the largest part is states (104." in found.reasons[0]
    beyond = plan.plan(SHAPE, Job(500_000), plan.Machines(1, memory=80e9, host=200e9))
    assert isinstance(beyond, plan.Refusal)
    assert "GiB of checkpoints and states a node in host memory, 186.3 are" in beyond.reasons[0]


def test_offloaded_states_count_where_they_wait():
    """12 bytes a weight of the states are float32 (training.md E3: 96 GB); blocks' weights 2."""
    states = OffloadSection(states="disk")
    both = OffloadSection(states="disk", weights="disk")
    kept, away, bare = (estimate(SHAPE, Job(1024), ALL, Layout(), o)
                        for o in (OffloadSection(), states, both))  # fmt: skip
    assert away.disk == 12 * SHAPE.weights and bare.disk - away.disk == 64 * SHAPE.block_weights
    assert kept.moments["block"] - away.moments["block"] == 12 * SHAPE.weights
    # two buffers of a block stay on the device
    assert away.moments["block"] - bare.moments["block"] == 60 * SHAPE.block_weights
    assert bare.moved == 2 * away.disk + 4 * 64 * SHAPE.block_weights


def test_one_gpu_trains_half_a_million_tokens_of_llama_8b_with_a_large_host():
    found = plan.plan(SHAPE, Job(500_000), plan.Machines(1, memory=80e9, host=400e9))
    assert isinstance(found, plan.Plan) and found.offload.states == "host"
    small = plan.plan(SHAPE, Job(2048), plan.Machines(1, memory=200e9, host=400e9))
    assert isinstance(small, plan.Plan) and small.offload == OffloadSection()
    many = plan.plan(SHAPE, Job(500_000), plan.Machines(2, memory=40e9, host=4e12))
    assert many.nearest.offload == OffloadSection()  # refused on more than one rank


def test_more_sums_and_masters_cost_their_bytes():
    base = estimate(SHAPE, Job(1024), ALL, Layout()).peak
    summed = estimate(SHAPE, Job(1024, sums_micros=True), ALL, Layout()).peak
    bare = estimate(SHAPE, Job(1024, has_master=False), ALL, Layout()).peak
    assert summed - base == pytest.approx(4 * SHAPE.weights)
    assert base - bare == pytest.approx(4 * SHAPE.weights)


def test_constants_of_the_kernels_are_theirs():
    """memory.py imports no torch, so it has its own copy."""
    assert memory.PARTIAL_BYTES == cpu_backend._PARTIAL_BYTES


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match="positive"):
        plan.plan(SHAPE, replace(Job(1), tokens=0), plan.Machines())


def test_replan_walks_the_ladder_to_its_end():
    settings, seen = LongseqSection(auto=True), []
    while settings is not None:
        seen.append(settings)
        settings = plan.replan(settings, False, True, False)
    assert len(seen) == len(list(plan.ladder(False, True, False)))
    assert seen[-1].tier == "disk"
    own = LongseqSection(checkpoint=True, mlp_tile=77)
    assert plan.replan(own, False, True, False).attention_tile


def test_the_command_says_it_in_json_and_by_its_exit_code(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    given = [str(path), "--seq-len", "500000", "--gpus", "1", "--json"]
    assert run(["plan", *given]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["longest_row"] == 0
    assert run(["plan", str(path), "--gpus", "8", "--seq-len", "100000"]) == 0
    assert "longest row" in capsys.readouterr().out
    path.write_text("{")
    assert run(["plan", str(path)]) == 2
    assert "give a Hugging Face config.json" in capsys.readouterr().err


def losses(result):
    lines = read_metrics(result.output / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "step"]


def test_a_run_plans_itself_and_learns_the_same(tiny, tmp_path, monkeypatch):
    plain = losses(train(tiny.recipe(tmp_path)))
    monkeypatch.setattr(autoplan, "free_memory", lambda device: 1.0)  # the most frugal rung
    own = {"output": str(tmp_path / "frugal"), "steps": 6, "rows_per_step": 4, "threads": 1}
    result = train(tiny.recipe(tmp_path, run=own, longseq={"auto": True}))
    assert losses(result) == pytest.approx(plain, rel=1e-5)


def test_rows_of_logits_that_auto_chose_reach_the_loss(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(autoplan, "free_memory", lambda device: 1.0)
    with build(tiny.recipe(tmp_path, longseq={"auto": True})) as trainer:
        assert trainer.parts.recipe.longseq.head_rows == 512
        assert trainer.parts.step._loss.keywords["chunk_rows"] == 512


def test_experts_are_never_tiled():
    rungs = list(plan.ladder(False, True, False, has_experts=True))
    assert not any(rung.mlp_tile for rung in rungs) and len(set(map(str, rungs))) == len(rungs)
    settings, seen = rungs[0], []
    while settings is not None:
        seen.append(settings)
        settings = plan.replan(settings, False, True, False, has_experts=True)
    assert seen == rungs


class Exhausted(Hook):
    """Memory runs out once, after step 2."""

    def __init__(self):
        self.times = 0
        self.settings, self.models = [], []

    def on_start(self, trainer):
        self.models = [ref for ref in self.models if ref() is not None]
        self.models.append(weakref.ref(trainer.parts.model))
        self.settings.append(trainer.parts.recipe.longseq)

    def after_step(self, trainer, stats):
        if stats.step == 3 and not self.times:
            self.times += 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_a_run_out_of_memory_goes_on_from_its_checkpoint(tiny, tmp_path):
    plain = losses(train(tiny.recipe(tmp_path)))
    own = {"output": str(tmp_path / "again"), "steps": 6, "rows_per_step": 4, "threads": 1}
    sections = {"run": own, "longseq": {"auto": True}, "checkpoint": {"every": 2}}
    hook = Exhausted()
    result = train(tiny.recipe(tmp_path, **sections), hooks=[hook])
    assert hook.times == 1 and result.outcome == "done"
    assert len(hook.models) == 1  # the first model was gone before the second
    assert losses(result) == pytest.approx(plain, rel=1e-5)


def test_the_next_rung_is_after_the_one_auto_chose(tiny, tmp_path, monkeypatch):
    rungs = list(plan.ladder(False, True, False))
    monkeypatch.setattr(autoplan, "ladder", lambda *args: iter(rungs[3:4]))
    own = {"output": str(tmp_path / "run"), "steps": 3, "rows_per_step": 4, "threads": 1}
    sections = {"run": own, "longseq": {"auto": True}, "checkpoint": {"every": 2}}
    hook = Exhausted()
    train(tiny.recipe(tmp_path, **sections), hooks=[hook])
    bare = [s.model_copy(update={"auto": False}) for s in hook.settings]
    assert bare == rungs[3:5]


def test_one_of_several_ranks_does_not_go_on_alone(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path, longseq={"auto": True})
    parts = SimpleNamespace(
        recipe=recipe, model=None, shards=Axis("whole"), mesh=SimpleNamespace(world=2, rank=1)
    )
    with pytest.raises(TrainError, match=r"rank 1 of 2.*checkpoint"):
        autoplan.more_frugal(parts, MemoryError())
    assert autoplan.more_frugal(parts, ValueError()) is None


def test_other_errors_and_runs_without_auto_are_not_touched(tiny, tmp_path):
    with pytest.raises(RuntimeError, match="allocate"):
        train(tiny.recipe(tmp_path), hooks=[Exhausted()])
