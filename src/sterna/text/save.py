"""A tokenizer as the files of a Hugging Face folder."""

from __future__ import annotations

import json

from sterna.text.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> text of tokenizer.json, its config and the ids that end a text.

    `load_tokenizer` reads the same tokenizer back from them, and so does transformers.
    """
    config = {
        **tokenizer.special_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    generation: dict[str, object] = {"eos_token_id": list(tokenizer.eos_token_ids)}
    if tokenizer.bos_token_id is not None:
        generation |= {"bos_token_id": tokenizer.bos_token_id}
    return {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
