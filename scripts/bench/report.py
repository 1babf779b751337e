"""Tables and plots of what benchmark.py measured."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from .calls import REPLAYED
from .contenders import CONTENDERS
from .processes import MEMORIES


CASES = ("attention", "operator", "step", "prefill", "memory")
OPERATOR_PASSES = ("forward", "forward+backward", f"forward{REPLAYED}", f"forward+backward{REPLAYED}")
PASSES = {case: OPERATOR_PASSES if case in CASES[:2] else (case,) for case in CASES}
PASSES["memory"] = ("allocated", "resident")
PLOTS = {"attention": ["attention"], "operator": ["operator"], "step": ["step", "prefill"], "memory": ["memory"]}
TITLES = {
    "attention": "Time of attention to given vectors",
    "operator": "Time of attention with its projections",
    "step": "Time of a training step",
    "prefill": "Time of reading a prompt",
    "memory": "Peak memory of a training step",
}
MEMORY_WORDS = {"default": "the C library's defaults", "kept": "memory kept"}
BOUND = "matrix multiplications alone"
MIB = 2**20
# Of a plot, in inches: what a line's label needs, and the height without labels.
LABEL_HEIGHT, LEAST_HEIGHT = 0.19, 4.5


def figure_of(entry: dict) -> float | None:
    """What an entry is about, seconds (of the CPU, where they were counted) or bytes; None if it was skipped."""
    return entry["cpu"]["median_s"] if "cpu" in entry else entry.get("median_s", entry.get("peak_bytes"))


def memory_of(entry: dict) -> str:
    """One of `MEMORIES`: what the C library did with freed memory."""
    return entry.get("memory", "default")


# Tables


def tables(figures: dict) -> str:
    """All entries as Markdown."""
    parts, entries = [], figures["entries"]
    for case in CASES:
        for pass_name in PASSES[case]:
            chosen = [entry for entry in entries if (entry["case"], entry["pass"]) == (case, pass_name)]
            if chosen:
                title = case if case == pass_name else f"{case}, {pass_name}"
                parts.append(f"### {title[0].upper()}{title[1:]}\n\n{table(chosen)}")
    if bounded := [entry for entry in entries if "bound" in entry]:
        parts.append(f"### Step, and its {BOUND}\n\n{table(bounded, of_bounds=True)}")
    if figures.get("crossovers"):
        lines = ["| case | | rounds | against | faster |", "|---|---|---:|---|---|"]
        for found in figures["crossovers"]:
            case = found["case"] if found["case"] == found["pass"] else f"{found['case']}, {found['pass']}"
            rounds = f"{found['rounds'] or ''}"
            lines.append(row([case, found["contender"], rounds, found["against"], found["in_words"]]))
        parts.append("### From which length on\n\n" + "\n".join(lines))
    if figures.get("layer_weights"):
        lines = ["| | weights of a layer |", "|---|---:|"]
        lines += [f"| {figures['contenders'][name]} | {n:,} |" for name, n in figures["layer_weights"].items()]
        parts.append("### Weights\n\n" + "\n".join(lines))
    if figures.get("unavailable"):
        parts.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in figures["unavailable"].items()))
    return "\n\n".join(parts)


def table(entries: list[dict], *, of_bounds: bool = False) -> str:
    """Entries of one kind, a row for each length, contender and rounds; side by side what memory they had."""
    memories = [memory for memory in MEMORIES[::-1] if memory in map(memory_of, entries)]
    rows: dict[tuple, dict[str, dict]] = {}
    for entry in sorted(entries, key=lambda entry: entry["length"]):
        place = (entry["length"], entry["contender"], entry["rounds"])
        rows.setdefault(place, {})[memory_of(entry)] = entry
    heads = {}
    for memory in memories:
        found = [entry for entry in entries if memory_of(entry) == memory]
        words = f", {MEMORY_WORDS[memory]}" if len(memories) > 1 else ""
        heads[memory] = bound_heads(words) if of_bounds else figure_heads(found, words)
    shared = ["GFLOP", "of them recomputed"] if of_bounds else []
    columns = shared + [head for memory in memories for head in heads[memory]]
    lines = [row(["tokens", "", "rounds", *columns]), f"|---:|---|---:|{'---:|' * len(columns)}"]
    for (length, name, rounds), by_memory in rows.items():
        cells = [f"{length:,}", CONTENDERS[name].words, f"{rounds or ''}"]
        if of_bounds:
            bound = next(iter(by_memory.values()))["bound"]
            cells += [f"{bound[key] / 1e9:,.0f}" for key in ("operations", "recomputed")]
        for memory in memories:
            found = (bound_cells if of_bounds else figure_cells)(by_memory[memory]) if memory in by_memory else []
            cells += found + [""] * (len(heads[memory]) - len(found))
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"|{''.join(f' {cell} |' if cell else ' |' for cell in cells)}"


def figure_heads(entries: list[dict], words: str) -> list[str]:
    """What stands above the columns of entries with one kind of memory."""
    if entries[0]["case"] == "memory":
        return ["peak of a step, MiB", "against ours"]
    if any("cpu" in entry for entry in entries):
        return [f"CPU ms{words}: median (least to most), runs", "wall ms", "against ours"]
    return [f"ms{words}: median (least to most), runs", "against ours"]


def figure_cells(entry: dict) -> list[str]:
    """An entry's figures."""
    if "skipped" in entry:
        return [f"skipped: {entry['skipped']}"]
    ratios = entry.get("ratios", {})
    words = [f"{ratio:.2f}" + (f" ({rounds})" if len(ratios) > 1 else "") for rounds, ratio in ratios.items()]
    if entry["case"] == "memory":
        return [f"{entry['peak_bytes'] / MIB:,.0f}", ", ".join(words)]
    timed = entry.get("cpu", entry)
    middle, least, most = (in_ms(timed[name]) for name in ("median_s", "least_s", "most_s"))
    wall = [in_ms(entry["median_s"])] if "cpu" in entry else []
    return [f"{middle} ({least} to {most}), {timed['runs']}", *wall, ", ".join(words)]


