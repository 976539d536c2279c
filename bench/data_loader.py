"""How fast files become packed rows, and how full the rows are.

    python bench/data_loader.py FILE MODEL [--fields prompt=question,completion=answer]
        [--documents blank_line] [--seq-len 1024]

Reads the file once without threads and once with two, in one process, and prints a JSON line for
each: tokens, tokens a second of wall and of CPU time, fill.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from sterna.core.machine import fingerprint
from sterna.data.config import DataConfig
from sterna.data.loader import Loader
from sterna.text.tokenizer import Tokenizer, load_tokenizer


def measure(data: DataConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """One pass over the data."""
    with Loader(data, tokenizer) as loader:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = sum(len(row.tokens) for row in loader)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        fill = loader.counts.fill
    return {
        "threads": data.prefetch,
        "tokens": tokens,
        "tokens_per_s": round(tokens / wall),
        "tokens_per_cpu_s": round(tokens / cpu),
        "fill": round(fill, 4),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("model")
    parser.add_argument("--fields", default="")
    parser.add_argument("--documents", default="file")
    parser.add_argument("--seq-len", type=int, default=1024)
    args = parser.parse_args()
    fields = dict(pair.split("=", 1) for pair in args.fields.split(",") if pair)
    source = {"path": args.file, "fields": fields, "documents": args.documents}
    tokenizer = load_tokenizer(args.model)
    for threads in (0, 2):
        settings = {"seq_len": args.seq_len, "prefetch": threads, "too_long": "split"}
        data = DataConfig.model_validate({"sources": [source], **settings})
        print(json.dumps({"machine": asdict(fingerprint()), **measure(data, tokenizer)}))


if __name__ == "__main__":
    main()
