"""
Speed and memory of Reformer attention and of training steps, ours beside its peers, against the length of the text.

    python -m scripts.bench.benchmark # everything, 1K to 64K tokens; hours
    python -m scripts.bench.benchmark --quick # 1K and 2K tokens, 1 round; within 5 minutes on two cores
    python -m scripts.bench.benchmark --cases operator step --lengths 1024 4096 --rounds 4 --contenders ours-sdpa stock
    python -m scripts.bench.benchmark --device cuda --cases attention operator --dtype bf16 --rounds 1 4 8
    python -m scripts.bench.benchmark --table docs/benchmark.json # the tables of an earlier run
    python -m scripts.bench.benchmark --plot-only --out docs/benchmark.json # its plots, docs/benchmark_{step,...}.png

Cases: `attention` is an operator on vectors that are there (hashing, sorting, attention), `operator` the same with the
projections before it, `step` forward and backward of a language model without the optimizer, `prefill` reading a
prompt without gradients, `memory` the peak of a step, in a process of its own. On a GPU short calls of operators are
also replayed from a CUDA graph, without Python. Contenders take turns. First they are checked to compute the same, and
nothing is measured if ours do not. Whatever is too slow, too large or fails is named, with the reason. Nothing else
should run meanwhile.
"""

import argparse
import gc
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from transformers.utils import logging

from hf_reformer.training.provenance import machine, versions

from . import contenders
from .agreement import Agreement, check_attention, check_models
from .contenders import CONTENDERS, Shape
from .history import History, Refused
from .timing import captured, sample, statistics_of


DOCS = Path(__file__).parents[2] / "docs"
CASES = ("attention", "operator", "step", "prefill", "memory")
# Of operators on a GPU also without Python, which can take longer than the kernels: replayed from a CUDA graph.
REPLAYED = ", replayed"
OPERATOR_PASSES = ("forward", "forward+backward", f"forward{REPLAYED}", f"forward+backward{REPLAYED}")
PASSES = {case: OPERATOR_PASSES if case in CASES[:2] else (case,) for case in CASES}
PASSES["memory"] = ("allocated", "resident")
PLOTS = {"attention": ["attention"], "operator": ["operator"], "step": ["step", "prefill"], "memory": ["memory"]}
CPU_LENGTHS = [1024, 4096, 16384, 65536]
CUDA_LENGTHS = [1024 * 2**power for power in range(11)]
CUDA_SAMPLE_SECONDS = 0.02  # a sample is as many calls as take this long
LONGEST_REPLAYED_S = 0.02  # in longer calls Python makes no difference
MIB = 2**20
STARTED = time.perf_counter()


def say(*words: object) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - STARTED:6.0f} s]", *words, file=sys.stderr, flush=True)


# What is timed


def make_call(case: str, pass_name: str, name: str, shape: Shape) -> Callable[[], list[torch.Tensor]]:
    """What is to be timed; it returns the tensors that must be finite, and keeps none."""
    shape = CONTENDERS[name].own(shape)
    if case in ("step", "prefill"):
        model, ids = contenders.make_model(name, shape), contenders.make_ids(shape)
        if case == "prefill":
            model.eval()
            return lambda: [contenders.prefill(model, ids, shape)]
        return lambda: [contenders.training_step(model, ids, shape), *take_gradients(model)]
    attention = contenders.make_attention(name, shape, with_projections=case == "operator")
    hidden, gradient = (
        contenders.draw(replace(shape, rounds=1, dtype="fp32"), place)
        for place in (contenders.HIDDEN, contenders.GRADIENT)
    )

    @torch.no_grad()
    def forward():
        with shape.autocast():
            return [attention(hidden)]

    def forward_and_backward():
        entering = hidden.detach().requires_grad_()
        with shape.autocast():
            output = attention(entering)
        output.backward(gradient.to(output.dtype))
        return [output.detach(), *take_gradients(attention), *([entering.grad] if entering.grad is not None else [])]

    return forward if pass_name.removesuffix(REPLAYED) == "forward" else forward_and_backward


def take_gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of all parameters that have one, away from them."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad(set_to_none=True)
    return gradients


