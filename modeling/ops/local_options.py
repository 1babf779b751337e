"""What local attention looks at: the options that every implementation follows."""

from dataclasses import dataclass


# trf-ignore: TRF031 these options go in, they are no output
@dataclass(frozen=True)
class LocalOptions:
    """
    Options of local attention.

    Attributes:
        chunk_length: Tokens per chunk.
        num_chunks_before, num_chunks_after: Neighbouring chunks looked at.
        padded_length: Tokens in all chunks, padding included; a multiple of `chunk_length`.
        causal: Attend to earlier positions only.
        circular_look_around: The first chunk's predecessor is the last one.
        dropout_p: Dropout on the attention probabilities.
    """

    chunk_length: int
    num_chunks_before: int
    num_chunks_after: int
    padded_length: int
    causal: bool
    circular_look_around: bool
    dropout_p: float = 0.0

    @property
    def around(self) -> tuple[int, int]:
        """Chunks looked at before and after a chunk's own."""
        return self.num_chunks_before, self.num_chunks_after
