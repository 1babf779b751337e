"""Through how many functions one layer runs, and how deep: who wants to know what it does has to follow them all."""

import sys
from pathlib import Path

import pytest
import torch

from hf_reformer.modeling.layers import encoder
from hf_reformer.modeling.layers.reversible import ReversibleTape
from hf_reformer.training import recipe_config


MODELING = str(Path(encoder.__file__).parents[1])
LENGTH = 256
# Functions and depth. Who needs more makes the code easier to read by it.
MOST = {"lsh": (63, 10), "local": (43, 10), "full": (34, 8)}


def functions_and_depth(run):
    """Named functions of `modeling` that `run` calls, and how many are at work at one time."""
    called, at_work, deepest = set(), 0, 0

    def follow(frame, event, _):
        nonlocal at_work, deepest
        code = frame.f_code
        # A comprehension is called like a function before Python 3.12.
        if not code.co_filename.startswith(MODELING) or code.co_name.startswith("<"):
            return
        if event == "call":
            called.add((code.co_filename, code.co_firstlineno))
            at_work += 1
            deepest = max(deepest, at_work)
        elif event == "return":
            at_work -= 1

    before = sys.getprofile()
    sys.setprofile(follow)
    try:
        run()
    finally:
        sys.setprofile(before)
    return len(called), deepest


@pytest.mark.parametrize("kind", MOST)
def test_a_layer_does_not_run_through_more_functions(kind):
    config = recipe_config(LENGTH, attn_layers=[kind], hidden_size=64, num_attention_heads=2, attention_head_size=32)
    config._attn_implementation = "eager"
    layer = encoder.ReformerLayer(config, 0).train()
    stream = torch.randn(2, LENGTH, config.hidden_size, requires_grad=True)
    tape = ReversibleTape((stream, stream))
    functions, depth = functions_and_depth(lambda: layer(stream, stream, tape=tape, stores_output=True, on_grid=True))
    assert functions <= MOST[kind][0]
    assert depth <= MOST[kind][1]
