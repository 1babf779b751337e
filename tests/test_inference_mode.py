"""`torch.inference_mode()` computes what `torch.no_grad()` does, and leaves nothing behind in the model."""

import pytest
import torch
from tiny_models import STACKS, assert_equal_tensors, gradients, left_padded, make_model, random_ids

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
