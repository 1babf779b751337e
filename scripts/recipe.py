"""The recipe for new models: the one place with the numbers that train.py and the demo use.

The defaults of `ReformerConfig` stay those of transformers' own Reformer, so that a published config file means what
it meant. They do not learn well. What differs here, and what each choice was worth, is in docs/recipe.md.
"""

import math
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_reformer import ReformerConfig
from hf_reformer.configuration.configuration_reformer import axial_pos_shape


# From this many buckets on they are factorised: two short rotations instead of one long one.
FACTORISE_FROM = 256


@dataclass
class ModelRecipe:
    """Size and structure of a new model; `build_config` turns them into a config for a training context."""

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
    local_attn_chunk_length: int = field(default=8, metadata={"help": "Tokens in a chunk of a local layer."})
    lsh_attn_chunk_length: int = field(default=64, metadata={"help": "Tokens in a chunk of an lsh layer."})
    lsh_sliding_window: bool = field(
        default=False,
        metadata={"help": "Windows within buckets: generation with a cache then equals one forward pass exactly."},
    )
    buckets_per_chunk: float = field(default=2.0, metadata={"help": "Hash buckets for each lsh chunk of the context."})
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


@dataclass
class ReformerTrainingArguments(TrainingArguments):
    """TrainingArguments with the recipe's defaults; every other argument is the Trainer's own."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "Where checkpoints and the model go."})
    muon: bool = field(
        default=True,
        metadata={"help": "Muon for the matrices of the layers and AdamW for the rest, instead of optim."},
    )
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, one of transformers' OptimizerNames."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate after warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or below 1 their share of all."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the matrices."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of AdamW's second moment."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Windows per device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Windows per device in evaluation."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training windows."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between logs, or below 1 their share of all."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float = field(default=0.1, metadata={"help": "Steps between evaluations, or below 1 their share."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in each step; a Reformer has none."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints that another run left in output_dir."}
    )
    accept_changes: bool = field(
        default=False, metadata={"help": "Resume although the model, the text or its order differ from before."}
    )

    def __post_init__(self):
        super().__post_init__()
        at_least_one = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be a number from 0 on.")


# What the demo changes, and nothing else: its context and how long it trains.
DEMO_CONTEXT_LENGTH = 4096
DEMO_TRAINING = {"max_steps": 1200, "eval_steps": 0.25, "save_strategy": "no"}
# On a CPU without bfloat16 a step takes up to six times as long.
DEMO_FLOAT32_TRAINING = {"max_steps": 240, "eval_steps": 0.5}


def build_config(
    recipe: ModelRecipe, *, context_length: int, tokenizer: PreTrainedTokenizerBase, causal: bool = True
) -> ReformerConfig:
    """The config of a new model for training windows of `context_length` tokens."""
    return ReformerConfig(
        attn_layers=["full"] * len(recipe.attn_layers) if recipe.full_attention else recipe.attn_layers,
        hidden_size=recipe.hidden_size,
        num_attention_heads=recipe.num_attention_heads,
        attention_head_size=recipe.attention_head_size,
        feed_forward_size=recipe.feed_forward_size,
        hidden_act=recipe.hidden_act,
        local_attn_chunk_length=recipe.local_attn_chunk_length,
        local_num_chunks_after=0 if causal else 1,
        lsh_attn_chunk_length=recipe.lsh_attn_chunk_length,
        lsh_num_chunks_after=0 if causal else 1,
        num_hashes=recipe.num_hashes,
        # Explicit, so that a result does not depend on how long a batch was padded.
        num_buckets=num_buckets(context_length, recipe.lsh_attn_chunk_length, recipe.buckets_per_chunk),
        # Off, so that neither padding nor the other rows of a batch change a result.
        circular_look_around=False,
        lsh_sliding_window=recipe.lsh_sliding_window,
        attend_across_buckets=not recipe.lsh_sliding_window,
        axial_pos_shape=axial_pos_shape(context_length),
        axial_norm_std=recipe.axial_norm_std,
        initializer_range=recipe.initializer_range,
        hidden_dropout_prob=recipe.dropout,
        local_attention_probs_dropout_prob=recipe.dropout,
        lsh_attention_probs_dropout_prob=recipe.dropout,
        chunk_size_feed_forward=recipe.chunk_size_feed_forward,
        chunk_size_lm_head=recipe.chunk_size_lm_head,
        is_decoder=causal,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def num_buckets(context_length: int, chunk_length: int, per_chunk: float = 2) -> int | list[int]:
    """A power of two; with 2 buckets per chunk a bucket holds about half a chunk (the published formula)."""
    power = max(int(per_chunk * context_length / chunk_length), 2).bit_length() - 1
    if 2**power < FACTORISE_FROM:
        return 2**power
    return [2 ** (power // 2), 2 ** (power - power // 2)]
