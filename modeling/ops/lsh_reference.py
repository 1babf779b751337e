"""
The definition of LSH attention: a dense, slow and obvious oracle that every implementation is compared with.

All hashing rounds together are one softmax over the multiset of keys that a query meets (paper appendix A), so the
oracle counts how often each query meets each key and takes that softmax directly. It shares no code with the
implementations.
"""

from functools import partial

import torch


def lsh_attention_reference(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    attention_mask: torch.Tensor | None = None,
    circular_look_around: bool = True,
    attend_across_buckets: bool = True,
    allow_duplicate_attention: bool = True,
    padded_length: int | None = None,
    sliding_window: bool = False,
    value_shift: int = 0,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense LSH attention, O(L^2) memory. Arguments and result as in `lsh_operator.lsh_attention`; use float64."""
    batch, length, num_heads, head_size = query_key.shape
    if attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.bool)
    if documents is None:
        documents = torch.zeros(batch, length, dtype=torch.long)
    if padded_length is None:
        padded_length = (length + chunk_length - 1) // chunk_length * chunk_length
    meetings = _list_sliding_meetings if sliding_window else partial(_list_meetings, circular=circular_look_around)
    counts = torch.zeros(batch, num_heads, length, length, dtype=query_key.dtype)
    for b in range(batch):
        for h in range(num_heads):
            row = buckets[b, h].tolist(), attention_mask[b].tolist(), documents[b].tolist()
            chunks = _list_chunks(*row, padded_length, chunk_length)
            for round_index, i, key_round, j in meetings(chunks, num_chunks_before, num_chunks_after, length):
                same_bucket = key_round == round_index and buckets[b, h, key_round, i] == buckets[b, h, key_round, j]
                if same_bucket or attend_across_buckets:
                    counts[b, h, i, j] += 1

    positions = torch.arange(length)
    is_self = positions[:, None] == positions[None, :]
    allowed = attention_mask[:, None, None] & ~is_self & (documents[:, :, None] == documents[:, None])[:, None]
    if causal:
        allowed = allowed & (positions[:, None] >= positions[None, :])
    if not allow_duplicate_attention:
        counts = counts.clamp(max=1)
    others = counts * allowed
    # A token attends to itself only when nothing else is left.
    is_alone = others.sum(-1, keepdim=True) == 0
    weight = torch.where(is_alone, (is_self & is_alone).to(counts.dtype), others)

    query = query_key.transpose(1, 2)
    key = query * (query.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() / head_size**0.5
    scores = torch.where(is_self, torch.zeros((), dtype=query.dtype), query @ key.transpose(-1, -2))
    scores = scores.masked_fill(weight == 0, -torch.inf)
    probabilities = weight * torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if value_shift:
        probabilities = probabilities.masked_fill(is_self, 0) * attention_mask[:, None, :, None]
        value = _values_of_successors(value, attention_mask.tolist(), documents.tolist())
    return (probabilities @ value.transpose(1, 2)).transpose(1, 2)


def _values_of_successors(value, is_real, documents):
    """At each place the value of the next real token of the document, zeros behind its last."""
    rows = []
    for row, row_is_real, row_documents in zip(value, is_real, documents, strict=True):
        values, following = [], {}
        for i in reversed(range(len(row))):
            document = row_documents[i]
            values.insert(0, following.get(document, 0 * row[0]))
            following[document] = row[i] if row_is_real[i] else values[0]
        rows.append(torch.stack(values))
    return torch.stack(rows)


def _list_chunks(buckets, is_real, documents, padded_length, chunk_length):
    """
    All rounds' chunks in one list: pairs of the round and the positions in the chunk. Masked tokens come last in their
    document, and padding last of all.
    """
    length = len(is_real)
    chunks = []
    for round_index, round_buckets in enumerate(buckets):
        places = [
            (documents[i], not is_real[i], bucket if is_real[i] else 0, i) for i, bucket in enumerate(round_buckets)
        ]
        order = [i for *_, i in sorted(places)] + list(range(length, padded_length))
        for start in range(0, padded_length, chunk_length):
            chunks.append((round_index, order[start : start + chunk_length]))
    return chunks


def _list_meetings(chunks, num_before, num_after, length, circular):
    """Each time a query meets a key: the query's round and position, the key's round and position."""
    for c, (round_index, queries) in enumerate(chunks):
        for offset in range(-num_before, num_after + 1):
            neighbour = c + offset
            if circular:
                # Stock Reformer's circle: further round than once is the chunk itself.
                neighbour = neighbour % len(chunks) if abs(offset) < len(chunks) else c
            if not 0 <= neighbour < len(chunks):
                continue
            key_round, keys = chunks[neighbour]
            if circular or key_round == round_index:
                yield from ((round_index, i, key_round, j) for i in queries for j in keys if max(i, j) < length)


def _list_sliding_meetings(chunks, num_before, num_after, length):
    """The same where a query meets what stands near it in the order, whatever chunks it is cut into."""
    chunk_length = len(chunks[0][1])
    for round_index in {round_index for round_index, _ in chunks}:
        order = [i for chunk_round, positions in chunks if chunk_round == round_index for i in positions]
        for place, i in enumerate(order):
            nearest = order[max(0, place - num_before * chunk_length) : place + num_after * chunk_length + 1]
            yield from ((round_index, i, round_index, j) for j in nearest if max(i, j) < length)
