"""Derivatives of every kind without `reversible`, advice that works elsewhere, and gradients of what models show."""

import pytest
import torch
from reversible_models import BATCH, LENGTH, layers_of, make, make_inputs
from tiny_models import POSITIONS, STACKS, assert_close, assert_equal_tensors, random_ids
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from hf_reformer import ReformerModel


# Seeds decide the buckets, so that one call is like the next; exact mode, because rounding has rules of its own.
SETTINGS = {"attn_layers": STACKS["mixed"], "hash_seed": 3, "exact_inversion": True}


def loss_of(logits, labels):
    """In float64; transformers' is in float32."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def loss_with(model, weights, embeds, labels):
    return loss_of(functional_call(model, weights, (), {"inputs_embeds": embeds}).logits, labels)


def arguments_of(model):
    inputs = make_inputs()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return weights, inputs["inputs_embeds"].detach(), inputs["labels"]


def gradients_by_autograd(model, embeds, labels):
    names, weights = zip(*((name, weight) for name, weight in model.named_parameters()), strict=True)
    loss = loss_of(model(inputs_embeds=embeds).logits, labels)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}


def used(gradients):
    return {name: tensor for name, tensor in gradients.items() if "word_embeddings" not in name}


# What is asked of a model. Each returns what it found and what it should have found.


def gradient(model):
    weights, embeds, labels = arguments_of(model)
    found = grad(lambda weights: loss_with(model, weights, embeds, labels))(weights)
    return used(found), gradients_by_autograd(model, embeds, labels)


def gradient_of_some_weights(model):
    weights, embeds, labels = arguments_of(model)
    some = {name: weight for name, weight in weights.items() if "layers.2" in name}
    found = grad(lambda some: loss_with(model, some, embeds, labels))(some)
    expected = gradients_by_autograd(model, embeds, labels)
    return found, {name: expected[name] for name in some}


def gradients_of_each_row(model):
    weights, embeds, labels = arguments_of(model)

    def of_row(embeds, labels):
        return grad(lambda weights: loss_with(model, weights, embeds[None], labels[None]))(weights)

    found = vmap(of_row, randomness="same")(embeds, labels)
    rows = [gradients_by_autograd(model, embeds[i, None], labels[i, None]) for i in range(BATCH)]
    return used(found), {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def slope(model):
    """Along one direction; with the gradient, or in forward mode."""
    weights, embeds, labels = arguments_of(model)
    direction = torch.randn(embeds.shape, dtype=embeds.dtype)
    _, found = jvp(lambda embeds: loss_with(model, weights, embeds, labels), (embeds,), (direction,))
    embeds.requires_grad_()
    loss = loss_of(model(inputs_embeds=embeds).logits, labels)
    (expected,) = torch.autograd.grad(loss, embeds)
    return {"slope": found}, {"slope": (expected * direction).sum()}


def slope_of_dual_numbers(model):
    weights, embeds, labels = arguments_of(model)
    direction = torch.randn(embeds.shape, dtype=embeds.dtype)
    with forward_ad.dual_level():
        logits = model(inputs_embeds=forward_ad.make_dual(embeds, direction)).logits
        found = forward_ad.unpack_dual(loss_of(logits, labels)).tangent
    _, expected = jvp(lambda embeds: loss_with(model, weights, embeds, labels), (embeds,), (direction,))
    return {"slope": found}, {"slope": expected}


def curvature(model):
    """Along one direction, by autograd twice, and in forward mode through a gradient."""
    weights, embeds, labels = arguments_of(model)
    direction = torch.randn(embeds.shape, dtype=embeds.dtype)
    variable = embeds.clone().requires_grad_()
    loss = loss_of(model(inputs_embeds=variable).logits, labels)
    (first,) = torch.autograd.grad(loss, variable, create_graph=True)
    (found,) = torch.autograd.grad((first * direction).sum(), variable)
    gradient = grad(lambda embeds: loss_with(model, weights, embeds, labels))
    return {"curvature": found}, {"curvature": jvp(gradient, (embeds,), (direction,))[1]}


DERIVATIVES = {
    "gradient": gradient,
    "gradient of some weights": gradient_of_some_weights,
    "gradients of each row": gradients_of_each_row,
    "slope": slope,
    "dual numbers": slope_of_dual_numbers,
    "curvature": curvature,
}


# Without a table of positions nothing but the layers has a gradient here.
@pytest.mark.parametrize("positions", ["axial", "LSH rotary"])
@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES)
def test_all_derivatives_of_ordinary_layers(derive, positions):
    assert_close(*derive(make(False, attn_implementation="eager", **SETTINGS, **POSITIONS[positions])))


def test_gradients_of_each_row_by_the_model_s_own_loss():
    """What is said of wrong values in masks and labels needs one answer for all rows, and is not said here."""
    model = make(False, attn_implementation="eager", **SETTINGS)
    weights, ids = arguments_of(model)[0], random_ids(BATCH, LENGTH)
    mask = torch.ones_like(ids)

    def of_row(weights, ids, mask):
        arguments = {"input_ids": ids[None], "attention_mask": mask[None], "labels": ids[None]}
        return functional_call(model, weights, (), arguments).loss

    found = vmap(grad(of_row), in_dims=(None, 0, 0), randomness="same")(weights, ids, mask)
    for row in range(BATCH):
        expected = grad(of_row)(weights, ids[row], mask[row])
        # The loss is in float32.
        torch.testing.assert_close({name: rows[row] for name, rows in found.items()}, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gradient", "gradient of some weights", "gradients of each row", "slope"])
def test_transforms_find_an_implementation(name):
    assert_close(*DERIVATIVES[name](make(False, **SETTINGS)))


@pytest.mark.parametrize(("reversible", "implementation"), [(True, None), (True, "eager"), (False, "sdpa")])
@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES)
def test_what_is_refused_works_once_the_advice_is_followed(derive, reversible, implementation):
    model = make(reversible, attn_implementation=implementation, **SETTINGS | {"attn_layers": ["local", "lsh"] * 2})
    advice = r"`model.config.reversible = False` and call `model.set_attn_implementation\('eager'\)`"
    with pytest.raises(RuntimeError, match=advice):
        derive(model)
    model.config.reversible = False
    model.set_attn_implementation("eager")
    assert_close(*derive(model))


# What a model shows of its inside.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("reversible", [True, False])
def test_hidden_states_and_maps_have_gradients(reversible, padding, dtype):
    """As those of other models: through them the loss depends on what comes before."""
    model = make(reversible, ReformerModel, attn_layers=STACKS["mixed"], dtype=dtype)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 20])[:, None]
    mask = {None: None, "left": mask.flip(1), "right": mask}[padding]
    output = model(random_ids(BATCH, LENGTH), mask, output_hidden_states=True, output_attentions=True)
    shown = [*output.hidden_states, *output.attentions]
    for tensor in shown:
        tensor.retain_grad()
    output.last_hidden_state[1, 20:25].float().pow(2).sum().backward()
    for tensor in shown:
        assert tensor.grad[1].abs().sum() > 0
        assert not tensor.grad[0].any()


@pytest.mark.parametrize("kind", ["local", "lsh", "full"])
def test_the_gradient_of_a_map_is_that_of_the_product(kind):
    """A change of the map by so much changes the output by that much times the values."""
    model, values, contexts = make(False, ReformerModel, attn_layers=[kind] * 2), [], []
    attention = layers_of_base(model)[1].attention
    attention.self_attention.value.register_forward_hook(lambda module, args, output: values.append(output))
    attention.output.register_forward_pre_hook(lambda module, args: contexts.append(args[0]))
    output = model(random_ids(BATCH, LENGTH), output_attentions=True)
    contexts[0].retain_grad()
    output.attentions[1].retain_grad()
    output.last_hidden_state.pow(2).sum().backward()
    value, gradient = (
        tensor.unflatten(-1, (2, -1)).transpose(1, 2) for tensor in (values[0].detach(), contexts[0].grad)
    )
    torch.testing.assert_close(output.attentions[1].grad, gradient @ value.mT, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        (output.attentions[1] @ value).transpose(1, 2).flatten(2), contexts[0], rtol=1e-10, atol=1e-12
    )


def layers_of_base(model):
    return model.encoder.layers


@pytest.mark.parametrize("reversible", [True, False])
def test_a_loss_on_maps_trains(reversible):
    model, inputs = make(reversible, attn_layers=STACKS["mixed"]), make_inputs()
    maps = model(**inputs, output_attentions=True).attentions
    sum(weights.pow(2).sum() for weights in maps).backward()
    assert layers_of(model)[0].attention.layer_norm.weight.grad.abs().sum() > 0


# Counting.


def test_operations_are_counted():
    """A reversible layer does what an ordinary one does, and its forward pass once more."""
    counts = {}
    for reversible in (False, True):
        model, inputs = make(reversible, attn_layers=["local", "full"]), make_inputs()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(**inputs)
        with FlopCounterMode(display=False) as both:
            model(**inputs).loss.backward()
        in_layers = sum(
            sum(flops.values()) for name, flops in forward.get_flop_counts().items() if name.count(".") == 4
        )
        counts[reversible] = both.get_total_flops()
    assert in_layers > 0
    assert_equal_tensors({"": torch.tensor(counts[True])}, {"": torch.tensor(counts[False] + in_layers)})
