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

On a CPU everything is timed twice, in turn: with the C library's defaults, and in a process in which it keeps the
memory that was freed (processes.py). CPU seconds stand beside those on the clock, and ratios are of CPU seconds.
Beside steps of ours stands how long their matrix multiplications would take alone (gemm_bound.py).
"""

import argparse
import gc
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hf_reformer.training.provenance import machine, versions

from . import calls, contenders, gemm_bound
from .agreement import Agreement, check_attention, check_causality, check_models
from .calls import REPLAYED, take_gradients
from .contenders import CONTENDERS
from .history import History, Refused
from .language_models import make_ids, training_step
from .processes import MEMORIES, Place, prepare_process, why_not
from .report import CASES, MIB, PASSES, draw, figure_of, memory_of, tables
from .shape import Shape
from .timing import summary_of


DOCS = Path(__file__).parents[2] / "docs"
CPU_LENGTHS = [1024, 4096, 16384, 65536]
CUDA_LENGTHS = [1024 * 2**power for power in range(11)]
CUDA_SAMPLE_SECONDS = 0.02  # a sample is as many calls as take this long
STARTED = time.perf_counter()


def say(*words: object) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - STARTED:6.0f} s]", *words, file=sys.stderr, flush=True)


def competitors(case: str, names: list[str], rounds: list[int]) -> list[tuple[str, int | None]]:
    """Name and rounds of all that take part; those that do not hash take part once."""
    chosen = [name for name in names if case in CONTENDERS[name].cases]
    return [(name, count) for name in chosen for count in (rounds if CONTENDERS[name].hashes else [None])]


def time_pass(
    case: str, pass_name: str, pairs: list[tuple], shape: Shape, history: History, arguments, places: list[Place]
) -> list[dict]:
    """An entry for each competitor and kind of memory at one length, all in turn."""
    entries, waiting, rates = [], [], {}
    for name, rounds in pairs:
        for place in places:
            entry = {"case": case, "pass": pass_name, "contender": name, "length": shape.length, "rounds": rounds}
            entries.append(entry | {"memory": place.memory})
            if prepare(entries[-1], place, shape, history):
                waiting.append((entries[-1], place, []))
    while waiting:
        for place in places if case == "step" and shape.device == "cpu" else ():
            rate = place.run(gemm_bound.operations_per_cpu_second)
            rates[place.memory] = max(rate, rates.get(place.memory, 0.0))
        waiting = [item for item in waiting if take_sample(*item, arguments)]
    for place in places:
        place.run(calls.forget)
    for entry in entries:
        if CONTENDERS[entry["contender"]].is_comparable and entry["memory"] in rates and figure_of(entry):
            add_bound(entry, shape, rates[entry["memory"]])
    return entries


def prepare(entry: dict, place: Place, shape: Shape, history: History) -> bool:
    """Whether an entry's call waits in its place; why not stands in the entry."""
    case, pass_name, name, rounds = (entry[key] for key in ("case", "pass", "contender", "rounds"))
    key = (case, pass_name, name, rounds, place.memory)
    try:
        history.refuse(key, shape.length, CONTENDERS[name].growth, contenders.free_memory(shape.device))
        seconds, taken = place.run(calls.prepare, case, pass_name, name, rounds, shape, history.limit)
    except Refused as refusal:
        entry["skipped"] = str(refusal)
        say(f"{describe(entry)}: skipped, {refusal}")
        return False
    history.note(key, shape.length, seconds, taken)
    if shape.device == "cuda":
        entry["taken_bytes"] = taken
    entry["calls_per_run"] = max(1, int(CUDA_SAMPLE_SECONDS / seconds)) if shape.device == "cuda" else 1
    say(f"{describe(entry)}: warmed up, {seconds:.3g} s")
    return True


def take_sample(entry: dict, place: Place, samples: list, arguments) -> bool:
    """Time the call of an entry once more; whether there are more samples to come."""
    try:
        samples.append(place.run(calls.clock, entry["contender"], entry["rounds"], entry["calls_per_run"]))
    except Refused as refusal:
        entry["skipped"] = str(refusal)
        say(f"{describe(entry)}: skipped, {refusal}")
        return False
    entry |= summary_of(samples)
    spent = sum(taken.wall if taken.cpu is None else taken.cpu for taken in samples)
    if len(samples) < arguments.repeats and spent < arguments.budget_s:
        return True
    say(f"{describe(entry)}: {figure_of(entry):.4g} s, median of {len(samples)}")
    return False


def add_bound(entry: dict, shape: Shape, rate: float) -> None:
    """To an entry `bound`: what its matrix multiplications would take alone, and how many `times` that it takes."""
    contender = CONTENDERS[entry["contender"]]
    shape = replace(shape, rounds=entry["rounds"] or 1)
    bound = gemm_bound.bound_of(shape, contender.layer, contender.reversible, rate)
    entry["bound"] = bound | {"times": figure_of(entry) / bound["bound_s"]}


def describe(entry: dict) -> str:
    """Which entry it is."""
    rounds = f", rounds {entry['rounds']}" if entry["rounds"] else ""
    memory = f", memory {entry['memory']}" if "memory" in entry else ""
    return f"{entry['case']}, {entry['pass']}, {entry['length']:,} tokens, {entry['contender']}{rounds}{memory}"


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


