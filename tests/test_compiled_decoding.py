"""A compiled model continues a text as the uncompiled one does, with few programs for a whole text."""

import copy

import pytest
import torch
from tiny_models import POSITIONS, STACKS, WINDOWS, left_padded, make_model, random_ids
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_reformer import ReformerCache, ReformerForCausalLM
from hf_reformer.modeling.decoding.bucket_order import NO_TOKEN, BucketOrder, bucket_of, encode
from hf_reformer.modeling.decoding.cache_naming import CACHE_NAME


pytestmark = pytest.mark.compile


LONG = {"axial_pos_shape": [32, 32], "max_position_embeddings": 1024}
SUCCESSORS = WINDOWS | {"lsh_value_shift": 1} | POSITIONS["LSH rotary"]
# The settings, and how many tokens of the second of two rows are padding; None for a single row without a mask.
CASES = {
    "local": ({"attn_layers": STACKS["local"]} | WINDOWS, None),
    "full": ({"attn_layers": STACKS["full"]} | WINDOWS, None),
    "lsh": ({"attn_layers": STACKS["lsh"]} | SUCCESSORS, None),
    "hashed, then turned": ({"attn_layers": STACKS["lsh"]} | WINDOWS | POSITIONS["LSH rotary, after hashing"], 30),
    "stock chunks": ({"attn_layers": STACKS["mixed"]}, 0),
    "padding": ({"attn_layers": STACKS["mixed"]} | SUCCESSORS, 30),
    "padding, counted once": ({"attn_layers": STACKS["mixed"], "allow_duplicate_attention": False} | WINDOWS, 95),
}
PROMPT, LENGTH = 100, 180


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def make(dtype=torch.float64, **changes):
    return make_model(ReformerForCausalLM, **(LONG | changes)).to(dtype)


def assert_same_steps(model, compiled, padding, tolerance, length=LENGTH):
    """Token by token from caches that hold the same prompt."""
    ids = random_ids(1 if padding is None else 2, length)
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    cache = ReformerCache(model.config)
    with torch.no_grad():
        model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], cache=cache)
        other = copy.deepcopy(cache)
        for end in range(PROMPT + 1, length + 1):
            step = {"input_ids": ids[:, end - 1 : end], "use_cache": True}
            if padding is not None:
                # As `generate` makes it: a tensor of its own.
                step["attention_mask"] = mask[:, :end].clone()
            expected = model(**step, cache=cache).logits
            actual = compiled(**step, past_key_values=other)
            assert (actual.logits - expected).norm() <= tolerance * expected.norm(), end
            assert actual[CACHE_NAME] is other
    assert other.get_seq_length() == length


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_equals_an_uncompiled_one(case):
    """Over borders of chunks, a merge of the order (at 128 tokens) and growing buffers (at 164)."""
    settings, padding = CASES[case]
    model, counter = make(**settings), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_same_steps(model, compiled, padding, 1e-10)
    # For the first token, for all others, for those that need more room; while a row is below the threshold.
    assert counter.frame_count <= (4 if padding == 95 else 3)


def test_inductor_continues_a_text():
    """In float32, and with `dynamic=True` by one program while there is room."""
    model = make(torch.float32, attn_layers=STACKS["mixed"], **SUCCESSORS)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    assert_same_steps(model, compiled, None, 1e-5, length=PROMPT + 50)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_may_begin_a_text():
    model = make(attn_layers=STACKS["mixed"], **SUCCESSORS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = random_ids(2, 53)
    with torch.no_grad():
        cache = compiled(ids[:, :50], use_cache=True).get(CACHE_NAME)
        logits = [compiled(token, cache=cache).logits for token in ids[:, 50:].split(1, dim=1)]
        expected = model(ids).logits[:, 50:]
    assert (torch.cat(logits, dim=1) - expected).norm() <= 1e-10 * expected.norm()


def test_rows_may_be_chosen_and_tokens_taken_back_between_compiled_steps():
    model = make(attn_layers=STACKS["mixed"], **SUCCESSORS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, others = random_ids(2, 135), random_ids(2, 10)
    caches = ReformerCache(model.config), ReformerCache(model.config)
    logits = []
    with torch.no_grad():
        for call, cache in zip((model, compiled), caches, strict=True):
            model(ids[:, :110], cache=cache)
            for token in ids[:, 110:].split(1, dim=1):
                call(token, cache=cache)
            # To before a merge, and among the tokens that were recent then.
            cache.crop(-12)
            cache.batch_select_indices(torch.tensor([1, 0]))
            logits.append([call(token, cache=cache).logits for token in others.split(1, dim=1)])
        text = torch.cat([ids[[1, 0], :123], others], dim=1)
        expected = model(text).logits[:, 123:]
    for found in logits:
        assert (torch.cat(found, dim=1) - expected).norm() <= 1e-10 * expected.norm()


def test_a_compiled_step_refuses_masked_tokens():
    model = make(attn_layers=["local"], **WINDOWS)
    ids, mask = random_ids(1, 20), torch.ones(1, 20)
    with torch.no_grad():
        cache = model(ids[:, :19], use_cache=True).get(CACHE_NAME)
        mask[0, 19] = 0
        with pytest.raises(RuntimeError, match=r"hides a new token.*call the uncompiled model"):
            torch.compile(model, fullgraph=True, backend="eager")(ids[:, 19:], attention_mask=mask, cache=cache)


GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("lengths", [(80,), (80, 50)], ids=["one prompt", "padding"])
@pytest.mark.parametrize("way", ["compile_config", "forward"])
def test_generate_with_a_compiled_step(way, lengths):
    """The prompt is not compiled: two programs, for the first step and the others."""
    model = make(attn_layers=STACKS["mixed"], **SUCCESSORS)
    ids, mask = left_padded([random_ids(1, length)[0] for length in lengths])
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    options = {}
    if way == "forward":
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    else:
        options["compile_config"] = CompileConfig(fullgraph=True, backend="eager", mode=None)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **options), expected)
    assert counters["stats"]["unique_graphs"] == 2


def test_the_codes_before_one_are_the_nearest_in_its_bucket():
    positions = torch.arange(300).expand(2, -1)
    is_token = torch.rand(2, 300) < 0.9
    codes = encode(torch.randint(4, (2, 2, 3, 300)), positions, is_token, 4)
    for first, count in ((300, 0), (200, 100), (237, 63), (236, 64), (290, 10)):
        order = BucketOrder(codes[..., :first])
        for code in codes[..., first:].split(1 if count < 70 else 33, dim=3):
            order.append(code)
        asked = codes[..., 280:]
        found = order.before(asked, 20).sort(descending=True).values
        seen, code = codes[..., None, :], asked[..., None]
        is_met = (seen < code) & (bucket_of(seen) == bucket_of(code)) & (seen < NO_TOKEN)
        assert torch.equal(found, seen.masked_fill(~is_met, -1).topk(20).values)
