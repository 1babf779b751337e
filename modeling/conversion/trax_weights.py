"""
Checkpoints of trax's `ReformerLM`, the Reformer of the paper's authors, as models of this package.

trax keeps weights in a fixed order, whichever layout its files have. Their number and shapes say most of what a model
is; what they do not say stands in the `config.gin` beside them, or has to be told.
"""

import os
from functools import reduce
from typing import Any

import torch

from ...configuration.configuration_reformer import ReformerConfig
from ..modeling_reformer import ReformerForCausalLM
from .trax_files import Configurable, Unread, read_trax_checkpoint
from .weights_in_files import build, check_settings


# Not in the files: settings, and what trax calls them.
ALWAYS_NEEDED = {
    "hidden_act": "ReformerLM.ff_activation: 'gelu_new' for FastGelu, which is its default, 'relu' for Relu, 'gelu' "
    "for Gelu",
}
NEEDED_BY_KIND = {
    "lsh": {
        "lsh_attn_chunk_length": "LSHSelfAttention.chunk_len, 128 by default",
        "num_buckets": "LSHSelfAttention.n_buckets, 2 * (length // chunk_len) by default",
        "num_hashes": "LSHSelfAttention.n_hashes, 1 by default",
    },
    "local": {
        "local_attn_chunk_length": "SelfAttention.chunk_len; without it, layers are 'full' in `attn_layers`",
        "local_num_chunks_before": "SelfAttention.n_chunks_before, 0 by default",
    },
    "full": {},
}
# Arrays of one layer's attention, and what it can be.
KINDS_BY_COUNT = {3: ("lsh",), 4: ("local", "full")}
NO_COUNTERPART = (
    "Layers that trax has beside those of `ReformerLM` with its plain settings (`ff_sparsity`, `ff_use_sru`, "
    "`loss_sparsity`, shared layers, other norms, `ReformerShortenLM`, `Reformer`, `Terraformer`) have no counterpart "
    "here."
)

FROM_GIN = {
    "LSHSelfAttention.chunk_len": "lsh_attn_chunk_length",
    "LSHSelfAttention.n_buckets": "num_buckets",
    "LSHSelfAttention.n_chunks_after": "lsh_num_chunks_after",
    "LSHSelfAttention.n_chunks_before": "lsh_num_chunks_before",
    "LSHSelfAttention.n_hashes": "num_hashes",
    "LayerNorm.epsilon": "layer_norm_eps",
    "SelfAttention.chunk_len": "local_attn_chunk_length",
    "SelfAttention.n_chunks_after": "local_num_chunks_after",
    "SelfAttention.n_chunks_before": "local_num_chunks_before",
}
DROPOUTS = ("hidden_dropout_prob", "local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
ACTIVATIONS = {"Relu": "relu", "FastGelu": "gelu_new", "Gelu": "gelu"}
ATTENTION_TYPES = ("LSHSelfAttention", "SelfAttention")
# What must have this value, wherever a gin file names it.
FIXED_IN_GIN = {
    "DecoderBlock.center_layernorm": True,
    "DecoderBlock.n_attention_layers": 1,
    "DecoderBlock.n_feedforward_layers": 1,
    "LSHSelfAttention.bias": False,
    "LayerNorm.center": True,
    "ReformerLM.attention_chunk_size": 0,
    "ReformerLM.ff_sparsity": 0,
    "ReformerLM.ff_use_sru": 0,
    "ReformerLM.loss_sparsity": 0,
    "SelfAttention.bias": False,
    "SelfAttention.share_qk": False,
    "train.model": Configurable("ReformerLM"),
}


def convert_trax(path: str | os.PathLike, **settings) -> ReformerForCausalLM:
    """
    A checkpoint of trax's `ReformerLM` as a model, in eval mode and in the dtype of the file.

    Its logits are those of trax for the same tokens *after* trax's own shift: trax puts the token 0 in front of every
    text and drops the last one, so start texts with 0 (`bos_token_id` of the config).

    Args:
        path: `model.pkl.gz`, `model.pkl`, another file that trax wrote, or the folder it is in. Nothing in it is run.
        settings: Of `ReformerConfig`. What the shapes of the weights say, needs no setting and is checked if there is
            one; what a `config.gin` beside the file says is a default; what neither says is asked for by an error.

    Raises:
        ValueError: Files that cannot be read; weights without a counterpart; settings that contradict the weights, or
            are missing.
    """
    checkpoint = read_trax_checkpoint(path)
    found = _Anatomy(checkpoint.arrays)
    _check_hashing(found.counts.count(3), checkpoint.num_hashing)
    settings = _settings_of_gin(checkpoint.gin, found) | settings
    config = ReformerConfig(**_complete_settings(settings, found))
    dtype = reduce(torch.promote_types, {weight.dtype for weight in checkpoint.arrays})
    return build(ReformerForCausalLM, config, found.weights, dtype)


class _Arrays:
    """The arrays of a file, taken one after the other, each with the shape that it must have."""

    def __init__(self, arrays: list[torch.Tensor]) -> None:
        self.arrays, self.place = arrays, 0

    def left(self):
        return len(self.arrays) - self.place

    def rank(self, ahead: int = 0) -> int:
        """Axes of an array to come; -1 behind the last one."""
        place = self.place + ahead
        return self.arrays[place].dim() if place < len(self.arrays) else -1

    def take(self, what: str, *shape: int | None) -> torch.Tensor:
        """The next array; None in `shape` stands for any length."""
        if not self.left():
            raise ValueError(f"The file ends after {self.place} arrays, where {what} should follow. {NO_COUNTERPART}")
        array = self.arrays[self.place]
        fits = array.dim() == len(shape) and all(
            size > 0 and wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=False)
        )
        if not fits or not array.is_floating_point():
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"Array {self.place} of the file is {array.dtype} of shape {list(array.shape)}. In `ReformerLM` it is "
                f"{what}, floating-point numbers of shape [{wanted}]. {NO_COUNTERPART}"
            )
        self.place += 1
        return array


