"""The benchmark: what it writes, what it refuses, and what it says about whatever it did not measure."""

import json
import os
import resource
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench import agreement, benchmark, contenders, gemm_bound, report
from scripts.bench.contenders import CONTENDERS
from scripts.bench.history import History, Refused, extrapolate
from scripts.bench.language_models import longformer_model, make_ids, own_model
from scripts.bench.processes import KEPT, Place
from scripts.bench.shape import Shape


pytestmark = pytest.mark.slow


SIZES = {
    "hidden-size": 32,
    "num-heads": 2,
    "num-layers": 2,
    "feed-forward-size": 64,
    "chunk-length": 16,
    "vocab-size": 50,
    "repeats": 2,
}
TINY = Shape(128, hidden_size=32, num_heads=2, num_layers=2, feed_forward_size=64, chunk_length=16, vocab_size=50)
OURS = "ours-eager"
KINDS = benchmark.PASSES["memory"]


def arguments(
    out, *changed, lengths=(128,), rounds=(1,), names=(OURS, "stock"), cases=("operator",), memory=("default",)
):
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    lists = {"lengths": lengths, "rounds": rounds, "contenders": names, "cases": cases, "memory": memory}
    words = [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]
    return [*sizes, *words, "--out", str(out), "--threads", "1", *changed]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of every case, and the file it wrote."""
    path = tmp_path_factory.mktemp("benchmark") / "folder" / "figures.json"
    names = (OURS, f"{OURS}-plain", f"{OURS}-local", "stock", "sdpa", "llama", "llama-checkpointed")
    cases = ("attention", "operator", "step", "prefill")
    benchmark.main(arguments(path, lengths=(128, 256), rounds=(1, 2), names=names, cases=cases))
    return path, json.loads(path.read_text())


DOCS = benchmark.DOCS


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("benchmark.json", "performance.md"),
        ("benchmark_lengths.json", "performance.md"),
        ("benchmark_memory.json", "performance.md"),
        ("benchmark_rounds.json", "benchmark_rounds.md"),
    ],
)
def test_the_tables_in_the_docs_are_those_of_the_files(name, page):
    figures = json.loads((DOCS / name).read_text())
    lines = [line for line in benchmark.tables(figures).splitlines() if line.startswith("|")]
    assert len(lines) > 10
    missing = set(lines) - set((DOCS / page).read_text().splitlines())
    assert not missing


def entries_of(figures, **where):
    return [entry for entry in figures["entries"] if where.items() <= entry.items()]


def test_every_case_is_in_the_file(measured):
    _, figures = measured
    hashing = {"attention": {OURS, "stock"}, "step": {OURS, f"{OURS}-plain", "stock"}}
    dense = {"attention": {"sdpa"}, "step": {f"{OURS}-local", "llama", "llama-checkpointed"}}
    for case, pass_name, like in [
        ("attention", "forward", "attention"),
        ("attention", "forward+backward", "attention"),
        ("operator", "forward", "attention"),
        ("operator", "forward+backward", "attention"),
        ("step", "step", "step"),
    ]:
        for length in (128, 256):
            found = entries_of(figures, case=case, length=length, **{"pass": pass_name})
            found = {(row["contender"], row["rounds"]) for row in found}
            expected = {(name, rounds) for name in hashing[like] for rounds in (1, 2)}
            assert found == expected | {(name, None) for name in dense[like]}
    assert {row["contender"] for row in entries_of(figures, case="prefill")} == {OURS, "stock", "llama"}
    for entry in figures["entries"]:
        for timed in (entry, entry["cpu"]):
            assert timed["runs"] == 2 and 0 < timed["least_s"] <= timed["median_s"] <= timed["most_s"]
        assert set(entry["ratios"]) == ({"1", "2"} if entry["rounds"] is None else {str(entry["rounds"])})


def test_where_and_how_it_was_measured(measured):
    _, figures = measured
    assert figures["threads"] == figures["machine"]["threads"] == 1
    assert figures["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert {"python", "torch", "transformers", "hf_reformer"} <= figures["versions"].keys()
    assert (figures["shape"]["hidden_size"], figures["shape"]["chunk_length"]) == (32, 16)
    assert all(row["error"] <= row["limit"] for row in figures["agreement"])
    compared = {(row["contender"], row["reference"], row["what"]) for row in figures["agreement"]}
    assert {(OURS, "stock", "output"), (OURS, "stock", "loss"), (OURS, f"{OURS}-plain", "gradients")} <= compared
    assert {
        (f"{OURS}-local", "stock", "gradients"),
        ("llama", "itself without what comes after", "logits"),
    } <= compared


def cpu_seconds(entry):
    return entry["cpu"]["median_s"]


def test_ratios_are_those_of_the_medians(measured):
    _, figures = measured
    for ours in entries_of(figures, case="step", contender=OURS):
        place = {name: ours[name] for name in ("case", "length")}
        llama = entries_of(figures, contender="llama", **place)[0]
        assert llama["ratios"][str(ours["rounds"])] == pytest.approx(cpu_seconds(llama) / cpu_seconds(ours))
        stock = entries_of(figures, contender="stock", rounds=ours["rounds"], **place)[0]
        assert stock["ratios"] == {str(ours["rounds"]): pytest.approx(cpu_seconds(stock) / cpu_seconds(ours))}


def test_tables_and_plots_from_the_file(measured, capsys):
    path, figures = measured
    benchmark.main(["--table", str(path)])
    printed = capsys.readouterr().out
    assert "### Operator, forward+backward" in printed and "### From which length on" in printed
    assert printed.count("| transformers Reformer | 2 |") == 2 * 6
    assert printed.count("\n| ") >= len(figures["entries"])
    plots = [path.with_name(f"figures_{kind}.png") for kind in ("attention", "operator", "step")]
    for plot in plots:
        plot.unlink()
    benchmark.main(["--plot-only", "--out", str(path)])
    for plot in plots:
        with Image.open(plot) as picture:
            assert picture.width > 500
    assert not path.with_name("figures_memory.png").exists()


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "figures.json"
    # Activations of 4 MiB in each of 6 layers.
    sizes = ("--feed-forward-size", "2048", "--num-layers", "6")
    benchmark.main(arguments(path, *sizes, lengths=(512,), names=(OURS, f"{OURS}-plain"), cases=("memory",)))
    figures = json.loads(path.read_text())
    for kind in KINDS:
        recomputed, stored = entries_of(figures, **{"pass": kind})
        assert recomputed["contender"] == OURS and recomputed["peak_bytes"] > 0
        # What is resident varies from run to run by more, with what the C library keeps.
        assert kind == "resident" or recomputed["peak_bytes"] < stored["peak_bytes"] / 2
    # The system counts at least what the allocator has given out, of which some small tensors were resident before.
    allocated, resident = (entries_of(figures, contender=f"{OURS}-plain", **{"pass": kind})[0] for kind in KINDS)
    assert resident["peak_bytes"] > 0.9 * allocated["peak_bytes"]
    assert path.with_name("figures_memory.png").is_file()


@pytest.mark.parametrize("case", ["attention", "operator", "step"])
def test_wrong_results_are_not_timed(case, tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    if case == "step":
        forward = contenders.own_model

        def wrong(*args, **kwargs):
            model = forward(*args, **kwargs)
            model.lm_head.register_forward_hook(lambda module, args, output: 1.01 * output)
            return model

        monkeypatch.setitem(CONTENDERS, OURS, replace(CONTENDERS[OURS], model=lambda *a, **k: wrong(*a, "eager", **k)))
    else:
        right = contenders.OwnAttention.forward
        monkeypatch.setattr(contenders.OwnAttention, "forward", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    with pytest.raises(SystemExit, match=f"{OURS} disagrees with stock: .* off by .* Nothing was measured"):
        benchmark.main(arguments(path, cases=(case,)))
    assert not path.exists()


def test_a_peer_that_disagrees_is_left_out_or_ends_the_run_if_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    monkeypatch.setitem(CONTENDERS, "flex", replace(CONTENDERS["sdpa"], attention=UncausalAttention))
    with pytest.raises(SystemExit, match=r"flex: .* off by .* from sdpa"):
        benchmark.main(arguments(path, names=(OURS, "flex")))
    words = arguments(path)
    start = words.index("--contenders")
    del words[start : start + 3]
    benchmark.main(words)
    figures = json.loads(path.read_text())
    assert "off by" in figures["unavailable"]["flex"] and not entries_of(figures, contender="flex")
    assert entries_of(figures, contender="sdpa")


class UncausalAttention(contenders.DenseAttention):
    def __init__(self, shape):
        super().__init__(shape)
        self.attend = torch.nn.functional.scaled_dot_product_attention


def test_what_is_skipped_says_why(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.json"
    right = contenders.StockAttention.forward

    def fails_at_256(self, hidden_states, buckets=None):
        output = right(self, hidden_states, buckets)
        if buckets is None and hidden_states.shape[1] == 256:
            raise RuntimeError("no kernel for this\nand more")
        return output * float("nan") if buckets is None and hidden_states.shape[1] == 384 else output

    monkeypatch.setattr(contenders.StockAttention, "forward", fails_at_256)
    benchmark.main(arguments(path, lengths=(128, 256, 384)))
    figures, printed = json.loads(path.read_text()), capsys.readouterr().out
    for length, reason in [(256, "it failed: RuntimeError: no kernel for this"), (384, "it gives NaN or infinity")]:
        skipped = entries_of(figures, contender="stock", length=length)
        assert [entry["skipped"] for entry in skipped] == [reason] * 2
        assert printed.count(f"skipped: {reason} |") == 2
    assert all("median_s" in entry for entry in entries_of(figures, contender=OURS))


def test_too_slow_and_too_large_runs_are_foreseen():
    history = History(limit=10)
    history.note("key", 1024, seconds=1, taken=100)
    history.refuse("key", 4096, growth=1.0, free=1000)
    with pytest.raises(Refused, match="about 16 s, above the limit of 10 s"):
        history.refuse("key", 4096, growth=2.0, free=10**6)
    with pytest.raises(Refused, match="GiB of memory"):
        history.refuse("key", 4096, growth=1.0, free=450)
    # From two lengths on, the growth that was seen counts, up to quadratic.
    assert extrapolate({1: 1.0, 2: 2.0}, 8, growth=2.0) == pytest.approx(8)
    assert extrapolate({1: 1.0, 2: 100.0}, 4, growth=1.0) == pytest.approx(400)
    assert extrapolate({1: 1.0, 2: 1.0}, 4, growth=1.0) == pytest.approx(2)


def test_slow_runs_are_skipped(tmp_path):
    path = tmp_path / "figures.json"
    benchmark.main(arguments(path, "--limit-s", "1e-6", names=(OURS,)))
    assert all("above the limit of 1e-06 s" in entry["skipped"] for entry in json.loads(path.read_text())["entries"])


def test_crossover_lies_where_lines_meet():
    ours, dense = {1: 4.0, 2: 8.0, 4: 16.0, 8: 32.0}, {1: 1.0, 2: 4.0, 4: 16.0, 8: 64.0, 16: 256.0}
    assert benchmark.crossover(ours, dense)["length"] == 4
    assert benchmark.crossover({2: 4.0, 8: 4.0}, {2: 2.0, 8: 8.0})["in_words"].startswith(
        "from about 4 tokens on (betw"
    )
    assert benchmark.crossover({2: 4.0}, {2: 2.0}) == {
        "shortest": 2,
        "longest": 2,
        "length": None,
        "in_words": "not up to 2 tokens",
    }
    assert benchmark.crossover({2: 1.0}, {2: 2.0})["in_words"] == "from 2 tokens on, or before"


def test_reformer_pytorch_takes_part(tmp_path):
    pytest.importorskip("reformer_pytorch")
    path = tmp_path / "figures.json"
    cases = ("attention", "operator", "step", "prefill")
    benchmark.main(arguments(path, rounds=(2,), names=("reformer-pytorch",), cases=cases))
    figures = json.loads(path.read_text())
    assert len(figures["entries"]) == 6 and all("median_s" in entry for entry in figures["entries"])
    assert {row["what"] for row in figures["agreement"] if row["contender"] == "reformer-pytorch"} == {
        "output",
        "gradients",
    }


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "MATH"])
def test_kernels_of_dense_attention_agree(backend):
    expected = agreement.outcome(contenders.make_attention("sdpa", TINY, with_projections=True), TINY)
    attention = contenders.DenseAttention(TINY, backend=backend)
    contenders.give_projections(attention, TINY, with_projections=True)
    assert max(agreement.errors_of(agreement.outcome(attention, TINY), expected).values()) < 1e-5


def faults_of_new_memory():
    """The fewest pages that the system gives when 64 MiB are filled, where four times as much was free before."""
    torch.zeros(2**26)  # An aligned piece asks for more than it has: one as large as the last fits nowhere.
    found = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**24).add_(1)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)


def test_memory_is_kept_and_a_killed_process_replaced():
    pages = 2**26 // resource.getpagesize()
    place = Place("kept", threads=1)
    try:
        assert place.run(faults_of_new_memory) < 0.01 * pages
        assert not KEPT.keys() & os.environ.keys()
        with pytest.raises(Refused, match="its process was killed; most likely memory ran out"):
            place.run(os._exit, 1)
        assert place.run(os.getpid) != os.getpid() and place.run(faults_of_new_memory) < 0.01 * pages
    finally:
        place.close()
    # Here the system gives them anew, in pages that may be larger.
    assert faults_of_new_memory() > 0 and Place("default", threads=1).run(os.getpid) == os.getpid()


def test_one_command_measures_both_kinds_of_memory(tmp_path):
    path = tmp_path / "figures.json"
    names, memory = (OURS, f"{OURS}-plain", "stock", "xlstm"), ("default", "kept")
    benchmark.main(arguments(path, rounds=(1, 2), names=names, cases=("step",), memory=memory))
    figures = json.loads(path.read_text())
    assert len(figures["entries"]) == 14
    for kind in memory:
        of_kind = entries_of(figures, memory=kind)
        ours = entries_of({"entries": of_kind}, contender=OURS, rounds=2)[0]
        stock = entries_of({"entries": of_kind}, contender="stock", rounds=2)[0]
        assert len(of_kind) == 7 and stock["ratios"]["2"] == pytest.approx(cpu_seconds(stock) / cpu_seconds(ours))
        shape = replace(TINY, rounds=2)
        bound = gemm_bound.bound_of(shape, "lsh", reversible=True, rate=ours["bound"]["rate"])
        assert ours["bound"] == bound | {"times": pytest.approx(cpu_seconds(ours) / bound["bound_s"])}
        plain = entries_of({"entries": of_kind}, contender=f"{OURS}-plain", rounds=2)[0]
        assert plain["bound"]["operations"] == bound["operations"] - bound["recomputed"]
        assert "bound" not in stock
    head = next(line for line in benchmark.tables(figures).splitlines() if "CPU ms" in line)
    assert head.index("memory kept") < head.index("the C library's defaults")
    assert {row["against"] for row in figures["crossovers"]} == {"xlstm"}
    # The plot shows memory kept, the bound of ours included.
    kept = entries_of(figures, memory="kept")
    labels = report.curves_of(kept)
    assert f"{report.BOUND}, 2 rounds" in labels and len(labels) == 9
    assert path.with_name("figures_step.png").is_file()


@pytest.mark.parametrize("layer", ["lsh", "local"])
@pytest.mark.parametrize("reversible", [True, False])
def test_matrix_multiplications_are_those_that_torch_counts(layer, reversible):
    shape = replace(TINY, length=256, rounds=2)
    model, ids = own_model(shape, "eager", reversible=reversible, layer=layer).train(), make_ids(shape)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    bound = gemm_bound.bound_of(shape, layer, reversible, rate=1e3)
    assert bound["operations"] == counter.get_total_flops()
    assert bound["bound_s"] == bound["operations"] / 1e3 and (bound["recomputed"] > 0) == reversible


def test_large_matrices_give_a_rate():
    seconds = 2 * 64**3 / gemm_bound.operations_per_cpu_second(side=64)
    assert 0 < seconds < 1


def test_labels_of_lines_that_end_together_are_apart():
    figure, axes = plt.subplots()
    curves = {f"line {place}": {"look": {"color": "black"}, "points": [(1, 1), (2, 5)]} for place in range(20)}
    curves["highest"] = {"look": {"color": "black"}, "points": [(1, 1), (2, 9)]}
    for curve in curves.values():
        axes.plot(*zip(*curve["points"], strict=True))
    report.label_lines(axes, curves)
    heights = sorted((text.xyann[1], text.get_text()) for text in axes.texts)
    plt.close(figure)
    assert heights[-1][1] == "highest" and 0 <= heights[0][0] and heights[-1][0] <= 1
    assert min(b[0] - a[0] for a, b in pairwise(heights)) > 0.99 / len(curves)


def test_a_model_that_reads_on_is_left_out(tmp_path, monkeypatch):
    reads_on = replace(CONTENDERS["minimax"], model=longformer_model)
    monkeypatch.setitem(CONTENDERS, "minimax", reads_on)
    with pytest.raises(SystemExit, match=r"minimax: .* logits off by .* from itself without what comes after"):
        benchmark.main(arguments(tmp_path / "figures.json", names=(OURS, "minimax"), cases=("step",)))


def test_layers_have_as_many_weights():
    parsed = benchmark.parse_arguments(["--lengths", "128", "--cases", "step"])
    weights = benchmark.count_weights(parsed, Shape(128, num_layers=2))["layer_weights"]
    assert {"ours-sdpa-local", "stock", "llama", "mistral-window", "longformer", "minimax", "xlstm", "mamba2"} < (
        weights.keys()
    )
    assert weights == {name: pytest.approx(weights["stock"], rel=0.01) for name in weights}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--contenders", "ours-cuda", "stock"], "there is no contender ours-cuda; choose from ours-triton, "),
        (["--contenders", "sdpa-flash"], "sdpa-flash: it needs --device cuda"),
        (["--contenders", "llama"], "none of llama takes part in operator"),
        (["--lengths", "100"], "--lengths must be multiples of two chunks, 32, as peers need; got [100]"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--repeats", "0"], "--repeats must be above 0, but is 0"),
        (["--num-heads", "3"], "--hidden-size must be a multiple of --num-heads"),
        (["--ff-chunk", "48"], "--ff-chunk must divide every length, or be 0, but is 48"),
        (["--memory", "lost"], "invalid choice: 'lost'"),
        (["--table", "nowhere.json"], "there is no file nowhere.json"),
        (["--cases", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_wrong_arguments(changed, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments(tmp_path / "figures.json", *changed))
    assert message in capsys.readouterr().err


def test_defaults_of_the_c_library_are_not_measured_without_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    with pytest.raises(SystemExit):
        benchmark.main(arguments(tmp_path / "figures.json"))
    assert "MALLOC_TRIM_THRESHOLD_ is set, so this process has not the C library's defaults" in capsys.readouterr().err


def test_a_missing_package(tmp_path, monkeypatch, capsys):
    gone = replace(CONTENDERS["reformer-pytorch"], package="reformer-pytorch-that-is-not-there")
    monkeypatch.setitem(CONTENDERS, "reformer-pytorch", gone)
    with pytest.raises(SystemExit):
        benchmark.main(arguments(tmp_path / "figures.json", names=("reformer-pytorch",)))
    assert "is not installed: pip install reformer-pytorch" in capsys.readouterr().err
    parsed = benchmark.parse_arguments(["--lengths", "128"])
    assert "pip install" in parsed.unavailable["reformer-pytorch"] and "stock" in parsed.contenders


def test_quick_fills_in_only_what_was_not_given():
    quick = benchmark.parse_arguments(["--quick", "--rounds", "4"])
    assert (quick.lengths, quick.rounds, quick.repeats) == ([1024, 2048], [4], 3)
