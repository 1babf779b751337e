"""Exact mode: backward recovers the very bits of forward, so gradients are those of ordinary autograd, bit by bit."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from math import floor, log2

import pytest
import torch
from reversible_models import (
    BATCH,
    HIDDEN,
    LENGTH,
    add_lora,
    gradients_of,
    layers_of,
    make,
    make_inputs,
    relative_error,
    with_each_implementation,
)
from tiny_models import AVERAGED, DROPOUT, assert_equal_tensors

from hf_reformer.modeling.layers import reversible as reversible_module
from hf_reformer.modeling.layers.reversible import GRID, RoundToGrid, narrowed
from scripts.figures import exactness


KINDS = ["local", "lsh", "full", "lsh"]


@dataclass
class Case:
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    config: dict = field(default_factory=dict)
    prepare: object = lambda model: model

    @property
    def stream_dtype(self):
        """A precision above that of the layers."""
        return torch.float64 if self.dtype.itemsize >= 4 and self.autocast is None else torch.float32


CASES = {
    "float64": Case(torch.float64, config={"exact_inversion": True}),
    "float32": Case(),
    "bfloat16 autocast": Case(autocast=torch.bfloat16),
    "float16 autocast": Case(autocast=torch.float16),
    "bfloat16 weights": Case(torch.bfloat16),
    "float16 weights": Case(torch.float16, config=AVERAGED),
    "bfloat16 weights, float32 adapters": Case(torch.bfloat16, prepare=add_lora),
}


def run(case, *, depth, reversible=True, scale=1.0, **changes):
    """
    A model trained for one step with dropout and with rotations of that step, and what its layers have read.

    Returns the loss, the gradients, and each half of a layer's stream in the forward pass and, if any, recovered.
    """
    config = {"attn_layers": KINDS * (depth // len(KINDS))} | DROPOUT | case.config | changes
    model = case.prepare(make(reversible, dtype=case.dtype, **config))
    inputs, read = make_inputs(dtype=case.dtype, scale=scale), defaultdict(list)
    places = {layer.attention: (layer.layer_idx, "attention") for layer in layers_of(model)}
    places |= {layer.feed_forward: (layer.layer_idx, "feed-forward") for layer in layers_of(model)}

    def read_and_narrow(stream, module):
        # Its memory may serve again.
        read[places[module]].append(stream.detach().clone())
        return narrowed(stream, module)

    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible_module, "narrowed", read_and_narrow)
        with torch.autocast("cpu", case.autocast, enabled=case.autocast is not None):
            loss = model(**inputs).loss
        loss.backward()
    # The feed-forward reads a piece at a time.
    streams = {place: torch.cat(pieces, dim=1).split(LENGTH, dim=1) for place, pieces in read.items()}
    return loss.detach(), gradients_of(model, inputs), streams


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), with_each_implementation(CASES))
def test_96_layers_recover_their_inputs_bit_by_bit(name, implementation):
    _, _, streams = run(CASES[name], depth=96, attn_implementation=implementation, chunk_size_feed_forward=16)
    assert len(streams) == 2 * 96
    for place, (before, after) in streams.items():
        assert before.dtype == after.dtype == CASES[name].stream_dtype
        assert torch.equal(before, after), place


@pytest.mark.parametrize("name", ["float32", "bfloat16 autocast"])
def test_pieces_of_streams_add_up_to_the_same(name, monkeypatch):
    expected_loss, expected, _ = run(CASES[name], depth=4)
    monkeypatch.setattr(reversible_module, "ADDED_AT_ONCE", 5 * BATCH * HIDDEN)
    loss, actual, streams = run(CASES[name], depth=4)
    assert torch.equal(loss, expected_loss)
    assert_equal_tensors(actual, expected)
    assert all(torch.equal(before, after) for before, after in streams.values())


@pytest.mark.parametrize("name", CASES)
def test_what_hooks_keep_of_the_inputs_of_modules_stays_as_it_is(name):
    """The memory of streams serves again, but not where modules were given the streams themselves."""
    kept, case = defaultdict(list), CASES[name]
    model = case.prepare(make(True, dtype=case.dtype, attn_layers=KINDS, **case.config))
    for layer in layers_of(model):
        for half in (layer.attention, layer.feed_forward):
            half.register_forward_pre_hook(lambda module, args: kept[module].append(args[0].detach()))
    with torch.autocast("cpu", case.autocast, enabled=case.autocast is not None):
        loss = model(**make_inputs(dtype=case.dtype)).loss
    loss.backward()
    assert len(kept) == 2 * len(KINDS)
    for before, after in kept.values():
        assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least_drift"),
    [("float32", 1e-5), ("bfloat16 autocast", 1e-2), ("float16 autocast", 1e-2), ("bfloat16 weights", 1e-2)],
)
def test_without_exact_mode_the_first_input_is_far_off(name, least_drift):
    _, _, streams = run(CASES[name], depth=96, exact_inversion=False)
    before, after = streams[0, "attention"]
    assert before.dtype == torch.float32
    assert (after - before).norm() > least_drift * before.norm()


@pytest.mark.parametrize(
    ("name", "implementation", "gain"),
    [(*each, 0.3) for each in with_each_implementation(CASES)]
    # Weights of other sizes are the same weights to every implementation.
    + [(name, "eager", gain) for name in CASES for gain in (0.02, 0.6)],
)
def test_gradients_are_those_of_ordinary_autograd_bit_by_bit(name, implementation, gain):
    case, changes = CASES[name], {"initializer_range": gain, "attn_implementation": implementation}
    expected_loss, expected, _ = run(case, depth=8, reversible=False, **changes)
    loss, actual, _ = run(case, depth=8, **changes)
    assert torch.equal(loss, expected_loss)
    assert actual.keys() == expected.keys()
    below = {key: actual.pop(key) for key in expected if "embed" in key}
    for key, gradient in actual.items():
        assert torch.equal(gradient, expected[key]), key
    # The input of the two streams sums three gradients, in another order.
    order = torch.finfo(case.dtype).eps
    assert relative_error(below, {key: expected[key] for key in below}) <= 2 * order


@pytest.mark.parametrize("exact_inversion", [None, False, True])
@pytest.mark.parametrize("name", CASES)
def test_exact_mode_is_the_default_where_layers_compute_in_less_than_float64(name, exact_inversion):
    _, _, streams = run(CASES[name], depth=4, exact_inversion=exact_inversion)
    assert all(is_on_grid(before) for before, _ in streams.values()) == (
        name != "float64" if exact_inversion is None else exact_inversion
    )


# The grid.


def is_on_grid(numbers):
    multiples = numbers / GRID[numbers.dtype]
    return torch.equal(multiples, multiples.round())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1024), (torch.float64, 131_072)])
def test_sums_on_the_grid_are_exact_below_its_limit(dtype, limit):
    numbers = limit * (torch.rand(2, 1_000_000, dtype=dtype) - 0.5)
    stream, update = RoundToGrid.apply(numbers, dtype)
    total = stream + update
    assert total.abs().max() > 0.95 * limit
    assert torch.equal(total - update, stream)


@pytest.mark.parametrize("grid", GRID)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest_and_passes_gradients(dtype, grid):
    numbers = torch.randn(1000, dtype=dtype, requires_grad=True)
    rounded = RoundToGrid.apply(numbers, grid)
    assert rounded.dtype == grid
    assert is_on_grid(rounded)
    assert (rounded - numbers.to(grid)).abs().max() <= GRID[grid] / 2
    gradient = torch.randn(1000, dtype=dtype)
    rounded.backward(gradient.to(grid))
    assert numbers.grad.dtype == dtype
    assert torch.equal(numbers.grad, gradient.to(grid).to(dtype))


@pytest.mark.parametrize("grid", GRID)
def test_rounding_hides_no_number_that_is_none(grid):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=grid)
    assert torch.equal(RoundToGrid.apply(special, grid).view(torch.uint8), special.view(torch.uint8))


# Beyond the grid's range.


@pytest.mark.parametrize("depth", [4, 24, 96])
def test_beyond_its_limit_a_layer_is_inverted_to_within_a_unit_in_the_last_place(depth):
    """Half a unit for the sum and half for the difference; the layers, behind a LayerNorm, add nothing to speak of."""
    _, _, streams = run(CASES["float64"], depth=depth, scale=500_000.0)
    largest = max(before.abs().max().item() for before, _ in streams.values())
    assert largest > 4 * 131_072
    unit = torch.finfo(torch.float64).eps * 2.0 ** floor(log2(largest))
    error = max((before - after).abs().max().item() for before, after in streams.values())
    assert 0 < error <= depth * unit


@pytest.mark.parametrize("name", ["bfloat16 autocast", "float16 autocast", "bfloat16 weights"])
def test_gradients_beyond_1024_are_as_good_as_those_of_ordinary_autograd(name):
    # Nothing is hashed, so that float64 does not differ by a bucket.
    changes = {"depth": 24, "scale": 5000.0, "attn_layers": ["local", "full"] * 12}
    (_, exact, _), (_, ordinary, _) = (run(CASES[case], reversible=False, **changes) for case in ("float64", name))
    _, actual, _ = run(CASES[name], **changes)
    assert relative_error(actual, ordinary) <= relative_error(ordinary, exact)


# The script that measures all this.


@pytest.mark.slow
def test_script_measures_errors_and_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(exactness, "DEPTHS", (2, 4))
    monkeypatch.setattr(exactness, "SHAPE", exactness.SHAPE | {"length": 128})
    for arguments in ([], ["--speed", "--repeats", "1"]):
        exactness.main([*arguments, "--output_dir", str(tmp_path)])
    assert (tmp_path / "exactness.png").stat().st_size > 10_000
    measured = json.loads((tmp_path / "exactness.json").read_text())
    assert len(measured["errors"]["rows"]) == 2 * 2 * 2 * 2
    assert any(row["input"] > 0 for row in measured["errors"]["rows"])
    for row in measured["errors"]["rows"]:
        assert row["input"] == 0 or not row["exact_inversion"]
        limits = (1e-8, 1e-3) if row["precision"] == "float32" else (1e-4, 1e-1)
        assert limits[0] < row["gradients, reversible"] < limits[1]
    assert len(measured["speed"]["seconds"]) == 4
    assert all(0 < figures["least"] <= figures["most"] for figures in measured["speed"]["seconds"].values())
