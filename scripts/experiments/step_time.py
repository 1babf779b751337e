"""From which length on LSH attention is faster than a `full_attention_threshold` above it: the time of a step."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn

from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention
from hf_reformer.training.provenance import machine, versions

from ..bench.benchmark import crossover, take_gradients
from ..bench.contenders import Shape, make_ids, training_step
from ..bench.timing import statistics_of
from .resumable import write_json
from .synthetic import markdown
from .text_models import CONTENDERS, VOCABULARY


LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
OURS = ("lsh, successors", "lsh, successors, 2 rounds", "lsh, successors, 4 rounds")
# The same layers with the threshold at the length, and layers with separate queries and keys.
DENSE = ("dense, shared, successors", "full")
PASSES = {"layer": "attention of one layer", "step": "the model"}
# Measured calls of each, and the seconds after which there are no more.
REPEATS, BUDGET = 7, 60.0


def layer_call(model: nn.Module, length: int) -> Callable[[], None]:
    """Forward and backward of the model's second layer without its feed-forward: norm, attention, projection."""
    attention = model.reformer.encoder.layers[1].attention
    shape = 1, length, model.config.hidden_size
    hidden_states, gradient = (torch.randn(shape, generator=torch.Generator().manual_seed(place)) for place in (0, 1))

    def call():
        rotations = None
        if isinstance(attention.self_attention, LSHSelfAttention):
            rotations = attention.self_attention.draw_rotations(length, None, None, hidden_states.device)
        attention(hidden_states.detach().requires_grad_(), rotations=rotations)[0].backward(gradient)
        take_gradients(attention)

    return call


def step_call(model: nn.Module, length: int) -> Callable[[], None]:
    """Forward and backward of the language model, without the optimizer."""
    shape = Shape(length, vocab_size=VOCABULARY)
    ids = make_ids(shape)
    return lambda: training_step(model, ids, shape)


def time_in_turn(calls: dict[str, Callable[[], None]]) -> dict[str, dict]:
    """CPU seconds of each call, after one that does not count; they take turns."""
    samples = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(REPEATS):
        for name, call in calls.items():
            if sum(samples[name]) < BUDGET:
                begun = time.process_time()
                call()
                samples[name].append(time.process_time() - begun)
    return {name: statistics_of(seconds) for name, seconds in samples.items()}


def measure(length: int) -> dict:
    """Times of all contenders at one length."""
    models = {}
    for name in (*OURS, *DENSE):
        torch.manual_seed(0)
        models[name] = CONTENDERS[name](length).train()
    return {
        "length": length,
        **{
            key: time_in_turn({name: make_call(model, length) for name, model in models.items()})
            for key, make_call in (("layer", layer_call), ("step", step_call))
        },
        "machine": machine(),
        "versions": versions(),
    }


def run(lengths: list[int], folder: Path) -> None:
    """A file for each length; those that are there are not measured again."""
    for length in lengths:
        path = folder / f"{length}.json"
        if not path.is_file():
            write_json(path, measure(length))


def read(folder: Path) -> list[dict]:
    """What was measured, the shortest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda record: record["length"])


def crossovers(records: list[dict]) -> list[str]:
    """A sentence for each pass, each of ours and each dense one."""
    sentences = []
    for key, words in PASSES.items():
        curves = {
            name: {record["length"]: record[key][name]["median_s"] for record in records} for name in (*OURS, *DENSE)
        }
        sentences += [
            f"{words}, {ours} faster than {dense}: {crossover(curves[ours], curves[dense])['in_words']}"
            for ours in OURS
            for dense in DENSE
        ]
    return sentences


def report(folder: Path, figure_path: Path) -> None:
    """Print the tables, in CPU milliseconds, medians, and draw the figure; nothing if nothing was measured."""
    records = read(folder)
    if not records:
        return
    for key, words in PASSES.items():
        rows = [[f"{words}, CPU ms", *(f"{record['length']:,}" for record in records)]]
        for name in (*OURS, *DENSE):
            rows.append([name, *(f"{1000 * record[key][name]['median_s']:.3g}" for record in records)])
        print(f"\n{markdown(*rows)}")
    print("\n" + "\n".join(f"- {sentence}" for sentence in crossovers(records)))
    figure, panels = plt.subplots(1, len(PASSES), figsize=(11, 4.6), layout="constrained")
    for axes, (key, words) in zip(panels, PASSES.items(), strict=True):
        lengths = [record["length"] for record in records]
        for name in (*OURS, *DENSE):
            seconds = [record[key][name]["median_s"] for record in records]
            axes.plot(lengths, seconds, "--" if name in DENSE else "-", marker="o", label=name)
        axes.set(title=words, xlabel="tokens", ylabel="CPU seconds, median", xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.2)
    panels[0].legend(fontsize=8)
    figure.savefig(figure_path, dpi=150)
    plt.close(figure)
