"""
The models that experiments on text compare: one size, and one thing that differs.

Two layers, half as wide as the demo's, so that three seeds of many contenders can be run on a CPU. All have rotary
positions, and none computes anything anew in the backward pass: gradients are the same, and seconds can be compared
with those of a Llama.
"""

from collections.abc import Callable

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_reformer import ReformerByteTokenizer, ReformerConfig, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.modeling.layers.full_attention import FullSelfAttention
from hf_reformer.modeling.layers.lsh_attention import LSHSelfAttention
from hf_reformer.training.recipe import num_buckets

from .value_variants import BothNeighbours, HalfShifted, HalfTwoOn, LearnedMix, with_lsh_layers


VOCABULARY = len(ReformerByteTokenizer())
# Of masked models, which have one token more.
MASK_ID = VOCABULARY
SIZE = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "attention_head_size": 64,
    "feed_forward_size": 512,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "position_embedding_type": "rotary",
    "local_attn_chunk_length": 32,
    "reversible": False,
}
WINDOWS = {"circular_look_around": False, "attend_across_buckets": False, "lsh_sliding_window": True}
SHIFTED = {"lsh_value_shift": 1}


class ShiftedFullAttention(FullSelfAttention):
    """
    Dense attention with separate queries and keys, to earlier tokens only, of which it reads the successors' values.

    A token's key is moved to its successor, so that the causal mask does the rest. The first value has no key; its
    score is always 0.
    """

    def _attend(self, query, key, value, mask, return_weights):
        return super()._attend(query, nn.functional.pad(key[:, :-1], (0, 0, 0, 0, 1, 0)), value, mask, return_weights)


def reformer_config(
    context_length: int, layers: list[str], buckets_per_chunk: float = 0.5, **changes
) -> ReformerConfig:
    """A causal Reformer; half a bucket per chunk, as windows want it."""
    chunk_length = changes.get("lsh_attn_chunk_length", 64)
    settings = (
        SIZE
        | WINDOWS
        | {
            "is_decoder": True,
            "vocab_size": VOCABULARY,
            "attn_layers": layers,
            "num_buckets": num_buckets(context_length, chunk_length, buckets_per_chunk),
            "max_position_embeddings": context_length,
        }
    )
    return ReformerConfig(eos_token_id=0, pad_token_id=None, **settings | changes)


def reformer(context_length: int, layers: list[str], **changes) -> ReformerForCausalLM:
    """A language model with `reformer_config`."""
    return ReformerForCausalLM(reformer_config(context_length, layers, **changes))


def with_config(model: PreTrainedModel, **settings) -> PreTrainedModel:
    """A model with the very same weights and other settings of its config, in evaluation mode."""
    twin = type(model)(ReformerConfig.from_dict(model.config.to_dict() | settings))
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def masked_reformer(context_length: int, layers: list[str], **changes) -> ReformerForMaskedLM:
    """The same in both directions."""
    both = {"is_decoder": False, "local_num_chunks_after": 1, "lsh_num_chunks_after": 1, "vocab_size": MASK_ID + 1}
    return ReformerForMaskedLM(reformer_config(context_length, layers, **both | changes))


def with_shifted_full_layers(context_length: int) -> ReformerForCausalLM:
    """A local layer and `ShiftedFullAttention`."""
    model = reformer(context_length, ["local", "full"])
    for layer in model.reformer.encoder.layers:
        attention = layer.attention.self_attention
        if isinstance(attention, FullSelfAttention):
            attention.__class__ = ShiftedFullAttention
    return model


def llama(context_length: int, **changes) -> PreTrainedModel:
    """A Llama with about as many weights."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 352,
        "max_position_embeddings": context_length,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def mixed(**changes) -> Callable[[int], nn.Module]:
    """A local layer and an LSH layer."""
    return lambda context_length: reformer(context_length, ["local", "lsh"], **changes)


def varied(kind: type[LSHSelfAttention]) -> Callable[[int], nn.Module]:
    """The same with other LSH layers."""
    return lambda context_length: with_lsh_layers(kind, lambda: mixed(**SHIFTED)(context_length))


def dense(**changes) -> Callable[[int], nn.Module]:
    """The same, but that LSH layers attend to everything."""
    return lambda context_length: reformer(
        context_length, ["local", "lsh"], full_attention_threshold=context_length, **changes
    )


# What is compared, by name: a model for a context.
CONTENDERS: dict[str, Callable[[int], nn.Module]] = {
    "local": lambda context_length: reformer(context_length, ["local"] * 2),
    "lsh": mixed(),
    "lsh, successors": mixed(**SHIFTED),
    "lsh, successors, 2 rounds": mixed(**SHIFTED, num_hashes=2),
    "lsh, successors, 4 rounds": mixed(**SHIFTED, num_hashes=4),
    "full": lambda context_length: reformer(context_length, ["local", "full"]),
    "dense, shared, successors": dense(**SHIFTED),
    "dense, separate, successors": with_shifted_full_layers,
    "llama": llama,
    "lsh, successors, 2 buckets per chunk": mixed(**SHIFTED, buckets_per_chunk=2),
    "lsh, successors, 8 buckets per chunk": mixed(**SHIFTED, buckets_per_chunk=8),
    "lsh, successors in half of the heads": varied(HalfShifted),
    "lsh, learned mix of own and successor": varied(LearnedMix),
    "lsh, successors, two on in half of the heads": varied(HalfTwoOn),
    "lsh, successors, chunks of 32": mixed(**SHIFTED, lsh_attn_chunk_length=32),
    "lsh, successors, chunks of 256": mixed(**SHIFTED, lsh_attn_chunk_length=256),
}

# The same for models in both directions.
MASKED: dict[str, Callable[[int], nn.Module]] = {
    "local": lambda context_length: masked_reformer(context_length, ["local"] * 2),
    "lsh": lambda context_length: masked_reformer(context_length, ["local", "lsh"]),
    "lsh, both neighbours": lambda context_length: with_lsh_layers(
        BothNeighbours, lambda: masked_reformer(context_length, ["local", "lsh"])
    ),
    "full": lambda context_length: masked_reformer(context_length, ["local", "full"]),
}
