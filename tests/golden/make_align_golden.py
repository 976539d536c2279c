"""Writes align.json: what TRL's own trainers compute on fixed tensors and a fixed tiny model.

Run once with a Python that has TRL (1.16.0 wrote the stored file); the tests need only the file:

    PYTHON_WITH_TRL tests/golden/make_align_golden.py

TRL's losses are methods. Here they run unbound, on a stand-in that has the settings they read and
a one-process accelerator; the mathematics is TRL's own code. Its cDPO is gone (its "robust" divides
by 1 - 2 eps): the cDPO value is its sigmoid loss of the pairs and of the pairs turned round, mixed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, reward_trainer, rloo_trainer

FILE = Path(__file__).with_name("align.json")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 48,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
PAIRS = [  # prompt, chosen, rejected; 1 is EOS
    ([5, 9, 11], [7, 8, 1], [20, 1]),
    ([2, 3], [30, 31, 32, 33, 1], [30, 31, 40, 41, 42, 1]),
    ([12, 13, 14, 15], [6, 1], [21, 22, 23, 1]),
]
MARGINS = [0.0, 0.5, 1.25]


def weights(name: str, shape: torch.Size, turn: float) -> torch.Tensor:
    """The same numbers wherever they are made: a wave by the tensor's name, norms near 1."""
    number = torch.arange(shape.numel(), dtype=torch.float64)
    phase = sum(ord(letter) for letter in name) + turn
    wave = torch.sin(number * 12.9898 + phase) * 0.2
    return (wave + ("norm" in name)).to(torch.float32).reshape(shape)


def tiny(turn: float, kind: Any = transformers.LlamaForCausalLM) -> Any:
    model = kind(transformers.LlamaConfig(**CONFIG, num_labels=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, parameter.shape, turn))
    return model.eval()


class Fused:
    """What TRL's fused head returns, from plain logits."""

    training = False

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Any:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        log_p, wanted = logits.log_softmax(-1), labels[:, 1:]
        found = log_p.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
        zero = torch.zeros_like(found)
        return SimpleNamespace(
            log_probs=torch.where(wanted >= 0, found, zero), entropy=zero, mean_logits=zero,
            is_top1=zero.bool(),
        )  # fmt: skip


def stand_in(**settings: Any) -> Any:
    same = lambda x, **_: x  # noqa: E731
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same,
        num_processes=1, unwrap_model=same,
    )  # fmt: skip
    metrics = {"eval": defaultdict(list)}
    defaults = {"ld_alpha": None, "aux_loss_enabled": False, "precompute_ref_logps": False,
                "use_weighting": False, "f_divergence_type": "reverse_kl", "loss_weights": [1.0],
                "model": SimpleNamespace(training=False), "_total_train_tokens": 0}  # fmt: skip
    return SimpleNamespace(accelerator=accelerator, _metrics=metrics, **{**defaults, **settings})


