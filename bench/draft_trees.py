"""What a tree of drafts would give over linear drafts: suffix drafts played back on stored texts.

    python bench/draft_trees.py make OUT.json [--questions mt_bench.jsonl] [--tokens 160]
    python bench/draft_trees.py play OUT.json [--cost 1:2.1,2:2.1,8:3.6,16:5.6,32:9.8]

`make` writes what the model answers to the prompts of bench/speculate.py, as tokens. `play` drafts
along those texts, past outputs of the same task included, as the engine would at batch 1, twice:

    rows N      every step has N draft rows, for both: tokens a step
    own rows    each step takes as many rows as promise most tokens a second at --cost
                (milliseconds by rows), with corrected probabilities (trust.py): tokens a second

A tree of N rows holds the N likeliest continuations (`draft_tree`); its rows are taken to cost no
more than those of a linear draft, which flatters it: branches need a mask or copied blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from drafters import Playback, State
from speculate_prompts import all_tasks
from speculate_run import PLAIN, Variants
from sterna.engine.build import build_engine
from sterna.engine.config import EngineConfig
from sterna.engine.draft_rows import MIN_GAIN
from sterna.engine.drafters.suffix import SuffixDrafter
from sterna.engine.stepcost import CostPoint, StepCost
from sterna.engine.trust import Trust
from sterna.text.chat import ChatRenderer

SOURCE = "suffix"
MIN_PROB, MOST = 0.03, 32
console = Console()


class Nodes(NamedTuple):
    """Draft rows. `probs` are conditional; a node's parent lies before it, -1 is the last token."""

    tokens: list[int]
    parents: list[int]
    probs: list[float]


class TreeDrafter(SuffixDrafter):
    """The suffix drafter, asked for nodes."""

    def nodes(self, seq: Playback, limit: int, is_tree: bool) -> Nodes:
        """At most `limit` rows: the likeliest ones as a tree, or one path."""
        track = self._track_of(seq)  # type: ignore[arg-type]
        context, best, score = self._context(seq), Nodes([], [], []), 0.0  # type: ignore[arg-type]
        places = [(track.own.tree, track.own.root)]
        if self._past is not None:
            places.append((self._past.tree, self._past.roots[track.tenant]))
        for tree, root in places:
            if is_tree:
                tokens, parents, probs, value, _ = tree.draft_tree(root, context, limit, MIN_PROB)
            else:
                tokens, probs, value, _ = tree.draft(root, context, limit, MIN_PROB)
                parents = list(range(-1, len(tokens) - 1))
            if value > score:
                best, score = Nodes(tokens, parents, probs), value
        return best


class Score:
    """Sums of one way to draft."""

    def __init__(self) -> None:
        self.tokens = self.steps = self.rows = 0
        self.ms = 0.0


def make(args: argparse.Namespace) -> None:
    """Answers of the default model, by task: [{"prompt": ids, "completion": ids}]."""
    engine = build_engine("", EngineConfig(speculation="suffix"))
    renderer, variants = ChatRenderer(engine.tokenizer), Variants(engine, {})
    found = {}
    for name, chats in all_tasks(args.questions).items():
        if name == "loop":
            continue
        prompts = [engine.tokenizer.encode(renderer.render(chat), False) for chat in chats]
        variants.use(PLAIN)
        _, outputs = variants.run(chats, 8, args.tokens, 0.0)
        found[name] = [
            {"prompt": prompt, "completion": outputs[f"{i}.{i // 8 * 8}"]}
            for i, prompt in enumerate(prompts)
        ]
    args.file.write_text(json.dumps(found))


def play(args: argparse.Namespace) -> None:
    """Print both ways side by side."""
    points = [part.split(":") for part in args.cost.split(",")]
    cost = StepCost([CostPoint(int(n), float(ms)) for n, ms in points])
    table = Table("task", "rows", "linear", "tree", "gain", "linear rows", "tree rows")
    found = []
    for name, records in track(json.loads(args.file.read_text()).items(), console=console):
        for rows in (3, 7, 15, 31, 0):
            pick = (lambda nodes, reach, n=rows: n) if rows else _best_of(cost)
            linear, tree = (_play(records, rows or MOST, is_tree, pick, cost) for is_tree in (0, 1))
            a, b = (s.tokens / s.steps if rows else 1e3 * s.tokens / s.ms for s in (linear, tree))
            table.add_row(
                name, str(rows or "own"), f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.1%}",
                f"{linear.rows / linear.steps:.1f}", f"{tree.rows / tree.steps:.1f}",
            )  # fmt: skip
            found.append({
                "task": name, "rows": rows or "own", "linear": a, "tree": b, "gain": b / a - 1,
                "linear_rows": linear.rows / linear.steps, "tree_rows": tree.rows / tree.steps,
            })  # fmt: skip
    console.print(table)
    if args.into:
        data = {"model": "SmolLM2-135M", "cost_ms": args.cost, "rows": found}
        args.into.write_text(json.dumps(data, indent=1) + "\n")


