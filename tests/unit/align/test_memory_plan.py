"""The memory planner of align: its bytes are those of real tensors, and runs are held to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import pipeline_kit as kit
from tests.unit.align.runs import Low, recipe, tiny

from sterna.align.build import build
from sterna.align.config import RlRecipe
from sterna.align.memory import fit
from sterna.align.memory.fit import Budget, changed_recipe, lacks, plan_rl
from sterna.align.memory.held import held_models
from sterna.align.memory.phases import kv_bytes, needs_of
from sterna.align.memory.steps import plan_recipe
from sterna.align.memory.work import Load, graph_bytes
from sterna.align.pipeline.config import AlignRecipe
from sterna.align.pipeline.run import align_pipeline
from sterna.align.rl import align_rl
from sterna.align.rlstate import snapshot
from sterna.align.rollout import Rollout
from sterna.align.score import completion_logprobs
from sterna.cli.main import run
from sterna.core.errors import ConfigError
from sterna.model.load import load_model
from sterna.model.value import ValueModel, save_value_model
from sterna.train.recipe import make_recipe

RECIPES = Path(__file__).parents[3] / "recipes"
# DeepSpeed-Chat's pair of models by size: a 1.3 B actor and a 350 M critic (arXiv 2308.01320).
ACTOR = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 50272,
    "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "word_embed_proj_dim": 2048, "do_layer_norm_before": True,
    "activation_function": "relu",
}  # fmt: skip
CRITIC = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50272,
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
PPO = {"algorithm": {"kind": "ppo", "kl_coef": 0.1}}


def sized(tensors) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def states_of(trained) -> int:
    return sum(t.nbytes for each in trained.optimizer.state_dict().values() for t in each.values())


def by_name(made: RlRecipe):
    return {model.name: model for model in held_models(made)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extra", [{}, {"adapter": {"rank": 4}},
                                   {"optim": {"states": "8bit", "master": False}}])  # fmt: skip
def test_weights_and_states_are_counted_to_the_byte(tmp_path, dtype, extra):
    base = recipe(tmp_path, **PPO, **extra)
    made = changed_recipe(base, {"model.dtype": dtype})
    models = by_name(made)
    with build(made, rewards=[Low()]) as trainer:
        learner = trainer.parts.learner
        policy = list(learner.policy.model.parameters())
        shared = {p.data_ptr() for p in policy}
        critic = [p for p in learner.critic.model.parameters() if p.data_ptr() not in shared]
        assert models["policy"].own == sized(policy)
        assert models["critic"].own == sized(critic)
        assert models["policy"].states == pytest.approx(states_of(learner.policy), rel=0.01)
        assert models["critic"].states == pytest.approx(states_of(learner.critic), rel=0.01)
    assert ("reference" in models) == ("adapter" not in extra)
    if "reference" in models:
        frozen = load_model(tmp_path / "model", dtype).decoder
        assert models["reference"].own == sized(frozen.parameters())


def test_reward_models_on_the_policys_base_count_their_adapter_alone(tmp_path):
    made = recipe(tmp_path, adapter={"rank": 4}, **PPO)
    with build(made, rewards=[Low()]) as trainer:
        trainer.save()
        trainer._checkpointer.wait()
    from sterna.align.adapted import value_files
    from sterna.train.checkpoint import newest

    found = newest(made.run.output / "checkpoints")
    assert found is not None
    judge = tmp_path / "judge"
    judge.mkdir()
    with build(recipe(tmp_path, adapter={"rank": 4}, **PPO, run={"output": str(tmp_path / "b")}),
               rewards=[Low()]) as trainer:  # fmt: skip
        critic = trainer.parts.learner.critic.model
        for name, data in value_files(critic, str(tmp_path / "model")).files.items():
            (judge / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    rewards = [{"kind": "model", "path": str(judge)}]
    shared = by_name(recipe(tmp_path, adapter={"rank": 4}, rewards=rewards))["reward"]
    alone = by_name(recipe(tmp_path, rewards=rewards))["reward"]
    trained = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    assert shared.own == pytest.approx(4 * trained, rel=0.15)  # the file has a header
    assert alone.own > shared.own + 2 * alone.block and not shared.can_move and alone.can_move


@pytest.mark.parametrize("weights", ["packed", "fp6", "merged"])
def test_rollout_copies_are_counted(tmp_path, weights):
    extra = {"adapter": {"rank": 4, "targets": ("all-linear",)}} if weights == "merged" else {}
    made = recipe(tmp_path, rollout={"weights": weights}, **extra)
    planned = needs_of(made, held_models(made)).held["rollout copy"]
    with build(made, rewards=[Low()]) as trainer:
        policy = {p.data_ptr() for p in trainer.parts.learner.policy.model.parameters()}
        served = trainer.parts.hybrid._served
        own = sized(t for t in (*served.parameters(), *served.buffers())
                    if t.data_ptr() not in policy)  # fmt: skip
    assert own <= planned * 1.1  # tiles of 64 columns and 16 rows are padded
    assert planned <= own * (2.2 if weights == "merged" else 1.25)  # tables are not merged


def test_the_cache_of_a_step_stays_under_its_plan(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": [3 + i] * 32}) + "\n" for i in range(4)))
    made = recipe(tmp_path, prompts={"path": str(prompts), "task": "", "max_tokens": 32},
                  rollout={"max_tokens": 48, "ignore_eos": True},
                  rewards=[{"kind": "function", "path": "given.py:low"}])  # fmt: skip
    used = []
    with build(made, rewards=[Low()]) as trainer:
        engine = trainer.parts.hybrid.engine
        engine.on_step.append(lambda *a: used.append(engine.pool.num_usable - engine.pool.num_free))
        trainer.generate(trainer.next_prompts())
        layers = engine.runner.layers
        block = sum(layer.nbytes for layer in layers) / engine.pool.num_blocks
        shape = held_models(made)[0].shape
        planned = kv_bytes(made, shape, 4)
        assert max(used) * block <= planned <= 1.5 * max(used) * block
        assert planned <= sum(layer.nbytes for layer in layers)
        on_gpu = kv_bytes(changed_recipe(made, {"model.device": "cuda"}), shape, 4)
        assert on_gpu == sum(layer.nbytes for layer in layers)


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_autograd_keeps_is_predicted(tmp_path, adapter, dtype):
    """Within a tenth, of a graph of 400 tokens; the head's and the loss's tensors are not in it."""
    extra = {} if adapter is None else {"adapter": adapter}
    made = changed_recipe(recipe(tmp_path, **extra), {"model.dtype": dtype})
    with build(made, rewards=[Low()]) as trainer:
        model = trainer.parts.learner.policy.model
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in weights:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        rows = [
            Rollout(i, 0, np.full(100, 5 + i, np.int32), np.full(100, 6, np.int32),
                    np.ones(100, np.bool_), np.zeros(100, np.float32), 0, False)
            for i in range(2)  # of two prompts, which share no row
        ]  # fmt: skip
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            completion_logprobs(model, rows)
    load = Load(400, 200, 1, 200, False)
    saved, _ = graph_bytes(held_models(made)[0], load)
    assert sum(kept.values()) == pytest.approx(saved, rel=0.15)


def test_the_cheapest_placement_is_taken_and_fits(tmp_path):
    made = recipe(tmp_path, **PPO, checkpoint={"is_async": True})
    models = held_models(made)
    roomy = plan_rl(made, Budget(1e12))
    assert not roomy.changes and roomy.recipe is made
    least = fit._most_frugal(made, models, ()).peak
    for share in np.linspace(0, 1, 7):
        budget = Budget(least + share * (roomy.peak - least) + 1)
        found = plan_rl(made, budget)
        assert not found.reasons and found.peak <= budget.device
        assert needs_of(found.recipe, held_models(found.recipe)).peak == found.needs.peak
        if found.changes:
            assert lacks(roomy.needs, budget) == found.lacking != ()


def test_what_does_not_fit_says_so_and_what_would(tmp_path):
    made = recipe(tmp_path, **PPO)
    least = fit._most_frugal(made, held_models(made), ())
    found = plan_rl(made, Budget(least.peak - 3e5))
    assert "GiB in the phase" in found.reasons[0] and "largest part is" in found.reasons[0]
    assert found.proposals
    for change, peak in found.proposals:
        altered = changed_recipe(made, change)
        assert needs_of(altered, held_models(altered)).peak * 1.1 == pytest.approx(peak)
        assert peak <= least.peak - 3e5


def test_a_tier_takes_its_model_out_of_the_device(tmp_path):
    made = recipe(tmp_path, **PPO)
    away = changed_recipe(made, {"memory.reference": "disk"})
    here, gone = (needs_of(one, held_models(one)) for one in (made, away))
    reference = by_name(made)["reference"]
    assert gone.disk == {"reference: weights": reference.own}
    less = here.held["reference: weights"] - gone.held["reference: weights"]
    assert less == reference.own - 2 * reference.block  # two buffers stay


def test_more_takes_more(tmp_path):
    def peak(**sections) -> float:
        made = recipe(tmp_path, **sections)
        return needs_of(made, held_models(made)).peak

    base = peak()
    assert peak(rollout={"workers": 2}) > base + 2 * (300 << 20)
    assert peak(optim={"ema_decay": 0.9}) > base
    assert peak(checkpoint={"is_async": True}) > base
    assert peak(algorithm={"kl_coef": 0.1}) > base
    assert peak(rollout={"prompts_per_step": 64, "max_tokens": 128}) > base
    assert peak(algorithm={"micro_tokens": 64}, prompts={"max_tokens": 32}) < base


def test_without_a_budget_freed_memory_is_counted_beside_the_cache(tmp_path):
    made = recipe(tmp_path, **PPO)
    stated = changed_recipe(made, {"memory.budget_gb": 1000.0})
    kept, given = (needs_of(one, held_models(one)) for one in (made, stated))
    most = max(given.of(name) for name in given.phases if name != "rollout")
    cache = given.phases["rollout"]["KV cache"]
    assert kept.of("rollout") == pytest.approx(most + cache) and kept.peak_phase == "rollout"
    assert given.of("rollout") < kept.of("rollout")


@pytest.mark.parametrize(("budget", "given"), [(0.0, 0), (50.0, 4)])
def test_a_stated_budget_gives_freed_memory_back(tmp_path, monkeypatch, budget, given):
    calls = []
    monkeypatch.setattr("sterna.align.rltrainer.give_back_memory", lambda: calls.append(1))
    align_rl(recipe(tmp_path, memory={"budget_gb": budget}, run={"steps": 2}), rewards=[Low()])
    assert len(calls) == given  # after scoring and after training, each step


def test_a_run_over_its_budget_stops_before_any_work(tmp_path):
    made = recipe(tmp_path, memory={"budget_gb": 0.01}, **PPO)
    with pytest.raises(ConfigError, match=r"does not fit into its memory: .*phase") as raised:
        align_rl(made, rewards=[Low()])
    assert "sterna plan" in raised.value.message
    assert not made.run.output.exists()


def tight(made: RlRecipe) -> float:
    """GB a little under what the recipe takes as it is, giving back what it frees."""
    stated = changed_recipe(made, {"memory.budget_gb": 1000.0})
    return (plan_rl(stated, Budget(1e12)).peak - 1e5) / 1e9


def test_a_run_adapts_loudly_and_resumes_as_it_was(tmp_path, caplog):
    prompts = {"max_tokens": 32}
    plain = recipe(tmp_path, prompts=prompts, algorithm={"kind": "ppo", "micro_tokens": 8192},
                   rollout={"prompts_per_step": 64})  # fmt: skip
    budget = {"budget_gb": tight(plain), "fit": "adapt"}
    made = changed_recipe(plain, {f"memory.{key}": value for key, value in budget.items()})
    with pytest.raises(ConfigError, match=r'memory\.fit = "adapt" does that'):
        align_rl(changed_recipe(made, {"memory.fit": "refuse"}), rewards=[Low()])
    two = changed_recipe(made, {"run.steps": 2})
    align_rl(two, rewards=[Low()])
    assert "memory: adapted to fit: algorithm.micro_tokens" in caplog.text
    written = (made.run.output / "recipe.toml").read_text()
    assert "micro_tokens = 8192" not in written
    # More room now: the order of sums stays that of the checkpoint.
    roomy = changed_recipe(made, {"memory.budget_gb": 50.0, "run.steps": 3})
    assert align_rl(roomy, rewards=[Low()], resume=True).steps == 3
    assert (made.run.output / "recipe.toml").read_text().count("micro_tokens = 8192") == 0


def test_without_a_stated_budget_a_run_is_only_warned(tmp_path, caplog, monkeypatch):
    made = recipe(tmp_path, run={"steps": 1})
    monkeypatch.setattr("sterna.align.memory.start.available_memory_bytes", lambda: 10_000_000)
    assert align_rl(made, rewards=[Low()]).steps == 1
    assert "memory.budget_gb is not set" in caplog.text


@pytest.mark.parametrize("is_async", [True, False])
def test_a_save_that_is_waited_for_copies_nothing(tmp_path, is_async):
    made = recipe(tmp_path, checkpoint={"is_async": is_async})
    with build(made, rewards=[Low()]) as trainer:
        trainer.start()
        own = {t.data_ptr() for p in trainer.parts.learner.policy.optimizer.state_dict().values()
               for t in p.values()}  # fmt: skip
        state = snapshot(trainer).state
        shared = [key for key, tensor in state.items() if tensor.data_ptr() in own]
    assert bool(shared) == (not is_async)


def pipeline(folder: Path, **changed: object) -> AlignRecipe:
    kit.write_task(folder, pairs=50)
    return make_recipe({**kit.values(folder), **changed}, AlignRecipe)


def test_a_pipeline_is_planned_before_its_models_exist(tmp_path):
    made = pipeline(tmp_path)
    plans = plan_recipe(made, Budget(1e12))
    assert [plan.step for plan in plans] == ["sft", "reward", "rl"]
    rl = plans[2].needs
    assert rl.held["policy: weights"] == rl.held["reference: weights"] > 0
    assert "critic: weights" in rl.held and "reward: weights" in rl.held


def test_a_pipeline_over_its_budget_stops_before_the_first_step(tmp_path):
    made = pipeline(tmp_path, memory={"budget_gb": 0.001})
    assert made.rl.memory.budget_gb == 0.001
    with pytest.raises(ConfigError, match="step sft does not fit"):
        align_pipeline(made)
    assert not made.run.output.exists()


def test_deepspeed_chats_pair_on_one_gpu_of_80_gb(tmp_path, capsys):
    for name, config in (("actor", ACTOR), ("critic", CRITIC)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    words = [str(RECIPES / "align-gpu.toml"), f"model.path={tmp_path / 'actor.json'}",
             f"reward.model.path={tmp_path / 'critic.json'}", "--json", "--gpus", "1"]  # fmt: skip
    assert run(["plan", *words, "--hbm", "80"]) == 0
    steps = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    held, b = steps["rl"]["held"], 1_315_753_984  # OPT-1.3b's own count of weights
    assert held["policy: optimizer"] == pytest.approx(12 * b, rel=0.001)
    assert held["policy: weights"] == pytest.approx(2 * b, rel=0.001)
    assert 40e9 < steps["rl"]["peak_bytes"]["with_margin"] < 70e9
    # 48 GB: not as it is. What is set then is said, and fits.
    code = run(["plan", *words, "--hbm", "48", "--host-ram", "64"])
    found = json.loads(capsys.readouterr().out)["steps"][2]
    assert code == 0 and found["changes"] and found["peak_bytes"]["with_margin"] < 48e9
    # 16 GB: nothing of the placement helps.
    assert run(["plan", *words, "--hbm", "16", "--host-ram", "64"]) == 1
    found = json.loads(capsys.readouterr().out)["steps"][2]
    assert found["reasons"]


def test_the_command_plans_recipes_of_all_verbs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = recipe(tmp_path)
    path = tmp_path / "one.toml"
    from sterna.train.recipe import to_toml

    path.write_text(to_toml(made))
    assert run(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "rl: " in shown and "KV cache" in shown and "fits" in shown
    assert run(["plan", str(path), "memory.budget_gb=0.01", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["fits"]
    lines = ('kind = "sft"', "[model]", f'path = "{tmp_path / "model"}"', "[[data.sources]]",
             'path = "x.jsonl"')  # fmt: skip
    (tmp_path / "train.toml").write_text("\n".join(lines))
    assert run(["plan", "train.toml"]) == 0
    assert "sft: " in capsys.readouterr().out
    assert run(["plan", "a", "b"]) == 2


def test_value_models_are_planned_without_their_head(tmp_path):
    tiny.write_model(tmp_path / "untied", tie_word_embeddings=False)
    model = ValueModel(load_model(tmp_path / "untied", "float32").decoder)
    save_value_model(model, tmp_path / "judge")
    made = recipe(tmp_path, rewards=[{"kind": "model", "path": str(tmp_path / "judge")}])
    assert by_name(made)["reward"].own == sized(model.parameters())
    assert replace(by_name(made)["reward"], tier="disk").away == sized(model.parameters())
