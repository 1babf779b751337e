"""The reversible stack: the numbers and gradients of ordinary autograd, without its stored activations."""

from dataclasses import dataclass, field

import pytest
import torch
from allocations import Allocations
from reversible_models import (
    BATCH,
    HIDDEN,
    IMPLEMENTATIONS,
    LENGTH,
    add_lora,
    gradients_of,
    layers_of,
    make,
    make_inputs,
    with_each_implementation,
)
from tiny_models import DROPOUT, POSITIONS, STACKS, TIED, TINY, assert_close, assert_equal_tensors
from torch import nn

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM, ReformerForSequenceClassification
from hf_reformer.modeling.layers import feed_forward


# What is done with the model. Each returns tensors to compare, beside the gradients that it leaves.


def backward_once(model, inputs):
    output = model(**inputs)
    output.loss.backward()
    return {"loss": output.loss}


def backward_twice(model, inputs):
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()
    return {"loss": loss}


def two_forwards_and_their_sum(model, inputs):
    first, second = model(**inputs).loss, model(**(inputs | {"inputs_embeds": inputs["inputs_embeds"].flip(1)})).loss
    (first + 2 * second).backward()
    return {"first": first, "second": second}


def accumulate_over_rows(model, inputs):
    losses = {}
    for row in range(BATCH):
        losses[f"loss {row}"] = model(**{name: tensor[row, None] for name, tensor in inputs.items()}).loss
        losses[f"loss {row}"].backward()
    return losses


def gradients_of_some_parameters(model, inputs):
    chosen = {name: weight for name, weight in model.named_parameters() if "layers.1.attention" in name}
    chosen["a table of positions"] = model.reformer.embeddings.position_embeddings.weights[0]
    return dict(zip(chosen, torch.autograd.grad(model(**inputs).loss, chosen.values()), strict=True))


def gradients_of_one_layer_then_of_all(model, inputs):
    loss = model(**inputs).loss
    weight = layers_of(model)[1].feed_forward.output.dense.weight
    (alone,) = torch.autograd.grad(loss, weight, retain_graph=True)
    loss.backward()
    return {"alone": alone}


def three_optimizer_steps(model, inputs):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), {}
    for step in range(3):
        optimizer.zero_grad()
        losses[f"loss {step}"] = model(**inputs).loss
        losses[f"loss {step}"].backward()
        optimizer.step()
    return losses | dict(model.named_parameters())


def one_hidden_state(model, inputs):
    hidden_states = model(**inputs, output_hidden_states=True).hidden_states
    hidden_states[1].pow(2).sum().backward()
    return {"hidden state": hidden_states[1]}


def a_hidden_state_by_index(model, inputs):
    hidden_states = model(**inputs, output_hidden_states=[-2]).hidden_states
    hidden_states[-2].pow(2).sum().backward()
    return {"hidden state": hidden_states[-2]}


def several_hidden_states(model, inputs):
    output = model(**inputs, output_hidden_states=True)
    losses = [weight * state.pow(2).mean() for weight, state in enumerate(output.hidden_states)]
    (sum(losses) + output.loss).backward()
    return {f"hidden state {i}": state for i, state in enumerate(output.hidden_states)}


def with_attention_maps(model, inputs):
    output = model(**inputs, output_attentions=True)
    output.loss.backward()
    return {f"map {i}": weights.detach() for i, weights in enumerate(output.attentions)}


def word_ids(model, inputs):
    loss = model(inputs["labels"], labels=inputs["labels"]).loss
    loss.backward()
    return {"loss": loss}


# What is changed about the model first.


def freeze(*parts):
    def prepare(model):
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad_(False)

    return prepare


def add_unused_parameters(model):
    for layer in layers_of(model):
        layer.attention.unused = layer.feed_forward.unused = nn.Parameter(torch.ones(3))


def train_one_module_only(model):
    model.eval()
    layers_of(model)[1].attention.output.train()


def steer_inside_layers(model):
    layers_of(model)[0].feed_forward.register_forward_hook(lambda module, args, output: output * 1.5)
    layers_of(model)[1].attention.register_forward_hook(lambda module, args, output: (output[0] * 1.5, *output[1:]))


def change_the_output_of_a_frozen_start(model):
    freeze("embeddings", "layers.0.")(model)
    layers_of(model)[0].register_forward_hook(lambda module, args, output: (output[0], output[1] * 1.5, *output[2:]))


@dataclass
class Variant:
    config: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    prepare: object = lambda model: None
    compute: object = backward_once
    model_class: type = ReformerForCausalLM


