"""A small Llama trained here from nothing: a subject of the quality study that saw no grid.

    python bench/quality/pretrain.py OUT --text FILE [FILE ...] [--minutes 8] [--lr 3e-3]
        [--batch 8] [--window 256] [--layers 6] [--vocab 4096] [--seed 0]

6 million parameters with a byte-level BPE of its own. Every row length is a multiple of 256, so
that llama.cpp's K-quants hold all its matrices at their true sizes (they fall back to Q8_0 and
Q5_0 on SmolLM2's rows of 576). Float32 master weights, saved in bfloat16; the training loop is
finetune.py's. OUT is a Hugging Face folder; facts.json beside it says steps, tokens and losses.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from finetune import token_batches, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from sterna.core.rundir import write_atomic
from sterna.text.tokenizer import load_tokenizer

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 256, 768, 4, 2
POSITIONS = 1024
END = "<|endoftext|>"


def main() -> int:
    """Tokenizer, weights, training, files."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "tokenizer.json", _tokenizer(args.text, args.vocab).to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    write_atomic(args.out / "tokenizer_config.json", json.dumps(settings) + "\n")
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(_config(args.vocab, args.layers))
    batches = token_batches(
        load_tokenizer(args.out), args.text, (args.batch, args.window), random.Random(args.seed)
    )
    losses = train(model, batches, args.minutes * 60, args.lr)
    model.to(torch.bfloat16).save_pretrained(args.out)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "steps": len(losses),
             "tokens": len(losses) * args.batch * args.window, "losses": losses}  # fmt: skip
    write_atomic(args.out / "facts.json", json.dumps(facts) + "\n")
    return 0


def _config(vocab: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=None, eos_token_id=0, pad_token_id=None, rms_norm_eps=1e-5,
    )  # fmt: skip


def _tokenizer(texts: Sequence[Path], vocab: int) -> Tokenizer:
    """Byte-level BPE trained on the texts; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], show_progress=True,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train([str(text) for text in texts], trainer)
    return tokenizer


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
