"""What transformers' own Reformer does not have, and so must not load: it would compute something else."""

# Before a kind of layer in the files of checkpoints that stock transformers must not load.
OWN_KIND = "hf_reformer."

# Switches that stock transformers does not have, with the value at which both compute the same.
BEYOND_STOCK = {
    "circular_look_around": True,
    "attend_across_buckets": True,
    "allow_duplicate_attention": True,
    "full_attention_threshold": None,
    "lsh_sliding_window": False,
    "lsh_value_shift": 0,
    "attention_output_bias": False,
    "gated_feed_forward": False,
    "combine_streams": "concat",
    "classifier_pooling": "token",
    "is_encoder_decoder": False,
}
