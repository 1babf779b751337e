"""Models small enough to test, with weights large enough for attention, words and positions to matter."""

import torch

from hf_reformer import (
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
)


TINY = {
    "attention_head_size": 8,
    "attn_layers": ["local", "lsh"],
    "axial_norm_std": 0.3,
    "axial_pos_embds_dim": [8, 24],
    "axial_pos_shape": [8, 16],
    "eos_token_id": 1,
    "feed_forward_size": 48,
    "hidden_dropout_prob": 0.0,
    "hidden_size": 32,
    "initializer_range": 0.3,
    "local_attention_probs_dropout_prob": 0.0,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "max_position_embeddings": 128,
    "num_attention_heads": 2,
    "num_buckets": 8,
    "num_hashes": 2,
    "vocab_size": 50,
}
# What the recipe is made this small by.
TINY_RECIPE = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 16,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
}
VOCAB, LONGEST = TINY["vocab_size"], TINY["max_position_embeddings"]
STACKS = {
    "lsh": ["lsh", "lsh"],
    "local": ["local", "local"],
    "full": ["full", "full"],
    "mixed": ["local", "lsh", "full"],
}
POSITIONS = {
    "axial": {},
    "rotary": {"position_embedding_type": "rotary"},
    "LSH rotary": {"position_embedding_type": "rotary", "lsh_rotary": True},
    "LSH rotary, after hashing": {"position_embedding_type": "rotary", "lsh_rotary": "after_hashing"},
    "none": {"position_embedding_type": "none"},
}
DROPOUT = {
    "hidden_dropout_prob": 0.1,
    "local_attention_probs_dropout_prob": 0.1,
    "lsh_attention_probs_dropout_prob": 0.1,
}
NO_ATTENTION_DROPOUT = {"local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0}


# The base model and every head.
MODEL_CLASSES = (
    ReformerModel,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)

# The settings with which cached and uncached results are the same at every position.
WINDOWS = {"lsh_sliding_window": True, "attend_across_buckets": False, "circular_look_around": False}

# The mean of the streams goes out, by the matrix that words come in by if there is a head for them.
AVERAGED = {"attention_output_bias": True, "combine_streams": "mean", "gated_feed_forward": True}
TIED = AVERAGED | {"tie_word_embeddings": True}


def tiny_config(**changes):
    return ReformerConfig(**(TINY | changes))


def make_model(model_class, **changes):
    """In evaluation mode; biases are random too, so that one that is not used shows."""
    torch.manual_seed(1)
    model = model_class(tiny_config(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
    return model.eval()


def random_ids(batch, length):
    """Token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length))


def left_padded(rows, length=0):
    """Ids and attention mask of rows of ids without 0, `length` columns or as many as the longest row has."""
    length = max(length, *map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    return ids, (ids != 0).long()


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_tensors(actual, expected):
    """Two dictionaries, bit by bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_close(actual, expected, within=1e-10):
    """Two dictionaries of float64 tensors, but for the order of sums."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= within * tensor.norm(), name
