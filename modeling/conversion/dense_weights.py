"""
Dense causal language models, GPT-2's and Llama's, as the beginning of a Reformer's training.

No Reformer computes what they compute: its residual stream is two, of which attention reads what feed-forward layers
wrote and the other way round, and queries of LSH layers are their keys. So this is a start that training goes on from
(docs/conversions.md says how far), not an equal model.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...configuration.configuration_reformer import AFTER_HASHING, ROPE_TYPES, ReformerConfig
from ..modeling_reformer import ReformerForCausalLM
from .weights_in_files import build, check_settings


# Directions of a projection that are weaker than the strongest by more than this take no part in folding a bias.
WEAKEST = 1e-5
# Settings that a dense model decides: others contradict it.
DECIDED = (
    "attention_head_size",
    "attention_output_bias",
    "combine_streams",
    "feed_forward_size",
    "gated_feed_forward",
    "hidden_act",
    "hidden_size",
    "is_decoder",
    "num_attention_heads",
    "position_embedding_type",
    "vocab_size",
)


def symmetric_part(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """
    Projections `[H, D, hidden]` whose products with themselves are nearest to the symmetric part of those of two.

    The scores of a head are a form `x' Q'K y`; of its symmetric part, the strongest positive eigenvectors.
    """
    # In a basis of what either reads, which is much smaller than the whole space.
    basis, _ = torch.linalg.qr(torch.cat([query, key], dim=1).mT)
    form = (query @ basis).mT @ (key @ basis)
    values, vectors = torch.linalg.eigh((form + form.mT) / 2)
    size = query.shape[1]
    return values[:, -size:, None].clamp(min=0).sqrt() * (basis @ vectors[:, :, -size:]).mT


ATTENTION_DROPOUTS = ("local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")

# How the query and the key of a head become one, by name.
TYING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": lambda query, key: (query + key) / 2,
    "query": lambda query, key: query,
    "key": lambda query, key: key,
    "symmetric": symmetric_part,
}


# trf-ignore: TRF031 this goes in, it is no output
@dataclass
class Affine:
    """`x -> weight x + bias`, or a norm's gain and bias; float64."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def named(self, name: str, with_bias: bool) -> dict[str, torch.Tensor]:
        """Parameters of a module of this name."""
        named = {f"{name}.weight": self.weight}
        if with_bias:
            named[f"{name}.bias"] = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return named


# trf-ignore: TRF031 this goes in, it is no output
@dataclass
class DenseLayer:
    """
    A layer of a dense model.

    Attributes:
        query, key, value: To `[H * D]`, of as many heads each.
    """

    attention_norm: Affine
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    feed_forward_norm: Affine
    wide: Affine
    narrow: Affine

    def fold_biases(self, is_dense: bool) -> None:
        """
        Move the biases of queries, keys and values to where a Reformer has some.

        Probabilities add up to one, so the value's bias is one of the output. The key's adds one number to all scores
        of a query, which changes nothing. The query's becomes part of the norm's bias; to the key's projection that is
        another such number, and to the value's another bias of the output. So dense attention stays what it was, but
        for directions of the query's projection below `WEAKEST`.

        Args:
            is_dense: Whether queries and keys are two projections. Where they are one, the query's bias would be in
                every key, so it is left out.
        """
        if is_dense and self.query.bias is not None:
            moved = torch.linalg.pinv(self.query.weight, rtol=WEAKEST) @ self.query.bias
            self.attention_norm.bias = _plus(self.attention_norm.bias, moved)
            self._add_to_output(-self.value.weight @ moved)
        if self.value.bias is not None:
            self._add_to_output(self.value.bias)
        self.query.bias = self.key.bias = self.value.bias = None

    def _add_to_output(self, values):
        self.output.bias = _plus(self.output.bias, self.output.weight @ values)


def _plus(bias, more):
    return more if bias is None else bias + more


# trf-ignore: TRF031 this goes in, it is no output
@dataclass
class DenseModel:
    """
    A dense model in parts.

    Attributes:
        settings: Those of `ReformerConfig` that follow from its config.
        positions: `[length, hidden]`, or None.
        head: None where it is the words' matrix.
    """

    settings: dict[str, Any]
    words: torch.Tensor
    positions: torch.Tensor | None
    layers: Iterator[DenseLayer]
    norm: Affine
    head: torch.Tensor | None


