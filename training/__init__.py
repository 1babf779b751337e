"""
What it takes to train a Reformer that learns: the recipe for new models, its optimizer, and the measure of a result.

`import hf_reformer` leaves this out; `ReformerTrainingArguments` is the only thing here that needs accelerate.
"""

from .arguments import ReformerTrainingArguments
from .bfloat16 import multiplies_in_bfloat16
from .compression import bits_per_byte, conditional_entropy, lzma_bits_per_byte, reference_figures
from .contribution import without_attention
from .muon import Muon, MuonWithAdamW
from .packing import DataCollatorForPacking
from .recipe import ModelRecipe, recipe_config


__all__ = [
    "DataCollatorForPacking",
    "ModelRecipe",
    "Muon",
    "MuonWithAdamW",
    "ReformerTrainingArguments",
    "bits_per_byte",
    "conditional_entropy",
    "lzma_bits_per_byte",
    "multiplies_in_bfloat16",
    "recipe_config",
    "reference_figures",
    "without_attention",
]
