"""Which characters of a text each token stands for: for bytes, which may be parts of a character, and for others."""

import codecs
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..tokenization.tokenization_reformer_byte import FIRST_BYTE_ID, ReformerByteTokenizer


REPLACEMENT = "\ufffd"
# Tokens before one that a decoder may look at.
CONTEXT = 4


@dataclass(frozen=True)
class TokenText:
    """
    A text and its tokens.

    Attributes:
        text: All of it.
        starts, ends: Of each token, the characters that it stands for. Tokens of one character share it.
    """

    text: str
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> "TokenText":
        """The text of these ids."""
        pieces = _bytes_as_pieces(ids, tokenizer) if isinstance(tokenizer, ReformerByteTokenizer) else None
        if pieces is None:
            pieces = _pieces(tokenizer, ids)
        starts, ends, text, begin = [], [], [], 0
        for piece, tokens in pieces:
            starts += [begin] * tokens
            begin += len(piece)
            ends += [begin] * tokens
            text.append(piece)
        return cls("".join(text), starts, ends)

    def __len__(self) -> int:
        return len(self.starts)

    def token_at(self, character: int) -> int:
        """The first token of the character at this place; of the nearest one where there is none."""
        last = max(0, bisect_right(self.starts, character) - 1)
        while last and self.starts[last - 1] == self.starts[last]:
            last -= 1
        return last

    def of_token(self, position: int) -> str:
        """The characters that a token stands for."""
        return self.text[self.starts[position] : self.ends[position]]


def whole_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], is_finished: bool) -> str:
    """The text of a continuation; while it grows, without a character that is not whole yet."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text if is_finished else text.rstrip(REPLACEMENT)


def _bytes_as_pieces(ids, tokenizer):
    """Each character with the number of its bytes; names of special tokens stand for themselves."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces, waiting = [], 0
    for token in ids:
        if FIRST_BYTE_ID <= token < FIRST_BYTE_ID + 256:
            waiting += 1
            text = decoder.decode(bytes([token - FIRST_BYTE_ID]))
            if text:
                # A byte that another character begins with has ended one that was not whole.
                begun = len(decoder.getstate()[0])
                pieces.append((text, waiting - begun))
                waiting = begun
            continue
        if waiting:
            pieces.append((decoder.decode(b"", final=True), waiting))
            waiting = 0
            decoder.reset()
        pieces.append((tokenizer.decode([token]), 1))
    if waiting:
        pieces.append((decoder.decode(b"", final=True), waiting))
    return pieces


def _pieces(tokenizer, ids):
    """Characters with the number of their tokens, by decoding each token behind those before it."""
    pieces, begin, waiting = [], 0, 0
    for end in range(1, len(ids) + 1):
        waiting += 1
        context = list(ids[max(0, begin - CONTEXT) : begin])
        before, text = tokenizer.decode(context), tokenizer.decode(context + list(ids[begin:end]))
        if text.endswith(REPLACEMENT) and end < len(ids) and waiting < CONTEXT:
            continue
        pieces.append((text[len(before) :], waiting))
        begin, waiting = end, 0
    return pieces
