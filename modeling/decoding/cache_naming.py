"""What transformers calls a cache: `past_key_values` until 5.23, `cache` from 5.24 on. Here both names are taken."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast


CACHE_NAMES = ("cache", "past_key_values")

# The one that the installed transformers passes to a model, reads in its output and takes in `generate`.
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def with_cache_named(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Keyword arguments in which a cache, given by either name, has the name `name`.

    Raises:
        ValueError: Two caches are given.
    """
    given = [arguments[one] for one in CACHE_NAMES if arguments.get(one) is not None]
    if len(given) > 1:
        raise ValueError("`past_key_values` is the old name of `cache`, and both are given. Give one of the two.")
    others = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    return others | {name: given[0]} if given else others


def takes_cache_by_either_name(forward: Callable) -> Callable:
    """A method with a keyword argument `cache` that may also be called `past_key_values`."""

    @wraps(forward)
    def by_either_name(self, *args: Any, **kwargs: Any):
        if "past_key_values" in kwargs:
            kwargs = with_cache_named("cache", kwargs)
        return forward(self, *args, **kwargs)

    return by_either_name
