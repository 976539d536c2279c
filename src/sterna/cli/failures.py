"""How a command ends when it cannot go on: one clear line on stderr and a telling exit code.

0 done, 1 some of the work failed, 2 usage or settings, 3-8 the codes of `core.errors`,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts import CycloptsError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def say_error(message: str) -> None:
    """One line on stderr; line breaks inside the message are folded.

    Under torchrun every rank has its own, and ranks but the first say who they are.
    """
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    rank = os.environ.get("RANK", "0")
    who = "sterna" if rank == "0" else f"sterna: rank {rank}"
    print(f"{who}: error: {line}", file=sys.stderr)


def describe_usage_error(error: CycloptsError) -> str:
    """What was given, what is allowed, what was meant, from a refused command line."""
    cause = error.__cause__
    if cause is not None and hasattr(cause, "errors"):  # a pydantic ValidationError
        return describe_validation(cause)
    return str(error)


def describe_validation(error: Any) -> str:
    """The findings of a pydantic ValidationError, each as `--field: reason (given ...)`."""
    return "; ".join(_describe_finding(finding) for finding in error.errors(include_url=False))


def _describe_finding(finding: Any) -> str:
    if not finding["loc"]:  # a check over several fields, in our own words
        return str(finding["msg"]).removeprefix("Value error, ")
    name = str(finding["loc"][-1]).replace("_", "-")
    reason = finding["msg"][:1].lower() + finding["msg"][1:]
    return f"--{name}: {reason} (given {finding['input']!r})"
