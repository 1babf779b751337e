"""Word and position embeddings: what the first layer reads."""

from typing import cast

import torch
from torch import nn

from .hooks import works_unseen
from .position_embeddings import AxialPositionEmbeddings, PositionEmbeddings


POSITION_TABLES = {"axial": AxialPositionEmbeddings, "learned": PositionEmbeddings}


class ReformerEmbeddings(nn.Module):
    """Word embeddings plus position embeddings, where positions have a table."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        # CODEPATH: every published checkpoint is axial; the others are a user's choice.
        kind = POSITION_TABLES.get(config.position_kind)
        self.position_embeddings = None if kind is None else kind(config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        longest: int | None = None,
    ) -> torch.Tensor:
        """
        `[B, L]` ids or `[B, L, hidden_size]` vectors, to `[B, L, hidden_size]`.

        Args:
            longest: Tokens of the longest document, where rows hold several; L by default.
        """
        given = cast(torch.Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        batch, length = given.shape[:2]
        self.check_length(length if longest is None else longest)
        if inputs_embeds is None:
            inputs_embeds = _look_up(self.word_embeddings, given, "input_ids", self.config.vocab_size)
        if self.position_embeddings is None:
            return self.dropout(inputs_embeds)
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)
        position_ids = position_ids.expand(batch, length)
        positions = _look_up(self.position_embeddings, position_ids, "position_ids", self.config.max_sequence_length)
        return self.dropout(inputs_embeds) + positions

    def makes_own_memory(self) -> bool:
        """Whether nobody else has what `forward` makes of ids."""
        return type(self.word_embeddings) is nn.Embedding and works_unseen(self)

    def check_length(self, length: int):
        """ValueError unless there are positions for `length` tokens."""
        longest = self.config.max_sequence_length
        if longest is not None and length > longest:
            raise ValueError(
                f"The input has {length} tokens, the position embeddings reach {longest}. Shorten the input, or load "
                "the model with a larger `axial_pos_shape` (or `max_position_embeddings`)."
            )


def _look_up(table: nn.Module, index: torch.Tensor, name: str, size: int) -> torch.Tensor:
    try:
        return table(index)
    except IndexError as error:
        raise ValueError(
            f"`{name}` holds values from {index.min()} to {index.max()}, but must lie between 0 and {size - 1}."
            + (" Use the model's own tokenizer, or `resize_token_embeddings`." if name == "input_ids" else "")
        ) from error
