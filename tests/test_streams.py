"""What goes into the two streams beside stock's, and what becomes of them."""

import pytest
import torch
from tiny_models import MODEL_CLASSES, make_model, random_ids

from hf_reformer import ReformerForMultipleChoice, ReformerModel


COMBINED = {"concat": lambda first, second: torch.cat([first, second], dim=-1), "mean": lambda *both: sum(both) / 2}


@pytest.mark.parametrize("combine_streams", COMBINED)
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_the_streams_go_out_side_by_side_or_as_their_mean(model_class, combine_streams):
    """First combined, then normalised; every head reads as many numbers as that gives."""
    model = make_model(model_class, combine_streams=combine_streams).double()
    encoder, streams, combined = model.base_model.encoder, [], []
    encoder.layers[-1].register_forward_hook(lambda layer, args, output: streams.extend(output[:2]))
    encoder.layer_norm.register_forward_pre_hook(lambda norm, args: combined.append(args[0]))
    ids = random_ids(4, 20)
    with torch.no_grad():
        model(ids[None] if model_class is ReformerForMultipleChoice else ids)
        output = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(combined[-1], COMBINED[combine_streams](*streams[-2:]))
        assert torch.equal(output, encoder.layer_norm(combined[-1]))
    assert output.shape[-1] == model.config.output_size == {"concat": 64, "mean": 32}[combine_streams]


@pytest.mark.parametrize("kind", ["lsh", "local", "full"])
def test_the_bias_of_the_attentions_output_is_added(kind):
    plain, biased = (
        make_model(ReformerModel, attn_layers=[kind], attention_output_bias=bias).encoder.layers[0].attention
        for bias in (False, True)
    )
    weights = biased.state_dict()
    bias = weights.pop("output.dense.bias")
    plain.load_state_dict(weights)
    hidden_states = torch.randn(2, 10, 32)
    with torch.no_grad():
        torch.testing.assert_close(biased(hidden_states)[0], plain(hidden_states)[0] + bias)
