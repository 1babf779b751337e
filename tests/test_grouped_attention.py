"""Many new tokens at once: groups of a bucket or chunk read one stretch of the order."""

import json
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_decoding_cache import cached_logits, close, make, rows_with_padding
from tiny_models import POSITIONS, WINDOWS, random_ids

from hf_reformer import ReformerCache
from hf_reformer.modeling.decoding import decoding_attention, grouped_attention
from hf_reformer.modeling.decoding.bucket_order import BucketOrder
from hf_reformer.modeling.memory.allocations import AllocationLedger
from scripts.bench import benchmark_prefill


def groups_of(size, many=2, most_numbers=2**22):
    """Pieces of `many` tokens are grouped, by `size`; what it was called for."""
    calls, attend = [], grouped_attention.GroupedAttention.__call__
    stack = ExitStack()
    for place, name, value in (
        (grouped_attention, "GROUP", size),
        (grouped_attention, "MANY_TOKENS", many),
        (grouped_attention, "MANY_IN_GROUP", 0),
        (decoding_attention, "MOST_NUMBERS", most_numbers),
        (
            grouped_attention.GroupedAttention,
            "__call__",
            lambda *given: calls.append(given[1].shape[1]) or attend(*given),
        ),
        (BucketOrder, "most_recent", 1),
    ):
        stack.enter_context(patch.object(place, name, value))
    return stack, calls


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    kinds=st.sampled_from([["lsh", "lsh"], ["local", "lsh"]]),
    positions=st.sampled_from(sorted(POSITIONS)),
    splits=st.lists(st.integers(2, 50), min_size=2, max_size=4).filter(lambda splits: 20 < sum(splits) <= 120),
    paddings=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    scattered=st.booleans(),
    num_buckets=st.sampled_from([2, 8]),
    num_hashes=st.integers(1, 3),
    threshold=st.sampled_from([None, 40]),
    before=st.integers(0, 2),
    value_shift=st.sampled_from([0, 1]),
    size=st.sampled_from([1, 3, 16]),
    most_numbers=st.sampled_from([1, 2**22]),
    seed=st.integers(0, 99),
)
@example(["lsh", "lsh"], "axial", [40, 60], [0, 0, 0], False, 8, 2, None, 1, 1, 3, 1, 0)
# Padding has the code of the token before it.
@example(["lsh", "lsh"], "LSH rotary", [2, 24], [0, 3, 0], True, 2, 1, None, 1, 0, 3, 2**22, 0)
def test_equals_one_forward_pass_over_each_row(
    kinds,
    positions,
    splits,
    paddings,
    scattered,
    num_buckets,
    num_hashes,
    threshold,
    before,
    value_shift,
    size,
    most_numbers,
    seed,
):
    torch.manual_seed(seed)
    model = make(
        attn_layers=kinds,
        num_hashes=num_hashes,
        num_buckets=num_buckets,
        full_attention_threshold=threshold,
        lsh_num_chunks_before=before,
        lsh_value_shift=value_shift,
        **WINDOWS,
        **POSITIONS[positions],
    )
    length = sum(splits)
    rows, ids, mask = rows_with_padding(length, paddings, scattered)
    patched, calls = groups_of(size, most_numbers=most_numbers)
    with patched:
        logits = cached_logits(model, ids, splits, mask)
    assert calls or threshold == 40 or length - splits[-1] < 16
    for row, is_real, actual in zip(rows, mask, logits, strict=True):
        with torch.no_grad():
            close(actual[is_real.bool()], model(row[None]).logits[0])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    splits=st.lists(st.integers(2, 50), min_size=2, max_size=4).filter(lambda splits: 20 < sum(splits) <= 120),
    paddings=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    num_buckets=st.sampled_from([2, 8]),
    num_hashes=st.integers(1, 3),
    before=st.sampled_from([0, 1, 2, 4]),
    after=st.integers(0, 1),
    circular=st.booleans(),
    across=st.booleans(),
    value_shift=st.sampled_from([0, 1]),
    size=st.sampled_from([1, 3, 16]),
    most_numbers=st.sampled_from([1, 2**22]),
    seed=st.integers(0, 99),
)
@example([40, 60], [0, 0, 0], 8, 2, 1, 0, True, True, 1, 3, 2**22, 0)
# The circle is shorter than what a chunk looks at.
@example([3, 20], [0, 0, 0], 2, 1, 4, 0, True, True, 0, 3, 2**22, 0)
def test_chunks_equal_looking_keys_up_one_by_one(
    splits, paddings, num_buckets, num_hashes, before, after, circular, across, value_shift, size, most_numbers, seed
):
    torch.manual_seed(seed)
    model = make(
        attn_layers=["lsh", "lsh"],
        num_hashes=num_hashes,
        num_buckets=num_buckets,
        lsh_num_chunks_before=before,
        lsh_num_chunks_after=after,
        circular_look_around=circular,
        attend_across_buckets=across,
        lsh_value_shift=value_shift,
    )
    _, ids, mask = rows_with_padding(sum(splits), paddings, scattered=False)
    logits = []
    for many in (2, 1000):
        patched, calls = groups_of(size, many, most_numbers)
        with patched:
            logits.append(cached_logits(model, ids, splits, mask))
        assert not calls if many > 2 else calls or before == 4
    close(*(each[mask.bool()] for each in logits))