RIGHT = torch.arange(LENGTH) < torch.tensor([LENGTH, 20])[:, None]
SCATTERED = torch.arange(LENGTH) % torch.tensor([3, 5])[:, None] != 1
VARIANTS = {
    **{stack: Variant({"attn_layers": kinds}) for stack, kinds in STACKS.items()},
    **{f"{stack}, dropout": Variant({"attn_layers": kinds} | DROPOUT) for stack, kinds in STACKS.items()},
    "bidirectional": Variant(DROPOUT, model_class=ReformerForMaskedLM),
    "without the circle": Variant(DROPOUT | {"circular_look_around": False}),
    "as in the paper": Variant({"attend_across_buckets": False, "allow_duplicate_attention": False}),
    "successors": Variant({"lsh_value_shift": 1} | DROPOUT, {"attention_mask": SCATTERED}),
    "hash_seed": Variant(DROPOUT | {"hash_seed": 5}),
    "num_hashes": Variant(DROPOUT, {"num_hashes": 5}),
    "evaluation": Variant(DROPOUT, prepare=nn.Module.eval),
    "one module in training": Variant(DROPOUT, prepare=train_one_module_only),
    "right padding": Variant(DROPOUT, {"attention_mask": RIGHT}),
    "left padding": Variant(DROPOUT, {"attention_mask": RIGHT.flip(1)}),
    "scattered mask": Variant(DROPOUT, {"attention_mask": SCATTERED}),
    "chunked feed-forward": Variant(DROPOUT | {"chunk_size_feed_forward": 8}),
    "chunked head": Variant(DROPOUT | {"chunk_size_lm_head": 8}),
    "learned positions": Variant(DROPOUT | {"axial_pos_embds": False}),
    "rotary positions": Variant(
        DROPOUT | POSITIONS["LSH rotary"] | {"attn_layers": STACKS["mixed"]}, {"attention_mask": RIGHT.flip(1)}
    ),
    "no positions": Variant(DROPOUT | POSITIONS["none"]),
    "word ids": Variant(DROPOUT, compute=word_ids),
    "tied embeddings": Variant({"attn_layers": STACKS["mixed"]} | DROPOUT | TIED, compute=word_ids),
    "frozen embeddings": Variant(DROPOUT, prepare=freeze("embeddings"), compute=word_ids),
    "frozen first layer": Variant(DROPOUT, prepare=freeze("layers.0.")),
    "frozen embeddings and first layer": Variant(DROPOUT, prepare=freeze("embeddings", "layers.0."), compute=word_ids),
    "frozen last layer": Variant(DROPOUT, prepare=freeze("layers.1.")),
    "frozen attention": Variant(DROPOUT, prepare=freeze("attention")),
    "frozen feed-forward": Variant(DROPOUT | {"chunk_size_feed_forward": 8}, prepare=freeze("feed_forward")),
    "all frozen but the head": Variant(DROPOUT, prepare=freeze("reformer.")),
    "unused parameters": Variant({"chunk_size_feed_forward": 8}, prepare=add_unused_parameters),
    "LoRA": Variant({"attn_layers": STACKS["mixed"]} | DROPOUT, prepare=add_lora),
    "LoRA, chunked feed-forward": Variant({"chunk_size_feed_forward": 8}, prepare=add_lora),
    "LoRA, word ids": Variant(DROPOUT, prepare=add_lora, compute=word_ids),
    "LoRA, tied embeddings": Variant(DROPOUT | TIED, prepare=add_lora, compute=word_ids),
    "exact inversion": Variant(DROPOUT | {"exact_inversion": True}),
    "hooks inside layers": Variant({"chunk_size_feed_forward": 8}, prepare=steer_inside_layers),
    "hook behind a frozen start": Variant(DROPOUT, prepare=change_the_output_of_a_frozen_start, compute=word_ids),
    "some parameters": Variant(DROPOUT, compute=gradients_of_some_parameters),
    "one layer, then all": Variant(DROPOUT, compute=gradients_of_one_layer_then_of_all),
    "backward twice": Variant(DROPOUT, compute=backward_twice),
    "three steps, fresh rotations": Variant(DROPOUT, compute=three_optimizer_steps),
    "two forwards": Variant(DROPOUT, compute=two_forwards_and_their_sum),
    "accumulated rows": Variant(DROPOUT, compute=accumulate_over_rows),
    "one hidden state": Variant(DROPOUT, compute=one_hidden_state),
    "a hidden state by index": Variant(DROPOUT, compute=a_hidden_state_by_index),
    "several hidden states": Variant(DROPOUT, compute=several_hidden_states),
    "attention maps": Variant({"attn_layers": STACKS["mixed"]} | DROPOUT, compute=with_attention_maps),
    "classification": Variant(
        DROPOUT | {"num_labels": 3, "is_decoder": True}, model_class=ReformerForSequenceClassification
    ),
    "one layer": Variant(DROPOUT | {"attn_layers": ["lsh"]}),
    "twelve layers": Variant(DROPOUT | {"attn_layers": ["local", "lsh", "lsh"] * 4}),
}


