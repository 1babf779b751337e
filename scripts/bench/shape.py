"""What all contenders of benchmark.py have in common: the sizes of one layer, and how long the text is."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from hf_reformer.modeling.ops.lsh_hashing import default_num_buckets


SEED = 0


@dataclass(frozen=True)
class Shape:
    """
    What all contenders have in common.

    Attributes:
        length: Tokens of a row.
        rounds: Hashing rounds of those that hash.
        chunk_length: Tokens of a chunk; for `reformer-pytorch` its bucket size.
        ff_chunk: Tokens that the feed-forward layers of the Reformers take at a time; 0 for all.
        dtype: "fp32", or "bf16" for float32 weights under autocast.
    """

    length: int
    rounds: int = 1
    batch_size: int = 1
    hidden_size: int = 512
    num_heads: int = 8
    num_layers: int = 4
    feed_forward_size: int = 2048
    chunk_length: int = 64
    ff_chunk: int = 0
    vocab_size: int = 256
    dtype: str = "fp32"
    device: str = "cpu"

    def autocast(self):
        """The context that forward passes run in."""
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    @property
    def num_buckets(self) -> int | list[int]:
        """What stock Reformer picks, given to both so that neither has to."""
        return default_num_buckets(self.length, self.chunk_length, self.length)

    @property
    def short_length(self) -> int:
        """About a thousand tokens that all contenders take."""
        return max(1024 // (2 * self.chunk_length), 1) * 2 * self.chunk_length

    @property
    def window(self) -> int:
        """Tokens of the window of those that have one: what a token meets in its own chunk and the one before."""
        return 2 * self.chunk_length

    def feed_forward_of(self, layer: str) -> int:
        """Width of our feed-forward: local attention has a matrix more than LSH attention, so there it is narrower."""
        return self.feed_forward_size - (self.hidden_size // 2 if layer == "local" else 0)

    def reformer_settings(self, seed: int | None, layer: str = "lsh") -> dict:
        """
        For our config and for stock's.

        Args:
            seed: With one both hash alike, without one they draw anew at every call.
            layer: The kind of all attention layers, "lsh" or "local".
        """
        return {
            "attn_layers": [layer] * self.num_layers,
            "attention_head_size": self.hidden_size // self.num_heads,
            "axial_pos_shape": [self.length // self.chunk_length, self.chunk_length],
            "axial_pos_embds_dim": [self.hidden_size // 4, self.hidden_size - self.hidden_size // 4],
            "chunk_size_feed_forward": self.ff_chunk,
            "feed_forward_size": self.feed_forward_of(layer),
            "hash_seed": seed,
            "hidden_dropout_prob": 0.0,
            "hidden_size": self.hidden_size,
            "is_decoder": True,
            "local_attention_probs_dropout_prob": 0.0,
            "local_attn_chunk_length": self.chunk_length,
            "lsh_attention_probs_dropout_prob": 0.0,
            "lsh_attn_chunk_length": self.chunk_length,
            "max_position_embeddings": self.length,
            "num_attention_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "num_hashes": self.rounds,
            "vocab_size": self.vocab_size,
        }