def warm_up(call: Callable, shape: Shape, limit: float) -> tuple[float, int]:
    """
    Seconds of a call, on a GPU of a second one, since the first compiles; and the bytes that a call took at its peak.

    Raises:
        Refused: it is too slow, or does not give numbers.
    """
    before = contenders.start_peak(shape.device)
    begun = time.perf_counter()
    tensors = call()
    seconds = time.perf_counter() - begun
    taken = contenders.read_peak(shape.device) - before
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise Refused("it gives NaN or infinity")
    del tensors
    if shape.device == "cuda":
        seconds = sample(call, shape.device)
    if seconds > limit:
        raise Refused(f"one run took {seconds:.0f} s, above the limit of {limit:g} s")
    return seconds, taken


def prepare(case: str, pass_name: str, name: str, shape: Shape, history: History) -> tuple[Callable, float, int]:
    """
    A call that has run before, its seconds, and the bytes that it took at its peak.

    Raises:
        Refused: it cannot be measured, for whatever reason.
    """
    key = (case, pass_name, name, shape.rounds)
    history.refuse(key, shape.length, CONTENDERS[name].growth, contenders.free_memory(shape.device))
    try:
        call = make_call(case, pass_name, name, shape)
        seconds, taken = warm_up(call, shape, history.limit)
        if pass_name.endswith(REPLAYED):
            if seconds > LONGEST_REPLAYED_S:
                raise Refused(f"a call takes {seconds:.2g} s, of which Python is little")
            call = captured(call)
            seconds = sample(call, shape.device)
    except Refused:
        raise
    except Exception as error:
        raise Refused(contenders.reason_of(error)) from error
    history.note(key, shape.length, seconds, taken)
    return call, seconds, taken


def competitors(case: str, names: list[str], rounds: list[int]) -> list[tuple[str, int | None]]:
    """Name and rounds of all that take part; those that do not hash take part once."""
    chosen = [name for name in names if case in CONTENDERS[name].cases]
    return [(name, count) for name in chosen for count in (rounds if CONTENDERS[name].hashes else [None])]


def time_pass(case: str, pass_name: str, pairs: list[tuple], shape: Shape, history: History, arguments) -> list[dict]:
    """An entry for each competitor at one length, all in turn."""
    entries, waiting = [], []
    for name, rounds in pairs:
        entry = {"case": case, "pass": pass_name, "contender": name, "length": shape.length, "rounds": rounds}
        entries.append(entry)
        try:
            call, seconds, taken = prepare(case, pass_name, name, replace(shape, rounds=rounds or 1), history)
        except Refused as refusal:
            entry["skipped"] = str(refusal)
            say(f"{describe(entry)}: skipped, {refusal}")
            gc.collect()
            continue
        if shape.device == "cuda":
            entry["taken_bytes"] = taken
        entry["calls_per_run"] = max(1, int(CUDA_SAMPLE_SECONDS / seconds)) if shape.device == "cuda" else 1
        waiting.append((entry, call, []))
        say(f"{describe(entry)}: warmed up, {seconds:.3g} s")
    while waiting:
        for entry, call, samples in waiting:
            samples.append(sample(call, shape.device, entry["calls_per_run"]))
            entry |= statistics_of(samples)
        more = [item for item in waiting if len(item[2]) < arguments.repeats and sum(item[2]) < arguments.budget_s]
        for entry, _, samples in waiting:
            if not any(entry is item[0] for item in more):
                say(f"{describe(entry)}: {entry['median_s']:.4g} s, median of {len(samples)}")
        waiting = more
    return entries


def describe(entry: dict) -> str:
    """Which entry it is."""
    rounds = f", rounds {entry['rounds']}" if entry["rounds"] else ""
    return f"{entry['case']}, {entry['pass']}, {entry['length']:,} tokens, {entry['contender']}{rounds}"


# Memory


