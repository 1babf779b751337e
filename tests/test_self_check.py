"""Untested releases of torch and transformers are checked on import, and what would be silently wrong is refused."""

import re
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from hf_reformer import ReformerForCausalLM
from hf_reformer.modeling import modeling_reformer, self_check
from hf_reformer.modeling.layers.reversible import ReversibleLayerFunction


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setitem(self_check.TESTED, "transformers", ("5.0", "5.1"))


@pytest.mark.parametrize(
    ("installed", "tested"),
    [("5.17.0", True), ("5.24.3", True), ("5.16.9", False), ("5.25.0", False), ("5.25.0.dev0", False), ("6.0", False)],
)
def test_which_releases_are_tested(monkeypatch, installed, tested):
    monkeypatch.setitem(self_check.TESTED, "transformers", ("5.17", "5.25"))
    assert self_check.is_tested("transformers", installed) is tested


def test_the_package_asks_for_releases_that_were_tested():
    setup = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    first, end = self_check.TESTED["transformers"]
    assert f'"transformers>={first},<{end}"' in setup
    # A build of torch for somebody's device may have any number; there the check on import decides.
    assert f'"torch>={self_check.TESTED["torch"][0]}"' in setup


def test_nothing_is_computed_with_tested_releases(monkeypatch):
    monkeypatch.setattr(self_check, "run_checks", lambda: pytest.fail("computed"))
    for package in self_check.TESTED:
        monkeypatch.setitem(self_check.TESTED, package, ("0", "99"))
    self_check.check_installed_releases()


def test_an_untested_release_that_works_is_named_once(untested, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    state = torch.get_rng_state()
    self_check.check_installed_releases()
    assert re.search(r"not been tested with transformers 5\S*, only with .*transformers>=5.0,<5.1", caplog.text)
    assert torch.equal(torch.get_rng_state(), state)


def forget_the_cache(monkeypatch):
    monkeypatch.setattr(modeling_reformer, "cache_of_call", lambda *args: None)


def predict_the_token_itself(monkeypatch):
    def loss(logits, labels, **kwargs):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    monkeypatch.setattr(ReformerForCausalLM, "loss_function", staticmethod(loss))


def lose_a_gradient(monkeypatch):
    backward = ReversibleLayerFunction.backward

    def without_x2(ctx, *grads):
        call, y1_grad, x2_grad, *others = backward(ctx, *grads)
        return call, y1_grad, x2_grad * 0, *others

    monkeypatch.setattr(ReversibleLayerFunction, "backward", staticmethod(without_x2))


def lose_a_weight(monkeypatch):
    save = ReformerForCausalLM.save_pretrained

    def save_without(self, folder):
        save(self, folder, state_dict={k: v for k, v in self.state_dict().items() if "word_embeddings" not in k})

    monkeypatch.setattr(ReformerForCausalLM, "save_pretrained", save_without)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (forget_the_cache, "`attention_mask` must have the input.s shape"),
        (predict_the_token_itself, "loss is not the cross-entropy of the next tokens"),
        (lose_a_gradient, "gradients of reversible layers"),
        (lose_a_weight, "word_embeddings.* is not loaded as it was saved"),
    ],
)
def test_an_untested_release_that_breaks_something_is_refused(untested, monkeypatch, fault, message):
    fault(monkeypatch)
    with pytest.raises(ImportError, match=rf"(?s)does not work right with it: .*{message}.* Install .*transformers>="):
        self_check.check_installed_releases()
