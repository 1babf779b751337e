"""Tokenizers."""

from .tokenization_reformer_byte import ReformerByteTokenizer


__all__ = ["ReformerByteTokenizer"]
