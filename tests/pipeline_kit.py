"""A made-up task for whole pipelines: reviews whose writer prefers good words to bad ones.

    prompt    tell me about the film
    answer    the plot was dull and the music was lovely
    gold      (good words - bad words) / 2, from -1 to 1

The model starts from random weights; nobody tells it which words are good: the pairs do.

    python tests/pipeline_kit.py FOLDER    writes the task for recipes/align-cpu.toml
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOPICS = [
    "film",
    "book",
    "play",
    "song",
    "show",
    "meal",
    "trip",
    "game",
    "house",
    "garden",
    "hotel",
    "concert",
]
THINGS = ["plot", "music", "cast", "scene", "sound", "place", "price", "staff", "light", "ending"]
GOOD = ["lovely", "great", "fine", "bright", "funny", "warm"]
BAD = ["dull", "poor", "bad", "grim", "slow", "cold"]
NOISE = 0.05
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GOLD = f'''
GOOD = {set(GOOD)!r}
BAD = {set(BAD)!r}


def gold(prompts, completions, **columns):
    """Good words less bad ones, a place of an adjective; 0 for what is no review."""
    return [worth(text) for text in completions]


def worth(text):
    words = text.split()
    good, bad = (sum(word in kind for word in words) for kind in (GOOD, BAD))
    return (good - bad) / max(good + bad, 2)
'''


def prompt(chance: random.Random) -> str:
    topic, thing = chance.choice(TOPICS), chance.choice(THINGS)
    return f"tell me about the {topic} of {thing} {chance.randrange(1000)}"


def review(chance: random.Random) -> str:
    parts = [f"the {chance.choice(THINGS)} was {chance.choice(GOOD + BAD)}" for _ in range(2)]
    return " and ".join(parts)


def worth(text: str) -> float:
    words = text.split()
    return sum((word in GOOD) - (word in BAD) for word in words) / 2


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    """Pairs of two reviews of different worth; one in twenty is the wrong way about."""
    chance = random.Random(seed)
    with path.open("w") as file:
        while count:
            one, other = sorted((review(chance), review(chance)), key=worth)
            if worth(one) < worth(other):
                if chance.random() < NOISE:
                    one, other = other, one
                row = {"prompt": prompt(chance), "chosen": other, "rejected": one}
                file.write(json.dumps(row) + "\n")
                count -= 1


def write_tokenizer(folder: Path, words: Path) -> int:
    """A byte-level BPE of the task's own words; returns its size."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train([str(words)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],  # the trap: padding by EOS must not keep EOS from being trained
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend.get_vocab_size()


def write_config(path: Path, vocab_size: int, hidden: int, layers: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    path.write_text(json.dumps(config))


def write_task(folder: Path, pairs: int = 3000, hidden: int = 64, layers: int = 2) -> None:
    """pairs.jsonl, gold.py, config.json and the tokenizer, in `folder`."""
    write_pairs(folder / "pairs.jsonl", pairs)
    (folder / "gold.py").write_text(GOLD)
    size = write_tokenizer(folder / "tokenizer", folder / "pairs.jsonl")
    write_config(folder / "config.json", size, hidden, layers)


def values(folder: Path) -> dict[str, Any]:
    """An AlignRecipe's values: a short run on the task in `folder`."""
    return {
        "model": {
            "config": str(folder / "config.json"),
            "tokenizer": str(folder / "tokenizer"),
            "dtype": "float32",
        },
        "data": {
            "sources": [{"path": str(folder / "pairs.jsonl"), "epochs": 0}],
            "split": [2, 4, 4],
            "held_out": 0.1,
            "seq_len": 128,
            "window_tokens": 4096,
            "prefetch": 0,
        },
        "run": {"output": str(folder / "run"), "threads": 1},
        "compare": {"prompts": 64},
        "sft": {
            "kind": "pretrain",
            "optim": {"lr": 3e-3},
            "run": {"steps": 60, "rows_per_step": 8, "micro_rows": 8},
            "checkpoint": {"every": 20},
            "log": {"tensorboard": False, "report": False, "peak_tflops": 0.1},
        },
        "reward": {
            "optim": {"lr": 1e-3},
            "run": {"steps": 40, "rows_per_step": 8, "micro_rows": 8},
            "checkpoint": {"every": 20},
            "log": {"tensorboard": False, "report": False, "peak_tflops": 0.1},
        },
        "rl": {
            "rollout": {"prompts_per_step": 16, "group_size": 4, "max_tokens": 16},
            "algorithm": {"kl_coef": 0.05, "minibatches": 2, "reward_clip": 5.0},
            "critic": {"optim": {"lr": 1e-3}},
            "optim": {"lr": 1e-4},
            "run": {"steps": 20},
            "checkpoint": {"every": 10},
            "rewards": [
                {"kind": "model"},
                {"kind": "function", "path": f"{folder / 'gold.py'}:gold", "weight": 0.0},
            ],
        },
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_task(target, hidden=160, layers=4)
