"""What the attention kernels are compiled for. It can be written down without Triton."""

from dataclasses import dataclass


# trf-ignore: TRF031 these options go in, they are no output
@dataclass(frozen=True)
class KernelOptions:
    """
    What a kernel is compiled for.

    Attributes:
        chunk_length, head_size: Sizes C and D, powers of two.
        num_chunks_before, num_chunks_after: Neighbouring chunks looked at.
        causal, circular_look_around, sliding_window: As in `LSHOptions`.
        attend_across_buckets: The same, but False for documents, too: no two have a bucket in common.
        shared_qk, own_value: Keys are queries at unit length; a token that sees nothing but itself gets its value.
        is_sorted: The order of the tokens is given; without it, it is that of the sequence.
        has_mask: There is a mask of keys.
        is_padded: P > L.
        widen: Multiply in float32. Triton's interpreter multiplies the raw bits of bfloat16.
        block: Rows that are worked on at a time; it divides C.
    """

    chunk_length: int
    head_size: int
    num_chunks_before: int
    num_chunks_after: int
    causal: bool
    circular_look_around: bool
    sliding_window: bool
    attend_across_buckets: bool
    shared_qk: bool
    own_value: bool
    is_sorted: bool
    has_mask: bool
    is_padded: bool
    widen: bool = False
    block: int = 0