def read_gpt2(model: Any) -> DenseModel:
    """The parts of a `GPT2LMHeadModel`."""
    config, stack = model.config, model.transformer
    if config.add_cross_attention or config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ValueError(
            "`add_cross_attention`, `scale_attn_by_inverse_layer_idx` and `scale_attn_weights=False` of a GPT-2 have "
            "no counterpart in a Reformer."
        )

    def affine(module):
        # Its projections are stored the other way round.
        weight = module.weight if isinstance(module, nn.LayerNorm) else module.weight.T
        return Affine(weight.detach().double(), module.bias.detach().double())

    def layer(block):
        joined = affine(block.attn.c_attn)
        parts = zip(joined.weight.chunk(3), joined.bias.chunk(3), strict=True)
        query, key, value = (Affine(weight, bias) for weight, bias in parts)
        return DenseLayer(
            affine(block.ln_1),
            query,
            key,
            value,
            affine(block.attn.c_proj),
            affine(block.ln_2),
            affine(block.mlp.c_fc),
            affine(block.mlp.c_proj),
        )

    settings = {
        **dict.fromkeys(ATTENTION_DROPOUTS, config.attn_pdrop),
        "attention_head_size": config.n_embd // config.n_head,
        "attention_output_bias": True,
        "feed_forward_size": config.n_inner or 4 * config.n_embd,
        "gated_feed_forward": False,
        "hidden_act": config.activation_function,
        "hidden_dropout_prob": config.resid_pdrop,
        "layer_norm_eps": config.layer_norm_epsilon,
        "position_embedding_type": "learned",
    }
    return DenseModel(
        settings,
        stack.wte.weight.detach(),
        stack.wpe.weight.detach(),
        map(layer, stack.h),
        affine(stack.ln_f),
        None if config.tie_word_embeddings else model.lm_head.weight.detach(),
    )


def read_llama(model: Any) -> DenseModel:
    """The parts of a `LlamaForCausalLM`. Its norms do not subtract the mean; a Reformer's do."""
    config, stack = model.config, model.model
    rope = _rotation_of_llama(config)
    head_size = config.head_dim or config.hidden_size // config.num_attention_heads

    def affine(module, repeats=1):
        bias = getattr(module, "bias", None)
        weight = module.weight.detach().double()
        if repeats > 1:
            weight = weight.unflatten(0, (-1, head_size)).repeat_interleave(repeats, dim=0).flatten(0, 1)
        return Affine(weight, None if bias is None else bias.detach().double())

    def joined(gate, value):
        biases = None if gate.bias is None else torch.cat([gate.bias, value.bias])
        return Affine(torch.cat([gate.weight, value.weight]), biases)

    groups = config.num_attention_heads // config.num_key_value_heads

    def layer(block):
        return DenseLayer(
            affine(block.input_layernorm),
            affine(block.self_attn.q_proj),
            affine(block.self_attn.k_proj, groups),
            affine(block.self_attn.v_proj, groups),
            affine(block.self_attn.o_proj),
            affine(block.post_attention_layernorm),
            joined(affine(block.mlp.gate_proj), affine(block.mlp.up_proj)),
            affine(block.mlp.down_proj),
        )

    settings = {
        **dict.fromkeys(ATTENTION_DROPOUTS, config.attention_dropout),
        "attention_output_bias": False,
        "attention_head_size": head_size,
        "feed_forward_size": config.intermediate_size,
        "gated_feed_forward": True,
        "hidden_act": config.hidden_act,
        "hidden_dropout_prob": 0.0,
        "layer_norm_eps": config.rms_norm_eps,
        "lsh_rotary": AFTER_HASHING,
        "position_embedding_type": "rotary",
        "rope_parameters": rope,
    }
    return DenseModel(
        settings,
        stack.embed_tokens.weight.detach(),
        None,
        map(layer, stack.layers),
        affine(stack.norm),
        None if config.tie_word_embeddings else model.lm_head.weight.detach(),
    )


def _rotation_of_llama(config):
    """Its `rope_parameters`; ValueError for what has no counterpart."""
    if config.attention_bias:
        raise ValueError(
            "`attention_bias=True` of a Llama has no counterpart in a Reformer: a bias that is turned by the position."
        )
    rope = dict(config.rope_parameters or {"rope_type": "default"})
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"`rope_type={rope['rope_type']!r}` of a Llama has no counterpart in a Reformer, which has "
            f"{', '.join(ROPE_TYPES)}."
        )
    return rope


READERS = {"GPT2LMHeadModel": read_gpt2, "LlamaForCausalLM": read_llama}


