"""Answers of several steps side by side, as a part of an HTML page. All text is escaped.

Without scripts all steps stand beside each other; with them a slider chooses one, and a second one
stays beside it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
.answers .bar { position: sticky; top: 0; background: var(--page); padding: .6rem 0; z-index: 1;
  display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; align-items: center;
  border-bottom: 1px solid var(--line); }
.answers .bar input[type=range] { width: min(22rem, 60vw); vertical-align: middle; }
.answers output { display: inline-block; min-width: 3.5em; font-variant-numeric: tabular-nums; }
.answers article { margin: 1.2rem 0; }
.answers .row { display: flex; gap: .8rem; overflow-x: auto; padding-bottom: .3rem; }
.answers .cell { flex: 1 0 min(20rem, 85vw); border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem .7rem; }
.answers .cell[hidden] { display: none; }
.answers .prompt { border-left: 3px solid var(--line); padding-left: .7rem; margin: .4rem 0; }
"""

_SCRIPT = """
for (const part of document.querySelectorAll('.answers')) {
  const bar = part.querySelector('.bar');
  const [range, all] = bar.querySelectorAll('input');
  const beside = bar.querySelector('select'), shown = bar.querySelector('output');
  const steps = [...beside.options].map(option => option.value);
  const show = () => {
    shown.textContent = steps[range.value];
    for (const cell of part.querySelectorAll('.cell')) {
      const step = cell.dataset.step;
      cell.hidden = !all.checked && step !== steps[range.value] && step !== beside.value;
    }
    range.disabled = beside.disabled = all.checked;
  };
  bar.hidden = false;
  for (const input of [range, all, beside]) input.addEventListener('input', show);
  show();
}
"""


def answers_part(lines: Sequence[Mapping[str, Any]]) -> str:
    """HTML of the lines of answers.jsonl; empty for none."""
    if not lines:
        return ""
    steps = list(dict.fromkeys(int(line["step"]) for line in lines))
    by_prompt: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], {})[int(line["step"])] = line
    articles = "".join(_article(prompt, found) for prompt, found in by_prompt.items())
    return (
        f'<style>{_STYLE}</style><section class="answers">{_bar(steps)}{articles}</section>'
        f"<script>{_SCRIPT}</script>"
    )


def _bar(steps: Sequence[int]) -> str:
    options = "".join(f'<option value="{step}">{step}</option>' for step in steps)
    last = len(steps) - 1
    return (
        '<div class="bar" hidden>'
        f'<label>Step <input type="range" min="0" max="{last}" value="{last}"> '
        f"<output>{steps[-1]}</output></label>"
        f"<label>beside step <select>{options}</select></label>"
        '<label><input type="checkbox"> all steps</label></div>'
    )


def _article(prompt: str, found: Mapping[int, Mapping[str, Any]]) -> str:
    cells, before = "", None
    for step, line in found.items():
        cells += _cell(step, line, before)
        before = line["answer"]
    return (
        f'<article><pre class="prompt">{html.escape(prompt)}</pre>'
        f'<div class="row">{cells}</div></article>'
    )


def _cell(step: int, line: Mapping[str, Any], before: str | None) -> str:
    facts = [f"step {step}", f"{line['tokens']} tokens"]
    facts += ["ended by length"] if line["truncated"] else []
    facts += [f"reward {line['reward']:.3f}"] if line.get("reward") is not None else []
    facts += ["unchanged"] if line["answer"] == before else []
    return (
        f'<div class="cell" data-step="{step}"><div class="dim">{html.escape(", ".join(facts))}'
        f"</div><pre>{html.escape(line['answer'])}</pre></div>"
    )
