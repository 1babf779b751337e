"""What only a GPU can show: the kernels of CUDA, compiled Triton at length, and models that train there."""

import weakref

import pytest
import test_lsh_operator
import torch
from tiny_models import NO_ATTENTION_DROPOUT, make_model

from hf_reformer import ReformerForCausalLM, estimate_memory
from hf_reformer.modeling.memory.memory_estimate import TrainingSetup, TrainingStep
from hf_reformer.modeling.ops import softmax_kernels
from hf_reformer.modeling.ops.local_operator import local_attention
from hf_reformer.modeling.ops.lsh_hashing import draw_rotations, hash_vectors
from hf_reformer.modeling.ops.lsh_operator import lsh_attention
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference
from scripts.bench.timing import captured


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")]

# Rows of 32 tokens and heads that fill 16 bytes, which the fused kernel of CUDA takes; and others, that it does not.
SHAPES = {"fused": (32, 8), "chunks of 24": (24, 8), "heads of 6": (32, 6)}
MODEL = NO_ATTENTION_DROPOUT | {
    "attention_head_size": 32,
    "attn_layers": ["local", "lsh", "local", "lsh"],
    "hash_seed": 3,
    "is_decoder": True,
    "local_attn_chunk_length": 32,
    "lsh_attn_chunk_length": 32,
    "reversible": True,
}


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused kernel of CUDA was chosen."""
    calls, choose = [], softmax_kernels._kernel_for

    def counted(query):
        calls.append(choose(query))
        return calls[-1]

    monkeypatch.setattr(softmax_kernels, "_kernel_for", counted)
    return calls


def relative_error(actual, expected):
    return ((actual.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "scattered"])
@pytest.mark.parametrize(
    "case", ["causal", "odd length", "far neighbours", "no circle", "own bucket", "no duplicates", "as in the paper"]
)
def test_fused_attention_equals_the_oracle(case, mask, dtype, shape, fused_calls):
    chunk_length, size = SHAPES[shape]
    options = dict(test_lsh_operator.CASES[case])
    length, rounds = 4 * options.pop("length"), options.pop("rounds")
    *rows, buckets, attention_mask = test_lsh_operator.make_inputs(length, rounds, mask, size=size)
    if attention_mask is not None:
        rows[2] = rows[2] * attention_mask[..., None, None]
    options["chunk_length"] = chunk_length
    known = {"buckets": buckets, "attention_mask": attention_mask}
    expected = test_lsh_operator.run(lsh_attention_reference, *rows, **known, **options)
    low = [row.to(dtype) for row in rows]
    theirs = test_lsh_operator.run(lsh_attention_reference, *low, **known, **options)
    known = {name: None if each is None else each.cuda() for name, each in known.items()}
    actual = test_lsh_operator.run(
        lsh_attention, *[row.cuda() for row in low], **known, **options, implementation="sdpa"
    )
    assert set(fused_calls) == {"cuda" if shape == "fused" else None}
    for ours, reference, truth in zip(actual, theirs, expected, strict=True):
        if attention_mask is not None:
            ours, reference, truth = (
                rows * attention_mask[..., None, None].to(rows) for rows in (ours, reference, truth)
            )
        assert ours.dtype == dtype
        assert relative_error(ours, truth) <= max(2 * relative_error(reference, truth), 1e-5)


LOCAL_CASES = {
    "causal": {"num_chunks_before": 1, "num_chunks_after": 0, "causal": True, "circular_look_around": True},
    "no circle": {"num_chunks_before": 2, "num_chunks_after": 1, "causal": False, "circular_look_around": False},
    "far neighbours": {"num_chunks_before": 3, "num_chunks_after": 2, "causal": False, "circular_look_around": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [160, 149])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", LOCAL_CASES)
def test_local_attention_equals_plain_operations(case, masked, length, dtype, fused_calls):
    options = LOCAL_CASES[case] | {"chunk_length": 32, "padded_length": 160}
    rows = list(torch.randn(4, 2, length, 2, 32, dtype=torch.float64))
    mask = torch.arange(length) >= torch.tensor([[0], [length // 3]]) if masked else None
    if masked:
        rows[3] = rows[3] * mask[..., None, None]

    def run(implementation, device, kind):
        query, key, value = leaves = [row.to(device, kind).requires_grad_() for row in rows[:3]]
        known = None if mask is None else mask.to(device)
        output, _ = local_attention(query, key, value, attention_mask=known, implementation=implementation, **options)
        if masked:
            output = output * known[..., None, None]
        return output.detach(), *torch.autograd.grad(output, leaves, rows[3].to(device, kind))

    expected, theirs = run("eager", "cpu", torch.float64), run("eager", "cpu", dtype)
    for implementation in ("sdpa", *(() if case == "far neighbours" else ("triton",)), None):
        for ours, reference, truth in zip(run(implementation, "cuda", dtype), theirs, expected, strict=True):
            assert ours.dtype == dtype
            assert relative_error(ours, truth) <= max(2 * relative_error(reference, truth), 1e-5)
    assert set(fused_calls) == {"cuda"}


def train(implementation, device, dtype=torch.float32, autocast=False, **changes):
    """Loss and gradients of one batch with a row that is padded on the right."""
    model = make_model(ReformerForCausalLM, **(MODEL | changes), attn_implementation=implementation)
    model = model.to(device, dtype).train()
    torch.manual_seed(2)
    ids = torch.randint(2, 50, (2, 128)).to(device)
    mask = (torch.arange(128) < torch.tensor([[128], [90]])).long().to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("implementation", [None, "triton", "sdpa", "eager"])
@pytest.mark.parametrize("num_buckets", [8, [4, 4]], ids=str)
def test_a_model_trains_as_on_a_cpu(implementation, num_buckets):
    expected = train("eager", "cpu", torch.float64, num_buckets=num_buckets)
    for ours, truth in zip(train(implementation, "cuda", num_buckets=num_buckets), expected, strict=True):
        assert relative_error(ours, truth) <= 1e-4


@pytest.mark.parametrize("implementation", ["triton", "sdpa"])
def test_a_model_trains_under_autocast(implementation):
    loss, gradients = train(implementation, "cuda", autocast=True)
    expected, their_gradients = train("eager", "cuda", autocast=True)
    assert gradients.isfinite().all()
    assert abs(loss - expected) <= 2**-7 * expected
    assert torch.nn.functional.cosine_similarity(gradients, their_gradients, dim=0) > 0.9


def test_two_steps_agree_bit_for_bit():
    torch.use_deterministic_algorithms(True)
    for one, other in zip(train("triton", "cuda"), train("triton", "cuda"), strict=True):
        assert torch.equal(one, other)


def test_recomputation_changes_nothing():
    for one, other in zip(train("triton", "cuda"), train("triton", "cuda", reversible=False), strict=True):
        assert relative_error(one, other.cpu()) <= 1e-5


def test_generates_what_a_cpu_does():
    models = [make_model(ReformerForCausalLM, **MODEL, attn_implementation=name) for name in ("eager", None)]
    ids = torch.randint(2, 50, (2, 70))
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    expected = models[0].generate(ids, **settings)
    assert torch.equal(models[1].cuda().generate(ids.cuda(), **settings).cpu(), expected)


@pytest.mark.parametrize("implementation", ["triton", "sdpa"])
def test_a_step_takes_the_memory_that_is_predicted(implementation):
    config = make_model(ReformerForCausalLM, **MODEL | {"hidden_size": 64, "axial_pos_embds_dim": [32, 32]}).config
    config._attn_implementation = implementation
    config.axial_pos_shape, config.max_position_embeddings = [64, 64], 4096
    setup = {"device": "cuda", "length": 4096, "batch_size": 8}
    predicted = estimate_memory(config, **setup)
    step = TrainingStep(config, TrainingSetup(**setup))
    step.make_optimizer(), step()
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    taken = torch.cuda.max_memory_allocated() - before
    standing = predicted.parameters + predicted.optimizer_state
    # An allocator rounds up to 512 bytes, and hands out blocks of 2 MiB and more in one piece.
    assert taken == pytest.approx(predicted.peak - standing, rel=0.1)


def test_a_graph_replays_a_call_and_keeps_what_it_reads():
    numbers, sums = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    replay = captured(lambda numbers=numbers: sums.add_(numbers))
    kept = weakref.ref(numbers)
    del numbers
    before = sums.clone()
    replay()
    assert torch.equal(sums, before + 1)
    assert kept() is not None
    with pytest.raises(RuntimeError):
        captured(lambda: sums.sum().item())
    assert torch.rand(1, device="cuda").isfinite().all()


def test_a_million_tokens_need_64_bit_offsets():
    length, heads, rounds = 2**20, 8, 5
    assert rounds * length * heads * 64 > 2**31
    torch.manual_seed(0)
    query_key, value, gradient = torch.randn(3, 1, length, heads, 64, device="cuda", dtype=torch.bfloat16)
    num_buckets = [64, 128]
    rotations = draw_rotations(heads, 64, rounds, num_buckets, device=query_key.device, seed=0)

    def attend(which):
        rows = [each[:, :, which].detach().requires_grad_() for each in (query_key, value)]
        buckets = hash_vectors(rows[0].detach(), rotations[which], num_buckets)
        output, _ = lsh_attention(*rows, buckets, chunk_length=64, causal=True, num_buckets=num_buckets)
        return output.detach(), *torch.autograd.grad(output, rows, gradient[:, :, which])

    alone = attend(slice(7, 8))
    for ours, theirs in zip(attend(slice(0, 8)), alone, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours[:, :, 7:], theirs)
