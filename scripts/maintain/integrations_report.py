"""docs/integrations.md, from the results of check_integrations.py."""

from pathlib import Path
from typing import Any


CONTROL, OURS = "control", "reformer"
WORKS, REFUSED, FAILS, NOT_RUN = "works", "refused", "**fails**", "not run"
OF_THE_TOOL = "the control fails too"
SOURCES = ("check", "examples", "hf_reformer")
LONGEST_REMARK = 320

HEADER = """# In other people's tools

What `make integrations` saw: each check runs a tool on a tiny random Reformer and on a control of the same size, a
Llama or a BERT, on a CPU, offline. A check is more than a run to the end: losses are compared with the model's own,
gradients with plain autograd's, saved and merged models with what they were made of. This page is written by
`scripts/maintain/check_integrations.py`, which describes itself; `integrations/` beside it has a module for each tool,
[integrations.json](integrations.json) all figures, those of the control in brackets below.

"""
IMPOSSIBLE = """
## What stays impossible

Each is refused with the reason, before anything is computed; the rows above marked "refused" hold what is said.

- **A static, quantised or offloaded cache of transformers, continuous batching, vLLM's transformers backend.** They
  store keys and values of full or sliding attention, in the order of the text, and attend by a function of their
  own. A Reformer needs queries, values and the order of buckets, and has a cache of its own, which grows as needed.
- **FlexAttention, FlashAttention and other registered attention functions** in LSH and local layers.
  `attn_implementation` takes "eager", "sdpa" and "triton"; the last are kernels of this package.
- **Adapters that are keys and values** (PEFT's prefix tuning, cartridges). Keys are the queries here, and there is no
  place for a key without one. Prompt tuning and P-tuning put vectors before the text instead, and work.
- **Generating from packed rows**: a cache holds one text for each row. Training on them works.

With tied embeddings (`combine_streams="mean"`) PEFT's `trainable_token_indices` leave out the head's bias, in every
model whose tied head has one, and adapters on the words alone cannot be merged: the head is the same matrix.

Not tried: PEFT's adaption prompt (made for named models), Poly and X-LoRA (several adapters at a time) and Shadow
(around whole blocks of one stream).
"""


def status_of(result: dict[str, Any] | None) -> str:
    """One word on a result."""
    if result is None:
        return NOT_RUN
    if result.get("ok"):
        return WORKS
    return REFUSED if "refused" in result else FAILS


def failures_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """The checks that fail for the Reformer though the control passes."""
    return [
        name
        for name, row in results.items()
        if status_of(row.get(OURS)) == FAILS and status_of(row.get(CONTROL)) != FAILS
    ]


def write_report(path: Path, results: dict[str, dict[str, Any]]) -> list[str]:
    """Write the page; return the checks that fail for the Reformer alone."""
    lines = [HEADER + versions_line(results)]
    for tool in dict.fromkeys(name.partition(": ")[0] for name in results):
        rows = {name.partition(": ")[2]: row for name, row in results.items() if name.partition(": ")[0] == tool}
        lines += ["", f"## {tool}", "", "| check | Reformer | control | |", "|---|---|---|---|"]
        lines += [row_line(name, row) for name, row in rows.items()]
    path.write_text("\n".join(lines) + "\n" + IMPOSSIBLE, encoding="utf-8")
    return failures_of(results)


def versions_line(results: dict[str, dict[str, Any]]) -> str:
    """The versions that the results were made with; several of one tool where they were made at several times."""
    versions: dict[str, set[str]] = {}
    for row in results.values():
        for result in row.values():
            for name, number in result["key"].items():
                if name not in SOURCES:
                    versions.setdefault(name, set()).add(number)
    return "Versions: " + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()) + "."


def row_line(name: str, row: dict[str, dict[str, Any]]) -> str:
    """A line of a tool's table."""
    ours, control = row.get(OURS), row.get(CONTROL)
    word = OF_THE_TOOL if status_of(ours) == status_of(control) == FAILS else status_of(ours)
    return f"| {name} | {word} | {status_of(control).strip('*')} | {remark(ours, control)} |"


def remark(ours: dict[str, Any] | None, control: dict[str, Any] | None) -> str:
    """What a reader wants beside the word: the figures of both, what was said, or the error."""
    if ours is None:
        return ""
    if not ours.get("ok"):
        return one_line(ours.get("refused") or ours["error"])
    figures = (control or {}).get("figures", {})
    parts = []
    for name, value in ours["figures"].items():
        beside = f" ({shown(figures[name])})" if name in figures else ""
        parts.append(f"{name} {shown(value)}{beside}")
    return one_line("; ".join(parts))


def shown(value: Any) -> str:
    """A figure with the digits that matter."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def one_line(text: str) -> str:
    """Text that fits a cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= LONGEST_REMARK else text[: LONGEST_REMARK - 1] + "…"