def bound_heads(words: str) -> list[str]:
    """What stands above the columns of bounds with one kind of memory."""
    return [f"CPU ms{words} (GFLOP/s)", "the step takes, times"]


def bound_cells(entry: dict) -> list[str]:
    """How long the matrix multiplications of a step take alone, and how many times as long the step takes."""
    bound = entry["bound"]
    return [f"{in_ms(bound['bound_s'])} ({bound['rate'] / 1e9:,.0f})", f"{bound['times']:.2f}"]


def in_ms(seconds: float) -> str:
    """Milliseconds, to four places where they are less than thousand."""
    return f"{1000 * seconds:,.0f}" if seconds >= 1 else f"{1000 * seconds:.4g}"


# Plots


def draw(figures: dict, path: Path) -> list[Path]:
    """The plots that the entries allow, beside the JSON file; where memory was kept, too, the plot is of that."""
    written, drawn = [], {}
    kept = {(entry["case"], entry["pass"]) for entry in figures["entries"] if memory_of(entry) == "kept"}
    for entry in figures["entries"]:
        panel = (entry["case"], entry["pass"])
        if figure_of(entry) and memory_of(entry) == ("kept" if panel in kept else "default"):
            drawn.setdefault(panel, []).append(entry)
    for kind, cases in PLOTS.items():
        panels = [(case, name) for case in cases for name in PASSES[case] if (case, name) in drawn]
        if not panels:
            continue
        curves = [curves_of(drawn[panel]) for panel in panels]
        size = (8.5 * len(panels), max(LEAST_HEIGHT, 1.2 + LABEL_HEIGHT * max(map(len, curves))))
        figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axes, panel, lines in zip(all_axes[0], panels, curves, strict=True):
            draw_panel(axes, panel, drawn[panel], lines)
            label_lines(axes, lines)
        written.append(path.with_name(f"{path.stem}_{kind}.png"))
        figure.savefig(written[-1], dpi=130)
        plt.close(figure)
    return written


