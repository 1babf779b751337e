"""The LSH attention layer: when it is exact, what it hashes with, and that the operator gets what the config says."""

import pytest
import torch
from tiny_models import tiny_config

from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention
from hf_reformer.modeling.ops.chunking import padded_to_multiple
from hf_reformer.modeling.ops.lsh_hashing import bucket_factors, default_num_buckets, draw_rotations, hash_vectors
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference


# The third is tested in test_triton.py.
IMPLEMENTATIONS = ["eager", "sdpa"]
CPU = torch.device("cpu")
CHUNK, HEADS, SIZE, HIDDEN = 8, 2, 8, 32


def make(implementation="eager", layer_idx=0, **changes):
    torch.manual_seed(1)
    config = tiny_config(lsh_attn_chunk_length=CHUNK, attn_implementation=implementation, **changes)
    module = LSHSelfAttention(config, layer_idx).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def run(module, hidden_states, gradient=None, circle_length=None, num_hashes=None, **arguments):
    """Output, map, buckets; with `gradient` the gradients of the input and the weights instead of the last two."""
    rotations = module.draw_rotations(hidden_states.shape[1], circle_length, num_hashes, CPU)
    hidden_states = hidden_states.clone().requires_grad_()
    output, weights, buckets = module(hidden_states, circle_length=circle_length, rotations=rotations, **arguments)
    if gradient is None:
        return output.detach(), weights, buckets
    return output.detach(), *torch.autograd.grad(output, [hidden_states, *module.parameters()], gradient)


def project(module, hidden_states):
    shape = (*hidden_states.shape[:2], HEADS, SIZE)
    return [(hidden_states @ linear.weight.T).view(shape) for linear in (module.query_key, module.value)]


