"""Rotary positions against plain complex numbers, what they leave out, and lengths beyond those of training."""

import pytest
import torch
from tiny_models import POSITIONS, STACKS, WINDOWS, make_model, random_ids, tiny_config
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

from hf_reformer import (
    ReformerCache,
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerModel,
    hash_vectors,
)
from hf_reformer.modeling.layers.encoder import SELF_ATTENTION
from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention
from hf_reformer.modeling.layers.rotary_positions import rotation_of
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference


# Positions that turn the vectors of LSH layers.
TURNED = [name for name, settings in POSITIONS.items() if settings.get("lsh_rotary")]
BATCH, LENGTH, HIDDEN, HEADS, SIZE, CHUNK = 2, 37, 32, 2, 8, 16
# The keys that each type of rotation needs; a head of 8 has waves on every side of these bounds.
ROPE_TYPES = {
    "default": {"rope_theta": 50.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_turns_as_llama_does(kind):
    rope_parameters = {"rope_type": kind, "rope_theta": 10000.0} | ROPE_TYPES[kind]
    # Its head size is not the hidden size shared out to the heads.
    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    config = tiny_config(**POSITIONS["rotary"], **sizes, attention_head_size=SIZE, rope_parameters=rope_parameters)
    llama = LlamaConfig(**sizes, head_dim=SIZE, max_position_embeddings=128, rope_parameters=rope_parameters)
    vectors, positions = torch.randn(BATCH, LENGTH, HEADS, SIZE), torch.randint(1000, (BATCH, LENGTH))
    cos, sin = LlamaRotaryEmbedding(llama)(vectors, positions)
    expected, _ = apply_rotary_pos_emb(vectors, vectors, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotation_of(config, positions, vectors.flatten(2)).turn(vectors), expected)


def test_settings_of_the_rotation_are_completed_wherever_they_come_from():
    scaled = {"rope_type": "yarn", "factor": 4.0}
    typed, assigned = tiny_config(**POSITIONS["rotary"], rope_parameters=scaled), tiny_config(**POSITIONS["rotary"])
    assert assigned.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assigned.rope_parameters = scaled
    assigned.validate()
    for config in (typed, assigned):
        assert config.rope_parameters == scaled | {"rope_theta": 10000.0, "original_max_position_embeddings": 128}
    # What was given may serve other configs.
    assert scaled == {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(
        ValueError, match=r"`rope_parameters={.*}` is for `position_embedding_type='rotary'`, .* 'axial'"
    ):
        ReformerConfig(rope_parameters=scaled)


def turned(vectors, positions, theta):
    """Number `i` of the first half and of the second are one complex number, multiplied by `e^(i angle)`."""
    pairs = torch.complex(*vectors.chunk(2, dim=-1))
    speeds = theta ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
    pairs = pairs * torch.exp(1j * positions[..., None, None] * speeds)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def plainly(module, hidden_states, positions, theta):
    """Causal attention, score by score; of an LSH layer with keys at unit length, and not to the token itself."""

    def project(name):
        return getattr(module, name)(hidden_states).unflatten(-1, (HEADS, SIZE))

    kind = next(kind for kind, layer in SELF_ATTENTION.items() if isinstance(module, layer))
    place = torch.arange(hidden_states.shape[1])
    distance = place[:, None] - place
    visible = distance >= 0
    if kind == "lsh":
        query = turned(project("query_key"), positions, theta)
        key = query / (query.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() / SIZE**0.5
        # The first token sees nothing else.
        visible = (distance > 0) | ((distance == 0) & (place == 0))
        scale = 1.0
    else:
        query, key = (turned(project(name), positions, theta) for name in ("query", "key"))
        scale = SIZE**-0.5
    if kind == "local":
        visible = visible & (place[:, None] // CHUNK - place // CHUNK <= 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, project("value")).flatten(2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", SELF_ATTENTION)
def test_layers_attend_as_written_plainly(kind, implementation):
    """Output and all gradients. LSH layers attend exactly here."""
    torch.manual_seed(0)
    config = tiny_config(
        attn_layers=[kind],
        is_decoder=True,
        circular_look_around=False,
        full_attention_threshold=LENGTH,
        rope_parameters={"rope_theta": 16.0},
        attn_implementation=implementation,
        **POSITIONS["LSH rotary"],
    )
    module = SELF_ATTENTION[kind](config, 0).double().eval()
    hidden_states = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(LENGTH) + torch.tensor([[0], [1000]])
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
    rotation = rotation_of(config, positions, hidden_states)
    output = module(hidden_states, rotation=rotation, full_attention_mask=mask)[0]
    leaves, results = [hidden_states, *module.parameters()], []
    gradient = torch.randn_like(output)
    for each in (output, plainly(module, hidden_states, positions, 16.0)):
        results.append(dict(enumerate([each, *torch.autograd.grad(each, leaves, gradient)])))
    # The frequencies have the precision of float32, and angles go up to 1,037.
    for name, expected in results[1].items():
        assert (results[0][name] - expected).norm() <= 1037 * 2**-23 * expected.norm(), name


@pytest.mark.parametrize("positions", TURNED)
def test_what_is_hashed(positions):
    """Buckets by content alone, or by content and place; scores know the distance either way."""
    config = tiny_config(attn_layers=["lsh"], circular_look_around=False, **POSITIONS[positions])
    module = LSHSelfAttention(config, 0).double().eval()
    hidden_states = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    rotation = rotation_of(config, None, hidden_states)
    rotations = module.draw_rotations(LENGTH, None, None, hidden_states.device)
    output, _, buckets = module(hidden_states, rotations=rotations, rotation=rotation)
    content = module.query_key(hidden_states).unflatten(-1, (HEADS, -1))
    hashed = content if positions == "LSH rotary, after hashing" else rotation.turn(content)
    assert torch.equal(buckets, hash_vectors(hashed, rotations, config.num_buckets))
    expected = lsh_attention_reference(
        rotation.turn(content),
        module.value(hidden_states).unflatten(-1, (HEADS, -1)),
        buckets,
        chunk_length=config.lsh_attn_chunk_length,
        circular_look_around=False,
    )
    assert (output - expected.flatten(2)).norm() <= 1e-10 * output.norm()


@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
@pytest.mark.parametrize("positions", ["rotary", *TURNED])
@pytest.mark.parametrize("stack", STACKS)
def test_only_distances_count(stack, positions, model_class, fixed_buckets):
    model = make_model(model_class, attn_layers=STACKS[stack], **POSITIONS[positions]).double()
    ids, places = random_ids(2, 70), torch.arange(70)
    with torch.no_grad():
        expected = model(ids).logits
        for moved in (places[None] + 1000, places + torch.tensor([[3], [50000]])):
            assert (model(ids, position_ids=moved).logits - expected).norm() <= 1e-10 * expected.norm()
        stretched = model(ids, position_ids=2 * places[None]).logits
    # LSH layers look for content, unless they are asked to mind the distance.
    is_free = stack == "lsh" and positions == "rotary"
    assert torch.equal(stretched, expected) == is_free
    assert is_free or (stretched - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_without_positions_tokens_are_a_bag(positions):
    """What full layers read in both directions does not change with the order."""
    model = make_model(ReformerModel, attn_layers=STACKS["full"], **POSITIONS[positions]).double()
    ids, order = random_ids(2, 50), torch.randperm(50)
    with torch.no_grad():
        expected, actual = model(ids)[0][:, order], model(ids[:, order])[0]
        assert torch.allclose(actual, expected, rtol=0, atol=1e-10) == (positions == "none")
        if positions == "none":
            assert torch.equal(model(ids, position_ids=7 * torch.arange(50)[None])[0], model(ids)[0])


@pytest.mark.parametrize("positions", ["rotary", *TURNED, "none"])
def test_no_length_is_the_last(positions):
    """Trained at 32 tokens; then texts of 128 and more, by one pass, by a cache, and generated."""
    model = make_model(
        ReformerForCausalLM, attn_layers=STACKS["mixed"], max_position_embeddings=32, **WINDOWS, **POSITIONS[positions]
    ).double()
    model.train()(random_ids(2, 32), labels=random_ids(2, 32)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    ids, cache = random_ids(2, 128), ReformerCache(model.eval().config)
    with torch.no_grad():
        expected = model(ids).logits
        actual = torch.cat([model(piece, cache=cache).logits for piece in ids.split([40, 80, *[1] * 8], dim=1)], dim=1)
    assert (actual - expected).norm() <= 1e-10 * expected.norm()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    made = [model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert made[0].shape == (2, 148)
    assert torch.equal(*made)


@pytest.mark.parametrize("positions", TURNED)
def test_positions_that_are_given_go_on_behind_a_cache(positions):
    """Each with the distance to the tokens before it, as in one pass."""
    model = make_model(ReformerForCausalLM, attn_layers=STACKS["mixed"], **WINDOWS, **POSITIONS[positions]).double()
    ids, positions, cache = random_ids(2, 60), torch.arange(60)[None] * 3 + 5, ReformerCache(model.config)
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        pieces = zip(*(tensor.split([25, 25, *[1] * 10], dim=1) for tensor in (ids, positions)), strict=True)
        actual = [model(piece, position_ids=places, cache=cache).logits for piece, places in pieces]
    assert (torch.cat(actual, dim=1) - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_angles_are_float32_at_least(dtype):
    """Whatever the layers compute in, and no wrapper that casts what layers are given gets hold of them."""
    config = tiny_config(**POSITIONS["rotary"])
    hidden_states, positions = torch.zeros(1, 3, HIDDEN, dtype=dtype), torch.tensor([[0, 1, 60001]])
    with torch.autocast("cpu", torch.bfloat16):
        rotation = rotation_of(config, positions, hidden_states)
    assert rotation.cos.dtype == rotation.sin.dtype == torch.promote_types(dtype, torch.float32)
    # The fastest wave turns by one radian per position.
    angle = torch.tensor(60001.0, dtype=torch.float64)
    torch.testing.assert_close(rotation.cos[0, 2, 0, 0].double(), angle.cos(), rtol=0, atol=2**-22)
    assert rotation.turn(torch.ones(1, 3, 2, SIZE, dtype=dtype)).dtype == dtype
    assert tree_leaves({"rotation": rotation}) == [rotation]
    moved = rotation.to(torch.device("meta"), non_blocking=True)
    assert moved.cos.is_meta and moved.sin.is_meta