def evaluate(variant, reversible, implementation):
    """What the variant computes, and every gradient it leaves."""
    model = make(reversible, variant.model_class, attn_implementation=implementation, **variant.config)
    model = variant.prepare(model) or model
    inputs = make_inputs(variant.model_class)
    torch.manual_seed(3)
    results = variant.compute(model, inputs | variant.inputs)
    results |= {f"gradient of {name}": gradient for name, gradient in gradients_of(model, inputs).items()}
    return {name: tensor.detach() for name, tensor in results.items()}, torch.get_rng_state()


@pytest.mark.parametrize(("name", "implementation"), with_each_implementation(VARIANTS))
def test_equals_ordinary_autograd(name, implementation):
    expected, expected_state = evaluate(VARIANTS[name], False, implementation)
    actual, state = evaluate(VARIANTS[name], True, implementation)
    assert_close(actual, expected)
    # The same random numbers were drawn, and those of the recomputation are given back.
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("reversible", [True, False])
def test_pieces_that_a_cpu_chooses_are_like_those_asked_for(reversible, monkeypatch):
    expected, _ = evaluate(Variant(DROPOUT | {"chunk_size_feed_forward": 8}), reversible, "sdpa")
    monkeypatch.setattr(feed_forward, "ACTIVATIONS_AT_ONCE", 8 * BATCH * TINY["feed_forward_size"])
    actual, _ = evaluate(Variant(DROPOUT), reversible, "sdpa")
    assert_equal_tensors(actual, expected)


def test_every_adapter_learns():
    """All that `add_lora` adds: two factors for each of the projections of each layer."""
    model, inputs = add_lora(make(True, attn_layers=STACKS["mixed"])), make_inputs()
    model(**inputs).loss.backward()
    gradients = {name: gradient for name, gradient in gradients_of(model, inputs).items() if "lora" in name}
    assert len(gradients) == 2 * sum({"lsh": 2, "local": 3, "full": 3}[kind] + 3 for kind in STACKS["mixed"])
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


# Memory.


def tensors_in(thing, seen):
    """Tensors that Python objects hold, modules excepted."""
    if id(thing) in seen or isinstance(thing, (nn.Module, type, str)):
        return []
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    inside = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    inside = [*inside, *getattr(thing, "__dict__", {}).values()]
    return [tensor for part in inside for tensor in tensors_in(part, seen)]