def add_ratios(entries: list[dict]) -> None:
    """To each entry `ratios`: what it takes relative to the first of ours that was measured, by rounds."""
    ours = {}
    for name in (name for name, contender in CONTENDERS.items() if contender.is_reference):
        for entry in entries:
            if entry["contender"] == name and figure_of(entry):
                place = (entry["case"], entry["pass"], entry["length"], memory_of(entry))
                ours.setdefault(place, {}).setdefault(entry["rounds"], entry)
    for entry in entries:
        same = ours.get((entry["case"], entry["pass"], entry["length"], memory_of(entry)), {})
        same = {rounds: other for rounds, other in same.items() if entry["rounds"] in (None, rounds)}
        if figure_of(entry) and same:
            entry["ratios"] = {str(rounds): figure_of(entry) / figure_of(other) for rounds, other in same.items()}
            entry["ratios_to"] = {str(rounds): other["contender"] for rounds, other in same.items()}


def find_crossovers(entries: list[dict]) -> list[dict]:
    """From which length on each of ours is faster than what does not hash; with memory kept, if that was measured."""
    memory = max(map(memory_of, entries), key=MEMORIES.index)
    curves = {}
    for entry in entries:
        if "median_s" in entry and memory_of(entry) == memory:
            place = (entry["case"], entry["pass"], entry["contender"], entry["rounds"])
            curves.setdefault(place, {})[entry["length"]] = figure_of(entry)
    found = []
    for (case, pass_name, name, rounds), ours in curves.items():
        for (*place, other, _), theirs in curves.items():
            comparable = place == [case, pass_name] and ours.keys() & theirs.keys()
            is_peer = not CONTENDERS[other].hashes and not CONTENDERS[other].implementation
            if comparable and CONTENDERS[name].is_comparable and is_peer:
                where = {"case": case, "pass": pass_name, "contender": name, "rounds": rounds, "against": other}
                found.append(where | crossover(ours, theirs))
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
    parser.add_argument("--budget-s", type=float, default=60.0, help="(CPU) seconds of all runs (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", nargs="+", choices=MEMORIES, help="(default both; one with --quick and with cuda)")
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
        "memory": ["default"] if on_cuda or arguments.quick or why_not("kept") else list(MEMORIES),
    }
    for name, value in defaults.items():
        given = getattr(arguments, name)
        setattr(arguments, name, value if given is None else sorted(set(given)) if isinstance(given, list) else given)
    if on_cuda and not torch.cuda.is_available() and not (arguments.table or arguments.plot_only):
        parser.error("--device cuda, but PyTorch sees no GPU")
    for reason in filter(None, map(why_not, () if arguments.table or arguments.plot_only else arguments.memory)):
        parser.error(reason)
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
        if {"step", "prefill", "memory"} & set(arguments.cases):
            check_causality(names, replace(shape, length=length, ff_chunk=0), agreement)
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


def count_weights(arguments: argparse.Namespace, shape: Shape) -> dict[str, dict[str, int]]:
    """
    `parameters` of each model that takes part, at the shortest length, since position tables grow with it; and
    `layer_weights`, on average those of a layer that a step gives a gradient.
    """
    cases = set(CASES[2:]) & set(arguments.cases)
    names = dict.fromkeys(name for case in cases for name, _ in competitors(case, arguments.contenders, [1]))
    found = {"parameters": {}, "layer_weights": {}}
    for name in names:
        own = CONTENDERS[name].own(replace(shape, length=min(arguments.lengths), device="cpu"))
        model = contenders.make_model(name, own)
        found["parameters"][name] = sum(weight.numel() for weight in model.parameters())
        if not CONTENDERS[name].needs_cuda:
            short = replace(own, length=min(own.length, own.short_length), ff_chunk=0)
            model = contenders.make_model(name, short)
            training_step(model, make_ids(short), short)
            lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
            layers = next(layers for layers in lists if len(layers) == shape.num_layers)
            trained = sum(gradient.numel() for gradient in take_gradients(layers))
            found["layer_weights"][name] = trained // shape.num_layers
    return found


def run(arguments: argparse.Namespace, shape: Shape) -> dict:
    """Check, then measure everything."""
    peers = versions() | contenders.peer_versions()
    figures = {"machine": machine(), "versions": peers, "shape": asdict(shape), "threads": arguments.threads}
    del figures["shape"]["length"], figures["shape"]["rounds"]
    figures["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if arguments.device == "cuda":
        figures["accelerator"] = torch.cuda.get_device_name()
    figures["settings"] = {
        name: getattr(arguments, name)
        for name in ("cases", "lengths", "rounds", "repeats", "limit_s", "budget_s", "memory")
    }
    print(json.dumps(figures, indent=2), flush=True)
    figures["agreement"] = check_agreement(arguments, shape)
    figures["contenders"] = {name: CONTENDERS[name].words for name in arguments.contenders}
    figures |= {"unavailable": arguments.unavailable, **count_weights(arguments, shape), "entries": []}
    with ExitStack() as stack:
        places = [Place(memory, arguments.threads) for memory in arguments.memory]
        for place in places:
            stack.callback(place.close)
        measure(arguments, shape, figures, places)
    return figures


def measure(arguments: argparse.Namespace, shape: Shape, figures: dict, places: list[Place]) -> None:
    """Add to `figures` all that is asked for, shortest length first; the file is written after each length."""
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
                    figures["entries"] += time_pass(case, pass_name, pairs, at_length, history, arguments, places)
                gc.collect()
        add_ratios(figures["entries"])
        figures["crossovers"] = find_crossovers(figures["entries"])
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write it all down; or show again what was measured."""
    arguments = parse_arguments(argv)
    if arguments.table:
        print(tables(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    if not arguments.plot_only:
        prepare_process(arguments.threads)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        sizes = asdict(Shape(0)).keys() - {"length", "rounds"}
        figures = run(arguments, Shape(0, **{name: getattr(arguments, name) for name in sizes}))
        print(tables(figures))
    for path in draw(json.loads(arguments.out.read_text(encoding="utf-8")), arguments.out):
        say("wrote", path)


if __name__ == "__main__":
    main()
