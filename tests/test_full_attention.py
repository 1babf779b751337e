"""Full attention against PyTorch's own function and against a form written out."""

import pytest
import torch
from tiny_models import make_model, random_ids, tiny_config
from torch import nn

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.modeling.layers.full_attention import FullSelfAttention, dense_attention


# The third is tested in test_triton.py.
IMPLEMENTATIONS = ["eager", "sdpa"]
HEADS, SIZE, HIDDEN, LENGTH = 2, 8, 32, 21


def make(implementation="eager", causal=False, dtype=torch.float64, **changes):
    torch.manual_seed(1)
    module = FullSelfAttention(tiny_config(attn_implementation=implementation, is_decoder=causal, **changes), 0).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def visible_keys(causal, masked):
    """`[2, 1, L, L]`; every row sees something."""
    visible = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    if masked:
        visible[1, ..., 3::4] = False
    return visible


def additive(visible, dtype=torch.float64):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def project(module, hidden_states):
    return [
        (hidden_states @ linear.weight.T).view(*hidden_states.shape[:2], HEADS, SIZE).transpose(1, 2)
        for linear in (module.query, module.key, module.value)
    ]


def with_torch(module, hidden_states, visible):
    query, key, value = project(module, hidden_states)
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return output.transpose(1, 2).flatten(2)