def measure_memory(kind: str, pairs: list[tuple], shape: Shape, history: History, threads: int) -> list[dict]:
    """An entry for each competitor at one length, each in a process that has only loaded the libraries before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hf_reformer", "transformers.models.reformer.modeling_reformer", "transformers.models.llama.modeling_llama"]
    )
    entries = []
    for name, rounds in pairs:
        entry = {"case": "memory", "pass": kind, "contender": name, "length": shape.length, "rounds": rounds}
        entries.append(entry)
        key = ("memory", kind, name, rounds)
        try:
            history.refuse(key, shape.length, CONTENDERS[name].growth, contenders.free_memory(shape.device))
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                own_shape = replace(shape, rounds=rounds or 1)
                step = pool.submit(contenders.peak_of_step, kind, name, own_shape, threads)
                taken, seconds = step.result()
        except Refused as refusal:
            entry["skipped"] = str(refusal)
        except BrokenProcessPool:
            entry["skipped"] = "its process was killed; most likely memory ran out"
        except Exception as error:
            entry["skipped"] = contenders.reason_of(error)
        else:
            history.note(key, shape.length, seconds, taken)
            entry["peak_bytes"] = taken
        say(f"{describe(entry)}:", entry.get("skipped") or f"{taken / MIB:,.0f} MiB")
    return entries


# Ratios and crossovers


def figure_of(entry: dict) -> float | None:
    """What an entry is about, seconds or bytes; None if it was skipped."""
    return entry.get("median_s", entry.get("peak_bytes"))


def add_ratios(entries: list[dict]) -> None:
    """To each entry `ratios`: what it takes relative to the first of ours that was measured, by rounds."""
    ours = {}
    for name in (name for name, contender in CONTENDERS.items() if contender.is_reference):
        for entry in entries:
            if entry["contender"] == name and figure_of(entry):
                place = (entry["case"], entry["pass"], entry["length"])
                ours.setdefault(place, {}).setdefault(entry["rounds"], entry)
    for entry in entries:
        same = ours.get((entry["case"], entry["pass"], entry["length"]), {})
        same = {rounds: other for rounds, other in same.items() if entry["rounds"] in (None, rounds)}
        if figure_of(entry) and same:
            entry["ratios"] = {str(rounds): figure_of(entry) / figure_of(other) for rounds, other in same.items()}
            entry["ratios_to"] = {str(rounds): other["contender"] for rounds, other in same.items()}


def find_crossovers(entries: list[dict]) -> list[dict]:
    """From which length on each of ours is faster than dense attention, and than a Llama."""
    curves = {}
    for entry in entries:
        if "median_s" in entry:
            place = (entry["case"], entry["pass"], entry["contender"], entry["rounds"])
            curves.setdefault(place, {})[entry["length"]] = entry["median_s"]
    found = []
    for (case, pass_name, name, rounds), ours in curves.items():
        for (*place, other, _), dense in curves.items():
            comparable = place == [case, pass_name] and ours.keys() & dense.keys()
            if comparable and CONTENDERS[name].is_comparable and not CONTENDERS[other].hashes:
                where = {"case": case, "pass": pass_name, "contender": name, "rounds": rounds, "against": other}
                found.append(where | crossover(ours, dense))
    return found


def crossover(ours: dict[int, float], dense: dict[int, float]) -> dict:
    """The length from which on ours is faster at all lengths measured, between two of them by lines in log-log."""
    lengths = sorted(ours.keys() & dense.keys())
    gains = [math.log(dense[length] / ours[length]) for length in lengths]
    behind = max((place for place, gain in enumerate(gains) if gain <= 0), default=-1)
    facts = {"shortest": lengths[0], "longest": lengths[-1]}
    if behind == len(lengths) - 1:
        return facts | {"length": None, "in_words": f"not up to {lengths[-1]:,} tokens"}
    if behind < 0:
        return facts | {"length": lengths[0], "in_words": f"from {lengths[0]:,} tokens on, or before"}
    share = -gains[behind] / (gains[behind + 1] - gains[behind])
    length = lengths[behind] * (lengths[behind + 1] / lengths[behind]) ** share
    between = f"between {lengths[behind]:,} and {lengths[behind + 1]:,}"
    return facts | {"length": round(length), "in_words": f"from about {length:,.0f} tokens on ({between})"}


# Tables and plots


def tables(figures: dict) -> str:
    """All entries as Markdown."""
    parts, entries = [], figures["entries"]
    for case in CASES:
        for pass_name in PASSES[case]:
            chosen = [entry for entry in entries if (entry["case"], entry["pass"]) == (case, pass_name)]
            if chosen:
                title = case if case == pass_name else f"{case}, {pass_name}"
                parts.append(f"### {title[0].upper()}{title[1:]}\n\n{table(chosen, is_memory=case == 'memory')}")
    if figures.get("crossovers"):
        lines = ["| case | | rounds | against | faster |", "|---|---|---:|---|---|"]
        for row in figures["crossovers"]:
            case = row["case"] if row["case"] == row["pass"] else f"{row['case']}, {row['pass']}"
            lines.append(f"| {case} | {row['contender']} | {row['rounds']} | {row['against']} | {row['in_words']} |")
        parts.append("### From which length on\n\n" + "\n".join(lines))
    if figures.get("unavailable"):
        parts.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in figures["unavailable"].items()))
    return "\n\n".join(parts)


def table(entries: list[dict], *, is_memory: bool) -> str:
    """Entries of one kind."""
    figure = "peak of a step, MiB" if is_memory else "ms: median (least to most), runs"
    lines = [f"| tokens | | rounds | {figure} | against ours |", "|---:|---|---:|---:|---:|"]
    for entry in sorted(entries, key=lambda entry: entry["length"]):
        start = f"| {entry['length']:,} | {CONTENDERS[entry['contender']].words} | {entry['rounds'] or ''} |"
        if "skipped" in entry:
            lines.append(f"{start} skipped: {entry['skipped']} | |")
            continue
        ratios = entry.get("ratios", {})
        words = [f"{ratio:.2f}" + (f" ({rounds})" if len(ratios) > 1 else "") for rounds, ratio in ratios.items()]
        if is_memory:
            text = f"{entry['peak_bytes'] / MIB:,.0f}"
        else:
            seconds = [entry[name] for name in ("median_s", "least_s", "most_s")]
            middle, least, most = (f"{1000 * s:,.0f}" if s >= 1 else f"{1000 * s:.4g}" for s in seconds)
            text = f"{middle} ({least} to {most}), {entry['runs']}"
        lines.append(f"{start} {text} | {', '.join(words)} |")
    return "\n".join(lines)


def draw(figures: dict, path: Path) -> list[Path]:
    """The plots that the entries allow, beside the JSON file."""
    written, drawn = [], {}
    for entry in figures["entries"]:
        if figure_of(entry):
            drawn.setdefault((entry["case"], entry["pass"]), []).append(entry)
    for kind, cases in PLOTS.items():
        panels = [(case, name) for case in cases for name in PASSES[case] if (case, name) in drawn]
        if not panels:
            continue
        size = (1.5 + 5.5 * len(panels), 5)
        figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        legend = {}
        for axes, panel in zip(all_axes[0], panels, strict=True):
            draw_panel(axes, panel, drawn[panel])
            lines, labels = axes.get_legend_handles_labels()
            legend |= zip(labels, lines, strict=True)
        figure.legend(legend.values(), legend.keys(), loc="outside right center", fontsize="small")
        written.append(path.with_name(f"{path.stem}_{kind}.png"))
        figure.savefig(written[-1], dpi=130)
        plt.close(figure)
    return written


def draw_panel(axes, panel: tuple[str, str], entries: list[dict]) -> None:
    """Lines of all contenders, one colour each; the more rounds, the more broken the line."""
    colors = dict(zip(CONTENDERS, plt.get_cmap("tab20").colors, strict=False))
    dashes = {None: "-", 1: "-", 2: "--", 4: "-.", 8: ":"}
    curves = {}
    for entry in sorted(entries, key=lambda entry: entry["length"]):
        curves.setdefault((entry["contender"], entry["rounds"]), []).append((entry["length"], figure_of(entry)))
    for (name, rounds), points in curves.items():
        lengths, values = zip(*points, strict=True)
        unit = MIB if panel[0] == "memory" else 1e-3
        label = f"{CONTENDERS[name].words}{f', rounds {rounds}' if rounds else ''}"
        line = {"color": colors[name], "linestyle": dashes.get(rounds, (0, (1, 3))), "label": label}
        axes.plot(lengths, [value / unit for value in values], marker="o", markersize=4, **line)
    ylabel = "MiB above the model" if panel[0] == "memory" else "ms, median"
    title = f"peak of a training step, {panel[1]}" if panel[0] == "memory" else ", ".join(dict.fromkeys(panel))
    axes.set(title=title, xlabel="tokens", ylabel=ylabel, xscale="log", yscale="log")
    ticks = sorted({entry["length"] for entry in entries})
    axes.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")


# The command line


def make_parser() -> argparse.ArgumentParser:
    """All arguments; those without a value get it from the device and --quick."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES[1:]), metavar="CASE")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help=f"by default all: {', '.join(CONTENDERS)}")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (default 1K to 64K, to 1M with cuda)")
    parser.add_argument("--rounds", type=int, nargs="+", help="hashing rounds (default 1 2 4 8)")
    parser.add_argument("--repeats", type=int, help="timed runs of each (default 5, with cuda 30)")
    parser.add_argument("--limit-s", type=float, default=120.0, help="longest run (default %(default)s)")
    parser.add_argument("--budget-s", type=float, default=60.0, help="when there are no more runs (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, value in asdict(Shape(0)).items():
        if name not in ("length", "rounds", "dtype", "device"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS / "benchmark.json", help="plots go beside it (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="1K and 2K tokens, 1 round, 3 repeats, more checks")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the tables of this file")
    parser.add_argument("--plot-only", action="store_true", help="only draw the plots of --out again")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked and complete."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    for path in [arguments.table] if arguments.table else [arguments.out] if arguments.plot_only else []:
        if not path.is_file():
            parser.error(f"there is no file {path}; a run without --table and --plot-only writes one")
    on_cuda = arguments.device == "cuda"
    defaults = {
        "lengths": [1024, 2048] if arguments.quick else CUDA_LENGTHS if on_cuda else CPU_LENGTHS,
        "rounds": [1] if arguments.quick else [1, 2, 4, 8],
        "repeats": 3 if arguments.quick else 30 if on_cuda else 5,
    }
    for name, value in defaults.items():
        given = getattr(arguments, name)
        setattr(arguments, name, value if given is None else sorted(set(given)) if isinstance(given, list) else given)
    if on_cuda and not torch.cuda.is_available() and not (arguments.table or arguments.plot_only):
        parser.error("--device cuda, but PyTorch sees no GPU")
    check_sizes(parser, arguments)
    choose_contenders(parser, arguments)
    return arguments


def check_sizes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Numbers that fit together; an error otherwise."""
    for name in ("repeats", "limit_s", "budget_s", "threads", "batch_size", "num_layers", "num_heads", "vocab_size"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, but is {getattr(arguments, name)}")
    step = 2 * arguments.chunk_length
    if step <= 0 or any(length < step or length % step for length in arguments.lengths):
        parser.error(f"--lengths must be multiples of two chunks, {step}, as peers need; got {arguments.lengths}")
    if min(arguments.rounds) < 1:
        parser.error(f"--rounds must be at least 1, but are {arguments.rounds}")
    if arguments.hidden_size % arguments.num_heads or arguments.feed_forward_size % arguments.hidden_size:
        parser.error(
            "--hidden-size must be a multiple of --num-heads, and --feed-forward-size one of --hidden-size, but they "
            f"are {arguments.hidden_size}, {arguments.num_heads} and {arguments.feed_forward_size}"
        )
    if arguments.ff_chunk < 0 or any(length % (arguments.ff_chunk or 1) for length in arguments.lengths):
        parser.error(f"--ff-chunk must divide every length, or be 0, but is {arguments.ff_chunk}")


def choose_contenders(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Those asked for, which must be there, or all that are there; the others in `unavailable`, with the reason."""
    asked = arguments.asked = arguments.contenders
    unknown = [name for name in asked or [] if name not in CONTENDERS]
    if unknown:
        parser.error(f"there is no contender {', '.join(unknown)}; choose from {', '.join(CONTENDERS)}")
    reasons = {name: CONTENDERS[name].missing(arguments.device) for name in asked or CONTENDERS}
    arguments.unavailable = {name: reason for name, reason in reasons.items() if reason}
    if asked and arguments.unavailable:
        parser.error("; ".join(f"{name}: {reason}" for name, reason in arguments.unavailable.items()))
    arguments.contenders = [name for name, reason in reasons.items() if not reason]
    if not any(competitors(case, arguments.contenders, arguments.rounds) for case in arguments.cases):
        parser.error(f"none of {', '.join(arguments.contenders)} takes part in {', '.join(arguments.cases)}")


def check_agreement(arguments: argparse.Namespace, shape: Shape) -> list[dict]:
    """What was compared, at one short length, with --quick also at all others; SystemExit if ours disagree."""
    lengths = {min(*arguments.lengths, shape.short_length)} | set(arguments.lengths if arguments.quick else [])
    agreement, names = Agreement(), arguments.contenders
    for length in sorted(lengths):
        for rounds in arguments.rounds:
            checked = replace(shape, length=length, rounds=rounds, ff_chunk=0)
            for case in sorted({"attention", "operator"} & set(arguments.cases)):
                check_attention(names, checked, agreement, with_projections=case == "operator")
            if {"step", "prefill", "memory"} & set(arguments.cases):
                check_models(names, checked, agreement)
    if agreement.failed and arguments.asked:
        raise SystemExit("; ".join(f"{name}: {reason}" for name, reason in agreement.failed.items()))
    arguments.unavailable |= agreement.failed
    arguments.contenders = [name for name in names if name not in agreement.failed]
    worst = {}
    for row in agreement.found:
        place = (row["contender"], row["what"])
        worst[place] = max(worst.get(place, 0.0), row["error"])
    for (name, what), error in worst.items():
        say(f"agreement: {name}, {what} off by {error:.1e} at most")
    return agreement.found


def count_parameters(arguments: argparse.Namespace, shape: Shape) -> dict[str, int]:
    """Of each model that takes part, at the shortest length: position tables grow with it."""
    shape, cases = replace(shape, length=min(arguments.lengths), device="cpu"), set(CASES[2:]) & set(arguments.cases)
    names = dict.fromkeys(name for case in cases for name, _ in competitors(case, arguments.contenders, [1]))
    return {name: sum(weight.numel() for weight in contenders.make_model(name, shape).parameters()) for name in names}


def run(arguments: argparse.Namespace, shape: Shape) -> dict:
    """Check, then measure everything, shortest length first; the file is written after each length."""
    peers = versions() | contenders.peer_versions()
    figures = {"machine": machine(), "versions": peers, "shape": asdict(shape), "threads": arguments.threads}
    del figures["shape"]["length"], figures["shape"]["rounds"]
    if arguments.device == "cuda":
        figures["accelerator"] = torch.cuda.get_device_name()
    figures["settings"] = {
        name: getattr(arguments, name) for name in ("cases", "lengths", "rounds", "repeats", "limit_s", "budget_s")
    }
    print(json.dumps(figures, indent=2), flush=True)
    figures["agreement"] = check_agreement(arguments, shape)
    figures["contenders"] = {name: CONTENDERS[name].words for name in arguments.contenders}
    figures |= {"unavailable": arguments.unavailable, "parameters": count_parameters(arguments, shape), "entries": []}
    history = History(arguments.limit_s)
    for length in arguments.lengths:
        for case in CASES[::-1]:
            pairs = competitors(case, arguments.contenders, arguments.rounds) if case in arguments.cases else []
            at_length = replace(shape, length=length)
            passes = [name for name in PASSES[case] if arguments.device == "cuda" or not name.endswith(REPLAYED)]
            for pass_name in passes if pairs else ():
                if case == "memory" and (pass_name, arguments.device) != ("resident", "cuda"):
                    figures["entries"] += measure_memory(pass_name, pairs, at_length, history, arguments.threads)
                elif case != "memory":
                    figures["entries"] += time_pass(case, pass_name, pairs, at_length, history, arguments)
                gc.collect()
        add_ratios(figures["entries"])
        figures["crossovers"] = find_crossovers(figures["entries"])
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write it all down; or show again what was measured."""
    arguments = parse_arguments(argv)
    if arguments.table:
        print(tables(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    if not arguments.plot_only:
        logging.set_verbosity_error()
        torch.set_num_threads(arguments.threads)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        sizes = asdict(Shape(0)).keys() - {"length", "rounds"}
        figures = run(arguments, Shape(0, **{name: getattr(arguments, name) for name in sizes}))
        print(tables(figures))
    for path in draw(json.loads(arguments.out.read_text(encoding="utf-8")), arguments.out):
        say("wrote", path)


if __name__ == "__main__":
    main()
