"""Small models of one character a token, trained on lines of text by `sterna train`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sterna.core.rundir import write_atomic
from sterna.train.config import Recipe
from sterna.train.loop import train

END = "<|end|>"
_HEADS = 4


def write_tokenizer(folder: Path, characters: str) -> None:
    """A Hugging Face tokenizer of these characters and the end token, which is the last id."""
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    write_atomic(folder / "tokenizer.json", backend.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    write_atomic(folder / "tokenizer_config.json", json.dumps(settings) + "\n")


def write_config(path: Path, num_tokens: int, hidden: int, layers: int) -> None:
    """config.json of a Llama with a feed-forward of 3 hidden sizes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": num_tokens,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "eos_token_id": num_tokens - 1,
    }
    write_atomic(path, json.dumps(config) + "\n")


def pretrain(
    folder: Path,
    characters: str,
    lines: Iterable[tuple[str, str]],
    *,
    hidden: int,
    layers: int,
    steps: int,
    seed: int,
    lr: float = 3e-3,
    rows: int = 4,
) -> Path:
    """The model after `steps` steps of `rows` times 512 tokens; with more steps it goes on.

    `lines`: what is given and what is learnt to follow it.
    """
    path = folder / "lines.jsonl"
    if not path.exists():
        write_tokenizer(folder, characters)
        write_config(folder / "config.json", len(characters) + 1, hidden, layers)
        made = (json.dumps({"prompt": given, "completion": rest}) for given, rest in lines)
        write_atomic(path, "\n".join(made) + "\n")
    source = {"path": str(path), "epochs": 0, "render": "plain"}
    recipe = Recipe.model_validate(
        {
            "kind": "pretrain",
            "model": {
                "config": folder / "config.json",
                "tokenizer": str(folder),
                "dtype": "float32",
            },
            "data": {"sources": [source], "seq_len": 512, "seed": seed, "prefetch": 0},
            "optim": {"lr": lr},
            "schedule": {"kind": "constant", "warmup_steps": 20},
            "run": {
                "output": folder / "run",
                "steps": steps,
                "rows_per_step": rows,
                "micro_rows": rows,
                "seed": seed,
                "threads": 1,
            },
            "checkpoint": {"every": 0, "keep_last": 1},
            "log": {"report": False, "tensorboard": False, "peak_tflops": 0.1},
        }
    )
    result = train(recipe, resume=(folder / "run" / "checkpoints").exists())
    if result.outcome != "done":
        raise SystemExit(f"{result.outcome} after {result.steps} steps; the same call goes on")
    return result.model
