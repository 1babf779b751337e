"""Small models for the experiments on text."""

from PIL import Image

from scripts.experiments import text_models


SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "feed_forward_size": 32,
    # Attention that is not the same everywhere.
    "initializer_range": 0.3,
}


def small(layers=("local", "lsh"), **changes):
    return lambda length: text_models.reformer(length, list(layers), **SMALL | changes)


def has_picture(path):
    """Whether there is one of a sensible size."""
    with Image.open(path) as picture:
        return picture.width > 500
