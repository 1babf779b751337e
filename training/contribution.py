"""What a kind of layer contributes: the trained model with its attention switched off."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def without_attention(model: PreTrainedModel, kind: str = "lsh") -> Iterator[list[int]]:
    """
    Within this context layers of a kind attend to nothing: their attention gives zeros, all else stays.

    What a model loses by it is what it has learned to rely on, which is less than what a model trained without these
    layers would lack.

    Args:
        model: A Reformer, with any head, wrapped or not.
        kind: "lsh", "local" or "full".

    Yields:
        The layers that were switched off, by number.

    Raises:
        ValueError: the model has no such layer.

    Example:

    >>> from hf_reformer import ReformerForCausalLM
    >>> from hf_reformer.training import recipe_config, without_attention
    >>> model = ReformerForCausalLM(recipe_config(1024, hidden_size=64)).eval()
    >>> with without_attention(model) as switched_off:
    ...     print(switched_off)
    [1, 3]
    """
    kinds = list(model.config.attn_layers)
    switched_off = [index for index, own_kind in enumerate(kinds) if own_kind == kind]
    if not switched_off:
        raise ValueError(f"The model has no layer of kind {kind!r}; it has {kinds}.")
    with ExitStack() as stack:
        for module in model.modules():
            attention = getattr(module, "self_attention", None)
            if isinstance(attention, nn.Module) and attention.layer_idx in switched_off:
                stack.enter_context(attention.register_forward_hook(_nothing))
        yield switched_off


def _nothing(module, arguments, result):
    output, *others = result
    return output.new_zeros(output.shape), *others
