"""
The language models of benchmark.py, of one size: a layer of each has about as many weights as one of the Reformer's.

A layer of the Reformer has 3 matrices of attention, `hidden_size` squared, and 2 of the feed-forward, `hidden_size`
times `feed_forward_size`. Where another model has more matrices its feed-forward is narrower; where it has none, as
Mamba2, its state is larger. Where a model has a window it is two chunks, as many keys as a token of the Reformer meets
in a round. Each model takes and gives what those of transformers do.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForMaskedLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.reformer.configuration_reformer import ReformerConfig as StockConfig
from transformers.models.reformer.modeling_reformer import ReformerModelWithLMHead as StockForCausalLM

from hf_reformer import ReformerConfig

from .shape import SEED, Shape


# Reformers


def own_model(
    shape: Shape, implementation: str, reversible: bool = True, layer: str = "lsh", seed: int | None = None
) -> nn.Module:
    """Ours, with the defaults that stock has, too; all its layers are of one kind."""
    config = ReformerConfig(reversible=reversible, **shape.reformer_settings(seed, layer))
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def stock_model(shape: Shape, layer: str = "lsh", seed: int | None = None) -> nn.Module:
    """The Reformer of transformers; not by the Auto classes, which give ours once hf_reformer is imported."""
    return StockForCausalLM(StockConfig(**shape.reformer_settings(seed, layer)))


class PackageModel(nn.Module):
    """The language model of `reformer-pytorch`, called as those of transformers are; it has no cache to fill."""

    def __init__(self, shape: Shape):
        super().__init__()
        from reformer_pytorch import ReformerLM

        self.model = ReformerLM(
            num_tokens=shape.vocab_size,
            dim=shape.hidden_size,
            depth=shape.num_layers,
            max_seq_len=shape.length,
            heads=shape.num_heads,
            dim_head=shape.hidden_size // shape.num_heads,
            bucket_size=shape.chunk_length,
            n_hashes=shape.rounds,
            ff_chunks=shape.length // shape.ff_chunk if shape.ff_chunk else 1,
            ff_mult=shape.feed_forward_size // shape.hidden_size,
            ff_activation=nn.ReLU,
            causal=True,
            full_attn_thres=0,
            axial_position_emb=True,
            axial_position_shape=(shape.length // shape.chunk_length, shape.chunk_length),
        )

    def forward(self, ids, labels=None, use_cache=False, logits_to_keep=0):
        logits, loss = self.model(ids), None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits[:, -logits_to_keep:])


# Others


def gated_width(shape: Any, more_matrices: int) -> int:
    """
    Width of a gated feed-forward, a multiple of 8.

    Args:
        shape: Anything with the sizes of `Shape`.
        more_matrices: How many more than 3 matrices of size `hidden_size` squared attention has.
    """
    width = (2 * shape.feed_forward_size - more_matrices * shape.hidden_size) / 3
    return max(8, 8 * round(width / 8))


def llama_config(shape: Any, length: int) -> LlamaConfig:
    """
    A Llama whose layers have as many weights as the Reformer's, for texts up to `length`.

    Args:
        shape: Anything with the sizes of `Shape`.
    """
    return LlamaConfig(
        attn_implementation="sdpa",
        hidden_size=shape.hidden_size,
        intermediate_size=gated_width(shape, more_matrices=1),
        max_position_embeddings=length,
        num_attention_heads=shape.num_heads,
        num_hidden_layers=shape.num_layers,
        num_key_value_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
    )


def llama_model(shape: Shape, checkpointed: bool = False) -> nn.Module:
    """The Llama of `llama_config`."""
    model = LlamaForCausalLM(llama_config(shape, shape.length))
    if checkpointed:
        # Its name has changed within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def mistral_model(shape: Shape) -> nn.Module:
    """A Llama with a window, by SDPA and a mask `[L, L]`."""
    return MistralForCausalLM(
        MistralConfig(
            attn_implementation="sdpa",
            hidden_size=shape.hidden_size,
            intermediate_size=gated_width(shape, more_matrices=1),
            max_position_embeddings=shape.length,
            num_attention_heads=shape.num_heads,
            num_hidden_layers=shape.num_layers,
            num_key_value_heads=shape.num_heads,
            sliding_window=shape.window,
            vocab_size=shape.vocab_size,
        )
    )


def longformer_model(shape: Shape) -> nn.Module:
    """
    An encoder: tokens see half a window on each side.

    It has no causal form. Its matrices for global attention, three more, are there, but nothing uses them.
    """
    return LongformerForMaskedLM(
        LongformerConfig(
            attention_probs_dropout_prob=0.0,
            attention_window=shape.window,
            hidden_dropout_prob=0.0,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.feed_forward_size - shape.hidden_size // 2,
            # Positions are counted on from the token of padding, 1.
            max_position_embeddings=shape.length + 2,
            num_attention_heads=shape.num_heads,
            num_hidden_layers=shape.num_layers,
            vocab_size=shape.vocab_size,
        )
    )


def minimax_model(shape: Shape) -> nn.Module:
    """
    Lightning attention in all layers, where the published model has one layer in eight of attention to everything.

    One expert that takes all tokens; by the implementation that was the faster of two on a CPU.
    """
    return MiniMaxForCausalLM(
        MiniMaxConfig(
            experts_implementation="eager",
            hidden_size=shape.hidden_size,
            intermediate_size=gated_width(shape, more_matrices=2),
            layer_types=["linear_attention"] * shape.num_layers,
            max_position_embeddings=shape.length,
            num_attention_heads=shape.num_heads,
            num_experts_per_tok=1,
            num_hidden_layers=shape.num_layers,
            num_key_value_heads=shape.num_heads,
            num_local_experts=1,
            vocab_size=shape.vocab_size,
        )
    )


def xlstm_model(shape: Shape) -> nn.Module:
    """Layers of mLSTM, by the chunks in plain PyTorch that transformers has; queries and keys are half as wide."""
    return xLSTMForCausalLM(
        xLSTMConfig(
            ffn_proj_factor=gated_width(shape, more_matrices=1) / shape.hidden_size,
            ffn_round_up_to_multiple_of=8,
            hidden_size=shape.hidden_size,
            mode="train",
            num_heads=shape.num_heads,
            num_hidden_layers=shape.num_layers,
            vocab_size=shape.vocab_size,
        )
    )


def mamba2_model(shape: Shape) -> nn.Module:
    """
    Without its kernels, which need a GPU: the scan in plain PyTorch that transformers has.

    There is no feed-forward. Chunks of 64 instead of 256, with which it took 1.6 times as long on a CPU.
    """
    spare = 2 * shape.feed_forward_size - 3 * shape.hidden_size
    return Mamba2ForCausalLM(
        Mamba2Config(
            chunk_size=64,
            expand=2,
            head_dim=shape.hidden_size // shape.num_heads,
            hidden_size=shape.hidden_size,
            n_groups=shape.num_heads,
            num_heads=2 * shape.num_heads,
            num_hidden_layers=shape.num_layers,
            state_size=max(1, spare // (2 * shape.num_heads)),
            vocab_size=shape.vocab_size,
        )
    )


# What is done with all of them


def make_ids(shape: Shape) -> torch.Tensor:
    """Random tokens, `[B, L]`."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, shape.vocab_size, (shape.batch_size, shape.length), generator=generator).to(shape.device)


def training_step(model: nn.Module, ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Gradients of the loss, and no step of an optimizer, which costs every contender the same; the loss."""
    model.zero_grad(set_to_none=True)
    with shape.autocast():
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Read a prompt: fill the cache and give the logits of the last token."""
    with shape.autocast():
        return model(ids, use_cache=True, logits_to_keep=1).logits
