"""Prompts of bench/speculate.py: six kinds of work, on texts that are on every machine.

Code comes from Python's standard library, prose from this repository's docs; the chat questions are
short ones of our own unless a file of MT-Bench questions is given.
"""

from __future__ import annotations

import heapq
import inspect
import json
import shlex
import statistics
import string
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Chat = list[dict[str, str]]

QUESTIONS = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain how a bicycle stays upright.",
    "Give three tips for learning a new language and say why each works.",
    "Describe the water cycle to a ten year old.",
    "Compare tea and coffee in two paragraphs.",
    "What are the main causes of the French Revolution?",
    "Write an e-mail that asks a landlord to repair a window.",
    "Plan a three day trip to Lisbon.",
)
FUNCTIONS = (
    textwrap.dedent, heapq.merge, textwrap.TextWrapper._split_chunks, statistics.quantiles,
    shlex.join, statistics.linear_regression, string.capwords, heapq.nsmallest,
)  # fmt: skip
PEOPLE = (
    ("Ada Byron", 36, "London", "analyst"), ("Emil Novak", 52, "Prague", "glazier"),
    ("Mia Torres", 29, "Quito", "botanist"), ("Jon Aho", 41, "Turku", "pilot"),
    ("Leila Amari", 33, "Tunis", "surgeon"), ("Ravi Menon", 47, "Kochi", "architect"),
    ("Nora Lund", 25, "Bergen", "diver"), ("Paul Okoro", 38, "Lagos", "printer"),
)  # fmt: skip


def edits() -> list[Chat]:
    """A function and a small change to make in it."""
    return [
        _user(
            "Here is a Python function:\n\n```python\n"
            + "".join(inspect.getsource(function))[:1600]
            + "\n```\n\nWrite the whole function again and add the parameter `verbose=False` at "
            "the end of its parameters. Change nothing else."
        )
        for function in FUNCTIONS
    ]


def rag() -> list[Chat]:
    """A question whose answer is to be quoted from its context."""
    text = (ROOT / "docs" / "tour.md").read_text() + (ROOT / "docs" / "quantised.md").read_text()
    parts = [part for part in text.split("\n\n") if len(part) > 250][:8]
    return [
        _user(
            f"Context:\n{part[:1500]}\n\nQuestion: what does the context say about "
            f"{' '.join(part.split()[4:8])}? Answer with its sentences, word for word."
        )
        for part in parts
    ]


def agents() -> list[Chat]:
    """The fourth turn of a loop whose tool output comes again with one line changed."""
    found = []
    for i in range(8):
        files = [
            f"src/app/module_{i}{j}.py | {10 + j} lines | owner team-{j % 3}" for j in range(8)
        ]
        chat: Chat = [{"role": "system", "content": "You report the tool's output as it is."}]
        for turn in range(4):
            files[turn] = files[turn].replace("lines", "lines changed")
            chat.append({"role": "user", "content": "TOOL OUTPUT:\n" + "\n".join(files)})
            chat.append({"role": "assistant", "content": "The files are:\n" + "\n".join(files)})
        found.append(chat[:-1])
    return found


def loops() -> list[Chat]:
    """The same loops without the answers: the model gives them."""
    return [[message for message in chat if message["role"] != "assistant"] for chat in agents()]


def chats(questions: Path | None) -> list[Chat]:
    """First turns of MT-Bench, or our own."""
    if questions is None:
        return [_user(question) for question in QUESTIONS]
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    return [_user(record["turns"][0]) for record in records[::10]][:8]


def extractions() -> list[Chat]:
    """Facts to be written as JSON."""
    return [
        _user(
            f"{name}, aged {age}, lives in {city} and works as a {work}. {name} moved to {city} "
            f"{age % 9 + 2} years ago.\n\nWrite the facts as JSON with the keys name, age, city, "
            'job and years. Example: {"name": "Tom Hale", "age": 44, "city": "York", '
            '"job": "baker", "years": 3}'
        )
        for name, age, city, work in PEOPLE
    ]


def all_tasks(questions: Path | None) -> dict[str, list[Chat]]:
    """Conversations by kind of work."""
    return {
        "edit": edits(),
        "agent": agents(),
        "loop": loops(),
        "rag": rag(),
        "json": extractions(),
        "chat": chats(questions),
    }


def _user(text: str) -> Chat:
    return [{"role": "user", "content": text}]