def padded(sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """prompt + answer, padded on the right, with TRL's masks."""
    size = max(len(prompt) + len(answer) for prompt, answer in sequences)
    rows: dict[str, list[list[int]]] = defaultdict(list)
    for prompt, answer in sequences:
        rest = size - len(prompt) - len(answer)
        rows["input_ids"].append(prompt + answer + [0] * rest)
        rows["attention_mask"].append([1] * (size - rest) + [0] * rest)
        rows["completion_mask"].append([0] * len(prompt) + [1] * len(answer) + [0] * rest)
    return {name: torch.tensor(values) for name, values in rows.items()}


def last(fake: Any) -> dict[str, float]:
    return {name: float(values[-1]) for name, values in fake._metrics["eval"].items()}


def dpo(loss: str, beta: float, policy: Any, reference: Any, turned: bool = False) -> Any:
    order = (2, 1) if turned else (1, 2)
    batch = padded([(pair[0], pair[i]) for i in order for pair in PAIRS])
    fake = stand_in(
        loss_types=[loss], beta=beta, ref_model=Fused(reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    found = dpo_trainer.DPOTrainer._compute_loss(fake, Fused(policy), batch, False)
    policy.zero_grad()
    found.backward()
    norm = float(sum(p.grad.double().square().sum() for p in policy.parameters()) ** 0.5)
    return {"loss": float(found), "grad_norm": norm, **last(fake)}


def kto(policy: Any, reference: Any) -> Any:
    answers = [(p, c, True) for p, c, _ in PAIRS] + [(p, r, False) for p, _, r in PAIRS[:2]]
    others = [(answers[i][0], answers[i - 1][1]) for i in range(len(answers))]
    batch = padded([(prompt, answer) for prompt, answer, _ in answers])
    batch |= {f"KL_{name}": value for name, value in padded(others).items()}
    batch["label"] = torch.tensor([label for *_, label in answers])
    fake = stand_in(
        loss_type="kto", beta=0.2, calculate_KL=True, desirable_weight=1.5,
        undesirable_weight=0.75, ref_model=Fused(reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    fake._compute_kl_logps = lambda *args: kto_trainer.KTOTrainer._compute_kl_logps(fake, *args)
    loss = kto_trainer.KTOTrainer._compute_loss(fake, Fused(policy), batch, False)
    return {
        "answers": answers, "others": others, "beta": 0.2, "desirable_weight": 1.5,
        "undesirable_weight": 0.75, "loss": float(loss), **last(fake),
    }  # fmt: skip


def reward(with_margins: bool) -> Any:
    model = tiny(0.3, transformers.LlamaForSequenceClassification)
    batch = padded([(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS])
    del batch["completion_mask"]
    fake = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {**batch, **({"margin": torch.tensor(MARGINS)} if with_margins else {})}
    if with_margins:  # the model would be given the margin too
        plain = model.forward
        model.forward = lambda margin=None, **kwargs: plain(**kwargs)
    loss = reward_trainer.RewardTrainer.compute_loss(fake, model, inputs)
    return {"loss": float(loss), **last(fake)}


LENGTHS = [4, 2, 5, 3]
ADVANTAGES = [1.25, -0.5, -1.0, 0.75]
MAX_LENGTH = 6


def token_tensors() -> tuple[torch.Tensor, ...]:
    """New, old and reference log-probs [B, T] in float64, and the mask."""
    shape = (len(LENGTHS), max(LENGTHS))
    number = torch.arange(shape[0] * shape[1], dtype=torch.float64).reshape(shape)
    new = -1.0 - torch.sin(number * 1.7) * 0.9
    old, ref = new + torch.cos(number * 2.3) * 0.5, new + torch.sin(number * 0.9) * 0.4
    mask = torch.tensor([[float(t < n) for t in range(shape[1])] for n in LENGTHS])
    return new, old, ref, mask.double()


def grpo(**settings: Any) -> Any:
    new, old, ref, mask = token_tensors()
    new.requires_grad_()
    defaults = {"beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "token",
                "epsilon_low": 0.2, "epsilon_high": 0.28, "top_entropy_quantile": 1.0,
                "off_policy_mask_threshold": None, "use_vllm": False,
                "max_completion_length": MAX_LENGTH, "_entropy_bonus_enabled": False}  # fmt: skip
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    fake = stand_in(**{**defaults, **settings}, args=args)
    fake._get_per_token_logps_and_entropies = lambda *_, **__: (new, torch.zeros_like(mask), None)
    inputs = {
        "prompt_ids": torch.zeros(4, 1).long(), "prompt_mask": torch.ones(4, 1).long(),
        "completion_ids": torch.zeros(4, 5).long(), "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = grpo_trainer.GRPOTrainer._compute_loss(fake, fake.model, inputs)
    (grad,) = torch.autograd.grad(loss, new)
    return {"settings": settings, "loss": float(loss), "grad": grad[mask.bool()].tolist(),
            **last(fake)}  # fmt: skip


def rloo() -> Any:
    """On policy (old = new): TRL clips one ratio a sequence, which is 1 here."""
    new, _, _, mask = token_tensors()
    new.requires_grad_()
    fake = stand_in(epsilon_low=0.2, epsilon_high=0.2)
    fake._get_per_token_logps_and_entropies = lambda *_, **__: (new, torch.zeros_like(mask), None)
    inputs = {
        "prompt_ids": torch.zeros(4, 1).long(), "prompt_mask": torch.ones(4, 1).long(),
        "completion_ids": torch.zeros(4, 5).long(), "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "old_logps": (new * mask).sum(1).detach(),
    }  # fmt: skip
    loss = rloo_trainer.RLOOTrainer._compute_loss(fake, fake.model, inputs)
    (grad,) = torch.autograd.grad(loss, new)
    return {"loss": float(loss), "grad": grad[mask.bool()].tolist()}


GRPO = {
    "grpo": {"loss_type": "grpo"}, "grpo_kl": {"loss_type": "grpo", "beta": 0.04},
    "bnpo": {"loss_type": "bnpo"}, "bnpo_kl": {"loss_type": "bnpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo"}, "dr_grpo_kl": {"loss_type": "dr_grpo", "beta": 0.04},
    "dapo": {"loss_type": "dapo"}, "dapo_kl": {"loss_type": "dapo", "beta": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}  # fmt: skip


def main() -> None:
    dpo_trainer.disable_gradient_checkpointing = lambda *_: nullcontext()
    kto_trainer.disable_gradient_checkpointing = lambda *_: nullcontext()
    policy, reference = tiny(0.0), tiny(0.1)
    straight = dpo("sigmoid", 0.5, policy, reference)
    round_ = dpo("sigmoid", 0.5, policy, reference, turned=True)
    new, old, ref, mask = token_tensors()
    found = {
        "trl": trl.__version__, "config": CONFIG, "pairs": PAIRS, "margins": MARGINS,
        "policy_turn": 0.0, "reference_turn": 0.1, "reward_turn": 0.3,
        "first_step": dpo("sigmoid", 0.5, policy, policy),
        "sigmoid": straight, "ipo": dpo("ipo", 0.5, policy, reference),
        "cdpo": {"label_smoothing": 0.1, "loss": 0.9 * straight["loss"] + 0.1 * round_["loss"]},
        "kto": kto(policy, reference),
        "reward": reward(False), "reward_margin": reward(True),
        "tokens": {
            "lengths": LENGTHS, "advantages": ADVANTAGES, "max_length": MAX_LENGTH,
            **{name: x[mask.bool()].tolist() for name, x in
               (("new", new), ("old", old), ("ref", ref))},
        },
        "policy": {name: grpo(**settings) for name, settings in GRPO.items()},
        "rloo": rloo(),
    }  # fmt: skip
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
