"""
The recipe for new models: the model's numbers, which `hf-reformer train` and the demo use.

Those of the optimizer are in `arguments.py`.

The defaults of `ReformerConfig` stay those of transformers' own Reformer, so that a published config file means what
it meant. They do not learn well. What differs here, and what each choice was worth, is in docs/recipe.md.
"""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..configuration.configuration_reformer import ReformerConfig
from ..tokenization.tokenization_reformer_byte import ReformerByteTokenizer


# From this many buckets on they are factorised: two short rotations instead of one long one.
FACTORISE_FROM = 256


@dataclass
class ModelRecipe:
    """
    Size and structure of a new model; `recipe_config` makes its config.

    A field named like a setting of `ReformerConfig` is that setting; to add one, add the field. The others stand for
    several settings, or for one that depends on the context, as `settings` says.
    """

    attn_layers: list[str] = field(
        default_factory=lambda: ["local", "lsh", "local", "lsh"],
        metadata={"help": "Attention of each layer: local (the last chunks), lsh (alike tokens), full (everything)."},
    )
    full_attention: bool = field(
        default=False, metadata={"help": "Make every layer full: the dense twin of the same model."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of each of the two residual streams."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of each attention layer."})
    attention_head_size: int = field(default=64, metadata={"help": "Width of a head."})
    feed_forward_size: int = field(default=1024, metadata={"help": "Width of the feed-forward layers."})
    hidden_act: str = field(default="gelu", metadata={"help": "Nonlinearity of the feed-forward layers."})
    position_embedding_type: str | None = field(
        default="rotary",
        metadata={"help": "Positions: rotary (no longest text), axial or learned (tables), or none."},
    )
    local_attn_chunk_length: int = field(default=32, metadata={"help": "Tokens in a chunk of a local layer."})
    lsh_attn_chunk_length: int = field(default=64, metadata={"help": "Tokens in a chunk of an lsh layer."})
    lsh_value_shift: int = field(
        default=1,
        metadata={"help": "1: tokens of a causal lsh layer read what followed the tokens like them; 0: those alone."},
    )
    lsh_sliding_window: bool = field(
        default=True,
        metadata={"help": "Windows within buckets: generation with a cache then equals one forward pass exactly."},
    )
    buckets_per_chunk: float = field(default=0.5, metadata={"help": "Hash buckets for each lsh chunk of the context."})
    num_hashes: int = field(
        default=1, metadata={"help": "Hash rounds of an lsh layer: more find more, and cost more."}
    )
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    axial_norm_std: float = field(
        default=0.02,
        metadata={"help": "The same of the position vectors; the stock value of 1.0 drowns the words for long."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout of hidden states and attention probabilities."})
    chunk_size_feed_forward: int = field(
        default=0, metadata={"help": "Tokens a feed-forward layer takes at a time; 0 for all at once."}
    )
    chunk_size_lm_head: int = field(
        default=0, metadata={"help": "Tokens whose logits exist at a time; 0 for all at once."}
    )

    def settings(self, context_length: int, *, is_decoder: bool, is_encoder_decoder: bool = False) -> dict[str, Any]:
        """The settings of `ReformerConfig` that this means for a training context."""
        settings = dict(vars(self))
        full_attention, per_chunk, dropout = map(settings.pop, ("full_attention", "buckets_per_chunk", "dropout"))
        if full_attention:
            settings["attn_layers"] = ["full"] * len(self.attn_layers)
        chunk_length = self.lsh_attn_chunk_length
        return settings | {
            "is_decoder": is_decoder,
            "is_encoder_decoder": is_encoder_decoder,
            # Beside an encoder, which has none of it, it is the decoder's.
            "lsh_value_shift": self.lsh_value_shift if is_decoder or is_encoder_decoder else 0,
            "local_num_chunks_after": 0 if is_decoder else 1,
            "lsh_num_chunks_after": 0 if is_decoder else 1,
            # Explicit, so that a result does not depend on how long a batch was padded.
            "num_buckets": num_buckets(context_length, chunk_length, per_chunk) if chunk_length else None,
            # Off, so that neither padding nor the other rows of a batch change a result.
            "circular_look_around": False,
            "attend_across_buckets": not self.lsh_sliding_window,
            "max_position_embeddings": context_length,
            "hidden_dropout_prob": dropout,
            "local_attention_probs_dropout_prob": dropout,
            "lsh_attention_probs_dropout_prob": dropout,
        }


def recipe_config(
    context_length: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    is_decoder: bool = True,
    is_encoder_decoder: bool = False,
    **settings: Any,
) -> ReformerConfig:
    """
    The config of a new model for training windows of `context_length` tokens.

    Args:
        context_length: With a table of positions the longest text that the model takes, too, unless
            `max_position_embeddings` says more.
        tokenizer: What the vocabulary and the special tokens are from; the byte tokenizer without one.
        is_decoder: Whether the model is causal. A masked one looks at what follows, too.
        is_encoder_decoder: Make an encoder, which looks at what follows, and a causal decoder; then `is_decoder` says
            nothing, and `attn_layers` are those of both unless `decoder_attn_layers` is given.
        **settings: Those of `ModelRecipe` and of `ReformerConfig`, which come before what the recipe says.

    Raises:
        ValueError: a setting is unknown, or the config refuses its value.

    Example:

    ```python
    >>> from hf_reformer.training import recipe_config

    >>> config = recipe_config(16384, hidden_size=512, buckets_per_chunk=1, reversible=False)
    >>> config.num_buckets, config.lsh_value_shift, config.vocab_size
    ([16, 16], 1, 258)

    ```
    """
    tokenizer = ReformerByteTokenizer() if tokenizer is None else tokenizer
    names = {setting.name for setting in fields(ModelRecipe)}
    if any(name.startswith("axial_pos_") for name in settings):
        # Then positions have a table, and these say which.
        settings.setdefault("position_embedding_type", None)
    recipe = ModelRecipe(**{name: settings.pop(name) for name in names & settings.keys()})
    if "axial_pos_shape" in settings:
        # It says by itself how many positions there are.
        settings.setdefault("max_position_embeddings", None)
    vocabulary = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    sides = {"is_decoder": is_decoder and not is_encoder_decoder, "is_encoder_decoder": is_encoder_decoder}
    config = ReformerConfig(**recipe.settings(context_length, **sides) | vocabulary | settings)
    _refuse_unknown(settings, config, names)
    return config


def _refuse_unknown(settings, config, names):
    # The config refuses what looks like a setting of its own, and keeps any other name.
    for name in settings:
        if name in vars(config) and not hasattr(type(config), name) and not name.endswith("_token_id"):
            close = get_close_matches(name, names | vars(config).keys() - settings.keys(), n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`{name}` is a setting of neither ModelRecipe nor ReformerConfig.{hint}")


def num_buckets(context_length: int, chunk_length: int, per_chunk: float = 2) -> int | list[int]:
    """A power of two; with 2 buckets per chunk a bucket holds about half a chunk (the published formula)."""
    power = max(int(per_chunk * context_length / chunk_length), 2).bit_length() - 1
    if 2**power < FACTORISE_FROM:
        return 2**power
    return [2 ** (power // 2), 2 ** (power - power // 2)]
