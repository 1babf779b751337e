"""
Transformers' common suites on nine small models: {causal, both ways, encoder and decoder} x {local, LSH, both kinds of
layers}.

A module for pytest, which contract.py runs with the suites as package `tests` in the path. Nothing that they test is
switched off. Where one finds what to do by the name of a class, the name is made known to it; where it speaks of
something that a Reformer has not, the hook that it offers to authors of models says what there is instead.
"""

import json
import os
import tempfile
import unittest
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, GenerationMixin, set_seed
from transformers.models.auto import modeling_auto

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerCache,
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
    ReformerSeq2SeqCache,
)
from hf_reformer.modeling.layers.encoder import ReformerLayer
from hf_reformer.modeling.modeling_reformer import ReformerPreTrainedModel


# The suite of the pipelines looks for its checkpoints here, and reads the list of them when it is imported.
CHECKPOINTS = tempfile.TemporaryDirectory(prefix="contract_checkpoints_")
OF_TASK = {
    "feature-extraction": ReformerModel,
    "fill-mask": ReformerForMaskedLM,
    "text-classification": ReformerForSequenceClassification,
    "text-generation": ReformerForCausalLM,
    "token-classification": ReformerForTokenClassification,
    "zero-shot": ReformerForSequenceClassification,
}
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = CHECKPOINTS.name
(Path(CHECKPOINTS.name) / "reports").mkdir()
(Path(CHECKPOINTS.name) / "reports" / "tiny_model_summary.json").write_text(
    json.dumps(
        {
            model_class.__name__: {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
            for model_class in OF_TASK.values()
        }
    )
)

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import (  # noqa: E402
    ModelTesterMixin,
    global_rng,
    ids_tensor,
    random_attention_mask,
)
from tests.test_pipeline_mixin import PipelineTesterMixin  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402


class GenerativeModel(ReformerForCausalLM, GenerationMixin):
    """The causal model under a name without "reformer", by which the generation suite knows what to leave out."""

    @wraps(ReformerForCausalLM.forward)
    def forward(self, *args, use_cache=True, **kwargs):
        """Make a cache unless told otherwise: the suite continues from the one that a plain call returns."""
        return super().forward(*args, use_cache=use_cache, **kwargs)


class GenerativeSeq2SeqModel(ReformerForConditionalGeneration, GenerationMixin):
    """The same of an encoder with a decoder."""

    def __init__(self, config):
        # The suite says of every config that it is a decoder's, which two stacks refuse.
        config.is_decoder = False
        super().__init__(config)

    @wraps(ReformerForConditionalGeneration.forward)
    def forward(self, *args, use_cache=True, **kwargs):
        """As `GenerativeModel.forward`."""
        return super().forward(*args, use_cache=use_cache, **kwargs)


class TrainedSeq2SeqModel(ReformerForConditionalGeneration):
    """The same without generation, to which the suite of training gives a prompt: here it would be a source."""

    @property
    def generate(self):
        """There is none."""
        raise AttributeError


# Labels are made by the names of classes, whatever the type of model beside them.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES |= {
    "contract, causal": ReformerForCausalLM.__name__,
    "contract, generative": GenerativeModel.__name__,
}
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES |= {
    "contract, tokens": ReformerForTokenClassification.__name__
}
modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES |= {
    "contract, seq2seq": ReformerForConditionalGeneration.__name__,
    "contract, generative seq2seq": GenerativeSeq2SeqModel.__name__,
}
SHARED_CLASSES = (
    ReformerModel,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerForQuestionAnswering,
)


