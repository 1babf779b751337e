"""Where a row's real tokens are, and rows moved so that they start at the front."""

import torch


def first_real_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, bool, to the index of each row's first True, `[B]`; 0 in a row without any."""
    return attention_mask.int().argmax(dim=1)


def last_real_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, bool, to the index of each row's last True, `[B]`; 0 in a row without any."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask).amax(dim=1)


def shift_rows(tensor: torch.Tensor | None, shift: torch.Tensor, dim: int = 1) -> torch.Tensor | None:
    """
    Each row rotated along `dim`, so that what stood at `shift` stands at the front.

    Args:
        tensor: `[B, ...]` or `[1, ...]` (the same for all rows), or None.
        shift: `[B]`, integer; negative values undo the rotation by the positive ones.

    Returns:
        `[B, ...]`, or None for None.
    """
    if tensor is None:
        return None
    length = tensor.shape[dim]
    tensor = tensor.expand(len(shift), *tensor.shape[1:])
    source = (torch.arange(length, device=tensor.device) + shift[:, None]) % length
    view = [1] * tensor.ndim
    view[0], view[dim] = source.shape
    return tensor.gather(dim, source.view(view).expand(tensor.shape))
