"""
Models of the package reformer-pytorch (`ReformerLM`, its release 1.4.4).

On the same buckets both compute the same. Theirs are other buckets at each call, and as many as the length has chunks;
here their number is that of the longest text.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import nn

from ...configuration.configuration_reformer import AFTER_HASHING, ReformerConfig
from ..modeling_reformer import ReformerForCausalLM, ReformerForMaskedLM
from .weights_in_files import Source, build, read_state_dict


# What a converted model could not compute.
WITHOUT_COUNTERPART = {
    "n_local_attn_heads": "heads with local attention inside of a layer with LSH attention",
    "num_mem_kv": "memory keys and values",
    "pkm_layers": "product-key memories",
    "return_embeddings": "models without a head",
    "use_rezero": "ReZero in the place of LayerNorm",
    "use_scale_norm": "ScaleNorm in the place of LayerNorm",
}
# Arguments that may be None; those that are lists.
OPTIONAL = ("axial_position_shape", "attn_chunks", "dim_head", "emb_dim")
TUPLES = ("axial_position_shape", "pkm_layers")
ACTIVATIONS = {"GELU": "gelu", "GELU_": "gelu_new", "ReLU": "relu", "SiLU": "silu", "Tanh": "tanh"}


# trf-ignore: TRF031 this goes in, it is no output
@dataclass(frozen=True)
class ReformerLMArguments:
    """What `ReformerLM(...)` takes, under its names and with its defaults."""

    num_tokens: int
    dim: int
    depth: int
    max_seq_len: int
    heads: int = 8
    dim_head: int | None = 64
    bucket_size: int = 64
    n_hashes: int = 4
    ff_chunks: int = 100
    attn_chunks: int | None = 1
    causal: bool = False
    weight_tie: bool = False
    lsh_dropout: float = 0.0
    ff_dropout: float = 0.0
    ff_mult: int = 4
    ff_activation: Any = None
    ff_glu: bool = False
    post_attn_dropout: float = 0.0
    layer_dropout: float = 0.0
    random_rotations_per_head: bool = False
    use_scale_norm: bool = False
    use_rezero: bool = False
    use_full_attn: bool = False
    full_attn_thres: int = 0
    reverse_thres: int = 0
    num_mem_kv: int = 0
    one_value_head: bool = False
    emb_dim: int | None = None
    return_embeddings: bool = False
    weight_tie_embedding: bool = False
    fixed_position_emb: bool = False
    absolute_position_emb: bool = False
    axial_position_emb: bool = False
    axial_position_shape: tuple[int, ...] | None = None
    n_local_attn_heads: int = 0
    pkm_layers: tuple[int, ...] = ()
    pkm_num_keys: int = 128

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ReformerLMArguments":
        """
        Raises:
            ValueError: One is unknown or missing, or asks for what has no counterpart.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(arguments) - names)
        missing = [name for name in ("num_tokens", "dim", "depth", "max_seq_len") if name not in arguments]
        if unknown or missing:
            raise ValueError(
                f"Give what `ReformerLM(...)` was given: it has no {', '.join(unknown)}."
                if unknown
                else f"Give what `ReformerLM(...)` was given: {', '.join(missing)} is missing."
            )
        for field in fields(cls):
            if field.name in arguments:
                _check_type(field.name, arguments[field.name], getattr(cls, field.name, 1))
        given = cls(**arguments)
        for name, what in WITHOUT_COUNTERPART.items():
            if getattr(given, name):
                raise ValueError(f"`{name}={getattr(given, name)!r}` has no counterpart in a Reformer here: {what}.")
        if given.has_rotary_positions and given.full_attn_thres and not given.use_full_attn:
            raise ValueError(
                f"`full_attn_thres={given.full_attn_thres}`: up to that length such a model attends without its "
                "rotary positions, beyond it with them, which has no counterpart. Give 0: short texts have them, too."
            )
        return given

    @property
    def head_size(self) -> int:
        """Numbers of a head's query."""
        return self.dim_head or self.dim // self.heads

    @property
    def embedding_size(self) -> int:
        """Numbers of a token's embedding."""
        return self.emb_dim or self.dim

    @property
    def has_rotary_positions(self) -> bool:
        """Without any other kind; full attention leaves them out."""
        return not (self.axial_position_emb or self.absolute_position_emb or self.fixed_position_emb)

    @property
    def activation(self) -> str:
        """Its name in transformers.

        Raises:
            ValueError: It has none that is known.
        """
        given = self.ff_activation
        name = (
            "GELU" if given is None else given if isinstance(given, str) else getattr(given, "__name__", repr(given))
        )
        if name not in ACTIVATIONS and name not in ACTIVATIONS.values():
            raise ValueError(f"`ff_activation={name}` is not known. It must be one of {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS.get(name, name)

    @property
    def positions(self) -> dict[str, Any]:
        """The settings of `ReformerConfig`."""
        if not self.has_rotary_positions:
            return {"position_embedding_type": "learned"}
        if self.use_full_attn:
            return {"position_embedding_type": "none"}
        return {"position_embedding_type": "rotary", "lsh_rotary": AFTER_HASHING}

    def config(self) -> ReformerConfig:
        """What describes the same model."""
        threshold = self.max_seq_len if self.use_full_attn else self.full_attn_thres
        return ReformerConfig(
            attn_layers=["lsh"] * self.depth,
            attention_head_size=self.head_size,
            attention_output_bias=True,
            bos_token_id=None,
            combine_streams="mean",
            eos_token_id=None,
            feed_forward_size=self.dim * self.ff_mult,
            full_attention_threshold=max(threshold, self.bucket_size),
            gated_feed_forward=self.ff_glu,
            hidden_act=self.activation,
            hidden_dropout_prob=self.ff_dropout,
            hidden_size=self.dim,
            is_decoder=self.causal,
            layer_norm_eps=1e-5,
            local_attention_probs_dropout_prob=self.lsh_dropout,
            lsh_attention_probs_dropout_prob=self.lsh_dropout,
            lsh_attn_chunk_length=self.bucket_size,
            max_position_embeddings=self.max_seq_len,
            num_attention_heads=self.heads,
            num_buckets=max(2, self.max_seq_len // self.bucket_size // 2 * 2),
            num_hashes=self.n_hashes,
            pad_token_id=None,
            vocab_size=self.num_tokens,
            **self.positions,
        )


def _check_type(name, value, default):
    """ValueError unless a value is of the kind that the default is of."""
    if name == "ff_activation" or (value is None and name in OPTIONAL):
        return
    if name in TUPLES:
        fits, kind = _are_sizes(value), "a list of numbers"
    elif isinstance(default, bool):
        fits, kind = isinstance(value, bool), "True or False"
    elif isinstance(default, float):
        fits, kind = isinstance(value, int | float) and 0 <= value <= 1, "a number between 0 and 1"
    else:
        # What may be none is 0 by default; everything else is a size.
        smallest = 0 if default == 0 else 1
        fits, kind = type(value) is int and value >= smallest, f"a whole number of at least {smallest}"
    if not fits:
        raise ValueError(f"`{name}` of `ReformerLM` must be {kind}, but got {value!r}.")


def _are_sizes(value):
    return isinstance(value, list | tuple) and all(type(size) is int and size >= 1 for size in value)


def convert_reformer_pytorch(
    weights: Mapping[str, torch.Tensor] | str | os.PathLike, **arguments
) -> ReformerForCausalLM | ReformerForMaskedLM:
    """
    The model that a `ReformerLM` of reformer-pytorch is, causal or for both directions.

    What is folded together or written out (embeddings of another size, fixed and axial positions, one value head,
    weights that layers share, a head that is tied to the embeddings) computes the same. `layer_dropout` and what
    changes memory and time alone are left out; `ff_dropout` becomes `hidden_dropout_prob`, which is in more places.

    Args:
        weights: Its state dict, or a file with it; that of an `Autopadder` or a `TrainingWrapper` will do.
        arguments: What `ReformerLM(...)` was given.

    Returns:
        A model in evaluation mode, in the precision of the weights.

    Raises:
        ValueError: Something has no counterpart, or weights and arguments do not fit.

    Example:

    ```python
    >>> import torch
    >>> from reformer_pytorch import ReformerLM
    >>> from hf_reformer import convert_reformer_pytorch
    >>> arguments = {"num_tokens": 258, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "max_seq_len": 1024}
    >>> theirs = ReformerLM(**arguments, causal=True)
    >>> model = convert_reformer_pytorch(theirs.state_dict(), **arguments, causal=True)
    >>> model(torch.randint(258, (1, 1000))).logits.shape
    torch.Size([1, 1000, 258])

    ```
    """
    given = ReformerLMArguments.of(arguments)
    state = _unwrapped(read_state_dict(weights))
    # The same weights again, for what is not run reversibly.
    state = {name: weight for name, weight in state.items() if ".irrev_blocks." not in name}
    source = Source(state, "the arguments of `ReformerLM`")
    words = source.take("token_emb.weight", given.num_tokens, given.embedding_size).double()
    own = _embeddings(source, given, words)
    for layer in range(given.depth):
        ours, theirs = f"reformer.encoder.layers.{layer}.", f"reformer.layers.blocks.{layer}."
        shared = theirs
        if given.weight_tie and f"{theirs}f.net.fn.toqk.weight" not in source:
            # Some files hold a weight once.
            shared = "reformer.layers.blocks.0."
        own |= _norm(source, given, f"{theirs}f.net.norm.", f"{ours}attention.layer_norm.")
        own |= _attention(source, given, f"{shared}f.net.fn.", f"{ours}attention.")
        own |= _norm(source, given, f"{theirs}g.net.norm.", f"{ours}feed_forward.layer_norm.")
        own |= _feed_forward(source, given, f"{shared}g.net.fn.fn.", f"{ours}feed_forward.")
    own |= _norm(source, given, "norm.", "reformer.encoder.layer_norm.") | _head(source, given, words)
    source.check_nothing_is_left()
    config, dtype = given.config(), own["reformer.encoder.layer_norm.weight"].dtype
    if given.causal:
        return build(ReformerForCausalLM, config, own, dtype)
    return build(ReformerForMaskedLM, config, own, dtype)


def _unwrapped(state):
    """Without what wrappers of the package and of PyTorch put in front."""
    last = "token_emb.weight"
    prefix = next((name.removesuffix(last) for name in state if name.endswith(last)), "")
    return {name.removeprefix(prefix): weight for name, weight in state.items()}


def _embeddings(source, given, words):
    positions = _positions(source, given)
    if given.embedding_size != given.dim:
        weight = source.take("to_model_dim.weight", given.dim, given.embedding_size).double()
        words = words @ weight.T + source.take("to_model_dim.bias", given.dim)
        positions = None if positions is None else positions @ weight.T
    own = {"reformer.embeddings.word_embeddings.weight": words}
    if positions is not None:
        own["reformer.embeddings.position_embeddings.embedding.weight"] = positions
    return own


def _positions(source, given):
    """A vector for each position, `[max_seq_len, embedding_size]`, float64; None with rotary positions."""
    length, size = given.max_seq_len, given.embedding_size
    if given.axial_position_emb:
        shape = given.axial_position_shape or (-(-length // given.bucket_size), given.bucket_size)
        if prod(shape) < length:
            raise ValueError(f"`axial_position_shape={tuple(shape)}` has fewer places than `max_seq_len={length}`.")
        table = torch.zeros(1, *shape, size, dtype=torch.float64)
        for axis, places in enumerate(shape):
            grid = [1] * len(shape)
            grid[axis] = places
            table = table + source.take(f"pos_emb.weights.{axis}", 1, *grid, size)
        return table.reshape(-1, size)[:length]
    if given.absolute_position_emb:
        return source.take("pos_emb.emb.weight", length, size).double()
    if given.fixed_position_emb:
        angles = torch.outer(torch.arange(length), source.take("pos_emb.inv_freq", size // 2)).double()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
    frequencies = source.take("layer_pos_emb.inv_freq", given.head_size // 2).double()
    usual = 10000.0 ** (-torch.arange(0, given.head_size, 2, dtype=torch.float64) / given.head_size)
    # They may have the precision of the weights.
    if not torch.allclose(frequencies, usual, rtol=0.01):
        raise ValueError("`layer_pos_emb.inv_freq` holds other frequencies of rotary positions than `ReformerLM` has.")
    return None


def _norm(source, given, theirs, ours):
    return {ours + name: source.take(theirs + name, given.dim) for name in ("weight", "bias")}


def _attention(source, given, theirs, ours):
    size = given.heads * given.head_size
    # Their scores are divided by the root of the head size.
    query_key = source.take(theirs + "toqk.weight", size, given.dim) * given.head_size**-0.5
    if given.positions.get("lsh_rotary"):
        # They turn neighbouring numbers, this package the first half with the second.
        query_key = query_key.unflatten(0, (given.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    value_heads = 1 if given.one_value_head else given.heads
    value = source.take(theirs + "tov.weight", value_heads * given.head_size, given.dim)
    return {
        ours + "self_attention.query_key.weight": query_key,
        ours + "self_attention.value.weight": value.repeat(given.heads // value_heads, 1),
        ours + "output.dense.weight": source.take(theirs + "to_out.weight", given.dim, size),
        ours + "output.dense.bias": source.take(theirs + "to_out.bias", given.dim),
    }


def _feed_forward(source, given, theirs, ours):
    own = {}
    wide, factor = given.dim * given.ff_mult, 2 if given.ff_glu else 1
    for name, half, shape in (("w1", "dense", (factor * wide, given.dim)), ("w2", "output", (given.dim, wide))):
        own[f"{ours}{half}.dense.weight"] = source.take(f"{theirs}{name}.weight", *shape)
        own[f"{ours}{half}.dense.bias"] = source.take(f"{theirs}{name}.bias", shape[0])
    return own


def _head(source, given, words):
    """Logits from the mean of the streams: one projection, with another before it folded in."""
    size = given.embedding_size
    if given.weight_tie_embedding:
        source.take("out.1.tensor", given.num_tokens, size)
        weight = nn.functional.normalize(words, dim=-1)
        bias = words.new_zeros(given.num_tokens)
    else:
        weight = source.take("out.1.weight", given.num_tokens, size).double()
        bias = source.take("out.1.bias", given.num_tokens).double()
    if size != given.dim:
        bias = bias + weight @ source.take("out.0.bias", size).double()
        weight = weight @ source.take("out.0.weight", size, given.dim).double()
    return {"lm_head.decoder.weight": weight, "lm_head.decoder.bias": bias}
