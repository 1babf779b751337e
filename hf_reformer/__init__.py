"""
The Reformer for Hugging Face Transformers.

Importing this package registers its classes, so `AutoModelForCausalLM.from_pretrained` and the other Auto classes use
them for every checkpoint of `model_type` "reformer", and so does whoever looks up in `transformers` the class that a
checkpoint names. `python -m hf_reformer` runs a program that does not import it.
"""

import sys
from importlib import import_module

import transformers
from transformers import AutoConfig, AutoTokenizer

from .configuration.configuration_reformer import ReformerConfig
from .modeling.decoding.decoding_cache import ReformerCache
from .modeling.decoding.seq2seq_cache import ReformerSeq2SeqCache
from .modeling.modeling_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
    ReformerModelWithLMHead,
    ReformerPreTrainedModel,
)
from .modeling.ops.local_operator import local_attention
from .modeling.ops.lsh_hashing import draw_rotations, hash_vectors
from .modeling.ops.lsh_operator import lsh_attention
from .modeling.remote_code import AUTO_CLASSES, export
from .modeling.self_check import check_installed_releases
from .modeling.seq2seq import ReformerForConditionalGeneration
from .tokenization.tokenization_reformer_byte import ReformerByteTokenizer


__version__ = "0.1.0"

check_installed_releases()

AutoConfig.register("reformer", ReformerConfig, exist_ok=True)
AutoTokenizer.register(ReformerConfig, tokenizer_class=ReformerByteTokenizer, exist_ok=True)
for auto_class, model_class in AUTO_CLASSES.items():
    getattr(transformers, auto_class).register(ReformerConfig, globals()[model_class], exist_ok=True)
del auto_class, model_class

__all__ = [
    "ReformerByteTokenizer",
    "ReformerCache",
    "ReformerConfig",
    "ReformerForCausalLM",
    "ReformerForConditionalGeneration",
    "ReformerForMaskedLM",
    "ReformerForMultipleChoice",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerForTokenClassification",
    "ReformerModel",
    "ReformerModelWithLMHead",
    "ReformerPreTrainedModel",
    "ReformerSeq2SeqCache",
    "convert_dense",
    "convert_reformer_pytorch",
    "convert_trax",
    "draw_rotations",
    "estimate_memory",
    "export",
    "hash_vectors",
    "local_attention",
    "lsh_attention",
]


# Loaded when they are asked for: the estimate stands on much of torch that is private, conversions are for few.
LOADED_LATER = {
    "convert_dense": "conversion.dense_weights",
    "convert_reformer_pytorch": "conversion.reformer_pytorch_weights",
    "convert_trax": "conversion.trax_weights",
    "estimate_memory": "memory.memory_estimate",
}


def __getattr__(name: str):
    if name not in LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".modeling.{LOADED_LATER[name]}", __name__), name)


# TRL, pipelines and `transformers serve` look up here what a checkpoint's `architectures` name. Stock's classes stay
# in `transformers.models.reformer`. The first import of transformers' processors makes a second module `transformers`,
# and whoever imported it before keeps the first.
copies = [getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values())]
for module in (sys.modules["transformers"], *copies):
    if getattr(module, "__name__", None) == "transformers":
        for name in __all__:
            if name.startswith("Reformer"):
                setattr(module, name, globals()[name])
del copies, module, name
