"""The chunked feed-forward layer: the whole layer's numbers and gradients, a chunk's memory."""

import pytest
import torch
from allocations import Allocations
from tiny_models import make_model, random_ids, tiny_config
from torch import nn

from hf_reformer import ReformerForCausalLM
from hf_reformer.modeling.layers.feed_forward import ChunkReformerFeedForward


LENGTH, HIDDEN, SIZE = 17, 32, 48


def make(chunk_size, dtype=torch.float64, **changes):
    torch.manual_seed(1)
    return ChunkReformerFeedForward(tiny_config(chunk_size_feed_forward=chunk_size, **changes)).to(dtype)


def run(module, hidden_states, gradient):
    hidden_states = hidden_states.clone().requires_grad_()
    output = module(hidden_states)
    output.backward(gradient.to(output.dtype))
    return [output.detach(), hidden_states.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("hidden_act", ["relu", "gelu"])
def test_definition(hidden_act, gated):
    module = make(0, hidden_act=hidden_act, gated_feed_forward=gated)
    hidden_states = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    norm, dense, output = module.layer_norm, module.dense.dense, module.output.dense
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    normalised = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() * norm.weight + norm.bias
    inside = normalised @ dense.weight.T + dense.bias
    inside, factor = (inside[..., :SIZE], inside[..., SIZE:]) if gated else (inside, 1)
    inside = inside.clamp(min=0) if hidden_act == "relu" else inside * (1 + torch.erf(inside / 2**0.5)) / 2
    inside = inside * factor
    expected = inside @ output.weight.T + output.bias
    torch.testing.assert_close(module(hidden_states), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 17, 18, 100])
def test_chunks_equal_the_whole(chunk_size, contiguous):
    hidden_states, gradient = torch.randn(2, 2, LENGTH, HIDDEN, dtype=torch.float64)
    if not contiguous:
        hidden_states = hidden_states.mT.contiguous().mT
    expected = run(make(0), hidden_states, gradient)
    for ours, whole in zip(run(make(chunk_size), hidden_states, gradient), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_whole_in_it(dtype):
    hidden_states, gradient = torch.randn(2, 2, LENGTH, HIDDEN, dtype=torch.float64)
    exact = run(make(0), hidden_states, gradient)
    whole, chunked = (run(make(size, dtype), hidden_states.to(dtype), gradient) for size in (0, 4))
    for ours, theirs, truth in zip(chunked, whole, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("chunk_size", [1, 4, 17, 100])
def test_split_gives_pieces_of_the_chunk_size(chunk_size):
    sequence = torch.randn(2, LENGTH, 3)
    pieces = make(chunk_size).split(sequence)
    assert all(piece.shape[1] == chunk_size for piece in pieces[:-1])
    assert 0 < pieces[-1].shape[1] <= chunk_size
    assert torch.equal(torch.cat(pieces, dim=1), sequence)
    assert len(make(0).split(sequence)) == 1


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_dropout_inside_and_behind(chunk_size):
    module = make(chunk_size, hidden_dropout_prob=0.25)
    hidden_states = torch.randn(1, 200, HIDDEN, dtype=torch.float64)
    inside = []
    module.output.dense.register_forward_pre_hook(lambda module, args: inside.append(args[0]))
    output = module(hidden_states)
    # Five standard deviations around a quarter of the 6400 outputs.
    assert (output == 0).double().mean() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 6400) ** 0.5)
    before = nn.functional.linear(torch.cat(inside, 1), module.output.dense.weight, module.output.dense.bias)
    kept = output != 0
    torch.testing.assert_close(output[kept], before[kept] / 0.75)

    inside.clear()
    with torch.no_grad():
        module.dense.dense.weight.zero_()
        module.dense.dense.bias.fill_(1.0)
    module(hidden_states)
    dropped = torch.cat(inside, 1)
    assert (dropped == 0).double().mean() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / (200 * SIZE)) ** 0.5)
    torch.testing.assert_close(dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 1 / 0.75))

    assert torch.equal(module.eval()(hidden_states), module(hidden_states))
    assert module(hidden_states).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chunk_size", [0, 8])
def test_the_wide_activations_never_exist_when_chunked(chunk_size, training):
    """Not in forward, and not in the backward of the reversible stack either."""
    length = 64
    model = make_model(
        ReformerForCausalLM,
        feed_forward_size=512,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        chunk_size_feed_forward=chunk_size,
        hidden_dropout_prob=0.1,
    ).train(training)
    ids = random_ids(1, length)
    weights = max(parameter.numel() for parameter in model.parameters())
    with Allocations() as allocations:
        model(ids, labels=ids).loss.backward()
    assert weights < length * 512
    if chunk_size:
        assert allocations.largest < length * 512
        assert (1, chunk_size, 512) in allocations.shapes
    else:
        assert allocations.largest == length * 512