def bytes_kept_for_backward(length, depth, kinds=("lsh", "local"), **changes):
    model = make(True, attn_layers=kinds * (depth // len(kinds)), **changes)
    kept, seen = [], {}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(**make_inputs(length=length)).loss
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if id(node) not in seen:
            kept += tensors_in(getattr(node, "__dict__", {}), seen)
            nodes += [following for following, _ in node.next_functions if following is not None]
            seen[id(node)] = node
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("length", [LENGTH, 120])
def test_a_layer_keeps_buckets_and_the_state_of_the_generator(length, dropout):
    growth = bytes_kept_for_backward(length, 12, **dropout) - bytes_kept_for_backward(length, 2, **dropout)
    int32_buckets = BATCH * 2 * 2 * length * 4
    random_states = 2 * torch.get_rng_state().nbytes
    assert growth == 5 * int32_buckets + 10 * random_states


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_peak_memory_does_not_grow_with_depth(implementation):
    peaks, weights = [], []
    for depth in (2, 12):
        model = make(True, attn_layers=["lsh", "local"] * (depth // 2), attn_implementation=implementation)
        inputs = make_inputs(length=120)
        with Allocations() as allocations:
            model(**inputs).loss.backward()
        peaks.append(allocations.peak)
        weights.append(sum(parameter.nbytes for parameter in model.parameters()))
    one_stream = BATCH * 120 * HIDDEN * 8
    int32_buckets = BATCH * 2 * 2 * 120 * 4
    gradients_of_weights = weights[1] - weights[0]
    assert peaks[1] - peaks[0] < gradients_of_weights + 5 * int32_buckets + one_stream / 2


def test_backward_leaves_nothing_but_gradients():
    """While the loss is still there: no stream, neither of a layer nor on the tape."""
    model, inputs = make(True, attn_layers=["local"] * 3), make_inputs(length=120)
    with Allocations() as allocations:
        loss = model(**inputs).loss
        loss.backward()
    gradients = [inputs["inputs_embeds"].grad, *(parameter.grad for parameter in model.parameters())]
    left = allocations.alive - sum(gradient.nbytes for gradient in gradients if gradient is not None)
    assert left < inputs["inputs_embeds"].nbytes / 2


def test_ordinary_autograd_is_not_what_is_measured():
    """Without `reversible` the same measures grow."""
    model = make(False, attn_layers=["local"] * 2)
    with Allocations() as allocations:
        model(**make_inputs(length=120)).loss.backward()
    shallow = allocations.peak
    model = make(False, attn_layers=["local"] * 4)
    with Allocations() as allocations:
        model(**make_inputs(length=120)).loss.backward()
    assert allocations.peak - shallow > 2 * 5 * BATCH * 120 * HIDDEN * 8


# Randomness.


def test_a_training_step_follows_the_default_generator_only():
    """Same seed, same step; another seed, another; and the generator is nowhere set to a value of ours."""
    model = make(True, **DROPOUT)

    def step(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model(**make_inputs()).loss
        loss.backward()
        return loss.detach(), layers_of(model)[0].feed_forward.dense.dense.weight.grad.clone(), torch.get_rng_state()

    first, other, again = step(1), step(2), step(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_evaluation_leaves_the_default_generator_alone():
    model = make(True, **DROPOUT).eval()
    before = torch.get_rng_state()
    model(**make_inputs()).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


# Hooks, and what cannot work.


@pytest.mark.parametrize("layer_idx", [0, 1, 2])
def test_hooks_on_layers_and_parameters_see_what_ordinary_autograd_shows(layer_idx):
    results = []
    for reversible in (False, True):
        model = make(reversible, attn_layers=STACKS["mixed"], chunk_size_feed_forward=8)
        seen, times = [], {}
        layers_of(model)[layer_idx].register_full_backward_hook(
            lambda module, inputs, outputs, seen=seen: seen.extend([*inputs[:2], *outputs[:2]])
        )
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name, times=times: times.update({name: times.get(name, 0) + 1})
            )
        model(**make_inputs()).loss.backward()
        results.append(seen)
        assert set(times.values()) == {1}
        assert set(times) == {name for name, _ in model.named_parameters()} - {
            "reformer.embeddings.word_embeddings.weight"
        }
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_hook_may_change_the_gradient_between_layers():
    results = []
    for reversible in (False, True):
        model = make(reversible)

        def double_gradient(module, args, output):
            output[1].register_hook(lambda gradient: 2 * gradient)

        layers_of(model)[0].register_forward_hook(double_gradient)
        inputs = make_inputs()
        model(**inputs).loss.backward()
        results.append(inputs["inputs_embeds"].grad)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_a_loss_on_an_output_that_was_not_kept():
    model, outputs = make(True, attn_layers=STACKS["mixed"]), []
    layers_of(model)[1].register_forward_hook(lambda module, args, output: outputs.append(output[1]))
    loss = model(**make_inputs()).loss
    with pytest.raises(RuntimeError, match=r"output of layer 1.*output_hidden_states=True.*config.reversible=False"):
        outputs[0].sum().backward()
    # Together with the model's loss it is kept at the right time, and then gone again.
    (loss + outputs[0].sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="output of layer 1"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("change", ["replaced", "in place"])
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_a_changed_output_between_layers(layer_idx, change):
    """A layer is inverted from what the next layer recovers, so that must be what it put out."""

    def hook(module, args, output):
        if change == "in place":
            with torch.no_grad():
                output[1].mul_(1.5)
            return None
        return (output[0], output[1] * 1.5, *output[2:])

    model = make(True, attn_layers=STACKS["mixed"])
    layers_of(model)[layer_idx].register_forward_hook(hook)
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match=rf"output of layer {layer_idx} was changed.*config.reversible=False"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)


def test_a_replaced_output_that_is_kept():
    """The last layer's is, and every layer's with `output_hidden_states`."""
    results = []
    for reversible in (False, True):
        model, inputs = make(reversible), make_inputs()
        for layer in layers_of(model):
            layer.register_forward_hook(lambda module, args, output: (output[0], output[1] * 1.5, *output[2:]))
        model(**inputs, output_hidden_states=True).loss.backward()
        results.append(inputs["inputs_embeds"].grad)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_differentiating_twice_is_refused():
    model, inputs = make(True), make_inputs()
    loss = model(**inputs).loss
    with pytest.raises(RuntimeError, match=r"derivatives of derivatives.*config.reversible = False"):
        torch.autograd.grad(loss, inputs["inputs_embeds"], create_graph=True)
    # A loss that is linear in the streams, where autograd by itself would go on with a wrong result.
    hidden_state = model(**inputs, output_hidden_states=True).hidden_states[-1]
    with pytest.raises(RuntimeError, match=r"derivatives of derivatives.*config.reversible = False"):
        torch.autograd.grad(hidden_state.sum(), inputs["inputs_embeds"], create_graph=True)