def written_out(module, hidden_states, visible):
    query, key, value = project(module, hidden_states)
    weights = (query @ key.mT / SIZE**0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def run(function, module, hidden_states, gradient):
    hidden_states = hidden_states.clone().requires_grad_()
    output = function(hidden_states)
    return output.detach(), *torch.autograd.grad(output, [hidden_states, *module.parameters()], gradient)


@pytest.mark.parametrize("return_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_eager_equals_torch(causal, masked, return_weights):
    module, visible = make(causal=causal), visible_keys(causal, masked)
    hidden_states, gradient = torch.randn(2, 2, LENGTH, HIDDEN, dtype=torch.float64)
    gradient = gradient[..., : HEADS * SIZE]
    mask = additive(visible) if causal or masked else None
    actual = run(
        lambda rows: module(rows, full_attention_mask=mask, return_weights=return_weights)[0],
        module,
        hidden_states,
        gradient,
    )
    expected = run(lambda rows: with_torch(module, rows, visible), module, hidden_states, gradient)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    _, weights, buckets = module(hidden_states, full_attention_mask=mask, return_weights=return_weights)
    assert buckets is None
    if return_weights:
        torch.testing.assert_close(weights, written_out(module, hidden_states, visible)[1], rtol=1e-10, atol=1e-10)
    else:
        assert weights is None


@pytest.mark.parametrize("causal", [True, False])
def test_any_function_of_the_attention_interface(causal):
    """`sdpa` gets a boolean mask or none and looks at `is_causal`."""
    module, hidden_states = make("sdpa", causal), torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    for masked in (True, False):
        visible = visible_keys(causal, masked)
        output = module(hidden_states, full_attention_mask=visible if masked else None)[0]
        torch.testing.assert_close(output, written_out(module, hidden_states, visible)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("return_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_low_precision_is_as_good_as_torch_in_it(masked, return_weights, dtype):
    visible = visible_keys(True, masked)
    hidden_states, gradient = torch.randn(2, 2, LENGTH, HIDDEN, dtype=torch.float64)
    gradient = gradient[..., : HEADS * SIZE]
    exact_module, module = make(), make(causal=True, dtype=dtype)
    exact = run(lambda rows: with_torch(exact_module, rows, visible), exact_module, hidden_states, gradient)
    low = hidden_states.to(dtype), gradient.to(dtype)
    reference = run(lambda rows: written_out(module, rows, visible)[0], module, *low)
    # The mask of the float32 streams, as under autocast.
    mask = additive(visible, torch.float32)
    actual = run(lambda rows: module(rows, full_attention_mask=mask, return_weights=return_weights)[0], module, *low)
    for ours, theirs, truth in zip(actual, reference, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("return_weights", [True, False])
def test_a_token_that_sees_nothing_harms_nobody(return_weights, dtype):
    """Such as one of a row of padding: no number beside it turns into NaN, forward or backward."""
    visible = visible_keys(True, False)
    visible[1] = False
    module, mask = make(causal=True, dtype=dtype), additive(visible, torch.float32)
    results = run(
        lambda rows: module(rows, full_attention_mask=mask, return_weights=return_weights)[0],
        module,
        torch.randn(2, LENGTH, HIDDEN, dtype=dtype),
        torch.randn(2, LENGTH, HEADS * SIZE, dtype=dtype),
    )
    assert all(tensor.isfinite().all() for tensor in results)


@pytest.mark.parametrize("return_weights", [True, False])
def test_dropout_in_training_only(return_weights):
    module = make(local_attention_probs_dropout_prob=0.5)
    hidden_states = torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)
    calm = module(hidden_states, return_weights=return_weights)[0]
    assert torch.equal(module(hidden_states, return_weights=return_weights)[0], calm)
    module.train()
    dropped = torch.stack([module(hidden_states, return_weights=return_weights)[0] for _ in range(400)])
    assert not torch.allclose(dropped[0], dropped[1])
    # The mean of many draws, within six of its standard errors.
    assert ((dropped.mean(0) - calm).abs() <= 6 * dropped.std(0) / 400**0.5).all()


def test_the_map_is_what_multiplied_the_values_under_dropout():
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, SIZE, dtype=torch.float64)
    output, weights = dense_attention(
        make(), query, key, value, None, scaling=SIZE**-0.5, dropout=0.5, output_attentions=True
    )
    torch.testing.assert_close(output, (weights @ value).transpose(1, 2), rtol=1e-12, atol=1e-12)
    assert (weights == 0).double().mean() == pytest.approx(0.5, abs=5 * (0.25 / weights.numel()) ** 0.5)


# Through a model, whose masks transformers makes.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_future_has_no_influence(implementation):
    model = make_model(ReformerForCausalLM, attn_layers=["full", "full"], attn_implementation=implementation)
    ids = random_ids(2, LENGTH)
    before = model(ids).logits
    ids[:, 10:] = random_ids(2, LENGTH - 10)
    after = model(ids).logits
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_masked_tokens_have_exactly_no_influence(side, model_class, implementation):
    model = make_model(model_class, attn_layers=["full", "full"], attn_implementation=implementation)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1] = {
        "right": torch.arange(LENGTH) < 9,
        "left": torch.arange(LENGTH) >= 9,
        "scattered": torch.arange(LENGTH) % 3 != 1,
    }[side]
    ids = random_ids(2, LENGTH)
    before = model(ids, attention_mask=mask).logits
    after = model(torch.where(mask, ids, random_ids(2, LENGTH)), attention_mask=mask).logits
    assert torch.equal(before[mask], after[mask])
    if side != "scattered":
        alone = model(ids[1, None, mask[1]]).logits
        torch.testing.assert_close(before[1, None, mask[1]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_a_model(causal, implementation, monkeypatch):
    """Every layer sees the earlier, or all, real tokens of its own row."""
    model_class = ReformerForCausalLM if causal else ReformerForMaskedLM
    model = make_model(model_class, attn_layers=["full", "full"], attn_implementation=implementation).double()
    ids, mask = random_ids(2, LENGTH), torch.arange(LENGTH) < torch.tensor([LENGTH, 9])[:, None]
    actual = model(ids, attention_mask=mask).logits
    visible = visible_keys(causal, False) & mask[:, None, None, :]
    monkeypatch.setattr(
        FullSelfAttention,
        "forward",
        lambda module, hidden_states, **kwargs: (*written_out(module, hidden_states, visible), None),
    )
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-10, atol=1e-10)
