"""What settings are called elsewhere: in old files, in other models."""

# Keys that published config files carry and nothing reads any more. In a file they are kept as they are.
LEGACY_KEYS = (
    "attention_probs_dropout_prob",
    "intermediate_size",
    "num_chunks_after",
    "num_chunks_before",
    "output_past",
    "sinusoidal_pos_embds",
    "tie_encoder_decoder",
)

# What other models call a setting.
OTHER_NAMES = {
    "attention_head_size": ("d_kv", "dim_head", "head_dim"),
    "attn_layers": ("depth", "n_layer", "n_layers", "num_layers"),
    "feed_forward_size": ("d_ff", "ffn_dim", "intermediate_size", "n_inner"),
    "hidden_act": ("activation_function", "hidden_activation"),
    "hidden_dropout_prob": ("dropout", "embd_pdrop", "resid_pdrop"),
    "hidden_size": ("d_model", "dim", "n_embd"),
    "is_decoder": ("causal",),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
    "local_attention_probs_dropout_prob": ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"),
    "local_num_chunks_after": ("num_chunks_after",),
    "local_num_chunks_before": ("num_chunks_before",),
    "lsh_attn_chunk_length": ("bucket_size",),
    "max_position_embeddings": ("max_seq_len", "max_seq_length", "n_ctx", "n_positions"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_hashes": ("n_hashes",),
    "rope_parameters": ("rope_scaling", "rope_theta"),
}
MEANT_BY = {name: ours for ours, names in OTHER_NAMES.items() for name in names}

# Settings of other models that have no counterpart here.
NOT_IN_A_REFORMER = (
    "add_cross_attention",
    "num_key_value_heads",
    "output_past",
    "sinusoidal_pos_embds",
    "sliding_window",
    "tie_encoder_decoder",
    "type_vocab_size",
)
