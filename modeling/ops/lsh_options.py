"""What LSH attention looks at: the options that the operator checks and every implementation follows."""

from dataclasses import dataclass


# trf-ignore: TRF031 these options go in, they are no output
@dataclass(frozen=True)
class LSHOptions:
    """
    Options of LSH attention.

    Attributes:
        chunk_length: Tokens per chunk. Any sequence length works; the last chunk is filled up with masked tokens.
        num_chunks_before, num_chunks_after: Neighbouring chunks looked at.
        causal: Attend to earlier positions only.
        circular_look_around: The first chunk's predecessor is the last one, with all rounds on one circle.
        attend_across_buckets: Attend to other buckets within reach, too.
        allow_duplicate_attention: Count a key once for each round that finds it, rather than once.
        sliding_window: Look at as many tokens before and after the query, in the sorted order, as the chunks looked at
            hold, wherever in its chunk the query stands. Not on the circle.
        value_shift: With 1 a key carries the value of the next real token instead of its own. A masked token reads
            nothing, zeros, and neither does one that sees nothing but itself. So a token reads what followed the
            tokens like it, and as it never sees itself beside others, nothing after it. Needs `causal`.
        dropout_p: Dropout on the attention probabilities.

    Raises:
        ValueError: A value out of range.
    """

    chunk_length: int
    num_chunks_before: int = 1
    num_chunks_after: int = 0
    causal: bool = False
    circular_look_around: bool = True
    attend_across_buckets: bool = True
    allow_duplicate_attention: bool = True
    sliding_window: bool = False
    value_shift: int = 0
    dropout_p: float = 0.0

    def __post_init__(self):
        if self.chunk_length < 1 or min(self.num_chunks_before, self.num_chunks_after) < 0:
            raise ValueError(
                f"`chunk_length` must be at least 1 and the numbers of neighbouring chunks at least 0, but got "
                f"{self.chunk_length}, {self.num_chunks_before} before and {self.num_chunks_after} after."
            )
        if self.sliding_window and self.circular_look_around:
            raise ValueError("`sliding_window=True` needs `circular_look_around=False`: windows do not cross a seam.")
        if self.value_shift not in (0, 1):
            raise ValueError(f"`value_shift` must be 0 or 1, but got {self.value_shift}.")
        if self.value_shift and not self.causal:
            raise ValueError("`value_shift=1` needs `causal=True`: elsewhere a key can carry the query's own value.")
        if not 0 <= self.dropout_p <= 1:
            raise ValueError(f"`dropout_p` is a probability and must be between 0 and 1, but got {self.dropout_p}.")

    @property
    def around(self) -> tuple[int, int]:
        """Chunks looked at before and after a chunk's own."""
        return self.num_chunks_before, self.num_chunks_after
