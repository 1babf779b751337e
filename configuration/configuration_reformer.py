# Copyright 2026 The hf_reformer authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of the Reformer (Kitaev, Kaiser, Levskaya, ICLR 2020, arXiv 2001.04451)."""

from difflib import get_close_matches
from math import ceil, inf, lcm, log2, prod

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring, logging

from .beyond_stock import BEYOND_STOCK, OWN_KIND
from .byte_sizes import bytes_of
from .setting_names import LEGACY_KEYS, MEANT_BY, NOT_IN_A_REFORMER


logger = logging.get_logger(__name__)

ATTENTION_KINDS = ("lsh", "local", "full")
STREAMS_TO_OUTPUT = ("concat", "mean")

# With a table of vectors, as in stock, and without.
POSITION_TABLES = ("axial", "learned")
POSITION_KINDS = (*POSITION_TABLES, "rotary", "none")

# Those of transformers' whose angles stay what they are while a text grows: a cache keeps keys as they were turned.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")

# `torch.Generator` takes no other seeds.
SMALLEST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1

# Padding to so many tokens is cheap, whatever the model.
SMALL_CIRCLE = 16384

# `lsh_rotary` of layers that hash vectors before they turn them.
AFTER_HASHING = "after_hashing"

# What `classifier_pooling` may be.
POOLINGS = ("token", "mean")


