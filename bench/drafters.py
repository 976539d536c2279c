"""Drafters without a model: microseconds a token, and tokens a step on stored texts.

    python bench/drafters.py cost [--tokens 20000]
    python bench/drafters.py accept FILE... [--draft 16] [--drafters suffix,ngram]

`accept` plays the text back as if a model wrote it greedily: a draft is accepted as far as the text
goes on as drafted, then one token more is committed, as in the engine. A .jsonl file has records
{"prompt": ..., "completion": ...}; of any other file the first half is the prompt. "Brier" is
the mean squared error of the announced probabilities, over verified tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sterna.engine.drafters import tree as tree_module
from sterna.engine.drafters.base import Drafter
from sterna.engine.drafters.ngram import NgramDrafter
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.engine.drafters.tree import new_tree
from sterna.model.hub import resolve_model
from sterna.text.tokenizer import load_tokenizer

COLUMNS = ("file", "drafter", "tokens", "tokens/step", "drafted", "accepted", "Brier", "us/token")
Encode = Callable[[str, bool], list[int]]
MAKERS: dict[str, Callable[[], Drafter]] = {
    "suffix": SuffixDrafter,
    "suffix-own": lambda: SuffixDrafter(max_bytes=0),
    "ngram": NgramDrafter,
    "ngram-3-5": lambda: NgramDrafter(3, 5),
}


@dataclass(eq=False)
class Playback:
    """What drafters read of an engine's Sequence."""

    state: SimpleNamespace
    output: list[int] = field(default_factory=list)


class State(SimpleNamespace):
    """Hashable by identity, as a RequestState is."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass
class Score:
    """Sums over one drafter's playback."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    expected: float = 0.0
    brier: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: list[int], probs: list[float], truth: list[int]) -> int:
        """Take one step; returns how many tokens it commits."""
        hits = [a == b for a, b in zip(tokens, truth, strict=False)]
        num_accepted = hits.index(False) if False in hits else len(hits)
        for prob, is_hit in zip(probs, hits[: num_accepted + 1], strict=False):
            self.verified += 1
            self.expected += prob
            self.brier += (prob - is_hit) ** 2
        self.steps += 1
        self.drafted += len(tokens)
        self.accepted += num_accepted
        return min(num_accepted + 1, len(truth))


def play(drafter: Drafter, prompt: list[int], text: list[int], limit: int, score: Score) -> None:
    """Let one request be drafted and verified against its text."""
    seq = Playback(State(prompt=np.array(prompt, np.int32), salt=""))
    started = time.perf_counter()
    at = 0
    while at < len(text):
        (draft,) = drafter.propose([seq], [min(limit, len(text) - at - 1)])
        tokens, probs = (draft.tokens, draft.probs) if draft else ([], [])
        count = score.add(tokens, probs, text[at : at + limit + 1])
        new = text[at : at + count]
        seq.output.extend(new)
        at += count
    drafter.finish(seq)
    score.seconds += time.perf_counter() - started
    score.tokens += len(text)


def records(path: Path, encode: Encode) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, completion) in tokens."""
    if path.suffix != ".jsonl":
        ids = encode(path.read_text(errors="replace"), False)
        yield ids[: len(ids) // 2], ids[len(ids) // 2 :]
        return
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield encode(row["prompt"], False), encode(row["completion"], False)


def accept(args: argparse.Namespace) -> None:
    """Print tokens a step by file and drafter."""
    encode = load_tokenizer(resolve_model(args.model)).encode
    table = Table(*COLUMNS)
    for path in track(args.files, "playing back", console=Console(stderr=True)):
        pairs = list(records(path, encode))
        for name in args.drafters.split(","):
            drafter, score = MAKERS[name](), Score()
            for prompt, text in pairs:
                play(drafter, prompt, text, args.draft, score)
            table.add_row(
                path.name,
                name,
                f"{score.tokens:,}",
                f"{score.tokens / max(1, score.steps):.2f}",
                f"{score.drafted:,}",
                f"{score.accepted / max(1, score.drafted):.0%}",
                f"{score.brier / max(1, score.verified):.3f}",
                f"{1e6 * score.seconds / max(1, score.tokens + sum(len(p) for p, _ in pairs)):.1f}",
            )
    Console().print(table)


def texts(kind: str, count: int) -> list[int]:
    """Tokens of a stream: `new` never repeats, `mixed` repeats phrases, `loop` only repeats."""
    draw = random.Random(1)
    if kind == "new":
        return [draw.randrange(49_000) for _ in range(count)]
    phrases = [[draw.randrange(49_000) for _ in range(draw.randrange(3, 60))] for _ in range(200)]
    found: list[int] = []
    while len(found) < count:
        found += draw.choice(phrases)
        if kind == "mixed":
            found += [draw.randrange(49_000) for _ in range(draw.randrange(20))]
    return found[:count]


def cost(args: argparse.Namespace) -> None:
    """Print what the tree's operations take a token, and its memory."""
    console = Console()
    table = Table("text", "tokens", "extend", "draft", "remove", "bytes/token", "nodes/token")
    for kind in ("new", "mixed", "loop"):
        stream, tree = texts(kind, args.tokens), new_tree(64)
        root = tree.add_root()
        half = tree.add(root)
        tree.extend(half, np.array(stream[: args.tokens // 2], np.int32))
        seq = tree.add(root)
        extend_s = draft_s = 0.0
        for at in range(args.tokens // 2, args.tokens):
            t0 = time.perf_counter()
            tree.extend(seq, stream[at : at + 1])
            t1 = time.perf_counter()
            tree.draft(root, stream[at - 31 : at + 1], 16, 0.1)
            draft_s += time.perf_counter() - t1
            extend_s += t1 - t0
        size, nodes = tree.num_bytes, tree.num_nodes
        t0 = time.perf_counter()
        tree.remove(half)
        remove_s = time.perf_counter() - t0
        num = args.tokens // 2
        times = [f"{1e6 * s / num:.2f} us" for s in (extend_s, draft_s, remove_s)]
        table.add_row(
            kind,
            f"{args.tokens:,}",
            *times,
            f"{size / args.tokens:.0f}",
            f"{nodes / args.tokens:.2f}",
        )
    console.print(type(new_tree(64)).__module__, f"escape {tree_module.ESCAPE}")
    console.print(table)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    costs = verbs.add_parser("cost")
    costs.add_argument("--tokens", type=int, default=200_000)
    costs.set_defaults(run=cost)
    accepts = verbs.add_parser("accept")
    accepts.add_argument("files", type=Path, nargs="+")
    accepts.add_argument("--draft", type=int, default=16)
    accepts.add_argument("--drafters", default="suffix,suffix-own,ngram,ngram-3-5")
    accepts.add_argument("--model", default="")
    accepts.set_defaults(run=accept)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
