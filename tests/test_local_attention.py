"""Local attention against a dense definition, in outputs, maps and all gradients."""

import pytest
import torch
from tiny_models import tiny_config

from hf_reformer.modeling.layers.local_attention import LocalSelfAttention


# The third is tested in test_triton.py.
IMPLEMENTATIONS = ["eager", "sdpa"]
CHUNK, HEADS, SIZE, HIDDEN = 8, 2, 8, 32

# `circle` is the length of the circle of chunks, 0 for the next multiple of the chunk length; None for no circle.
CASES = {
    "causal": {"length": 40, "causal": True, "circle": 0},
    "bidirectional": {"length": 40, "circle": 0},
    "one token": {"length": 1, "causal": True, "circle": 1},
    "shorter than a chunk": {"length": 5, "circle": 5},
    "one chunk": {"length": 8, "around": (1, 1), "circle": 8},
    "one token more than a chunk": {"length": 9, "around": (1, 1), "circle": 0},
    "odd length": {"length": 37, "causal": True, "circle": 0},
    "odd length, bidirectional": {"length": 37, "around": (1, 1), "circle": 0},
    "no neighbours": {"length": 37, "around": (0, 0), "circle": 0},
    "far neighbours": {"length": 70, "around": (3, 2), "circle": 0},
    "look ahead only": {"length": 37, "around": (0, 2), "circle": 0},
    "more neighbours than chunks": {"length": 21, "around": (3, 4), "circle": 0},
    "longer circle": {"length": 37, "around": (1, 1), "circle": 64},
    "short on a longer circle": {"length": 3, "around": (1, 1), "circle": 16},
    "no circle": {"length": 37, "around": (1, 1), "circle": None},
    "no circle, causal": {"length": 40, "causal": True, "circle": None},
    "no circle, more neighbours than chunks": {"length": 21, "around": (3, 4), "circle": None},
    "no circle, shorter than a chunk": {"length": 7, "around": (2, 2), "circle": None},
}
MASKS = ("none", "right", "left", "scattered")


