"""A tiny Llama with a byte tokenizer and a chat template, and chats to train it on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from sterna.data.config import DataConfig
from sterna.model.config import parse_config
from sterna.model.decoder import Decoder
from sterna.model.save import save_model
from sterna.train.config import Recipe
from sterna.train.init_weights import init_weights
from sterna.train.recipe import make_recipe, merge_into

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}


def write_tokenizer(folder: Path) -> None:
    """256 bytes and three special tokens, as a Hugging Face folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder: Path, seed: int = 0, **changed: object) -> Path:
    """The model's folder: random weights, config, tokenizer."""
    decoder = Decoder(parse_config({**CONFIG, **changed}, "tiny"), torch.float32)
    init_weights(decoder, seed)
    save_model(decoder, folder)
    write_tokenizer(folder)
    return folder


def write_chats(path: Path, count: int = 200, seed: int = 0) -> Path:
    """Chats of 20 to 80 tokens with a rule to learn: the answer is the question reversed."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(chance.choice("abcdef") for _ in range(chance.randint(4, 30)))
            chat = [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]
            file.write(json.dumps({"messages": chat}) + "\n")
    return path


def recipe(folder: Path, **sections: dict[str, object]) -> Recipe:
    """A small run in `folder`/run on `folder`/model and chats.jsonl, made when missing."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_chats(folder / "chats.jsonl")
    values: dict[str, object] = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "sources": [{"path": str(folder / "chats.jsonl"), "epochs": 0}],
            "seq_len": 96,
            "window_tokens": 2048,
            "prefetch": 0,
        },
        "optim": {"lr": 3e-3},
        "run": {"output": str(folder / "run"), "steps": 6, "rows_per_step": 4, "threads": 1},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "report": False, "peak_tflops": 0.1},
    }
    merge_into(values, sections)
    return make_recipe(values)


def data(folder: Path, **changed: object) -> DataConfig:
    """The data section of `recipe`."""
    return recipe(folder, data=changed).data
