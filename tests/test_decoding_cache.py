"""
Cached against uncached: at every position the same logits.

Where LSH chunks are cut as in stock Reformer, a later token moves the borders of earlier chunks, so the uncached model
is the one whose layers, each call, see the text up to that call: `grown_logits`. With windows (`lsh_sliding_window`)
later tokens change nothing, and the uncached model is one forward pass over the whole text.
"""

import copy
import doctest
import importlib
import itertools
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import POSITIONS, STACKS, TIED, WINDOWS, left_padded, make_model, random_ids
from transformers import DynamicCache

from hf_reformer import ReformerCache, ReformerForCausalLM, ReformerForMaskedLM, ReformerModel
from hf_reformer.modeling.decoding import decoding_attention
from hf_reformer.modeling.decoding.cache_naming import CACHE_NAME
from hf_reformer.modeling.decoding.decoding_cache import CROP_REACH
from hf_reformer.modeling.layers.full_attention import full_attention_mask
from hf_reformer.modeling.layers.reversible import ReversibleTape
from hf_reformer.modeling.layers.rotary_positions import rotation_of
from hf_reformer.modeling.memory.allocations import AllocationLedger
from hf_reformer.modeling.ops.chunking import circle_length_of
from scripts.bench.benchmark_generation import bytes_held_by


LONG = {"axial_pos_shape": [32, 32], "max_position_embeddings": 1024}
SPLITS = st.lists(st.one_of(st.just(1), st.integers(2, 40), st.integers(60, 80)), min_size=1, max_size=10)
WINDOW_STACKS = {**STACKS, "two LSH": ["lsh", "local", "lsh"]}


def make(dtype=torch.float64, **changes):
    return make_model(ReformerForCausalLM, **(LONG | changes)).to(dtype)


def close(actual, expected, tolerance=1e-10):
    assert (actual - expected).norm() <= tolerance * expected.norm()


@torch.no_grad()
def cached_logits(model, ids, splits, mask=None, cache=None):
    cache = ReformerCache(model.config) if cache is None else cache
    outputs, start = [], cache.get_seq_length()
    for piece in ids.split(splits, dim=1):
        start += piece.shape[1]
        seen = None if mask is None else mask[:, :start]
        outputs.append(model(piece, attention_mask=seen, cache=cache).logits)
    assert cache.get_seq_length() == start
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def grown_logits(model, ids, splits):
    """Without a cache: each layer computes the text so far anew in each call, from what the layer below gave."""
    reformer, ends = model.reformer, list(itertools.accumulate(splits))
    embeddings, _ = reformer.encoder._begin_streams(reformer.embeddings(ids))
    streams = embeddings, embeddings
    for layer in reformer.encoder.layers:
        pieces, start = [], 0
        for end in ends:
            seen = tuple(stream[:, :end] for stream in streams)
            full_mask = full_attention_mask(model.config, seen[1], None)
            output = layer(
                *seen,
                tape=ReversibleTape(seen),
                stores_output=False,
                circle_length=circle_length_of(model.config, end),
                full_attention_mask=full_mask,
                rotation=rotation_of(model.config, None, seen[1]),
            )
            pieces.append([stream[:, start:] for stream in output[:2]])
            start = end
        streams = tuple(torch.cat(stream, dim=1) for stream in zip(*pieces, strict=True))
    return model.lm_head(reformer.encoder.layer_norm(torch.cat(streams, dim=-1)))


def rows_with_padding(length, paddings, scattered=False):
    """Rows that are shorter than `length` by their padding, but not empty; their ids and mask side by side."""
    rows = [random_ids(1, length)[0][min(padding, length - 1) :] for padding in paddings]
    ids, mask = left_padded(rows, length)
    if scattered:
        mask = mask.gather(1, torch.stack([torch.randperm(length) for _ in rows]))
        ids = torch.zeros_like(ids).masked_scatter(mask.bool(), torch.cat(rows))
    return rows, ids, mask