def curves_of(entries: list[dict]) -> dict[str, dict]:
    """By label: the points (tokens, seconds or MiB) of a line, and how it looks; bounds of the first of ours, too."""
    curves: dict[str, dict] = {}
    names = list(dict.fromkeys(entry["contender"] for entry in entries))
    others = [name for name in names if not CONTENDERS[name].implementation]
    ours = next((name for name in names if CONTENDERS[name].is_reference), None)
    dashes = {None: "-", 1: "-", 2: "--", 4: "-.", 8: ":"}
    for entry in sorted(entries, key=lambda entry: entry["length"]):
        name, rounds = entry["contender"], entry["rounds"]
        words = f"{', 1 round' if rounds == 1 else f', {rounds} rounds' if rounds else ''}"
        is_ours = name not in others
        color = plt.get_cmap("Blues")(0.95 - 0.15 * (names.index(name) % 5)) if is_ours else None
        color = color or plt.get_cmap("Dark2")(others.index(name) % 8)
        look = {"color": color, "linestyle": dashes.get(rounds, (0, (1, 3))), "linewidth": 2.2 if is_ours else 1.2}
        curve = curves.setdefault(CONTENDERS[name].words + words, {"look": look, "points": []})
        unit = MIB if entry["case"] == "memory" else 1
        curve["points"].append((entry["length"], figure_of(entry) / unit))
        if name == ours and "bound" in entry:
            look = {"color": "black", "linestyle": dashes.get(rounds, ":"), "linewidth": 1}
            curve = curves.setdefault(f"{BOUND}{words}", {"look": look, "points": []})
            curve["points"].append((entry["length"], entry["bound"]["bound_s"]))
    return curves


def draw_panel(axes, panel: tuple[str, str], entries: list[dict], curves: dict[str, dict]) -> None:
    """The lines of one case; those of ours are blue and thick, and the more rounds, the more broken a line."""
    for curve in curves.values():
        axes.plot(*zip(*curve["points"], strict=True), marker="o", markersize=3, **curve["look"])
    case, pass_name = panel
    words = "" if case == pass_name else f", {pass_name.replace('+', ' and ')}"
    unit = "CPU seconds" if "cpu" in entries[0] else "seconds"
    if case != "memory" and "memory" in entries[0]:
        words += f", with {MEMORY_WORDS[memory_of(entries[0])]}"
    ylabel = "MiB above the model" if case == "memory" else f"{unit}, median"
    axes.set(title=TITLES[case] + words, xlabel="tokens", ylabel=ylabel, xscale="log", yscale="log")
    ticks = sorted({entry["length"] for entry in entries})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)


def label_lines(axes, curves: dict[str, dict]) -> None:
    """Each line's label beside its end, in their order, apart enough to be read."""
    low, high = axes.transData.transform([(1, value) for value in axes.get_ylim()])[:, 1]
    ends = {label: curve["points"][-1] for label, curve in curves.items()}
    heights = {label: (axes.transData.transform(end)[1] - low) / (high - low) for label, end in ends.items()}
    order, apart = sorted(heights, key=heights.get), 1 / max(len(ends), 15)
    place = {}
    for label in order:
        place[label] = max(heights[label], *(other + apart for other in place.values()), 0.0)
    above = 1.0
    for label in reversed(order):
        place[label] = above = min(place[label], above)
        above -= apart
    for label, end in ends.items():
        color = curves[label]["look"]["color"]
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5)}
        where = {"xytext": (1.04, place[label]), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(label, end, fontsize="small", color=color, arrowprops=arrow, **where)