def exact_attention(module, hidden_states, attention_mask=None):
    """Softmax over every token but oneself, of those that the masks leave; over oneself where they leave nothing."""
    query_key, value = (vectors.transpose(1, 2) for vectors in project(module, hidden_states))
    key = query_key * (query_key.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() / SIZE**0.5
    length = hidden_states.shape[1]
    itself = torch.eye(length, dtype=torch.bool)
    allowed = ~itself
    if module.config.is_decoder:
        allowed = allowed & torch.ones(length, length).tril().bool()
    allowed = allowed.expand(len(hidden_states), 1, -1, -1)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :]
    allowed = torch.where(allowed.any(-1, keepdim=True), allowed, itself)
    weights = (query_key @ key.mT).masked_fill(~allowed, -torch.inf).softmax(-1)
    if module.config.lsh_value_shift:
        # Of the values behind the keys, which in these texts are those of real tokens; nothing of its own.
        weights = torch.nn.functional.pad(weights.masked_fill(itself, 0)[..., :-1], (1, 0))
    return (weights @ value).transpose(1, 2).flatten(2), weights


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize(
    "direction",
    [{"is_decoder": True}, {"is_decoder": False}, {"is_decoder": True, "lsh_value_shift": 1}],
    ids=["causal", "both ways", "successors"],
)
@pytest.mark.parametrize("threshold", [None, CHUNK, 21])
def test_exact_up_to_the_threshold(threshold, direction, circular, implementation):
    module = make(implementation, full_attention_threshold=threshold, circular_look_around=circular, **direction)
    reach = threshold or CHUNK
    for length in (1, 2, 5, 8, 20, 21):
        hidden_states, gradient = torch.randn(2, 2, length, HIDDEN, dtype=torch.float64)
        for mask in (None, torch.arange(length) < torch.tensor([length, (length + 1) // 2])[:, None]):
            rotations = module.draw_rotations(length, length if circular else None, None, CPU)
            assert (rotations is None) == (length <= reach)
            if length > reach:
                continue
            options = {"attention_mask": mask, "circle_length": length if circular else None}
            real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
            has_maps = implementation == "eager"
            output, weights, buckets = run(module, hidden_states, return_weights=has_maps, **options)
            leaf = hidden_states.clone().requires_grad_()
            expected, expected_weights = exact_attention(module, leaf, mask)
            assert buckets is None
            torch.testing.assert_close(output[real], expected[real], rtol=1e-10, atol=1e-10)
            rows = real[:, None].expand(-1, HEADS, -1)
            if has_maps:
                torch.testing.assert_close(weights[rows], expected_weights[rows], rtol=1e-10, atol=1e-10)
            gradient = gradient[..., : HEADS * SIZE] * real[..., None]
            actual = run(module, hidden_states, gradient, **options)[1:]
            expected = torch.autograd.grad(expected, [leaf, *module.parameters()], gradient)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


SETTINGS = {
    "default": {},
    "causal": {"is_decoder": True},
    "around": {"lsh_num_chunks_before": 2, "lsh_num_chunks_after": 1},
    "no circle": {"circular_look_around": False, "is_decoder": True},
    "own bucket": {"attend_across_buckets": False},
    "no duplicates": {"allow_duplicate_attention": False, "num_hashes": 4},
    "factors": {"num_buckets": [4, 6]},
    "no number of buckets": {"num_buckets": None},
    "successors": {"is_decoder": True, "lsh_value_shift": 1},
    "successors, no circle": {"is_decoder": True, "lsh_value_shift": 1, "circular_look_around": False},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("setting", SETTINGS)
def test_beyond_it_equals_the_oracle(setting, length, implementation):
    module = make(implementation, **SETTINGS[setting])
    config = module.config
    hidden_states, gradient = torch.randn(2, 2, length, HIDDEN, dtype=torch.float64)
    circle_length = 48 if config.circular_look_around else None
    mask = torch.arange(length) < torch.tensor([length, length - 1])[:, None]
    gradient = gradient[..., : HEADS * SIZE] * mask[..., None]
    options = {"attention_mask": mask, "circle_length": circle_length}
    actual = run(module, hidden_states, gradient, **options)
    buckets = run(module, hidden_states, **options)[2]

    leaf = hidden_states.clone().requires_grad_()
    query_key, value = project(module, leaf)
    expected = lsh_attention_reference(
        query_key,
        value,
        buckets,
        chunk_length=CHUNK,
        num_chunks_before=config.lsh_num_chunks_before,
        num_chunks_after=config.lsh_num_chunks_after,
        causal=config.is_decoder,
        attention_mask=mask,
        circular_look_around=config.circular_look_around,
        attend_across_buckets=config.attend_across_buckets,
        allow_duplicate_attention=config.allow_duplicate_attention,
        padded_length=circle_length,
        value_shift=config.lsh_value_shift,
    ).flatten(2)
    grads = torch.autograd.grad(expected, [leaf, *module.parameters()], gradient)
    torch.testing.assert_close(actual[0][mask], expected[mask], rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(actual[1:], grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_successors_are_for_causal_models():
    with pytest.raises(ValueError, match=r"`lsh_value_shift=1` is for causal models.* Set it to 0, or"):
        make(lsh_value_shift=1)


def test_hashes_its_queries():
    module, hidden_states = make(num_hashes=3), torch.randn(2, 40, HIDDEN, dtype=torch.float64)
    rotations = module.draw_rotations(40, None, None, CPU)
    _, _, buckets = module(hidden_states, rotations=rotations)
    assert torch.equal(buckets, hash_vectors(project(module, hidden_states)[0], rotations, 8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_given_buckets_are_used_and_nothing_is_hashed(implementation):
    module, hidden_states = make(implementation), torch.randn(2, 40, HIDDEN, dtype=torch.float64)
    hashed, _, own = run(module, hidden_states)
    again, _, same = module(hidden_states, buckets=own)
    assert torch.equal(again, hashed)
    assert torch.equal(same, own)
    given = torch.randint(8, own.shape, dtype=torch.int32)
    other, _, kept = module(hidden_states, buckets=given)
    assert torch.equal(kept, given)
    query_key, value = project(module, hidden_states)
    expected = lsh_attention_reference(query_key, value, given, chunk_length=CHUNK).flatten(2)
    torch.testing.assert_close(other, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(other, hashed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "setting",
    [
        {"full_attention_threshold": 24},
        {"full_attention_threshold": 24, "is_decoder": True},
        {"attend_across_buckets": False, "is_decoder": True},
        {"attend_across_buckets": False, "allow_duplicate_attention": False, "full_attention_threshold": 17},
    ],
    ids=str,
)
def test_short_rows_of_a_batch_are_as_exact_as_alone(setting, implementation):
    """Up to the threshold a row is attended to exactly, however long the rows beside it are."""
    module = make(implementation, circular_look_around=False, **setting)
    lengths = (40, 25, 24, 17, 8, 3, 1)
    hidden_states, gradient = torch.randn(2, len(lengths), 40, HIDDEN, dtype=torch.float64)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    gradient = gradient[..., : HEADS * SIZE] * mask[..., None]
    output, input_grad, *weight_grads = run(module, hidden_states, gradient, attention_mask=mask)
    has_maps = implementation == "eager"
    maps = run(module, hidden_states, attention_mask=mask, return_weights=has_maps)[1]
    summed = [torch.zeros_like(gradient) for gradient in weight_grads]
    exact_rows = 0
    for row, length in enumerate(lengths):
        alone, own_gradient = hidden_states[row, None, :length], gradient[row, None, :length]
        expected, expected_grad, *expected_grads = run(module, alone, own_gradient)
        _, expected_map, buckets = run(module, alone, return_weights=has_maps)
        exact_rows += buckets is None
        torch.testing.assert_close(output[row, None, :length], expected, rtol=1e-11, atol=1e-11)
        if has_maps:
            torch.testing.assert_close(maps[row, None, :, :length, :length], expected_map, rtol=1e-11, atol=1e-11)
            assert not maps[row, :, :length, length:].any()
        torch.testing.assert_close(input_grad[row, None, :length], expected_grad, rtol=1e-10, atol=1e-10)
        assert not input_grad[row, length:].any()
        summed = [total + part for total, part in zip(summed, expected_grads, strict=True)]
    for ours, theirs in zip(weight_grads, summed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert exact_rows == sum(length <= module.threshold.length for length in lengths) > 1


def test_on_the_circle_padding_counts_for_the_threshold():
    """As in stock: the padded length decides, for all rows alike."""
    module = make(full_attention_threshold=20)
    assert module.draw_rotations(17, 24, None, CPU) is not None
    assert module.draw_rotations(17, 20, None, CPU) is None
    assert module.draw_rotations(17, None, None, CPU) is None
    hidden_states = torch.randn(1, 17, HIDDEN, dtype=torch.float64)
    assert run(module, hidden_states, circle_length=24)[2] is not None
    assert run(module, hidden_states)[2] is None


def test_training_draws_from_the_default_generator():
    module = make(num_hashes=3).train()
    torch.manual_seed(7)
    first, second = module.draw_rotations(40, None, None, CPU), module.draw_rotations(40, None, None, CPU)
    torch.manual_seed(7)
    expected = torch.randn(2, HEADS, SIZE, 3, 4)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize(("hash_seed", "training"), [(None, False), (3, True), (3, False)])
def test_evaluation_and_hash_seed_draw_from_a_private_generator(hash_seed, training):
    before = torch.get_rng_state()
    for layer_idx in (0, 5):
        module = make(layer_idx=layer_idx, hash_seed=hash_seed).train(training)
        torch.set_rng_state(before)
        rotations = module.draw_rotations(40, None, None, CPU)
        seed = layer_idx if hash_seed is None else hash_seed
        assert torch.equal(rotations, draw_rotations(HEADS, SIZE, 2, 8, device=CPU, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_exact_attention_draws_nothing(training):
    module = make().train(training)
    before = torch.get_rng_state()
    assert module.draw_rotations(CHUNK, CHUNK, None, CPU) is None
    run(module, torch.randn(1, CHUNK, HIDDEN, dtype=torch.float64, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_hashes", [1, 2, 16])
def test_num_hashes_of_one_call(num_hashes):
    module, hidden_states = make(num_hashes=2), torch.randn(1, 40, HIDDEN, dtype=torch.float64)
    assert run(module, hidden_states, num_hashes=num_hashes)[2].shape == (1, HEADS, num_hashes, 40)
    assert run(module, hidden_states)[2].shape == (1, HEADS, 2, 40)


@pytest.mark.parametrize("circular", [True, False])
def test_without_num_buckets_the_padded_length_decides(circular):
    module = make(num_buckets=None, circular_look_around=circular)
    for length in (9, 40, 41, 300):
        padded_length = padded_to_multiple(length, 24 if circular else CHUNK)
        num_buckets = default_num_buckets(padded_length, CHUNK, module.config.max_position_embeddings)
        circle_length = padded_length if circular else None
        rotations = module.draw_rotations(length, circle_length, None, CPU)
        assert rotations.shape[-1] == sum(bucket_factors(num_buckets)) // 2
        hidden_states = torch.randn(1, length, HIDDEN, dtype=torch.float64)
        buckets = run(module, hidden_states, circle_length=circle_length)[2]
        assert torch.equal(buckets, hash_vectors(project(module, hidden_states)[0], rotations, num_buckets))
    assert module.config.num_buckets is None


@pytest.mark.parametrize("length", [5, 40])
def test_dropout_in_training_only(length):
    module = make(None, lsh_attention_probs_dropout_prob=0.5, hash_seed=0)
    hidden_states = torch.randn(1, length, HIDDEN, dtype=torch.float64)
    calm = run(module, hidden_states)[0]
    assert torch.equal(run(module, hidden_states)[0], calm)
    module.train()
    dropped = torch.stack([run(module, hidden_states)[0] for _ in range(400)])
    assert not torch.allclose(dropped[0], dropped[1])
    # The mean of many draws, within six of its standard errors.
    error = (dropped.mean(0) - calm).abs()
    assert (error <= 6 * dropped.std(0) / 400**0.5 + 1e-12).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [5, 40])
def test_dtype(length, dtype, implementation):
    module = make(implementation).to(dtype)
    has_maps = implementation == "eager"
    output, weights, _ = run(module, torch.randn(1, length, HIDDEN, dtype=dtype), return_weights=has_maps)
    assert output.dtype == dtype
    assert output.isfinite().all() and (weights is None) != has_maps
    assert not has_maps or weights.isfinite().all()