# The promise.


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    stack=st.sampled_from(sorted(WINDOW_STACKS)),
    positions=st.sampled_from(sorted(POSITIONS)),
    splits=SPLITS,
    paddings=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    scattered=st.booleans(),
    num_hashes=st.sampled_from([1, 2, 4]),
    num_buckets=st.sampled_from([2, 8, [4, 8]]),
    duplicates=st.booleans(),
    threshold=st.sampled_from([None, 40]),
    before=st.integers(0, 2),
    value_shift=st.sampled_from([0, 1]),
    streams=st.sampled_from([{}, TIED]),
    seed=st.integers(0, 99),
)
def test_equals_one_forward_pass_over_each_row(
    stack,
    positions,
    splits,
    paddings,
    scattered,
    num_hashes,
    num_buckets,
    duplicates,
    threshold,
    before,
    value_shift,
    streams,
    seed,
):
    """Any split, and rows of different lengths with padding in front or anywhere, against each row alone and whole."""
    torch.manual_seed(seed)
    model = make(
        lsh_value_shift=value_shift,
        attn_layers=WINDOW_STACKS[stack],
        num_hashes=num_hashes,
        num_buckets=num_buckets,
        allow_duplicate_attention=duplicates,
        full_attention_threshold=threshold,
        local_num_chunks_before=before,
        lsh_num_chunks_before=before,
        **WINDOWS,
        **streams,
        **POSITIONS[positions],
    )
    length = sum(splits)
    rows, ids, mask = rows_with_padding(length, paddings, scattered)
    logits = cached_logits(model, ids, splits, mask)
    for row, is_real, actual in zip(rows, mask, logits, strict=True):
        with torch.no_grad():
            close(actual[is_real.bool()], model(row[None]).logits[0])