def make(implementation="eager", dtype=torch.float64, causal=False, around=(1, 0), circle=0, **changes):
    torch.manual_seed(1)
    config = tiny_config(
        local_attn_chunk_length=CHUNK,
        local_num_chunks_before=around[0],
        local_num_chunks_after=around[1],
        is_decoder=causal,
        circular_look_around=circle is not None,
        attn_implementation=implementation,
        **changes,
    )
    module = LocalSelfAttention(config, 0).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def make_mask(kind, length):
    mask = torch.ones(2, length, dtype=torch.bool)
    if kind == "right":
        mask[1, (length + 1) // 2 :] = False
    elif kind == "left":
        mask[1, : length // 2] = False
    elif kind == "scattered":
        mask[:, 1::3] = False
        mask[1, 3:15] = False
    return None if kind == "none" else mask


def times_visible(length, mask, *, causal=False, around=(1, 0), circle=0):
    """`[B, L, L]`: how often each query has each key in its window, one pair of tokens at a time."""
    circular, padded = circle is not None, circle or (length + CHUNK - 1) // CHUNK * CHUNK
    num_chunks = padded // CHUNK
    times = torch.zeros(2, length, length, dtype=torch.float64)
    for query in range(length):
        for key in range(length):
            if causal and key > query:
                continue
            if (padded if circular else length) <= CHUNK:
                count = 1
            else:
                own = query // CHUNK
                neighbours = [own + offset for offset in range(-around[0], around[1] + 1)]
                if circular:
                    # Further round the circle than once is the chunk itself, as in stock Reformer.
                    neighbours = [c % num_chunks if abs(c - own) < num_chunks else own for c in neighbours]
                count = neighbours.count(key // CHUNK)
            for row in range(2):
                times[row, query, key] = count * (mask is None or bool(mask[row, key]))
    return times


def dense_attention(module, hidden_states, times):
    batch, length = hidden_states.shape[:2]
    query, key, value = (
        (hidden_states @ linear.weight.T).view(batch, length, HEADS, SIZE).transpose(1, 2)
        for linear in (module.query, module.key, module.value)
    )
    scores = query @ key.mT / SIZE**0.5 + times[:, None].log()
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def run(function, module, hidden_states, gradient):
    """Output, and the gradients of the input and of each weight."""
    hidden_states = hidden_states.clone().requires_grad_()
    output = function(hidden_states)[0]
    return output.detach(), *torch.autograd.grad(output, [hidden_states, *module.parameters()], gradient)


def make_inputs(length, mask, dtype=torch.float64):
    hidden_states, gradient = torch.randn(2, 2, length, HIDDEN, dtype=torch.float64)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    # What a masked token itself attends to means nothing.
    return hidden_states.to(dtype), (gradient[..., : HEADS * SIZE] * real[..., None]).to(dtype), real


def circle_length(length, circle):
    return circle if circle != 0 else (length + CHUNK - 1) // CHUNK * CHUNK


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, kind, implementation):
    settings = dict(CASES[case])
    length = settings.pop("length")
    mask = make_mask(kind, length)
    module = make(implementation, **settings)
    hidden_states, gradient, real = make_inputs(length, mask)
    options = {"attention_mask": mask, "circle_length": circle_length(length, settings["circle"])}
    times = times_visible(length, mask, **settings)
    # A masked row means nothing, so it may see itself here.
    times = torch.where(real[..., None], times, torch.eye(length, dtype=torch.float64))

    actual = run(lambda rows: module(rows, **options), module, hidden_states, gradient)
    expected = run(lambda rows: dense_attention(module, rows, times), module, hidden_states, gradient)
    torch.testing.assert_close(actual[0][real], expected[0][real], rtol=1e-10, atol=1e-10)
    for name, ours, theirs in zip(("input", "query", "key", "value"), actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")

    if implementation != "eager":
        return
    output, weights, buckets = module(hidden_states, return_weights=True, **options)
    assert buckets is None
    assert weights.shape == (2, HEADS, length, length)
    rows = real[:, None].expand(-1, HEADS, -1)
    expected_map = dense_attention(module, hidden_states, times)[1]
    torch.testing.assert_close(weights[rows], expected_map[rows], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output[real], actual[0][real], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_count_less_than_scores_of_any_size(implementation):
    settings = CASES["no circle, causal"]
    length, mask = settings["length"], make_mask("left", settings["length"])
    settings = {name: value for name, value in settings.items() if name != "length"}
    module = make(implementation, **settings)
    # Some tokens see nothing but keys with a score of minus a million millions.
    module.query.weight.data *= 1e12
    hidden_states, _, real = make_inputs(length, mask)
    times = torch.where(real[..., None], times_visible(length, mask, **settings), torch.eye(length))
    expected = dense_attention(module, hidden_states, times)[0]
    actual = module(hidden_states, attention_mask=mask)[0]
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["odd length", "no circle", "shorter than a chunk"])
def test_low_precision_is_as_good_as_the_definition_in_it(case, dtype, implementation):
    settings = dict(CASES[case])
    length = settings.pop("length")
    hidden_states, gradient, _ = make_inputs(length, None)
    times = times_visible(length, None, **settings)
    exact_module, module = make(**settings), make(implementation, dtype, **settings)
    exact = run(lambda rows: dense_attention(exact_module, rows, times), exact_module, hidden_states, gradient)
    low = hidden_states.to(dtype), gradient.to(dtype)
    definition = run(lambda rows: dense_attention(module, rows, times.to(dtype)), module, *low)
    circle = circle_length(length, settings["circle"])
    actual = run(lambda rows: module(rows, circle_length=circle), module, *low)
    # Fused kernels round scores in forward, scores again in backward, and their log-sum-exp: three for one.
    slack = 2 if implementation == "eager" else 2 * 3**0.5
    for ours, theirs, truth in zip(actual, definition, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() <= slack * (theirs - truth).norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("circle", [0, None])
@pytest.mark.parametrize("length", [8, 37, 40])
def test_the_future_has_no_influence(length, circle, implementation):
    module = make(implementation, torch.float32, causal=True, around=(1, 1), circle=circle)
    hidden_states = torch.randn(2, length, HIDDEN)
    options = {"circle_length": circle_length(length, circle)}
    before = module(hidden_states, **options)[0]
    now = length // 2
    hidden_states[:, now:] = 100 * torch.randn_like(hidden_states[:, now:])
    after = module(hidden_states, **options)[0]
    assert torch.equal(before[:, :now], after[:, :now])
    assert not torch.equal(before[:, now:], after[:, now:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", MASKS[1:])
@pytest.mark.parametrize("circle", [0, None])
@pytest.mark.parametrize("length", [7, 37])
def test_masked_tokens_have_exactly_no_influence(length, circle, kind, implementation):
    module, mask = make(implementation, torch.float32, around=(1, 1), circle=circle), make_mask(kind, length)
    hidden_states, gradient, _ = make_inputs(length, mask, torch.float32)
    options = {"attention_mask": mask, "circle_length": circle_length(length, circle)}
    before = run(lambda rows: module(rows, **options), module, hidden_states, gradient)
    hidden_states[~mask] = 1e3 * torch.randn_like(hidden_states[~mask])
    after = run(lambda rows: module(rows, **options), module, hidden_states, gradient)
    assert torch.equal(before[0][mask], after[0][mask])
    assert torch.equal(before[1][mask], after[1][mask])
    assert not after[1][~mask].any()
    for old, new in zip(before[2:], after[2:], strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [5, 8, 21])
def test_padding_changes_nothing_without_the_circle(length, implementation):
    module = make(implementation, around=(1, 1), circle=None)
    hidden_states, gradient, _ = make_inputs(length, None)
    alone = run(module, module, hidden_states, gradient)
    mask = (torch.arange(50) < length).expand(2, -1)
    longer = torch.nn.functional.pad(hidden_states, (0, 0, 0, 50 - length), value=3.0)
    padded = run(
        lambda rows: module(rows, attention_mask=mask),
        module,
        longer,
        torch.nn.functional.pad(gradient, (0, 0, 0, 50 - length)),
    )
    for ours, theirs in zip((padded[0][:, :length], padded[1][:, :length], *padded[2:]), alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_a_batch_do_not_touch(implementation):
    module, (hidden_states, _, _) = make(implementation), make_inputs(37, None)
    both = module(hidden_states, circle_length=40)[0]
    for row in range(2):
        alone = module(hidden_states[row, None], circle_length=40)[0]
        torch.testing.assert_close(both[row, None], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_takes_non_contiguous_inputs(implementation):
    module, (hidden_states, _, _) = make(implementation), make_inputs(37, None)
    strided = hidden_states.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert torch.equal(module(strided, circle_length=40)[0], module(hidden_states, circle_length=40)[0])


@pytest.mark.parametrize("length", [7, 37])
def test_dropout_in_training_only(length):
    module = make(None, local_attention_probs_dropout_prob=0.5)
    hidden_states, _, _ = make_inputs(length, None)
    options = {"circle_length": circle_length(length, 0)}
    calm = module(hidden_states, **options)[0]
    assert torch.equal(module(hidden_states, **options)[0], calm)
    module.train()
    dropped = torch.stack([module(hidden_states, **options)[0] for _ in range(400)])
    assert not torch.allclose(dropped[0], dropped[1])
    # The mean of many draws, within six of its standard errors.
    assert ((dropped.mean(0) - calm).abs() <= 6 * dropped.std(0) / 400**0.5).all()