def convert_dense(
    model: PreTrainedModel, attn_layers: Sequence[str] | None = None, tie: str = "mean", **settings
) -> ReformerForCausalLM:
    """
    A Reformer that begins with the weights of a dense causal model, GPT-2's or Llama's.

    `full` and `local` layers have its queries, keys and values. In an `lsh` layer query and key are one projection,
    made of both by a rule, and scaled so that scores are as large as before for vectors of usual length. A Llama's are
    turned by their positions for the scores, but not for the hash.

    Args:
        model: A `GPT2LMHeadModel` or a `LlamaForCausalLM`.
        attn_layers: The kind of each of its layers; local and LSH layers in turn by default.
        tie: The rule: "mean" of both, "query" or "key" alone, or "symmetric", the projection nearest to the symmetric
            part of their scores.
        settings: Of `ReformerConfig`, but for what the other model decides. By default those with which cached
            generation is exact (windows), and half a bucket for each chunk of the longest text.

    Returns:
        A model in evaluation mode, in the precision of the other, with its settings of generation.

    Raises:
        ValueError: It is another model, has something without a counterpart, or a setting contradicts it.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_reformer import convert_dense
    >>> dense = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=2, n_positions=512, vocab_size=258))
    >>> model = convert_dense(dense, attn_layers=["full", "lsh"])
    >>> model.config.tie_word_embeddings, model.config.num_buckets
    (True, 4)

    ```
    """
    if not isinstance(tie, str) or tie not in TYING:
        raise ValueError(f"`tie` must be one of {', '.join(TYING)}, but got {tie!r}.")
    _check_model(model)
    depth = model.config.num_hidden_layers
    attn_layers = (["local", "lsh"] * depth)[:depth] if attn_layers is None else attn_layers
    if not isinstance(attn_layers, list | tuple) or len(attn_layers) != depth:
        raise ValueError(f"`attn_layers` must be a list of {depth} kinds, as many as layers, but got {attn_layers!r}.")
    dense = READERS[type(model).__name__](model)
    config = _config(model.config, dense, attn_layers, settings)
    state = {"reformer.embeddings.word_embeddings.weight": dense.words}
    if dense.positions is not None:
        state["reformer.embeddings.position_embeddings.embedding.weight"] = dense.positions
    for index, layer in enumerate(dense.layers):
        # One layer at a time is in more precision than its model.
        state |= {name: weight.to(model.dtype) for name, weight in _layer(layer, config, index, TYING[tie]).items()}
    state |= dense.norm.named("reformer.encoder.layer_norm", with_bias=True)
    state |= Affine(dense.words if dense.head is None else dense.head).named("lm_head.decoder", with_bias=True)
    converted = build(ReformerForCausalLM, config, state, model.dtype)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted


def _check_model(model):
    """ValueError unless it is a model that can be read, with the weights of its class and no others."""
    kind = type(model)
    if kind.__name__ not in READERS:
        raise ValueError(f"`model` is a {kind.__name__}; it must be one of {', '.join(READERS)}.")
    with torch.device("meta"):
        usual = {name: tuple(weight.shape) for name, weight in kind(model.config).named_parameters()}
    names = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if names != usual:
        other = sorted(name for name in names | usual if names.get(name) != usual.get(name))
        raise ValueError(
            f"`model` has other parameters than its class: {', '.join(other[:3])}. Merge adapters, and load it "
            "without quantisation."
        )


def _config(theirs, dense, attn_layers, settings):
    length = settings.get("max_position_embeddings", theirs.max_position_embeddings)
    chunk_length = settings.get("lsh_attn_chunk_length", 64)
    if not (isinstance(chunk_length, int) and isinstance(length, int) and chunk_length > 0):
        # Which the config refuses.
        chunk_length, length = 1, 1
    usual = {
        "attend_across_buckets": False,
        "circular_look_around": False,
        "combine_streams": "mean",
        "lsh_sliding_window": True,
        "num_buckets": max(2, length // chunk_length // 4 * 2),
        "tie_word_embeddings": dense.head is None,
    }
    taken = ("bos_token_id", "eos_token_id", "hidden_size", "num_attention_heads", "pad_token_id", "vocab_size")
    usual |= {name: getattr(theirs, name) for name in taken} | {"is_decoder": True} | dense.settings
    known = {name: usual[name] for name in DECIDED}
    if dense.positions is not None:
        known["max_position_embeddings"] = theirs.max_position_embeddings
    if settings.get("tie_word_embeddings"):
        known["tie_word_embeddings"] = dense.head is None
    check_settings(settings, known, f"the {type(theirs).__name__} of the model")
    usual |= {"max_position_embeddings": theirs.max_position_embeddings, "attn_layers": attn_layers}
    return ReformerConfig(**usual | settings)


def _layer(dense, config, index, tie):
    name = f"reformer.encoder.layers.{index}"
    attention, feed_forward = f"{name}.attention", f"{name}.feed_forward"
    # CODEPATH: all kinds of layers; LSH layers have one projection for two.
    is_dense = config.attn_layers[index] != "lsh"
    dense.fold_biases(is_dense)
    projections = {"query": dense.query, "key": dense.key}
    if not is_dense:
        projections = {"query_key": Affine(_tied(dense, config, tie))}
    state = dense.attention_norm.named(f"{attention}.layer_norm", with_bias=True)
    for part, projection in {**projections, "value": dense.value}.items():
        state |= projection.named(f"{attention}.self_attention.{part}", with_bias=False)
    state |= dense.output.named(f"{attention}.output.dense", with_bias=config.attention_output_bias)
    state |= dense.feed_forward_norm.named(f"{feed_forward}.layer_norm", with_bias=True)
    state |= dense.wide.named(f"{feed_forward}.dense.dense", with_bias=True)
    return state | dense.narrow.named(f"{feed_forward}.output.dense", with_bias=True)


def _tied(dense, config, tie):
    """One projection `[H * D, hidden]` for query and key."""
    heads = (config.num_attention_heads, -1)
    projection = tie(*(part.weight.unflatten(0, heads) for part in (dense.query, dense.key)))
    # A key has unit length here, and scores are not divided: a query that is as long as keys are on average, over the
    # root of the head size, has the scores that it had.
    lengths = (projection * dense.attention_norm.weight).flatten(1).norm(dim=1)
    return (projection * lengths[:, None, None] / sqrt(config.attention_head_size)).flatten(0, 1)