class ReformerModelTester:
    """What the suites ask of a model: its sizes, its config, inputs for it."""

    batch_size, seq_length, is_training, num_labels = 5, 32, True, 2
    vocab_size, hidden_size, num_attention_heads, num_hidden_layers = 32, 32, 2, 2
    # Attention maps are those of dense attention: every query, every key.
    key_length = encoder_seq_length = seq_length

    def __init__(self, attn_layers: list[str], is_decoder: bool):
        self.attn_layers, self.is_decoder = attn_layers, is_decoder
        self.causal_lm_class = ReformerForCausalLM if is_decoder else ReformerForMaskedLM
        self.dropout, self.reversible, self.windows, self.rotary = 0.1, True, False, False

    def get_config(self, **changes) -> ReformerConfig:
        """A config of a few thousand parameters, whose chunks are short beside the inputs."""
        chunks_after = 0 if self.is_decoder else 1
        settings = {
            "attention_head_size": 16,
            "attn_layers": self.attn_layers,
            "attend_across_buckets": not self.windows,
            "axial_pos_embds_dim": [16, 16],
            "axial_pos_shape": [16, 32],
            "bos_token_id": 1,
            "circular_look_around": not self.windows,
            "eos_token_id": 2,
            "feed_forward_size": 32,
            "hash_seed": 0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": self.dropout,
            "hidden_size": self.hidden_size,
            "is_decoder": self.is_decoder,
            "local_attention_probs_dropout_prob": self.dropout,
            "local_attn_chunk_length": 4,
            "local_num_chunks_after": chunks_after,
            "lsh_rotary": self.rotary,
            "lsh_attention_probs_dropout_prob": self.dropout,
            "lsh_attn_chunk_length": 4,
            "lsh_num_chunks_after": chunks_after,
            "lsh_sliding_window": self.windows,
            "max_position_embeddings": 512,
            "num_attention_heads": self.num_attention_heads,
            "num_buckets": 4,
            "num_hashes": 2,
            "pad_token_id": 0,
            "position_embedding_type": "rotary" if self.rotary else None,
            "reversible": self.reversible,
            "vocab_size": self.vocab_size,
        }
        return ReformerConfig(**(settings | changes))

    def prepare_config_and_inputs_for_common(self) -> tuple[ReformerConfig, dict[str, torch.Tensor]]:
        """A config, and ids with a mask."""
        shape = [self.batch_size, self.seq_length]
        mask = random_attention_mask(shape)
        return self.get_config(), {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": mask}


class ConfigTesterMixin:
    """The suite of configs, as one test."""

    def test_config(self):
        """Saved, loaded, changed."""
        ConfigTester(self, config_class=ReformerConfig, hidden_size=256).run_common_tests()


class CommonSuites(ModelTesterMixin, TrainingTesterMixin, ConfigTesterMixin):
    """For every model."""

    attn_layers = None
    is_decoder = False
    model_tester = None
    all_model_classes = (*SHARED_CLASSES, ReformerForMaskedLM)

    def setUp(self):
        """Start every test from the same numbers."""
        global_rng.seed(0)
        set_seed(0)
        self.model_tester = self.make_tester()
        # The suite takes any config that could have rotary positions for one that has.
        self.model_tester.rotary = "_rope_" in self._testMethodName

    def make_tester(self) -> ReformerModelTester:
        """Of the models of these suites."""
        return ReformerModelTester(self.attn_layers, self.is_decoder)

    def test_model_rope_scaling_from_config_1_dynamic(self):
        """Frequencies that change with the length of the input are refused: cached keys are turned already."""
        with self.assertRaisesRegex(StrictDataclassError, "must have a `rope_type` of"):
            self.model_tester.get_config(rope_parameters={"rope_type": "dynamic", "factor": 10.0})

    def test_training_overfit(self):
        """Without dropout, and with windows: then a text in a cache is read as it was in training."""
        self.model_tester.dropout = 0.0
        self.model_tester.windows = self.is_decoder
        super().test_training_overfit()

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        """Of layers that are not reversible; the others compute again by themselves, whatever the mode."""
        self.model_tester.reversible = False
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_sdpa_can_dispatch_non_composite_models(self):
        """A choice is kept; without one the config names none, because each call then takes the fastest for it."""
        for model_class in self.all_model_classes:
            with tempfile.TemporaryDirectory() as folder:
                model_class(self.model_tester.get_config()).save_pretrained(folder)
                for choice in (None, "sdpa", "eager"):
                    model = model_class.from_pretrained(folder, attn_implementation=choice)
                    self.assertEqual(model.config._attn_implementation, choice)

    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self):
        """Attention maps asked of "sdpa", which keeps none, are refused."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            model.set_attn_implementation("sdpa")
            with self.assertRaisesRegex(ValueError, "use 'eager' for attention maps"):
                model(**inputs, output_attentions=True)

    def test_can_capture_specific_layers_hidden_states(self):
        """Layers give what is asked for themselves, so the class names nothing that hooks could record."""
        with patch.object(ReformerPreTrainedModel, "_can_record_outputs", {"hidden_states": ReformerLayer}):
            super().test_can_capture_specific_layers_hidden_states()


class GenerationSuites(CommonSuites, GenerationTesterMixin):
    """For what generates."""

    def _should_skip(self, model_class, generate=False, **kwargs):
        if generate:
            self.skipTest("A cache cannot be exported.")
        return super()._should_skip(model_class, generate=generate, **kwargs)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        if self.is_encoder_decoder and not isinstance(past_key_values, ReformerCache):
            self.assertIsInstance(past_key_values, (ReformerSeq2SeqCache, DynamicCache))
            # Keys and values of the source are like other models'; the cache of the target comes here again.
            return super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length, config)
        # Layers of the cache hold different things; what they hold is tested in tests/test_decoding_cache.py.
        self.assertIsInstance(past_key_values, ReformerCache)
        self.assertEqual(len(past_key_values), config.num_hidden_layers)
        self.assertEqual(past_key_values.get_seq_length(), seq_length)


class CausalSuites(GenerationSuites):
    """For causal models."""

    is_decoder = True
    all_model_classes = (*SHARED_CLASSES, ReformerForCausalLM)
    all_generative_model_classes = (GenerativeModel,)

    def attention_mask_padding_matches_padding_free_with_position_ids(self, attn_implementation, fa_kwargs=False):
        """With windows, as chunks on a circle depend on the length of a row; the borders of documents by name, too."""
        self.model_tester.windows = True
        # The suite takes the flag for a sign that a model knows packed rows.
        with patch.object(GenerativeModel, "_supports_attention_backend", True):
            for borders in (fa_kwargs, True):
                super().attention_mask_padding_matches_padding_free_with_position_ids(attn_implementation, borders)


class Seq2SeqModelTester(ReformerModelTester):
    """The same of an encoder with a decoder. Some suites give the mask of the one side to the other."""

    decoder_seq_length = decoder_key_length = ReformerModelTester.seq_length

    def __init__(self, attn_layers: list[str]):
        super().__init__(attn_layers, is_decoder=False)
        self.causal_lm_class = TrainedSeq2SeqModel

    def get_config(self, **changes) -> ReformerConfig:
        """As of one stack."""
        return super().get_config(**({"is_encoder_decoder": True} | changes))

    def prepare_config_and_inputs_for_common(self) -> tuple[ReformerConfig, dict[str, torch.Tensor]]:
        """A config, and two texts with masks."""
        config, inputs = super().prepare_config_and_inputs_for_common()
        _, target = super().prepare_config_and_inputs_for_common()
        return config, inputs | {f"decoder_{name}": tensor for name, tensor in target.items()}


class Seq2SeqSuites(GenerationSuites):
    """For an encoder with a decoder."""

    is_encoder_decoder = True
    all_model_classes = (ReformerForConditionalGeneration,)
    all_generative_model_classes = (GenerativeSeq2SeqModel,)

    def make_tester(self) -> ReformerModelTester:
        """Of two stacks."""
        return Seq2SeqModelTester(self.attn_layers)


def _suites_of(base: type, attn_layers: list[str]) -> type:
    return type(base.__name__, (base, unittest.TestCase), {"__module__": __name__, "attn_layers": attn_layers})


both_ways_local = _suites_of(CommonSuites, ["local", "local"])
both_ways_lsh = _suites_of(CommonSuites, ["lsh", "lsh"])
both_ways_mixed = _suites_of(CommonSuites, ["local", "lsh"])
causal_local = _suites_of(CausalSuites, ["local", "local"])
causal_lsh = _suites_of(CausalSuites, ["lsh", "lsh"])
causal_mixed = _suites_of(CausalSuites, ["local", "lsh"])
seq2seq_local = _suites_of(Seq2SeqSuites, ["local", "local"])
seq2seq_lsh = _suites_of(Seq2SeqSuites, ["lsh", "lsh"])
seq2seq_mixed = _suites_of(Seq2SeqSuites, ["local", "lsh"])


class pipelines(PipelineTesterMixin, unittest.TestCase):
    """Every pipeline for text, on a model of both kinds of layers with the package's byte tokenizer."""

    pipeline_model_mapping = OF_TASK

    @classmethod
    def setUpClass(cls):
        """Save a checkpoint for each class."""
        names = {f"{name}_token": f"<{name}>" for name in ("bos", "mask", "cls", "sep", "unk")}
        tokenizer = ReformerByteTokenizer(**names, model_max_length=512)
        for model_class in set(OF_TASK.values()):
            config = ReformerModelTester(["local", "lsh"], model_class is ReformerForCausalLM).get_config(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                num_buckets=None,
                vocab_size=len(tokenizer),
            )
            torch.manual_seed(0)
            folder = Path(CHECKPOINTS.name) / config.model_type / model_class.__name__
            model_class(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def tearDownModule():
    """Remove the checkpoints."""
    CHECKPOINTS.cleanup()