@settings(max_examples=60, deadline=None)
@given(
    stack=st.sampled_from(sorted(STACKS)),
    positions=st.sampled_from(sorted(POSITIONS)),
    splits=SPLITS,
    num_hashes=st.sampled_from([1, 2, 4]),
    circular=st.booleans(),
    across=st.booleans(),
    duplicates=st.booleans(),
    around=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    threshold=st.sampled_from([None, 40]),
    chunks=st.sampled_from([(16, 16), (8, 16), (16, 8)]),
    value_shift=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
# The circle is longer than the local layer's chunks alone would make it, and its last chunk looks at the first one.
@pytest.mark.slow
@example(
    stack="mixed",
    positions="axial",
    splits=[17, 3, 5, 4],
    num_hashes=1,
    circular=True,
    across=True,
    duplicates=True,
    around=(1, 1),
    threshold=None,
    chunks=(8, 16),
    value_shift=0,
    seed=0,
)
def test_equals_layers_that_see_the_text_up_to_each_call(
    stack, positions, splits, num_hashes, circular, across, duplicates, around, threshold, chunks, value_shift, seed
):
    torch.manual_seed(seed)
    model = make(
        lsh_value_shift=value_shift,
        attn_layers=STACKS[stack],
        num_hashes=num_hashes,
        circular_look_around=circular,
        attend_across_buckets=across,
        allow_duplicate_attention=duplicates,
        local_num_chunks_before=around[0],
        local_num_chunks_after=around[1],
        lsh_num_chunks_before=around[0],
        lsh_num_chunks_after=around[1],
        full_attention_threshold=threshold,
        local_attn_chunk_length=chunks[0],
        lsh_attn_chunk_length=chunks[1],
        **POSITIONS[positions],
    )
    ids = random_ids(2, sum(splits))
    close(cached_logits(model, ids, splits), grown_logits(model, ids, splits))


@settings(max_examples=40, deadline=None)
@given(
    splits=SPLITS,
    paddings=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    threshold=st.sampled_from([None, 40]),
    across=st.booleans(),
    value_shift=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
# A row below the threshold beside one above it.
@pytest.mark.slow
@example(splits=[50, 1, 1], paddings=[0, 20, 40], threshold=40, across=False, value_shift=0, seed=0)
def test_chunks_of_padded_rows_are_those_of_the_row_alone(splits, paddings, threshold, across, value_shift, seed):
    torch.manual_seed(seed)
    model = make(
        lsh_value_shift=value_shift,
        attn_layers=STACKS["mixed"],
        circular_look_around=False,
        full_attention_threshold=threshold,
        attend_across_buckets=across,
    )
    length = sum(splits)
    rows, ids, mask = rows_with_padding(length, paddings)
    logits = cached_logits(model, ids, splits, mask)
    ends = list(itertools.accumulate(splits))
    for row, actual in zip(rows, logits, strict=True):
        own_ends = [max(0, end - length + len(row)) for end in ends]
        own_splits = [end - start for start, end in itertools.pairwise([0, *own_ends]) if end > start]
        close(actual[-len(row) :], grown_logits(model, row[None], own_splits)[0])


def test_stock_chunks_depend_on_later_tokens_and_windows_do_not():
    """Why there are two references: no cache can follow borders that move."""
    ids = random_ids(1, 200)
    for settings_, expected in ({"circular_look_around": False}, False), (WINDOWS, True):
        model = make(attn_layers=["lsh", "lsh"], **settings_)
        with torch.no_grad():
            whole, part = model(ids).logits[:, :100], model(ids[:, :100]).logits
        assert torch.allclose(whole, part, rtol=1e-9, atol=1e-9) is expected


@pytest.mark.slow
@pytest.mark.parametrize("num_hashes", [1, 2, 4])
@pytest.mark.parametrize("stack", WINDOW_STACKS)
def test_float32_and_bfloat16(stack, num_hashes):
    """In a padded batch of 4: float32 to 1e-5; in bfloat16 neither is further from exact than the other."""
    changes = WINDOWS | {"attn_layers": WINDOW_STACKS[stack], "num_hashes": num_hashes}
    ids, mask = left_padded([random_ids(1, length)[0] for length in (150, 149, 100, 20)])
    real = mask.bool()
    with torch.no_grad():
        exact = make(**changes)(ids, attention_mask=mask).logits[real]
        for dtype in (torch.float32, torch.bfloat16):
            model = make(dtype, **changes)
            uncached = model(ids, attention_mask=mask).logits[real]
            cached = cached_logits(model, ids, [60, 30, *[1] * 60], mask)[real]
            if dtype == torch.float32:
                close(cached, uncached, 1e-5)
            assert (cached - exact).norm() <= 1.5 * (uncached - exact).norm()


def test_masks_count_less_than_scores_of_any_size():
    """Also where a token sees only keys that it scores far below zero, exactly and by buckets."""
    model = make(attn_layers=STACKS["mixed"], num_hashes=4, full_attention_threshold=30, **WINDOWS)
    for name, weight in model.named_parameters():
        if "query" in name:
            weight.data *= 1e12
    ids = random_ids(2, 60)
    with torch.no_grad():
        close(cached_logits(model, ids, [1, 19, *[1] * 40]), model(ids).logits)


@pytest.mark.parametrize(
    "settings_",
    [WINDOWS, WINDOWS | {"lsh_value_shift": 1}, {"circular_look_around": False}],
    ids=["windows", "successors", "chunks"],
)
def test_masked_tokens_inside_a_text_stay_unseen(settings_):
    """Their ids do not matter, and the others get what the whole masked text gives."""
    model = make(
        attn_layers=["full", "local"] if "lsh_sliding_window" not in settings_ else STACKS["mixed"], **settings_
    )
    ids, mask = random_ids(3, 120), torch.ones(3, 120, dtype=torch.long)
    # Before a text, across the first split, and later.
    mask[0, :30], mask[1, 30:50], mask[2, 100:105] = 0, 0, 0
    logits = cached_logits(model, ids, [35, 20, *[1] * 65], mask)
    other = torch.where(mask.bool(), ids, random_ids(3, 120))
    assert torch.equal(cached_logits(model, other, [35, 20, *[1] * 65], mask)[mask.bool()], logits[mask.bool()])
    with torch.no_grad():
        close(logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("value_shift", [0, 1])
def test_the_text_goes_on_behind_padding_of_a_prompt(value_shift):
    model = make(attn_layers=STACKS["mixed"], lsh_value_shift=value_shift, **WINDOWS)
    ids, mask = random_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, 20:40] = 0
    for splits in ([40, *[1] * 20], [30, 10, 20]):
        cache = ReformerCache(model.config)
        logits = cached_logits(model, ids, splits, mask, cache)
        with torch.no_grad():
            close(logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])
        cache.crop(-25)
        again = cached_logits(model, ids[:, 35:], [25], mask, cache)
        close(again[mask[:, 35:].bool()], logits[:, 35:][mask[:, 35:].bool()])


@pytest.mark.parametrize("stack", STACKS)
def test_pieces_change_nothing(stack, monkeypatch):
    """Memory for a token at a time."""
    model = make(attn_layers=STACKS[stack], **WINDOWS)
    ids, mask = left_padded([random_ids(1, length)[0] for length in (90, 60)])
    expected = cached_logits(model, ids, [40, 50], mask)
    monkeypatch.setattr(decoding_attention, "MOST_NUMBERS", 1)
    close(cached_logits(model, ids, [40, 50], mask), expected)
    close(cached_logits(model, ids, [40, 50]), model(ids).logits)


def test_autocast_may_come_and_go():
    model = make(torch.float32, attn_layers=STACKS["mixed"], **WINDOWS)
    ids = random_ids(2, 100)
    for first, second in ((True, False), (False, True)):
        cache = ReformerCache(model.config)
        for piece, enabled in ((ids[:, :60], first), (ids[:, 60:], second)):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = cached_logits(model, piece, [10] * (piece.shape[1] // 10), cache=cache)
        with torch.no_grad():
            close(logits.float(), model(ids).logits[:, 60:], 0.1)


# What `generate` does with a cache.


def fork(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("stack", ["lsh", "mixed"])
@pytest.mark.parametrize("removed", [1, 5, 64, 90, 200, 240])
def test_crop_goes_back(removed, stack):
    model = make(attn_layers=STACKS[stack], **WINDOWS)
    rows = [random_ids(1, length)[0] for length in (250, 180)]
    ids, mask = left_padded(rows)
    cache = ReformerCache(model.config)
    cached_logits(model, ids, [100, 80, *[1] * 70], mask, cache)
    cache.crop(-removed)
    cache.crop(0)
    assert cache.get_seq_length() == 250 - removed
    others = random_ids(2, 30)
    more = torch.ones(2, 30, dtype=torch.long)
    whole, seen = torch.cat([ids[:, : 250 - removed], others], 1), torch.cat([mask[:, : 250 - removed], more], 1)
    expected = cached_logits(model, whole, [whole.shape[1]], seen)[:, -30:]
    actual = cached_logits(model, others, [1] * 30, seen, cache)
    # A row may have been cropped to before its first token.
    kept = seen[:, : 250 - removed].any(dim=1)
    close(actual[kept], expected[kept])


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("removed", [3, 40, 70])
def test_crop_with_stock_chunks(removed, circular):
    """Below 16 tokens, the threshold, and above. One LSH layer on top, so that what is left is what it was."""
    model = make(attn_layers=["full", "lsh"], circular_look_around=circular)
    ids, others = random_ids(2, 80), random_ids(2, 40)
    cache = ReformerCache(model.config)
    cached_logits(model, ids, [50, *[1] * 30], cache=cache)
    # As assisted decoding of transformers 5.17 does.
    cache.crop(torch.tensor(-removed))
    kept = 80 - removed
    actual = cached_logits(model, others, [1] * 40, cache=cache)
    close(actual, grown_logits(model, torch.cat([ids[:, :kept], others], dim=1), [kept, *[1] * 40])[:, kept:])


def test_several_crops_reach_no_further_than_one():
    model = make(attn_layers=["local"], **WINDOWS)
    cache = ReformerCache(model.config)
    cached_logits(model, random_ids(1, 500), [500], cache=cache)
    cache.crop(-200)
    cached_logits(model, random_ids(1, 20), [20], cache=cache)
    with pytest.raises(ValueError, match="can take back 76 tokens at most"):
        cache.crop(-77)
    cache.crop(-76)


def test_crop_to_nothing_and_reset_begin_anew():
    model = make(attn_layers=STACKS["mixed"], **WINDOWS)
    ids = random_ids(2, 60)
    expected = cached_logits(model, ids, [30, 30])
    for forget in (lambda cache: cache.crop(-90), lambda cache: cache.reset()):
        cache = ReformerCache(model.config)
        cached_logits(model, random_ids(3, 90), [90], cache=cache)
        forget(cache)
        assert cache.get_seq_length() == 0
        assert torch.equal(cached_logits(model, ids, [30, 30], cache=cache), expected)


def test_crop_further_than_a_local_layer_remembers_is_refused():
    model = make(attn_layers=["local"], **WINDOWS)
    cache = ReformerCache(model.config)
    cached_logits(model, random_ids(1, 600), [600], cache=cache)
    with pytest.raises(ValueError, match=rf"can take back {CROP_REACH} tokens at most.*reset\(\)"):
        cache.crop(-CROP_REACH - 1)
    for wrong in (1, -601):
        with pytest.raises(ValueError, match="negative number of tokens"):
            cache.crop(wrong)
    cache.crop(-CROP_REACH)


@pytest.mark.parametrize("stack", STACKS)
def test_rows_can_be_reordered_repeated_and_selected(stack):
    model = make(attn_layers=STACKS[stack], **WINDOWS)
    ids, mask = left_padded([random_ids(1, length)[0] for length in (90, 70, 40)])
    mask[0, 75:85] = 0
    cache = ReformerCache(model.config)
    cached_logits(model, ids, [60, *[1] * 30], mask, cache)
    changes = {
        "reorder_cache": ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        "batch_select_indices": ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
        "nothing": ([0, 1, 2], lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2]))),
    }
    for rows, change in changes.values():
        changed = fork(cache)
        change(changed)
        assert changed.batch_size == len(rows)
        more = random_ids(len(rows), 20)
        seen = torch.cat([mask[rows], torch.ones_like(more)], dim=1)
        expected = cached_logits(model, torch.cat([ids[rows], more], dim=1), [110], seen)[:, 90:]
        close(cached_logits(model, more, [1] * 20, seen, changed), expected)


@pytest.mark.parametrize("copied", [fork, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_goes_on_by_itself(copied):
    model = make(attn_layers=STACKS["mixed"], **WINDOWS)
    ids, more = random_ids(2, 70), random_ids(2, 40)
    cache = ReformerCache(model.config)
    cached_logits(model, ids, [70], cache=cache)
    copy_ = copied(cache)
    first = cached_logits(model, more, [1] * 40, cache=cache)
    assert torch.equal(cached_logits(model, more, [1] * 40, cache=copy_), first)


# Buckets and rotations.


def test_the_number_of_buckets_stays_while_the_text_grows():
    """With `num_buckets=None` it is the one for `max_length`, or for the first call that hashes."""
    model = make(attn_layers=["lsh", "lsh"], **(WINDOWS | {"num_buckets": None}))
    ids = random_ids(2, 300)
    for max_length, splits, expected in ((300, [40, 260], 32), (None, [30, 10, 260], 4), (None, [300], 32)):
        cache = ReformerCache(model.config, max_length=max_length)
        logits = cached_logits(model, ids, splits, cache=cache)
        fixed = make(attn_layers=["lsh", "lsh"], **(WINDOWS | {"num_buckets": expected}))
        with torch.no_grad():
            close(logits, fixed(ids).logits)


def test_the_number_of_buckets_for_a_length_is_that_of_the_model():
    """On the circle, too, which the local layers' chunks make longer."""
    for circular in (True, False):
        model = make(
            attn_layers=["local", "lsh"], num_buckets=None, local_attn_chunk_length=128, circular_look_around=circular
        )
        ids = random_ids(1, 65)
        close(cached_logits(model, ids, [65], cache=ReformerCache(model.config, max_length=65)), model(ids).logits)


def test_rotations_stay_in_the_cache():
    model = make(attn_layers=["lsh", "lsh"], num_hashes=1, **WINDOWS)
    ids = random_ids(1, 100)
    with torch.no_grad():
        expected = model(ids, num_hashes=3).logits
        cache = ReformerCache(model.config)
        first = model(ids[:, :60], num_hashes=3, cache=cache).logits
        # The number is that of the cache now.
        second = model(ids[:, 60:], cache=cache).logits
        close(torch.cat([first, second], dim=1), expected)
        with pytest.raises(ValueError, match=r"`num_hashes=2`, but .* made with 3 hashing rounds"):
            model(ids[:, :1], num_hashes=2, cache=cache)


# Memory.


def test_memory_per_token():
    heads, size, rounds = 2, 8, 3
    sizes = {}
    for kind in ("lsh", "local", "full"):
        model = make(torch.float32, attn_layers=[kind], num_hashes=rounds, **WINDOWS)
        for length in (300, 900):
            cache = ReformerCache(model.config)
            cached_logits(model, random_ids(1, length), [length], cache=cache)
            sizes[kind, length] = bytes_held_by(cache.layers[0])
    per_token = {kind: (sizes[kind, 900] - sizes[kind, 300]) / 600 for kind in ("lsh", "local", "full")}
    assert per_token["local"] == 0
    assert per_token["full"] == 2 * 4 * heads * size
    assert per_token["lsh"] == 2 * 4 * heads * size + 4 * heads + 8 * heads * rounds


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_a_step_allocates_nothing_of_the_text_s_length(kind):
    """Merging the order, once in 64 steps, and growing the buffers excepted."""
    model = make(torch.float32, attn_layers=[kind], **WINDOWS)
    largest = {}
    for length in (300, 900):
        cache = ReformerCache(model.config)
        cached_logits(model, random_ids(1, length), [length], cache=cache)
        token = random_ids(1, 1)
        with torch.no_grad(), AllocationLedger() as ledger:
            model(token, cache=cache)
        largest[length] = ledger.peak
    assert largest[900] == largest[300]


def test_earlier_tokens_are_not_copied_in_each_step():
    model = make(attn_layers=STACKS["mixed"], **WINDOWS)
    cache = ReformerCache(model.config)
    cached_logits(model, random_ids(1, 100), [100], cache=cache)
    places = set()
    for _ in range(200):
        cached_logits(model, random_ids(1, 1), [1], cache=cache)
        places.add(tuple(layer.rows.keys.data_ptr() for layer in cache.layers))
    # Room is made for a quarter more, and for 64 tokens at least.
    assert len(places) <= 4


def test_prefill_in_pieces_needs_memory_for_a_piece():
    model = make(torch.float32, attn_layers=["local", "lsh"], **WINDOWS)
    peaks = {}
    for splits in ([1000], [50] * 20):
        with AllocationLedger() as ledger:
            cached_logits(model, random_ids(1, 1000), splits)
        peaks[len(splits)] = ledger.peak
    assert peaks[20] < peaks[1] / 2


# Mistakes.


def test_errors_say_what_to_do_and_leave_the_cache_as_it_was():
    model = make(attn_layers=STACKS["mixed"], **WINDOWS)
    ids = random_ids(2, 1000)
    cache = ReformerCache(model.config)
    cached_logits(model, ids, [1000], cache=cache)
    mistakes = {
        "has 1025 tokens, the position embeddings reach 1024": {"input_ids": random_ids(2, 25)},
        "holds 2 rows, the input has 3": {"input_ids": random_ids(3, 1)},
        r"with the 1000 tokens in the cache \[2, 1001\], but has \[2, 1\]": {
            "input_ids": ids[:, :1],
            "attention_mask": torch.ones(2, 1),
        },
        "must lie between 0 and 49": {"input_ids": ids[:, :1] + 50},
    }
    for message, inputs in mistakes.items():
        with pytest.raises(ValueError, match=message):
            model(**inputs, cache=cache)
    more = random_ids(2, 20)
    with torch.no_grad():
        close(cached_logits(model, more, [20], cache=cache), model(torch.cat([ids, more], dim=1)).logits[:, 1000:])


def test_where_a_cache_cannot_be_used():
    ids = random_ids(1, 5)
    model = make(**WINDOWS)
    with pytest.raises(ValueError, match=r"is a DynamicCache; a Reformer takes a `hf_reformer\.ReformerCache`"):
        model(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match=r"call `model\.eval\(\)`"):
        model.train()(ids, cache=ReformerCache(model.config))
    assert model(ids, use_cache=True).get(CACHE_NAME) is None
    bidirectional = make_model(ReformerModel, **LONG)
    with pytest.raises(ValueError, match="needs causal attention"):
        bidirectional(ids, cache=ReformerCache(bidirectional.config))
    assert bidirectional(ids, use_cache=True).get(CACHE_NAME) is None
    assert CACHE_NAME not in make_model(ReformerForMaskedLM)(ids, use_cache=True)


def test_a_cache_is_made_where_it_is_asked_for():
    model = make(**WINDOWS)
    ids = random_ids(1, 50)
    assert model(ids).get(CACHE_NAME) is None
    cache = model(ids[:, :30], use_cache=True).get(CACHE_NAME)
    assert cache.get_seq_length() == 30
    close(model(ids[:, 30:], cache=cache).logits, model(ids).logits[:, 30:])


def test_the_example_in_the_docstring():
    results = doctest.testmod(importlib.import_module("hf_reformer.modeling.decoding.decoding_cache"))
    assert results.attempted
    assert not results.failed
