"""What reversible layers keep within `activation_memory`: the same results, and less is computed twice."""

import threading
from dataclasses import replace
from functools import wraps

import pytest
import torch
from allocations import Allocations
from huggingface_hub.errors import StrictDataclassClassValidationError
from reversible_models import (
    BATCH,
    HIDDEN,
    LENGTH,
    add_lora,
    gradients_of,
    layers_of,
    make,
    make_inputs,
    relative_error,
)
from seq2seq_models import ALL_DROPOUT
from seq2seq_models import make as make_two_sides
from seq2seq_models import train as train_two_sides
from test_reversible import VARIANTS, evaluate
from tiny_models import DROPOUT, STACKS, TINY, assert_close
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import flop_registry

from hf_reformer import ReformerConfig
from hf_reformer.configuration.byte_sizes import bytes_of
from hf_reformer.modeling.layers.encoder import ReformerAttention
from hf_reformer.modeling.layers.output_projection import OutputProjection, can_do_without_result


# Of a stream in float64.
UPDATE = BATCH * LENGTH * HIDDEN * 8
ALL = "1GiB"
# Operations of the last projections of a layer, feed-forward first, then attention.
LAST = [2 * BATCH * LENGTH * HIDDEN * size for size in (TINY["feed_forward_size"], HIDDEN // 2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_ordinary_autograd(name):
    expected, expected_state = evaluate(VARIANTS[name], False, "sdpa" if "maps" not in name else "eager")
    variant = replace(VARIANTS[name], config=VARIANTS[name].config | {"activation_memory": ALL})
    actual, state = evaluate(variant, True, "sdpa" if "maps" not in name else "eager")
    assert_close(actual, expected)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("changes", [{}, ALL_DROPOUT, {"chunk_size_feed_forward": 8} | ALL_DROPOUT])
def test_an_encoder_with_a_decoder(changes):
    expected = train_two_sides(make_two_sides(reversible=False, **changes))
    assert_close(train_two_sides(make_two_sides(activation_memory=ALL, **changes)), expected)


@pytest.mark.parametrize(
    ("autocast", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float64)],
)
def test_under_autocast(autocast, dtype):
    def gradients_within(memory):
        model, inputs = make(True, dtype=dtype, activation_memory=memory, **DROPOUT), make_inputs(dtype=dtype)
        torch.manual_seed(3)
        with torch.autocast("cpu", autocast):
            model(**inputs).loss.backward()
        return gradients_of(model, inputs)

    expected, actual = gradients_within(0), gradients_within(ALL)
    assert actual.keys() == expected.keys()
    # Half a unit in the last place of what the layers compute in: autocast leaves float64 as it is.
    precision = torch.finfo(autocast).eps / 2 if dtype == torch.float32 else 1e-6
    assert relative_error(actual, expected) < precision


class Operations(Allocations):
    """Also counts what PyTorch counts of matrix products, whose own counter looks at modules with hooks."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def step(memory, prepare=lambda model: model, **changes):
    """Operations of a training step, and the bytes in use between forward and backward."""
    model, inputs = prepare(make(True, activation_memory=memory, **changes)), make_inputs()
    torch.manual_seed(3)
    with Operations() as operations:
        loss = model(**inputs).loss
        kept = operations.alive
        loss.backward()
    return operations.count, kept


@pytest.mark.parametrize(
    ("memory", "saved"),
    [
        (1, []),
        (UPDATE - 1, []),
        (UPDATE, LAST[:1]),
        (3 * UPDATE, LAST[:1] * 3),
        (5 * UPDATE - 1, LAST[:1] * 3 + LAST[1:]),
        (6 * UPDATE, LAST * 3),
        (ALL, LAST * 3),
    ],
)
def test_feed_forwards_come_first_and_no_more_is_kept_than_allowed(memory, saved):
    stack = {"attn_layers": STACKS["mixed"]}
    operations, kept = step(0, **stack)
    fewer, more = step(memory, **stack)
    assert operations - fewer == sum(saved)
    assert more - kept == len(saved) * UPDATE
    if memory != ALL:
        assert more - kept <= memory


def kept_by(memory, autocast=None, dtype=torch.float32, **changes):
    """Bytes that a model keeps more than without a budget."""
    in_use = []
    for each in (0, memory):
        model, inputs = make(True, activation_memory=each, dtype=dtype, **changes), make_inputs(dtype=dtype)
        with Allocations() as allocations, torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**inputs).loss
            in_use.append(allocations.alive)
        del loss
    return in_use[1] - in_use[0]


@pytest.mark.parametrize(
    ("autocast", "dtype"), [(None, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float64)]
)
def test_the_budget_is_one_of_bytes_whatever_layers_compute_in(autocast, dtype):
    """It is used up: by two updates in float32, by four of half the size, by one in float64, which autocast leaves."""
    assert kept_by(UPDATE, autocast, dtype, attn_layers=["local"] * 4) == pytest.approx(UPDATE, abs=64)


def look_at_projections(model):
    for layer in layers_of(model):
        layer.feed_forward.output.dense.register_forward_hook(look_at_projections.hook)
    return model


def test_what_a_hook_sees_is_computed():
    seen = []
    look_at_projections.hook = lambda module, args, output: seen.append(output.detach())
    operations, kept = step(0, look_at_projections, exact_inversion=True)
    # In forward and in the recomputation, the last layer first.
    expected, seen = seen, []
    fewer, more = step(ALL, look_at_projections, exact_inversion=True)
    assert len(seen) == 4 and all(map(torch.equal, seen, expected))
    # Attention, which has none, does without.
    assert operations - fewer == 2 * LAST[1] and more - kept == 2 * UPDATE


def test_adapters_on_the_projection_are_computed_and_nothing_is_kept_for_them():
    assert step(ALL, add_lora) == step(0, add_lora)


def test_what_cannot_use_the_budget_leaves_it_to_others():
    def hook_feed_forwards(model):
        for layer in layers_of(model):
            layer.feed_forward.register_forward_hook(lambda module, args, output: None)
        return model

    operations, kept = step(0, hook_feed_forwards)
    fewer, more = step(2 * UPDATE, hook_feed_forwards)
    assert operations - fewer == 2 * LAST[1] and more - kept == 2 * UPDATE


# Whatever reads what the last projection makes gets it.


class Bottleneck(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout, self.scale = dropout, torch.nn.Parameter(torch.full((HIDDEN,), 0.5, dtype=torch.float64))

    def forward(self, hidden_states):
        return self.dropout(hidden_states) + torch.tanh(hidden_states) * self.scale


def read_instead_of_dropout(model, monkeypatch):
    for layer in layers_of(model):
        layer.feed_forward.output.dropout = Bottleneck(layer.feed_forward.output.dropout)


def read_around_attention(model, monkeypatch):
    forward = ReformerAttention.forward

    @wraps(forward)
    def squared(self, *args, **kwargs):
        output, *others = forward(self, *args, **kwargs)
        return output + output**2, *others

    monkeypatch.setattr(ReformerAttention, "forward", squared)


def read_around(module_class):
    def change(model, monkeypatch):
        forward = module_class.forward
        monkeypatch.setattr(module_class, "forward", lambda self, *args: torch.tanh(forward(self, *args)))

    return change


def read_every_module(model, monkeypatch):
    handle = register_module_forward_hook(
        lambda module, args, output: torch.tanh(output) if isinstance(module, OutputProjection) else None
    )
    monkeypatch.setattr(model, "handle", handle, raising=False)


READERS = {
    "an adapter in the place of dropout": read_instead_of_dropout,
    "a wrapper of attention's class": read_around_attention,
    "a wrapper of the projection's class": read_around(OutputProjection),
    "a wrapper of all linear layers": read_around(torch.nn.Linear),
    "a hook on all modules": read_every_module,
}


@pytest.mark.parametrize("name", READERS)
def test_who_reads_the_projection_gets_it(name, monkeypatch):
    def gradients_with(**changes):
        model, inputs = make(activation_memory=ALL, **changes), make_inputs()
        with monkeypatch.context() as patch:
            READERS[name](model, patch)
            torch.manual_seed(3)
            model(**inputs).loss.backward()
            if hasattr(model, "handle"):
                model.handle.remove()
        return gradients_of(model, inputs)

    assert_close(gradients_with(reversible=True), gradients_with(reversible=False))


def test_sharded_weights_are_computed():
    feed_forward = layers_of(make(True))[0].feed_forward
    assert can_do_without_result(feed_forward)
    feed_forward.output.dense.weight.__tensor_flatten__ = None
    assert not can_do_without_result(feed_forward)


def test_compiled_parts_are_computed():
    feed_forward = layers_of(make(True))[0].feed_forward
    feed_forward.output.compile()
    assert not can_do_without_result(feed_forward)


def test_other_threads_compute_what_they_need():
    model, inputs = make(True, activation_memory=ALL, hash_seed=3), make_inputs()
    expected, found, done = model(**make_inputs()).logits.detach(), [], threading.Event()

    def evaluate_beside():
        with torch.no_grad():
            while not done.is_set() or len(found) < 3:
                found.append(model(**inputs).logits)

    thread = threading.Thread(target=evaluate_beside)
    thread.start()
    for _ in range(20):
        model(**make_inputs()).loss.backward()
    done.set()
    thread.join()
    assert_close({"logits": torch.stack(found)}, {"logits": expected.expand(len(found), -1, -1, -1)})


def test_pieces_may_be_others_in_backward():
    """As where somebody sets another size, or a compiler asks."""
    model, inputs = make(True, activation_memory=ALL, chunk_size_feed_forward=8), make_inputs()
    loss = model(**inputs).loss
    for layer in layers_of(model):
        layer.feed_forward.chunk_size = 0
    loss.backward()
    expected = make_inputs()
    make(False)(**expected).loss.backward()
    assert_close({"embeds": inputs["inputs_embeds"].grad}, {"embeds": expected["inputs_embeds"].grad})


def test_hooks_on_saved_tensors_have_them():
    """As offloading needs it."""
    packed = []
    model, inputs = make(True, activation_memory=ALL), make_inputs()

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    # Two halves of two layers, and the last layer's output.
    assert packed.count((BATCH, LENGTH, HIDDEN)) >= 6
    expected = make(True), make_inputs()
    expected[0](**expected[1]).loss.backward()
    assert_close({"embeds": inputs["inputs_embeds"].grad}, {"embeds": expected[1]["inputs_embeds"].grad})


@pytest.mark.parametrize(
    ("size", "number"),
    [
        (0, 0),
        (5, 5),
        ("7", 7),
        ("2GiB", 2**31),
        ("1.5 MiB", 3 * 2**19),
        ("500 MB", 500_000_000),
        ("3KB", 3000),
        (2**53 + 1, 2**53 + 1),
    ],
)
def test_sizes(size, number):
    assert bytes_of("size", size) == number
    assert ReformerConfig(activation_memory=size).activation_memory == size


@pytest.mark.parametrize("size", [-1, "", "-2GiB", "2 gigs", "GiB", "2gib", "1e9"])
def test_sizes_that_are_none(size):
    with pytest.raises(StrictDataclassClassValidationError, match="`activation_memory` must be a number of bytes"):
        ReformerConfig(activation_memory=size)