@auto_docstring(
    custom_intro="Everything that defines a Reformer. A superset of the configuration that transformers ships: a "
    "`config.json` written for that one means the same here, and every default is the same but `eos_token_id`, which "
    "is the byte tokenizer's."
)
@strict
class ReformerConfig(PreTrainedConfig):
    r"""
    attention_head_size (`int`, *optional*, defaults to 64):
        Size of one head's query/key and value vectors.
    attn_layers (`list[str]`, *optional*):
        One entry per layer, first layer first: `"lsh"`, `"local"` or `"full"` (dense attention). Its length is the
        depth of the model.
    axial_norm_std (`float`, *optional*, defaults to 1.0):
        Standard deviation of the initial axial position vectors.
    axial_pos_embds (`bool`, *optional*):
        Axial position embeddings (a learned table per axis) instead of one learned vector per position. `None` follows
        `position_embedding_type`, or is `True` without it.
    axial_pos_shape (`list[int]`, *optional*):
        Length of each axis. Any number of axes; their product bounds the sequence length. `None` takes two axes, as
        square as powers of two allow, that hold `max_position_embeddings`.
    axial_pos_embds_dim (`list[int]`, *optional*):
        Vector size of each axis; the sizes add up to `hidden_size`. `None` splits `hidden_size`, 1 to 3 with two axes.
    chunk_size_lm_head (`int`, *optional*, defaults to 0):
        Tokens per chunk of the language model's loss; 0 computes it in one piece. With labels and a value above 0 the
        `length x vocab_size` logits never exist in training.
    chunk_size_feed_forward (`int`, *optional*, defaults to 0):
        Tokens per chunk of the feed-forward layers, forward and backward. With 0, a CPU takes as many as it keeps in
        its cache (4 million activations of the wide layer); a GPU, and what is compiled as a whole, takes all.
    feed_forward_size (`int`, *optional*, defaults to 512):
        Width of the feed-forward layers.
    eos_token_id (`int` or `list[int]`, *optional*, defaults to 1):
        The end of a text. A file that does not name it means stock's default, 2.
    hash_seed (`int`, *optional*):
        Seed of the hashing rotations. `None` draws fresh rotations at every training step and uses fixed ones, private
        to each layer, in evaluation.
    local_num_chunks_before (`int`, *optional*, defaults to 1):
        Chunks before its own that a chunk of a local layer attends to.
    local_num_chunks_after (`int`, *optional*, defaults to 0):
        The same after it.
    local_attention_probs_dropout_prob (`float`, *optional*, defaults to 0.05):
        Dropout on local and full attention.
    local_attn_chunk_length (`int`, *optional*, defaults to 64):
        Tokens per chunk of a local layer.
    lsh_attn_chunk_length (`int`, *optional*, defaults to 64):
        Tokens per chunk of an LSH layer.
    lsh_attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
        Dropout on LSH attention.
    lsh_num_chunks_before (`int`, *optional*, defaults to 1):
        Chunks of the sorted order before its own that a chunk of an LSH layer attends to.
    lsh_num_chunks_after (`int`, *optional*, defaults to 0):
        The same after it.
    lsh_rotary (`bool` or `str`, *optional*, defaults to `False`):
        With rotary positions turn the queries of LSH layers, which are also their keys: `True` before they are hashed,
        `"after_hashing"` for the scores alone, as reformer-pytorch does. By default these layers look for content
        wherever it stands.
    max_position_embeddings (`int`, *optional*):
        Longest input. `None` means all positions that `axial_pos_shape` holds, or 4,096. Without a table of positions
        it is no bound, only the length that the model is made for.
    is_encoder_decoder (`bool`, *optional*, defaults to `False`):
        An encoder and a decoder, for `ReformerForConditionalGeneration`. All settings are those of both, but that the
        decoder is causal (`*_num_chunks_after` and `lsh_value_shift` are for one side each: the encoder looks ahead,
        the decoder reads successors).
    decoder_attn_layers (`list[str]`, *optional*):
        `attn_layers` of the decoder; `None` for as many and the same as the encoder's.
    decoder_start_token_id (`int`, *optional*):
        What a decoder's text begins with; `None` for `pad_token_id`, as T5 does, or without one for `bos_token_id`.
    cross_attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
        Dropout on the decoder's attention to the encoder.
    num_buckets (`int` or `list[int]`, *optional*):
        Hash buckets, an even number or a list of even factors. `None` computes it from the length of each input, so
        the result then depends on that length, padding included.
    num_hashes (`int`, *optional*, defaults to 1):
        Hashing rounds. More rounds come closer to full attention and cost proportionally more.
    position_embedding_type (`str`, *optional*):
        `"axial"` or `"learned"`, which `None` leaves to `axial_pos_embds`; `"rotary"`, which turns queries and keys of
        local and full layers by angles that grow with the position; or `"none"`. The last two have no parameters, and
        inputs may have any length.
    rope_parameters (`dict`, *optional*):
        Of rotary positions, as in other models: `{"rope_type": "default", "rope_theta": 10000.0}`, which `None`
        means, or one of the types "linear", "yarn" and "llama3" with its keys.
    reversible (`bool`, *optional*, defaults to `True`):
        Recompute activations in backward by inverting the layers instead of storing them (paper section 3). `False`
        computes the same with ordinary autograd.
    exact_inversion (`bool`, *optional*):
        Keep the residual streams on a grid of numbers whose sums are exact, so that backward recovers the very bits of
        forward at any depth: in float64 for float32 layers, in float32 for layers in bfloat16 or float16 (weights or
        autocast). `None` does so for these, but not for float64 layers, nor for float32 layers on devices without
        float64; `True` always; `False` never, with float32 streams at least. Without gradients nothing is inverted,
        and the streams of float32 layers are float32.
    activation_memory (`int` or `str`, *optional*, defaults to 0):
        Bytes, or a text such as `"2GiB"`, that reversible layers of each stack may keep of a batch for backward, which
        then computes less anew: what feed-forwards have added to the streams, then attention. Results stay the same.
    circular_look_around (`bool`, *optional*, defaults to `True`):
        Let the first chunk look at the last one, in the order of the concatenated rounds, as the published checkpoints
        were trained. `False` makes a sequence's result independent of padding and of the batch it is in.
    attend_across_buckets (`bool`, *optional*, defaults to `True`):
        Attend to everything in reach of the chunk. `False` keeps to the query's own bucket, as the paper does.
    allow_duplicate_attention (`bool`, *optional*, defaults to `True`):
        Count a key once for each round that finds it. `False` counts it once (paper, the `N_ij` term of appendix A).
    full_attention_threshold (`int`, *optional*):
        LSH layers attend to everything, exactly, up to this length. `None` means `lsh_attn_chunk_length`.
    lsh_sliding_window (`bool`, *optional*, defaults to `False`):
        A query attends to as many tokens of its bucket before (and after) its own as the neighbouring chunks hold,
        wherever chunks begin. A causal model's results then do not depend on later tokens in any way, and generation
        with a cache computes exactly what one forward pass over the whole text does. Needs
        `circular_look_around=False` and `attend_across_buckets=False`.
    lsh_value_shift (`int`, *optional*, defaults to 0):
        With 1 a token of an LSH layer reads what followed the tokens like it: each key carries the value of the next
        token instead of its own. It costs nothing and sees nothing of the future. Causal models only.
    attention_output_bias (`bool`, *optional*, defaults to `False`):
        A bias in the projection of the heads' outputs, of every kind of attention.
    gated_feed_forward (`bool`, *optional*, defaults to `False`):
        Multiply the activations of the feed-forward layers by a second projection (arXiv 2002.05202), so their first
        matrix is twice as large. With `hidden_act="silu"` it is Llama's SwiGLU.
    combine_streams (`str`, *optional*, defaults to `"concat"`):
        What the last LayerNorm and the heads read of the two streams: `"concat"` both side by side, `2 * hidden_size`
        numbers per token, `"mean"` their mean, `hidden_size` numbers, as trax's `Reformer` does.
    classifier_pooling (`str`, *optional*, defaults to `"token"`):
        What the heads for sequences and multiple choice read: `"token"` the vector of the token that has seen the
        whole text, which is the last one when attention is causal and the first one otherwise; `"mean"` the mean of
        all tokens' vectors.
    tie_word_embeddings (`bool`, *optional*, defaults to `False`):
        One matrix for the words that go in and those that come out. Needs `combine_streams="mean"`. In a file with
        `"concat"` it changes nothing, as in stock Reformer.

    A value that cannot work raises `StrictDataclassClassValidationError` or `StrictDataclassFieldValidationError`, a
    misspelt name or another model's name for a setting a `ValueError`; the message says what was given and what is
    allowed. In a file, or in what `to_dict` wrote, such a name is kept and gets a warning.

    Example:

    ```python
    >>> from hf_reformer import ReformerConfig

    >>> config = ReformerConfig(attn_layers=["local", "lsh"], num_buckets=[8, 16], num_hashes=4)
    >>> config.num_hidden_layers
    2

    ```
    """

    model_type = "reformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.layer_norm": "keep_full_weight",
    }

    attention_head_size: int = 64
    attn_layers: list[str] | tuple[str, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    axial_norm_std: float | int = 1.0
    axial_pos_embds: bool | None = None
    axial_pos_shape: list[int] | tuple[int, ...] | None = None
    axial_pos_embds_dim: list[int] | tuple[int, ...] | None = None
    chunk_size_lm_head: int = 0
    eos_token_id: int | list[int] | None = 1
    feed_forward_size: int = 512
    hash_seed: int | None = None
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.05
    hidden_size: int = 256
    initializer_range: float = 0.02
    is_decoder: bool = False
    layer_norm_eps: float = 1e-12
    local_num_chunks_before: int = 1
    local_num_chunks_after: int = 0
    local_attention_probs_dropout_prob: float | int = 0.05
    local_attn_chunk_length: int = 64
    lsh_attn_chunk_length: int | None = 64
    lsh_attention_probs_dropout_prob: float | int | None = 0.0
    lsh_num_chunks_before: int | None = 1
    lsh_num_chunks_after: int | None = 0
    max_position_embeddings: int | None = None
    num_attention_heads: int = 12
    num_buckets: int | list[int] | tuple[int, ...] | None = None
    num_hashes: int = 1
    vocab_size: int = 320
    tie_word_embeddings: bool = False
    use_cache: bool = True
    classifier_dropout: float | int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = 0
    reversible: bool = True
    exact_inversion: bool | None = None
    activation_memory: int | str = 0
    circular_look_around: bool = True
    attend_across_buckets: bool = True
    allow_duplicate_attention: bool = True
    full_attention_threshold: int | None = None
    lsh_sliding_window: bool = False
    lsh_value_shift: int = 0
    attention_output_bias: bool = False
    gated_feed_forward: bool = False
    combine_streams: str = "concat"
    classifier_pooling: str = "token"
    position_embedding_type: str | None = None
    rope_parameters: dict | None = None
    lsh_rotary: bool | str = False
    decoder_attn_layers: list[str] | tuple[str, ...] | None = None
    decoder_start_token_id: int | None = None
    cross_attention_probs_dropout_prob: float | int = 0.0

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # What a file means that leaves these out.
        return super().from_dict({"model_type": cls.model_type, "eos_token_id": 2} | config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        # Nobody types the model's type: what has it comes from a file or from `to_dict`.
        typed = "model_type" not in kwargs
        if self.axial_pos_embds is None:
            self.axial_pos_embds = self.position_embedding_type in (None, "axial")
        self._refuse_foreign_keys(kwargs, typed)
        self.attn_layers = tuple(kind.removeprefix(OWN_KIND) for kind in self.attn_layers)
        if self.is_encoder_decoder:
            self.complete_sides()
        self._complete_positions(typed)
        super().__post_init__(**kwargs)

    def complete_sides(self):
        """Give the decoder what follows from other settings."""
        layers = self.attn_layers if self.decoder_attn_layers is None else self.decoder_attn_layers
        self.decoder_attn_layers = tuple(kind.removeprefix(OWN_KIND) for kind in layers)
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id if self.pad_token_id is None else self.pad_token_id

    def _refuse_foreign_keys(self, extra_keys, typed):
        if typed and self.tie_word_embeddings and self.output_size != self.hidden_size:
            raise ValueError(
                f"`tie_word_embeddings=True` is not possible: the LM head reads both streams, {self.output_size} "
                f"numbers per token, and a word embedding has {self.hidden_size}. Set it to False, or let a new model "
                "read the mean of the streams: `combine_streams='mean'`. Stock Reformer ignores it, so a stock "
                "checkpoint holds separate weights either way."
            )
        if self.rope_parameters and self.position_kind != "rotary":
            extra_keys = extra_keys | {"rope_parameters": self.rope_parameters}
        for key, value in extra_keys.items():
            fault = self._fault_of_key(key, value, typed)
            if fault and typed:
                raise ValueError(fault)
            if fault:
                logger.warning_once(f"{fault} It is kept and changes nothing.")

    def _fault_of_key(self, key, value, typed):
        if key == "rope_parameters":
            return f"`{key}={value!r}` is for `position_embedding_type='rotary'`, but it is {self.position_kind!r}."
        # Any special token may have its id in a config.
        is_known = key.endswith("_token_id") or (hasattr(type(self), key) and key not in MEANT_BY)
        if is_known or (key in LEGACY_KEYS and not typed):
            return None
        if key in NOT_IN_A_REFORMER:
            return f"`{key}={value!r}`: a Reformer has no such thing. Leave it out." if value else None
        close = get_close_matches(key, self.__dataclass_fields__, n=1, cutoff=0.8)
        meant = MEANT_BY.get(key, *close)
        return meant and f"`{key}` is not a setting of {type(self).__name__}. Did you mean `{meant}`?"

    def convert_rope_params_to_dict(self, **kwargs):
        """Complete `rope_parameters`, as the base class asks of models that have them: those with rotary positions."""
        if self.position_kind != "rotary":
            return kwargs
        self.rope_parameters = dict(self.rope_parameters or {})
        return super().convert_rope_params_to_dict(**kwargs)

    def _complete_positions(self, typed):
        given = prod(self.axial_pos_shape) if self.axial_pos_embds and self.axial_pos_shape else None
        if self.max_position_embeddings is None:
            self.max_position_embeddings = 4096 if given is None else given
        elif typed and given is not None and given < self.max_position_embeddings:
            logger.warning_once(
                f"`max_position_embeddings={self.max_position_embeddings}`, but `axial_pos_shape="
                f"{list(self.axial_pos_shape)}` holds {given} positions, and no input may be longer. Leave one of the "
                "two out; it follows from the other."
            )
        shape = self.axial_pos_shape
        self.axial_pos_shape = tuple(axial_pos_shape(self.max_position_embeddings) if shape is None else shape)
        sizes = self.axial_pos_embds_dim
        if sizes is None:
            others = len(self.axial_pos_shape) - 1
            size = self.hidden_size // (2 * others + 2)
            sizes = [size] * others + [self.hidden_size - others * size]
        self.axial_pos_embds_dim = tuple(sizes)

    def validate_attn_layers(self):
        sides = {"attn_layers": self.attn_layers}
        if self.is_encoder_decoder:
            sides["decoder_attn_layers"] = self.decoder_attn_layers
        for name, kinds in sides.items():
            if not kinds or not set(kinds) <= set(ATTENTION_KINDS):
                raise ValueError(
                    f"`{name}` must name at least one layer, each one of {list(ATTENTION_KINDS)}, but got "
                    f"{list(kinds or ())}."
                )

    def validate_num_buckets(self):
        if self.num_buckets is None:
            return
        factors = [self.num_buckets] if isinstance(self.num_buckets, int) else list(self.num_buckets)
        if not factors or any(factor < 2 or factor % 2 for factor in factors):
            raise ValueError(
                f"`num_buckets` must be an even number >= 2, a list of such factors, or None, but got "
                f"{self.num_buckets}. Hashing takes buckets in pairs: a direction and its opposite."
            )

    def validate_position_embedding_type(self):
        kind = self.position_embedding_type
        if kind not in (None, *POSITION_KINDS):
            raise ValueError(
                f"`position_embedding_type` must be None or one of {list(POSITION_KINDS)}, but got {kind!r}."
            )
        if kind is not None and self.axial_pos_embds != (kind == "axial"):
            raise ValueError(
                f"`position_embedding_type={kind!r}` contradicts `axial_pos_embds={self.axial_pos_embds}`. Leave one "
                "of the two out; it follows from the other."
            )
        if self.lsh_rotary not in (False, True, AFTER_HASHING):
            raise ValueError(f"`lsh_rotary` must be False, True or {AFTER_HASHING!r}, but got {self.lsh_rotary!r}.")
        if self.lsh_rotary and kind != "rotary":
            raise ValueError(
                f"`lsh_rotary={self.lsh_rotary!r}` needs `position_embedding_type='rotary'`, but it is "
                f"{self.position_kind!r}."
            )

    def validate_rope(self):
        if self.position_kind != "rotary":
            return
        # They may have been assigned since the config was made.
        self.convert_rope_params_to_dict()
        if self.attention_head_size % 2:
            raise ValueError(
                f"Rotary positions turn pairs of numbers, so `attention_head_size` must be even, but got "
                f"{self.attention_head_size}."
            )
        settings = self.rope_parameters
        kind, theta, part = (settings.get(name) for name in ("rope_type", "rope_theta", "partial_rotary_factor"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"`rope_parameters` must have a `rope_type` of {list(ROPE_TYPES)}, but it is {kind!r}.")
        if not isinstance(theta, (int, float)) or not 1 < theta < inf:
            raise ValueError(f"`rope_parameters` must have a finite `rope_theta` above 1, but it is {theta!r}.")
        if part not in (None, 1):
            raise ValueError(f"`partial_rotary_factor={part!r}` is not possible: heads turn as a whole. Leave it out.")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def validate_axial_position_embeddings(self):
        if not self.axial_pos_embds:
            return
        shape, dims = tuple(self.axial_pos_shape), tuple(self.axial_pos_embds_dim)
        if not shape or len(shape) != len(dims) or min(shape + dims) < 1:
            raise ValueError(
                f"`axial_pos_shape` and `axial_pos_embds_dim` must hold one positive number per axis each, but got "
                f"{list(shape)} and {list(dims)}."
            )
        if sum(dims) != self.hidden_size:
            raise ValueError(
                f"`axial_pos_embds_dim={list(dims)}` adds up to {sum(dims)} and must add up to "
                f"`hidden_size={self.hidden_size}`. Change one of the two, or set `axial_pos_embds=False`."
            )

    def validate_chunks(self):
        smallest_allowed = {
            "chunk_size_feed_forward": 0,
            "chunk_size_lm_head": 0,
            "local_attn_chunk_length": 1,
            "local_num_chunks_after": 0,
            "local_num_chunks_before": 0,
            "lsh_attn_chunk_length": 1,
            "lsh_num_chunks_after": 0,
            "lsh_num_chunks_before": 0,
        }
        optional_without_lsh = "lsh" not in self.all_layers
        for name, smallest in smallest_allowed.items():
            value = getattr(self, name)
            if value is None and name.startswith("lsh") and optional_without_lsh:
                continue
            if value is None or value < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}, but got {value}.")
        threshold = self.full_attention_threshold
        if threshold is not None and not optional_without_lsh and threshold < self.lsh_attn_chunk_length:
            raise ValueError(
                f"`full_attention_threshold` must be None or at least `lsh_attn_chunk_length="
                f"{self.lsh_attn_chunk_length}`, but got {threshold}."
            )

    def validate_sliding_window(self):
        if self.lsh_sliding_window and (self.circular_look_around or self.attend_across_buckets):
            raise ValueError(
                f"`lsh_sliding_window=True` needs `circular_look_around=False` and `attend_across_buckets=False`, but "
                f"they are {self.circular_look_around} and {self.attend_across_buckets}."
            )

    def validate_value_shift(self):
        if self.lsh_value_shift not in (0, 1):
            raise ValueError(f"`lsh_value_shift` must be 0 or 1, but got {self.lsh_value_shift}.")

    def validate_circle(self):
        if not self.circular_look_around:
            return
        lengths = {"lsh": self.lsh_attn_chunk_length, "local": self.local_attn_chunk_length}
        in_use = [lengths[kind] for kind in set(self.all_layers) if kind in lengths]
        longest = self.max_sequence_length or self.max_position_embeddings
        # An input within the shorter chunk is not padded.
        if lcm(*in_use) > max(SMALL_CIRCLE, min(in_use, default=0)) and lcm(*in_use) > longest:
            raise ValueError(
                f"With `circular_look_around` inputs are padded to a multiple of both `lsh_attn_chunk_length="
                f"{lengths['lsh']}` and `local_attn_chunk_length={lengths['local']}`: {lcm(*in_use)} tokens, where "
                f"the longest input has {longest}. Take shorter chunks, or lengths that divide each "
                "the other."
            )

    def validate_choices(self):
        for name, allowed in {"classifier_pooling": POOLINGS, "combine_streams": STREAMS_TO_OUTPUT}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, but got {getattr(self, name)!r}.")

    def validate_activation_memory(self):
        bytes_of("activation_memory", self.activation_memory)

    def validate_direction(self):
        if self.is_encoder_decoder and self.is_decoder:
            raise ValueError(
                "`is_decoder=True` is for one stack, but `is_encoder_decoder=True` asks for two, of which the second "
                "is causal. Leave one of them out."
            )
        if self.decoder_attn_layers is not None and not self.is_encoder_decoder:
            raise ValueError(
                f"`decoder_attn_layers={list(self.decoder_attn_layers)}` needs `is_encoder_decoder=True`. One stack "
                "has `attn_layers`."
            )

    def validate_dropout(self):
        names = [name for name in self.__dataclass_fields__ if "dropout" in name]
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` is a probability and must be between 0 and 1, but got {value}.")

    def validate_sizes(self):
        names = (
            "attention_head_size",
            "feed_forward_size",
            "hidden_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hashes",
            "vocab_size",
        )
        for name in names:
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")
        for name in ("axial_norm_std", "initializer_range", "layer_norm_eps"):
            # Also False for NaN.
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"`{name}` must be a finite number >= 0, but got {getattr(self, name)}.")
        if self.hash_seed is not None and not SMALLEST_SEED <= self.hash_seed <= LARGEST_SEED:
            raise ValueError(f"`hash_seed` must be between -2**63 and 2**64 - 1, but got {self.hash_seed}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, but got {self.hidden_act!r}.")

    @property
    def num_hidden_layers(self) -> int:
        """Depth of the model, which `attn_layers` decides."""
        return len(self.attn_layers)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        if value != len(self.attn_layers):
            raise ValueError(
                f"`num_hidden_layers={value}` contradicts `attn_layers`, which names {len(self.attn_layers)} layers. "
                "Leave `num_hidden_layers` out and change `attn_layers`: the depth follows from it."
            )

    @property
    def all_layers(self) -> tuple[str, ...]:
        """The kinds of all layers, the encoder's and the decoder's."""
        return *self.attn_layers, *(self.decoder_attn_layers or ())

    @property
    def auto_map(self) -> dict:
        """Where a repository's own code is. Empty without any; TRL reads it of every config."""
        return self.__dict__.setdefault("auto_map", {})

    @auto_map.setter
    def auto_map(self, value: dict):
        self.__dict__["auto_map"] = value

    @property
    def position_kind(self) -> str:
        """Which of `POSITION_KINDS` the model has, by either setting."""
        return self.position_embedding_type or ("axial" if self.axial_pos_embds else "learned")

    @property
    def max_sequence_length(self) -> int | None:
        """Tokens that the position embeddings reach: the longest input the model takes; None without a bound."""
        if self.position_kind not in POSITION_TABLES:
            return None
        if not self.axial_pos_embds:
            return self.max_position_embeddings
        reach = prod(self.axial_pos_shape or ())
        return reach if self.max_position_embeddings is None else min(self.max_position_embeddings, reach)

    @property
    def output_size(self) -> int:
        """Numbers per token that the heads read."""
        return 2 * self.hidden_size if self.combine_streams == "concat" else self.hidden_size

    def to_dict(self):
        """
        Same as the base class's, with the depth, but with "hf_reformer." before each kind of layer when a switch is
        set that stock transformers does not have. That class would ignore the switch and compute something else; so
        it raises an error that shows where the checkpoint comes from. So does it where a folder brings its own code.
        """
        output = super().to_dict() | {"num_hidden_layers": self.num_hidden_layers}
        # Saved from here, a checkpoint has no code beside it.
        has_code = bool(self.auto_map) and is_remote_code()
        if not has_code:
            output.pop("auto_map", None)
        elif not all("--" in name for name in output["auto_map"].values()):
            # Saving has written code that was in another repository.
            output["auto_map"] = {auto: name.rpartition("--")[2] for auto, name in output["auto_map"].items()}
        is_beyond_stock = self.position_kind not in POSITION_TABLES
        if (
            has_code
            or is_beyond_stock
            or any(getattr(self, switch) != stock for switch, stock in BEYOND_STOCK.items())
        ):
            for name in ("attn_layers", "decoder_attn_layers"):
                if output.get(name) is not None:
                    output[name] = [OWN_KIND + kind for kind in output[name]]
        return output


def is_remote_code() -> bool:
    """Whether this file was loaded from a checkpoint, by `trust_remote_code=True`."""
    return __name__.partition(".")[0] == "transformers_modules"


def axial_pos_shape(length: int) -> list[int]:
    """Two axes, as square as a power of two allows, whose product is `length` or just above."""
    length = max(length, 1)
    rows = 2 ** ceil(log2(length) / 2)
    return [rows, ceil(length / rows)]
