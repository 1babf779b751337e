"""`torch.inference_mode()` computes what `torch.no_grad()` does, and leaves nothing behind in the model."""

import pytest
import torch
from tiny_models import POSITIONS, STACKS, assert_equal_tensors, gradients, left_padded, make_model, random_ids

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
)
from hf_reformer.modeling.decoding.cache_naming import CACHE_NAME
from hf_reformer.modeling.layers import encoder, rotary_positions


MIXED = {"attn_layers": STACKS["mixed"]}
LABELS = {
    ReformerForCausalLM: lambda ids: {"labels": ids},
    ReformerForMaskedLM: lambda ids: {"labels": ids},
    ReformerForMultipleChoice: lambda ids: {"labels": ids[:, 0, 0] % 2},
    ReformerForQuestionAnswering: lambda ids: {"start_positions": ids[:, 0] % 30, "end_positions": ids[:, 1] % 30},
    ReformerForSequenceClassification: lambda ids: {"labels": ids[:, 0] % 2},
    ReformerForTokenClassification: lambda ids: {"labels": ids % 2},
}


def make_inputs(model_class, length=40):
    ids, mask = left_padded([random_ids(1, 30)[0], random_ids(1, length)[0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model_class is ReformerForMultipleChoice:
        inputs = {name: tensor.view(1, 2, length).expand(2, -1, -1) for name, tensor in inputs.items()}
    return inputs


def outputs_under(mode, model, inputs):
    # In training mode both draw the same rotations.
    torch.manual_seed(5)
    with mode():
        output = model(**inputs, output_hidden_states=True)
    flat = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    return flat | {f"hidden state {i}": state for i, state in enumerate(output.hidden_states)}


def train(model, inputs):
    torch.manual_seed(6)
    model.train()(**inputs).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model_class", [ReformerModel, *LABELS])
def test_every_head(model_class, training):
    model, inputs = make_model(model_class, **MIXED).train(training), make_inputs(model_class)
    if model_class in LABELS:
        inputs |= LABELS[model_class](inputs["input_ids"])
    expected = outputs_under(torch.no_grad, model, inputs)
    assert_equal_tensors(outputs_under(torch.inference_mode, model, inputs), expected)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    if model_class in LABELS:
        assert_equal_tensors(train(model, inputs), train(make_model(model_class, **MIXED), inputs))


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(use_cache, reversible):
    model = make_model(ReformerForCausalLM, reversible=reversible, **MIXED)
    inputs = make_inputs(ReformerForCausalLM)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, use_cache=use_cache, **settings)
    with torch.inference_mode():
        assert torch.equal(model.generate(**inputs, use_cache=use_cache, **settings), expected)
    inputs |= {"labels": inputs["input_ids"]}
    assert_equal_tensors(train(model, inputs), train(make_model(ReformerForCausalLM, **MIXED), inputs))


def test_a_text_in_a_cache_can_be_continued():
    model, ids = make_model(ReformerForCausalLM, **MIXED), random_ids(1, 40)
    logits = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = model(ids[:, :30], use_cache=True)
            logits.append(model(ids[:, 30:], **{CACHE_NAME: output[CACHE_NAME]}).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("exact_inversion", [None, True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_without_gradients_streams_are_as_narrow_as_the_layers(stack, exact_inversion):
    """And the output is the same, to rounding."""
    model = make_model(ReformerForCausalLM, attn_layers=STACKS[stack], exact_inversion=exact_inversion)
    ids, dtypes = random_ids(2, 70), []
    model.reformer.encoder.layers[1].register_forward_pre_hook(lambda layer, args: dtypes.append(args[0].dtype))
    expected = model(ids).logits
    with torch.no_grad():
        actual = model(ids).logits
    assert dtypes == [torch.float32 if exact_inversion is False else torch.float64, torch.float32]
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


# Streams that are overwritten.


@pytest.fixture
def overwriting(monkeypatch):
    """Streams of any length keep their memory through all layers."""
    monkeypatch.setattr(encoder, "LARGE_STREAM", 0)


@pytest.fixture
def model_and_ids():
    return make_model(ReformerModel, **MIXED), random_ids(2, 100)


def read(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize("positions", ["axial", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwritten_streams_give_the_same_numbers(positions, dtype, monkeypatch):
    model, ids = make_model(ReformerModel, **MIXED | POSITIONS[positions]).to(dtype), random_ids(2, 100)
    expected = read(model, ids, use_cache=False).last_hidden_state
    monkeypatch.setattr(encoder, "LARGE_STREAM", 0)
    monkeypatch.setattr(rotary_positions, "TURNED_AT_ONCE", 300)
    assert torch.equal(read(model, ids, use_cache=False).last_hidden_state, expected)


def test_a_caller_keeps_what_it_gave(overwriting, model_and_ids):
    model, ids = model_and_ids
    embeds = model.get_input_embeddings()(ids).detach()
    before = embeds.clone()
    expected = read(model, ids, use_cache=False).last_hidden_state
    assert torch.equal(read(model, inputs_embeds=embeds, use_cache=False).last_hidden_state, expected)
    assert torch.equal(embeds, before)


@pytest.mark.parametrize("place", ["layers.0", "layers.1.attention", "layers.1.feed_forward.layer_norm", "embeddings"])
@pytest.mark.parametrize("kind", ["forward", "pre", "global"])
def test_who_looks_keeps_what_it_saw(place, kind, overwriting, model_and_ids):
    """A hook may keep a stream: it must not change afterwards."""
    model, ids = model_and_ids
    module = model.encoder.get_submodule(place) if "layers" in place else model.get_submodule(place)
    seen, copies = [], []

    def keep(given):
        for tensor in given if isinstance(given, tuple) else (given,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                seen.append(tensor)
                copies.append(tensor.clone())

    if kind == "forward":
        handle = module.register_forward_hook(lambda module, args, output: keep(output))
    elif kind == "pre":
        handle = module.register_forward_pre_hook(lambda module, args: keep(args))
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: keep(output))
    try:
        read(model, ids, use_cache=False)
    finally:
        handle.remove()
    assert seen or (kind, place) == ("pre", "embeddings")
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(seen, copies, strict=True))


def test_hidden_states_are_those_of_each_layer(overwriting, model_and_ids):
    model, ids = model_and_ids
    shown = read(model, ids, use_cache=False, output_hidden_states=True).hidden_states
    with torch.enable_grad():
        expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    for ours, theirs in zip(shown, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5)


def test_streams_take_no_memory_layer_by_layer(overwriting, model_and_ids):
    """Without anybody who looks, the two streams of the first layer are those of the last."""
    model, ids = model_and_ids
    overwrites = []
    forward = encoder.run_with_graph

    def watch(call, x1, x2):
        y1, y2, weights = forward(call, x1, x2)
        overwrites.append((y1.data_ptr() == x1.data_ptr(), y2.data_ptr() == x2.data_ptr()))
        return y1, y2, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "run_with_graph", watch)
        read(model, ids, use_cache=False)
    assert overwrites == [(True, True)] * len(model.encoder.layers)
