"""`attn_implementation`: a request is met or refused; without one the fastest that can serves each call."""

from dataclasses import replace

import pytest
import torch
from tiny_models import NO_ATTENTION_DROPOUT, make_model, random_ids

from hf_reformer import ReformerForCausalLM
from hf_reformer.modeling.ops import local_operator, lsh_operator


REGISTRIES = (lsh_operator.LSH_IMPLEMENTATIONS, local_operator.LOCAL_IMPLEMENTATIONS)


@pytest.fixture
def called(monkeypatch):
    """Names of the implementations that calls have been served by, of LSH and of local layers."""
    names = ([], [])
    for registry, seen in zip(REGISTRIES, names, strict=True):
        for name, implementation in registry.items():

            def attend(*args, name=name, attend=implementation.attend, seen=seen):
                seen.append(name)
                return attend(*args)

            monkeypatch.setitem(registry, name, replace(implementation, attend=attend))
    return names


def make(**changes):
    return make_model(ReformerForCausalLM, **changes)


def test_fused_kernels_are_the_default_on_a_cpu(called):
    model = make()
    assert model.config._attn_implementation is None
    model(random_ids(1, 60))
    assert called == (["sdpa"], ["sdpa"])


def test_without_a_request_a_call_gets_what_it_needs(called):
    model = make(local_attention_probs_dropout_prob=0.1)
    assert len(model(random_ids(1, 60), output_attentions=True).attentions) == 2
    assert called == (["eager"], ["eager"])
    model.train()(random_ids(1, 60))
    assert called == (["eager", "sdpa"], ["eager", "eager"])


def test_in_bfloat16_local_layers_have_a_faster_one_on_a_cpu(called):
    make().bfloat16()(random_ids(1, 60))
    assert called == (["sdpa"], ["eager"])


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_request_is_met(name, called, tmp_path):
    model = make(attn_implementation=name)
    model(random_ids(1, 60))
    make().save_pretrained(tmp_path)
    loaded = ReformerForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    loaded(random_ids(1, 60))
    other = make()
    other.set_attn_implementation(name)
    other(random_ids(1, 60))
    assert called == ([name] * 3, [name] * 3)


def test_implementations_compute_the_same():
    ids, names = random_ids(2, 60), ("eager", "sdpa", "triton")
    outputs = [make(attn_implementation=name, attention_head_size=32)(ids).logits for name in names]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


REFUSED = {
    "maps": ("sdpa", {}, {"output_attentions": True}, False, "'sdpa' .* no attention probabilities to return"),
    "dropout": ("sdpa", {"local_attention_probs_dropout_prob": 0.1}, {}, True, "'sdpa' .* no dropout .* 0.1"),
    "head size": ("triton", {}, {}, False, r"'triton' .* head sizes \[32, 64, 128\], but not 8"),
    "maps of full layers": ("sdpa", {"attn_layers": ["full"]}, {"output_attentions": True}, False, "'sdpa' .* maps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_met_is_refused(case):
    name, changes, inputs, is_training, message = REFUSED[case]
    model = make(attn_implementation=name, **NO_ATTENTION_DROPOUT | changes).train(is_training)
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 60), **inputs)


def test_names_that_sparse_layers_do_not_have_are_refused():
    with pytest.raises(ValueError, match=r"flash_attention_2.` is not supported: .* \['eager', 'sdpa', 'triton'\]"):
        make(attn_implementation="flash_attention_2")
    model = make()
    with pytest.raises(ValueError, match=r"flex_attention.` is not supported"):
        model.set_attn_implementation("flex_attention")
    model(random_ids(1, 60))
