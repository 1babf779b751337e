"""What a task's run leaves for people: the model card, the curve, the log."""

import json
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from .provenance import machine, versions
from .run_report import write_log


CARD = Template("""---
library_name: transformers
pipeline_tag: $pipeline_tag
tags:
- reformer
- lsh-attention
- long-context
model-index:
- name: $name_quoted
  results:
  - task:
      type: $pipeline_tag
    dataset:
      type: text
      name: $source_quoted
    metrics:
$metrics
---

# $name

A Reformer ([Kitaev, Kaiser, Levskaya, ICLR 2020](https://arxiv.org/abs/2001.04451)) that $objective.
It was trained with `hf_reformer`, a package that plugs the Reformer into Hugging Face Transformers.

| | |
|---|---|
| class | `$model_class` |
| parameters | $parameters |
| attention, layer by layer | $layers |
| tokens read of a text | $context_length; $longer |
| tokenizer | `$tokenizer_class`, $vocab_size entries |
| weights before training | $start |
$labels
## How to use it

```python
import hf_reformer
$usage
```

`import hf_reformer` comes first: it registers the classes that this folder names.

## How good it is

$figures

$measured_on
$pictures
## What it was trained on

Text: $source. $split.

- Training: $train.
- Held out: $held_out.
$test
## How it was trained

$steps steps of $rows_per_step texts with `transformers.Trainer`: $optimizer. Seed $seed. $time
Versions: $versions. Machine: $machine. `training_log.json` holds every argument and every logged figure.

## What to expect, and what not

- It knows texts like those it was trained on. What it makes of others was not measured.
- Figures of one seed and one split: another seed may differ by more than two neighbours in the table do.
""")


def write_card(path: Path, facts: dict[str, Any], figures: dict[str, dict[str, float]]) -> None:
    """
    Write the model card.

    Args:
        path: Where it goes.
        facts: A value for every placeholder but those that follow from the figures and this machine.
        figures: Those of `this model` first, then of baselines, each with the same names.
    """
    own = figures["this model"]
    metrics = "\n".join(
        f'    - type: {METRIC_TYPES.get(name, name)}\n      name: "{name.replace("_", " ")}"\n      value: {value:.4f}'
        for name, value in own.items()
    )
    place = machine()
    path.write_text(
        CARD.substitute(
            facts,
            name_quoted=json.dumps(facts["name"]),
            source_quoted=json.dumps(facts["source"]),
            metrics=metrics,
            figures=figures_table(figures),
            versions=", ".join(f"{name} {version}" for name, version in versions().items()),
            machine=f"{place['processor']}, {place['threads']} threads of {place['cores']} cores",
        ),
        encoding="utf-8",
    )


METRIC_TYPES = {"macro_f1": "f1", "exact": "exact_match"}


def is_better_low(figure: str) -> bool:
    """Whether less of a figure is better; others are shares of what is right."""
    return figure.startswith("bits")


def figures_table(figures: dict[str, dict[str, float]]) -> str:
    """A table of markdown, a row for each name; the best of each figure is bold, and one that is not there a dash."""
    names = list(next(iter(figures.values())))
    rows = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", f"|---|{'---|' * len(names)}"]
    best = {
        figure: (min if is_better_low(figure) else max)(
            values[figure] for values in figures.values() if figure in values
        )
        for figure in names
    }
    for name, values in figures.items():
        shown = {figure: f"{values[figure]:.3f}" if figure in values else "-" for figure in names}
        cells = [f"**{cell}**" if values.get(figure) == best[figure] else cell for figure, cell in shown.items()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def write_task_curve(
    path: Path, log_history: list[dict[str, float]], metric: str, baselines: dict[str, float], last: float
) -> None:
    """Draw the loss, and the held-out metric beside that of each baseline, against steps."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, metrics = figure.subplots(1, 2)
    for name, label in (("loss", "training"), ("eval_loss", "held-out")):
        points = [(row["step"], row[name]) for row in log_history if name in row]
        if points:
            losses.plot(
                *zip(*points, strict=True), label=label, marker="o" if name == "eval_loss" else None, markersize=3
            )
    losses.set(xlabel="steps", ylabel="loss, nats")
    if losses.lines:
        losses.legend()
    points = [(row["step"], row[f"eval_{metric}"]) for row in log_history if f"eval_{metric}" in row]
    if points:
        metrics.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"this model, {last:.3f} at the end")
    for number, (name, value) in enumerate(baselines.items()):
        metrics.axhline(value, color="gray", linestyle=("--", ":")[number % 2], label=f"{name}, {value:.3f}")
    metrics.set(xlabel="steps", ylabel=f"held-out {metric.replace('_', ' ')}")
    if is_better_low(metric):
        metrics.set_ylim(bottom=0)
    else:
        metrics.set_ylim(0, 1.02)
    if metrics.lines:
        metrics.legend(fontsize=7, loc="upper right" if is_better_low(metric) else "lower right")
    for axes in (losses, metrics):
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def write_task_log(path: Path, trainer: Any, figures: dict[str, dict[str, float]], **entries: Any) -> None:
    """Write what was asked for, measured and logged, as JSON."""
    write_log(
        path,
        run=trainer.run,
        figures=figures,
        training_arguments=trainer.args.to_sanitized_dict(),
        config=trainer.model.config.to_diff_dict(),
        log_history=trainer.state.log_history,
        machine=machine(),
        **entries,
    )