def test_single_tokens_keys_that_count_once_and_maps_are_left_to_the_other_way():
    windows = {"attn_layers": ["lsh", "lsh"], **WINDOWS}
    ids = random_ids(1, 100)
    for changes, splits, how in (
        ({"num_hashes": 2, "allow_duplicate_attention": False}, [50, 50], {}),
        ({"num_hashes": 1}, [98, 1, 1], {}),
        ({"num_hashes": 1}, [50, 50], {"output_attentions": True}),
    ):
        patched, calls = groups_of(4)
        with patched, torch.no_grad():
            model, cache, first = make(**windows, **changes), None, 0
            for count in splits:
                cache = model(ids[:, first : first + count], cache=cache, use_cache=True, **how).cache
                first += count
        assert not calls


def test_codes_that_are_not_sorted_yet_are_waited_for():
    """A piece behind single tokens; what is long enough to be grouped sorts all."""
    model = make(attn_layers=["lsh", "lsh"], num_hashes=1, **WINDOWS)
    ids, splits = random_ids(1, 120), [40, 1, 1, 3, 70, 1, 4]
    patched, calls = groups_of(4, many=3)
    with patched, patch.object(BucketOrder, "most_recent", 8), torch.no_grad():
        close(cached_logits(model, ids, splits), model(ids).logits)
    # Two layers.
    assert calls == [70, 70]


def test_short_pieces_behind_a_long_text_are_left_to_the_other_way():
    """Of 400 tokens, in chunks of 16, 50 are two of a chunk, expected, and fewer are less."""
    model, ids = make(attn_layers=["lsh"], num_hashes=1, **WINDOWS), random_ids(1, 400)
    for splits, expected in (([350, 50], [50]), ([352, 48], [])):
        patched, calls = groups_of(4)
        with patched, patch.object(grouped_attention, "MANY_IN_GROUP", 2):
            cached_logits(model, ids, splits)
        assert calls == expected


def test_keys_are_gathered_once_for_a_group():
    """300 tokens of two buckets; each alone would gather the 16 keys before it."""
    model = make(torch.float32, attn_layers=["lsh"], num_hashes=1, num_buckets=2, **WINDOWS)
    peaks = []
    for many in (64, 1000):
        cache = ReformerCache(model.config)
        cached_logits(model, random_ids(1, 100), [100], cache=cache)
        with patch.object(grouped_attention, "MANY_TOKENS", many), AllocationLedger() as ledger:
            cached_logits(model, random_ids(1, 300), [300], cache=cache)
        peaks.append(ledger.peak)
    assert peaks[0] < peaks[1] / 2


def test_memory_is_bounded_by_the_piece():
    model = make(torch.float32, attn_layers=["lsh"], num_hashes=1, num_buckets=64)
    peaks = []
    for most_numbers in (2**12, 2**22):
        patched, calls = groups_of(8, most_numbers=most_numbers)
        cache = ReformerCache(model.config)
        with patched:
            cached_logits(model, random_ids(1, 100), [100], cache=cache)
            with AllocationLedger() as ledger:
                cached_logits(model, random_ids(1, 800), [800], cache=cache)
        assert calls
        peaks.append(ledger.peak)
    assert peaks[0] < peaks[1] / 2


def test_equal_keys_with_large_values_do_not_overflow_in_half_precision():
    """The mean of 40 values of 4,000 is one of them, and their sum no number of float16."""
    model = make(torch.float16, attn_layers=["lsh"], num_hashes=2, lsh_num_chunks_before=4)
    attention = model.reformer.encoder.layers[0].attention.self_attention
    attention.value.register_forward_hook(lambda *given: torch.full_like(given[2], 4000.0))
    outputs = []
    attention.register_forward_hook(lambda *given: outputs.append(given[2][0]))
    patched, calls = groups_of(8)
    with patched:
        cached_logits(model, torch.ones(1, 200).long(), [100, 100])
    assert calls and (outputs[1] == 4000).all()


@pytest.mark.parametrize("changes", [WINDOWS, {}], ids=["windows", "chunks"])
def test_gradients_are_those_of_looking_keys_up_one_by_one(changes):
    model = make(attn_layers=["lsh", "lsh"], num_hashes=2, lsh_value_shift=1, **changes)
    ids, gradients = random_ids(2, 100), []
    for many in (2, 1000):
        patched, calls = groups_of(4, many, most_numbers=2**10)
        with patched:
            with torch.no_grad():
                cache = model(ids[:, :50], use_cache=True).cache
            model.zero_grad()
            model(ids[:, 50:], cache=cache, use_cache=True).logits.square().sum().backward()
        assert bool(calls) == (many == 2)
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_benchmark_and_its_table(tmp_path, capsys):
    sizes = ["--length", "512", "--piece", "128", "--turns", "2", "--hidden_size", "64"]
    threads = torch.get_num_threads()
    benchmark_prefill.main([*sizes, "--out", str(tmp_path / "figures.json")])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["setting"], row["rounds"]) for row in rows] == [
        ("windows", 1),
        ("windows", 4),
        ("chunks", 1),
        ("chunks", 4),
    ]
    assert all(0 < row["at_once_s"][0] <= row["at_once_s"][1] for row in rows)
    assert [benchmark_prefill.line_of(row) for row in rows] == capsys.readouterr().out.splitlines()[-4:]
    page = (benchmark_prefill.DOCS / "performance.md").read_text(encoding="utf-8")
    figures = json.loads((benchmark_prefill.DOCS / "prefill.json").read_text(encoding="utf-8"))
    assert all(benchmark_prefill.line_of(row) in page for row in figures["rows"])


def test_nothing_is_timed_where_results_differ(monkeypatch):
    monkeypatch.setattr(benchmark_prefill, "TOLERANCE", -1)
    shape = benchmark_prefill.Shape(64, 1, hidden_size=16, num_heads=2, num_layers=1, feed_forward_size=16)
    with pytest.raises(ValueError, match=r"windows, 1 rounds: logits are .* apart, so nothing is timed"):
        benchmark_prefill.measure(shape, 32, 1)