class _Anatomy:
    """What the shapes of a checkpoint say: settings, weights by our names, arrays of each layer's attention."""

    def __init__(self, arrays: list[torch.Tensor]) -> None:
        self.settings: dict[str, Any] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.counts: list[int] = []
        rest = _Arrays(arrays)
        words = rest.take("the word embedding", None, None)
        self.weights["reformer.embeddings.word_embeddings.weight"] = words
        self.settings["vocab_size"], self.settings["hidden_size"] = words.shape
        self._check_head(arrays)
        self._take_positions(rest)
        # The last LayerNorm and the head are four.
        while rest.left() > 4:
            self._take_layer(rest)
        self._take_head(rest)

    def _check_head(self, arrays):
        vocab, hidden = self.settings["vocab_size"], self.settings["hidden_size"]
        shapes = [list(array.shape) for array in arrays[-2:]]
        if shapes == [[hidden, vocab], [vocab]]:
            raise ValueError(
                f"The head reads {hidden} numbers per token, and in `ReformerLM` it reads {2 * hidden}, both streams. "
                "Models that encode and decode (`Reformer`, `Terraformer`), `ReformerShortenLM` and models with one "
                "stream (`TransformerLM`) have no counterpart here."
            )
        if shapes != [[2 * hidden, vocab], [vocab]]:
            raise ValueError(
                f"The last arrays of the file have the shapes {shapes}. In `ReformerLM`, with the word embedding "
                f"[{vocab}, {hidden}], they are the head: [[{2 * hidden}, {vocab}], [{vocab}]]. {NO_COUNTERPART}"
            )

    def _take_positions(self, rest: _Arrays) -> None:
        hidden, rank = self.settings["hidden_size"], rest.rank()
        kind = "axial" if rank > 3 else "learned" if rank > 1 else "none"
        self.settings |= {"position_embedding_type": kind, "axial_pos_embds": kind == "axial"}
        name = "reformer.embeddings.position_embeddings"
        if kind == "axial":
            axes, shape, sizes = rank - 2, [], []
            for axis in range(axes):
                grid: list[int | None] = [1] * axes
                grid[axis] = None
                table = rest.take(f"the position table of axis {axis}", 1, *grid, None)
                shape.append(table.shape[1 + axis])
                sizes.append(table.shape[-1])
                self.weights[f"{name}.weights.{axis}"] = table[0]
            if sum(sizes) != hidden:
                raise ValueError(
                    f"The vectors of the axes have {sizes} numbers, {sum(sizes)} together, and words have {hidden}. "
                    f"{NO_COUNTERPART}"
                )
            self.settings |= {"axial_pos_shape": shape, "axial_pos_embds_dim": sizes}
        elif kind == "learned":
            table = rest.take("the position table", *([1] if rank == 3 else []), None, hidden)
            self.weights[f"{name}.embedding.weight"] = table.reshape(-1, hidden)
            self.settings["max_position_embeddings"] = table.shape[-2]

    def _take_norm(self, rest, name, what, size):
        self.weights[f"{name}.weight"] = rest.take(f"the scale of {what}", size)
        self.weights[f"{name}.bias"] = rest.take(f"the bias of {what}", size)

    def _take_dense(self, rest, name, what, size_in, size_out):
        weight = rest.take(f"the weight of {what}", size_in, size_out)
        self.weights[f"{name}.weight"] = weight.T
        self.weights[f"{name}.bias"] = rest.take(f"the bias of {what}", weight.shape[1])
        return weight.shape[1]

    def _take_layer(self, rest):
        index, hidden = len(self.counts), self.settings["hidden_size"]
        name, where = f"reformer.encoder.layers.{index}", f"of layer {index}"
        self._take_norm(rest, f"{name}.attention.layer_norm", f"the attention's LayerNorm {where}", hidden)
        self._take_attention(rest, f"{name}.attention", where)
        self._take_norm(rest, f"{name}.feed_forward.layer_norm", f"the feed-forward's LayerNorm {where}", hidden)
        if rest.rank() == 3:
            raise ValueError(
                f"Layer {index} has a second attention behind the first, as in the decoder of trax's `Reformer`, "
                "which attends to an encoder. Only `ReformerLM` can be converted."
            )
        wide = self.settings.get("feed_forward_size")
        feed_forward = f"{name}.feed_forward"
        wide = self._take_dense(rest, f"{feed_forward}.dense.dense", f"the first Dense layer {where}", hidden, wide)
        self._take_dense(rest, f"{feed_forward}.output.dense", f"the second Dense layer {where}", wide, hidden)
        self.settings["feed_forward_size"] = wide

    def _take_attention(self, rest, name, where):
        count = 0
        while rest.rank(count) == 3:
            count += 1
        if count not in KINDS_BY_COUNT:
            raise ValueError(
                f"The attention {where} has {count} arrays with a part for each head, where `LSHSelfAttention` has 3 "
                "and `SelfAttention` 4. Other kinds (`CausalAttention`, `PureLSHSelfAttention`, "
                f"`MixedLSHSelfAttention`, ...) have no counterpart here. {NO_COUNTERPART}"
            )
        if rest.rank(count) == 2:
            raise ValueError(
                f"The attention {where} has biases for queries and values (`bias=True`), which have no counterpart "
                "here."
            )
        hidden = self.settings["hidden_size"]
        heads, size = self.settings.get("num_attention_heads"), self.settings.get("attention_head_size")
        for part in ("query_key", "value") if count == 3 else ("query", "key", "value"):
            weight = rest.take(f"{part} {where}", heads, hidden, None)
            heads, _, own_size = weight.shape
            if size not in (None, own_size):
                raise ValueError(
                    f"The heads of {part} {where} have {own_size} numbers and others {size}. `attention_head_size` is "
                    "one number here, for queries and values of all layers: a model whose `d_attention_key` and "
                    "`d_attention_value` differ has no counterpart."
                )
            size = own_size
            self.weights[f"{name}.self_attention.{part}.weight"] = weight.transpose(1, 2).reshape(-1, hidden)
        output = rest.take(f"the output {where}", heads, size, hidden)
        self.weights[f"{name}.output.dense.weight"] = output.reshape(-1, hidden).T
        self.settings |= {"num_attention_heads": heads, "attention_head_size": size}
        self.counts.append(count)

    def _take_head(self, rest):
        vocab, hidden = self.settings["vocab_size"], self.settings["hidden_size"]
        self._take_norm(rest, "reformer.encoder.layer_norm", "the last LayerNorm", 2 * hidden)
        self._take_dense(rest, "lm_head.decoder", "the head", 2 * hidden, vocab)
        if not self.counts:
            raise ValueError(f"The file has no layers. {NO_COUNTERPART}")