Pick = Callable[[Nodes, list[float]], int]


def _best_of(cost: StepCost) -> Pick:
    """How many rows promise most tokens a second."""

    def pick(nodes: Nodes, reach: list[float]) -> int:
        best, count, tokens = MIN_GAIN / cost.seconds(1, 0), 0, 1.0
        for i, r in enumerate(reach):
            tokens += r
            if tokens / cost.seconds(i + 2, 0) > best:
                best, count = tokens / cost.seconds(i + 2, 0), i + 1
        return count

    return pick


def _play(
    records: list[dict[str, list[int]]], limit: int, is_tree: bool, pick: Pick, cost: StepCost
) -> Score:
    drafter, trust, score = TreeDrafter(), Trust(), Score()
    for record in records:
        text = record["completion"]
        seq = Playback(State(prompt=np.array(record["prompt"], np.int32), salt=""))
        at = 0
        while at < len(text):
            room = min(limit, MOST, max(len(text) - at - 1, 0))
            nodes = drafter.nodes(seq, room, is_tree) if room else Nodes([], [], [])
            nodes, reach = _likeliest(nodes, trust, seq)
            num = min(pick(nodes, reach), len(nodes.tokens))
            count = 1 + _accept(nodes, num, text[at:], trust, seq)
            if not num:
                trust.fade(seq)
            score.steps += 1
            score.rows += num
            score.ms += cost.seconds(1 + num, 0)
            new = text[at : at + count]
            seq.output.extend(new)
            at += count
        drafter.finish(seq)  # type: ignore[arg-type]
        score.tokens += len(text)
    return score


def _likeliest(nodes: Nodes, trust: Trust, seq: Playback) -> tuple[Nodes, list[float]]:
    """Nodes by the corrected probability of being reached, parents first."""
    reach: list[float] = []
    for parent, prob in zip(nodes.parents, nodes.probs, strict=True):
        above = reach[parent] if parent >= 0 else 1.0
        reach.append(above * trust.reach(seq, SOURCE, [prob])[0])
    order = sorted(range(len(reach)), key=lambda i: (-reach[i], i))
    place = {old: new for new, old in enumerate(order)} | {-1: -1}
    tokens, parents, probs = nodes
    moved = Nodes(
        [tokens[i] for i in order], [place[parents[i]] for i in order], [probs[i] for i in order]
    )
    return moved, [reach[i] for i in order]


def _accept(nodes: Nodes, num: int, truth: list[int], trust: Trust, seq: Playback) -> int:
    """Tokens accepted of the first `num` nodes; what is verified corrects later estimates."""
    at, count = -1, 0
    while count < len(truth):
        tried = [i for i in range(num) if nodes.parents[i] == at]
        hit = next((i for i in tried if nodes.tokens[i] == truth[count]), None)
        for i in tried:
            trust.note(seq, SOURCE, [nodes.probs[i]], [i == hit])
        if hit is None:
            break
        at, count = hit, count + 1
    return min(count, len(truth) - 1)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    verbs = parser.add_subparsers(required=True)
    makes = verbs.add_parser("make")
    makes.add_argument("--questions", type=Path, default=None)
    makes.add_argument("--tokens", type=int, default=160)
    makes.set_defaults(run=make)
    plays = verbs.add_parser("play")
    plays.add_argument("--cost", default="1:2.1,2:2.1,3:2.6,4:2.8,8:3.6,16:5.6,32:9.8")
    plays.add_argument("--into", type=Path, default=None, help="store the table as JSON")
    plays.set_defaults(run=play)
    for verb in (makes, plays):
        verb.add_argument("file", type=Path)
    args: SimpleNamespace = parser.parse_args(namespace=SimpleNamespace())
    args.run(args)


if __name__ == "__main__":
    main()
