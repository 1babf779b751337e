"""Buffers of a cache grow seldom, also beyond the length that it was made for."""

import torch
from tiny_models import POSITIONS, STACKS, WINDOWS, make_model, random_ids

from hf_reformer import ReformerCache, ReformerForCausalLM
from hf_reformer.modeling.decoding.growing import room_for


def test_room_stops_at_most_and_then_grows_on():
    assert room_for(100, 0, None) == 164
    assert room_for(1000, 900, None) == 1125
    assert room_for(100, 0, 120) == 120
    assert room_for(121, 120, 120) == 185
    assert room_for(1000, 999, 120) == 1248


def test_a_text_longer_than_its_cache_was_made_for_is_seldom_copied():
    """The cache of a draft model is made for the first tokens that it proposes."""
    model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"], **WINDOWS, **POSITIONS["rotary"])
    ids, cache = random_ids(1, 300), ReformerCache(model.config, max_length=100)
    buffers = set()
    with torch.no_grad():
        for piece in ids.split([90, *[1] * 210], dim=1):
            model(piece, cache=cache)
            lsh, full = cache.layers[1:]
            buffers |= {("lsh", lsh.rows.capacity), ("full", full.rows.capacity)}
            buffers.add(("order", lsh.order._sorted.shape[3]))
    assert len(buffers) <= 3 * 5