def _check_hashing(num_shared, num_hashing):
    if num_hashing is not None and num_hashing < num_shared:
        raise ValueError(
            f"The file has 3 arrays of attention in {num_shared} layers, and buckets of {num_hashing}. Layers that do "
            "not hash, but whose queries are their keys (`SelfAttention(share_qk=True)`), have no counterpart here."
        )


def _settings_of_gin(gin, found):
    """What a gin file says in our words; ValueError for what has no counterpart."""
    for name in (
        *FIXED_IN_GIN,
        *FROM_GIN,
        "ReformerLM.attention_type",
        "ReformerLM.dropout",
        "ReformerLM.ff_activation",
    ):
        if isinstance(gin.get(name), Unread):
            raise ValueError(
                f"`config.gin` sets {name} = {gin[name][:80]}, which is not read. Write a number, a name in quotes or "
                "@name there, or move the file and give the settings."
            )
    for name, allowed in FIXED_IN_GIN.items():
        if name in gin and gin[name] != allowed and not (gin[name] is None and not allowed):
            raise ValueError(f"`config.gin` sets {name} = {gin[name]}, which has no counterpart here.")
    settings = {ours: gin[name] for name, ours in FROM_GIN.items() if gin.get(name) is not None}
    if "ReformerLM.dropout" in gin:
        settings |= dict.fromkeys(DROPOUTS, gin["ReformerLM.dropout"])
    activation = gin.get("ReformerLM.ff_activation")
    if isinstance(activation, Configurable) and activation in ACTIVATIONS:
        settings["hidden_act"] = ACTIVATIONS[activation]
    if "ReformerLM.attention_type" in gin:
        settings["attn_layers"] = _kinds_of_gin(gin, len(found.counts))
    return settings


