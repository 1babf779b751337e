"""Attention maps of calls with a cache: for each new token the columns so far, as in the map of the whole text."""

import pytest
import torch
from test_decoding_cache import WINDOW_STACKS, close, make
from tiny_models import STACKS, WINDOWS, left_padded, random_ids

from hf_reformer import ReformerCache
from hf_reformer.modeling.decoding import decoding_attention


@torch.no_grad()
def cached_maps(model, ids, splits, mask=None):
    """`[B, H, L, L]` of each layer, put together from each call's rows over the columns so far."""
    cache, calls, start = ReformerCache(model.config), [], 0
    for piece in ids.split(splits, dim=1):
        start += piece.shape[1]
        seen = None if mask is None else mask[:, :start]
        maps = model(piece, attention_mask=seen, cache=cache, output_attentions=True).attentions
        assert all(weights.shape[2:] == (piece.shape[1], start) for weights in maps)
        calls.append([torch.nn.functional.pad(weights, (0, ids.shape[1] - start)) for weights in maps])
    return [torch.cat(of_layer, dim=2) for of_layer in zip(*calls, strict=True)]


@pytest.mark.parametrize(
    "changes", [{"threshold": 40}, {"duplicates": False, "before": 2}, {"threshold": 40, "value_shift": 1}], ids=str
)
@pytest.mark.parametrize("stack", WINDOW_STACKS)
def test_maps_are_the_rows_of_the_whole_map(stack, changes, monkeypatch):
    """At the columns of the batch, for rows of any length, across everything that is done in pieces."""
    model = make(
        attn_layers=WINDOW_STACKS[stack],
        full_attention_threshold=changes.get("threshold"),
        allow_duplicate_attention=changes.get("duplicates", True),
        local_num_chunks_before=changes.get("before", 1),
        lsh_value_shift=changes.get("value_shift", 0),
        num_hashes=3,
        **WINDOWS,
    )
    # The second row begins in a later call; another token is masked within a row.
    ids, mask = left_padded([random_ids(1, length)[0] for length in (110, 70, 104)])
    mask[2, 60] = 0
    real = mask.bool()[:, None].expand(-1, model.config.num_attention_heads, -1)
    monkeypatch.setattr(decoding_attention, "MOST_NUMBERS", 2**14)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_attentions=True).attentions
    for splits in ([38, 1, 1, 50, *[1] * 20], [1, 9, 100]):
        for ours, theirs in zip(cached_maps(model, ids, splits, mask), expected, strict=True):
            assert ours.dtype == theirs.dtype
            close(ours[real], theirs[real])
    # Rows without padding.
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    for ours, theirs in zip(cached_maps(model, ids, [45, 1, 64]), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("circular", [True, False])
def test_maps_with_stock_chunks_are_probabilities(circular):
    model = make(attn_layers=STACKS["mixed"], circular_look_around=circular)
    for weights in cached_maps(model, random_ids(2, 60), [5, 20, *[1] * 35]):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert not weights.triu(1).any()