def _kinds_of_gin(gin, depth):
    types = gin["ReformerLM.attention_type"]
    types = types if isinstance(types, list) else [types]
    unknown = [kind for kind in types if kind not in ATTENTION_TYPES]
    if unknown or not types:
        raise ValueError(
            f"`config.gin` names the attention {unknown or types}, which has no counterpart here; "
            f"{list(ATTENTION_TYPES)} have."
        )
    chunked = gin.get("SelfAttention.chunk_len") is not None
    kinds = {"LSHSelfAttention": "lsh", "SelfAttention": "local" if chunked else "full"}
    return [kinds[types[index % len(types)]] for index in range(depth)]


def _complete_settings(settings, found):
    derived = found.settings | {"combine_streams": "concat", "is_decoder": True, "attention_output_bias": False}
    check_settings(settings, derived, "the file")
    if found.settings["position_embedding_type"] == "none" and settings.get("position_embedding_type") != "none":
        raise ValueError(
            "The file has no positions. If the model has none (`pos_type='no'`), say "
            "`position_embedding_type='none'`. Positions that trax computes (`pos_type='sin-cos'` and others) have no "
            "counterpart here."
        )
    kinds = _kinds_of_layers(settings, found.counts)
    needed = ALWAYS_NEEDED.copy()
    for kind in sorted(set(kinds)):
        needed |= NEEDED_BY_KIND[kind]
    missing = [f"`{name}` ({theirs})" for name, theirs in needed.items() if name not in settings]
    if missing:
        raise ValueError(
            "trax's files do not say everything about a model. Give these settings, or put its `config.gin` beside "
            f"the file: {'; '.join(missing)}."
        )
    # trax's own epsilon, and the token that it puts in front.
    defaults = {"layer_norm_eps": 1e-6, "bos_token_id": 0}
    return defaults | settings | derived | {"attn_layers": kinds}


def _kinds_of_layers(settings, counts):
    kinds = settings.get("attn_layers")
    if kinds is None:
        if 4 in counts and settings.get("local_attn_chunk_length") is None:
            raise ValueError(
                "The file does not say whether its `SelfAttention` layers attend to everything or within chunks. Give "
                "`attn_layers`, with 'full' or 'local' for layers "
                f"{[index for index, count in enumerate(counts) if count == 4]}, or `local_attn_chunk_length`."
            )
        return ["lsh" if count == 3 else "local" for count in counts]
    if len(kinds) != len(counts):
        raise ValueError(f"`attn_layers` names {len(kinds)} layers, and the file has {len(counts)}.")
    for index, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        if kind not in KINDS_BY_COUNT[count]:
            raise ValueError(
                f"`attn_layers` says that layer {index} is {kind!r}, and its attention has {count} arrays: it can be "
                f"{' or '.join(map(repr, KINDS_BY_COUNT[count]))}."
            )
    return list(kinds)
