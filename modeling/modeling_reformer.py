# Copyright 2026 The hf_reformer authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The Reformer's models and heads for transformers. Shapes: B batch, L length, H heads, V vocabulary."""

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging

from ..configuration.configuration_reformer import ReformerConfig
from .argument_checks import (
    check_answer,
    check_chances,
    check_inputs,
    check_is_one_stack,
    check_labels,
    check_num_hashes,
    check_one_document_per_row,
    given_input,
)
from .decoding.cache_naming import CACHE_NAME, CACHE_NAMES, takes_cache_by_either_name
from .decoding.decoding_cache import ReformerCache
from .decoding.generation import CachedGenerationMixin, cache_of_call
from .layers.embeddings import ReformerEmbeddings
from .layers.encoder import ReformerEncoder, run_without_checkpoint
from .layers.full_attention import full_attention_mask
from .layers.position_embeddings import AxialTables
from .layers.source import check_source
from .lm_head import LMHeadMixin, ReformerOnlyLMHead, untie_embeddings
from .ops.chunking import circle_length_of
from .ops.implementations import check_requested
from .ops.padding import pool
from .ops.row_layout import into_rows
from .packed_rows import arrange_rows, documents_of_call, labels_of_call
from .weights_loading import CheckpointMixin


logger = logging.get_logger(__name__)


@auto_docstring(custom_intro="Weights, loading and saving shared by all Reformer models.")
class ReformerPreTrainedModel(CheckpointMixin, PreTrainedModel):
    config: ReformerConfig
    base_model_prefix = "reformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ReformerLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AxialTables):
            for table in module:
                init.normal_(table, std=self.config.axial_norm_std)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False):
        # None stays: then every call takes the fastest implementation that can do what it asks.
        # CODEPATH: no published checkpoint has full layers only; those take what transformers has for dense attention.
        if set(self.config.all_layers) == {"full"} and requested_attention not in (None, "triton"):
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        check_requested(requested_attention)
        return requested_attention

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        # CODEPATH: published checkpoints are reversible, which already recomputes every layer; `reversible=False` is a
        # user's choice.
        if enable and self.config.reversible:
            logger.warning_once(
                "Reversible layers already recompute their activations: gradient checkpointing changes nothing."
            )
            gradient_checkpointing_func = run_without_checkpoint
        super()._set_gradient_checkpointing(
            enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **kwargs
        )


def _with_direction(config: ReformerConfig, is_decoder: bool) -> ReformerConfig:
    """`config`, or a copy that says whether attention is causal, for the classes that decide it."""
    if config.is_decoder == is_decoder:
        return config
    config = copy.deepcopy(config)
    config.is_decoder = is_decoder
    return config


@auto_docstring(
    custom_intro="The Reformer without a head: the residual streams of the last layer, combined and normalised."
)
class ReformerModel(ReformerPreTrainedModel):
    stack_class = ReformerEncoder

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        check_is_one_stack(config)
        # Settings may have been assigned one by one since the config was made.
        config.validate()
        untie_embeddings(config)
        self.embeddings = ReformerEmbeddings(config)
        self.encoder = self.stack_class(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.word_embeddings = value

    @takes_cache_by_either_name
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_hashes: int | None = None,
        cache: ReformerCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        cache (`ReformerCache`, *optional*):
            What is known of the text so far; the call continues it. Also taken as `past_key_values`.
        use_cache (`bool`, *optional*):
            Make a cache and return it. Not in training, which needs none.
        """
        last_hidden_state, hidden_states, maps, cache = self._read(
            input_ids, attention_mask, position_ids, inputs_embeds, num_hashes, cache, use_cache, **kwargs
        )
        attentions = None if maps is None else tuple(of_layer[0] for of_layer in maps)
        return BaseModelOutputWithPast(
            last_hidden_state, hidden_states=hidden_states, attentions=attentions, **{CACHE_NAME: cache}
        )

    def _read(
        self,
        input_ids,
        attention_mask,
        position_ids,
        inputs_embeds,
        num_hashes,
        cache,
        use_cache,
        source=None,
        **kwargs,
    ):
        """The last hidden state, the hidden states, the maps of each layer's halves, and the cache."""
        wants_maps = bool(kwargs.get("output_attentions", self.config.output_attentions))
        cache = cache_of_call(self, cache, use_cache, wants_maps)
        past_length = 0 if cache is None else cache.get_seq_length()
        check_inputs(
            self.config.hidden_size, input_ids, inputs_embeds, attention_mask, position_ids, past_length=past_length
        )
        check_num_hashes(num_hashes)
        if cache is not None:
            cache.check_mask(attention_mask)
        given, cached_length = given_input(input_ids, inputs_embeds), None if cache is None else past_length
        rows = arrange_rows(self.config, given, attention_mask, position_ids, kwargs, cached_length)
        check_source(source, given, rows.documents)
        input_ids, inputs_embeds = (into_rows(rows.layout, given) for given in (input_ids, inputs_embeds))
        step, cached, position_ids = None, None, rows.position_ids
        if cache is not None:
            step = cache.begin(given_input(input_ids, inputs_embeds), rows.attention_mask, rows.layout)
            cached = cache.at(step)
            self.embeddings.check_length(step.longest)
            position_ids = step.positions if position_ids is None and past_length else position_ids
        hidden_states = self.embeddings(input_ids, position_ids, inputs_embeds, rows.longest)
        full_mask = None
        if not past_length and rows.documents is None:
            full_mask = full_attention_mask(self.config, hidden_states, rows.attention_mask, wants_maps)
        last_hidden_state, hidden_states, maps = self.encoder(
            hidden_states,
            position_ids=position_ids,
            return_hidden_states=kwargs.get("output_hidden_states", self.config.output_hidden_states),
            return_weights=wants_maps,
            layout=rows.layout,
            documents=rows.documents,
            attention_mask=rows.attention_mask,
            full_attention_mask=full_mask,
            circle_length=circle_length_of(self.config, past_length + hidden_states.shape[1]),
            num_hashes=num_hashes,
            cached=cached,
            owns_input=inputs_embeds is None and self.embeddings.makes_own_memory(),
            source=source,
        )
        if cache is not None and step is not None:
            cache.end(step)
            if maps is not None and not step.is_first:
                maps = tuple([step.in_columns(own), *others] for own, *others in maps)
        return last_hidden_state, hidden_states, maps, cache


@auto_docstring(custom_intro="The Reformer as a causal language model: attention to earlier tokens only.")
class ReformerForCausalLM(LMHeadMixin, CachedGenerationMixin, ReformerPreTrainedModel, GenerationMixin):
    def __init__(self, config: ReformerConfig):
        super().__init__(_with_direction(config, is_decoder=True))
        self.reformer = ReformerModel(self.config)
        self.lm_head = ReformerOnlyLMHead(self.config)
        self.post_init()

    def _get_name(self) -> str:
        # The Trainer looks this name up to know that labels are to be shifted when it smooths them.
        return "ReformerModelWithLMHead"

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        check_one_document_per_row(model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), model_kwargs)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @takes_cache_by_either_name
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_hashes: int | None = None,
        cache: ReformerCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        cache (`ReformerCache`, *optional*):
            What is known of the text so far; the call continues it. Also taken as `past_key_values`.
        use_cache (`bool`, *optional*):
            Make a cache and return it. Not in training, which needs none.
        """
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is not None and cache is None and kwargs.get("shift_labels") is None:
            given = given_input(input_ids, inputs_embeds)
            kwargs |= labels_of_call(labels, given, attention_mask, position_ids, kwargs)
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, labels, kept, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


# The name that published checkpoints give.
ReformerModelWithLMHead = ReformerForCausalLM


@auto_docstring(custom_intro="The Reformer as a masked language model: attention in both directions.")
class ReformerForMaskedLM(LMHeadMixin, ReformerPreTrainedModel):
    def __init__(self, config: ReformerConfig):
        super().__init__(_with_direction(config, is_decoder=False))
        self.reformer = ReformerModel(self.config)
        self.lm_head = ReformerOnlyLMHead(self.config)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_hashes: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        """
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            return_dict=True,
            **kwargs,
        )
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, labels, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ReformerClassificationHead(nn.Module):
    """Two-layer head on the vector of a text."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.output_size, config.hidden_size)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, cast(int, config.num_labels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, output_size]` to `[B, num_labels]`."""
        hidden_states = torch.tanh(self.dense(self.dropout(hidden_states)))
        return self.out_proj(self.dropout(hidden_states))


def _head_dropout(config: ReformerConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


# trf-ignore: TRF031 this goes into a loss function, it is no output
@dataclass
class _LossSettings:
    """What transformers' loss for sequence classification reads of a config."""

    num_labels: int
    problem_type: str


@auto_docstring(
    custom_intro="The Reformer with a classification or regression head. `config.classifier_pooling` says what it "
    "reads: one token, the last real one when attention is causal and the first one otherwise, or the mean of all."
)
class ReformerForSequenceClassification(ReformerPreTrainedModel):
    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.reformer = ReformerModel(config)
        self.classifier = ReformerClassificationHead(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_hashes: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        """
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            return_dict=True,
            **kwargs,
        )
        given = given_input(input_ids, inputs_embeds)
        numbers = documents_of_call(given, attention_mask, position_ids, kwargs)
        logits = self.classifier(pool(outputs.last_hidden_state, input_ids, attention_mask, self.config, numbers))
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits, labels, num_items_in_batch=None, **kwargs):
        problem = self.config.problem_type
        if problem is None:
            integer = not labels.is_floating_point()
            problem = "single_label_classification" if integer else "multi_label_classification"
            problem = "regression" if self.num_labels == 1 else problem
        classes = self.num_labels if problem == "single_label_classification" else None
        single = classes is not None or self.num_labels == 1
        expected = logits.shape[: 1 if single else 2]
        check_labels(labels.squeeze(-1) if single and labels.ndim == 2 else labels, expected, classes)
        if problem == "multi_label_classification":
            check_chances(labels)
        # The loss function writes `problem_type` into the config it is given; the model's own stays as it is.
        settings = _LossSettings(self.num_labels, problem)
        if problem == "single_label_classification":
            kwargs["num_items_in_batch"] = num_items_in_batch
        loss = self.loss_function(labels=labels, pooled_logits=logits, config=settings, **kwargs)
        if problem != "single_label_classification" and num_items_in_batch is not None:
            # It takes the mean over this batch where the Trainer expects this batch's share of the mean over several.
            loss = loss * labels.numel() / num_items_in_batch
        return loss


@auto_docstring(custom_intro="The Reformer with a classification head on every token.")
class ReformerForTokenClassification(ReformerPreTrainedModel):
    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.reformer = ReformerModel(config)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.output_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_hashes: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        """
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:2], self.num_labels)
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(custom_intro="The Reformer with a head that marks the start and the end of an answer.")
class ReformerForQuestionAnswering(ReformerPreTrainedModel):
    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.reformer = ReformerModel(config)
        self.qa_outputs = nn.Linear(config.output_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        num_hashes: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        r"""
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        """
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
                check_answer(positions, start_logits.shape[0], name)
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(custom_intro="The Reformer with a head that scores each of several choices; pooling as for sequences.")
class ReformerForMultipleChoice(ReformerPreTrainedModel):
    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        # Choosing is classification of the row of scores; transformers has no loss under this class's name.
        self.loss_type = "ForSequenceClassification"
        self.reformer = ReformerModel(config)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.output_size, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_hashes: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`):
            Ids of each choice's tokens; the other inputs have the same leading dimensions.
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        """
        dimensions = ("batch", "choices", "length")
        check_inputs(self.config.hidden_size, input_ids, inputs_embeds, attention_mask, position_ids, dimensions)
        batch, num_choices = given_input(input_ids, inputs_embeds).shape[:2]
        if position_ids is not None:
            position_ids = position_ids.expand(batch, -1, -1)
        input_ids, attention_mask, position_ids, inputs_embeds = (
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, position_ids, inputs_embeds)
        )
        given = given_input(input_ids, inputs_embeds)
        if documents_of_call(given, attention_mask, position_ids, kwargs) is not None:
            raise ValueError("A choice is one row: it cannot hold several documents. Give each one a row of its own.")
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_hashes=num_hashes,
            return_dict=True,
            **kwargs,
        )
        pooled = self.dropout(pool(outputs.last_hidden_state, input_ids, attention_mask, self.config))
        logits = self.classifier(pooled).view(batch, num_choices)
        loss = None
        if labels is not None:
            check_labels(labels, (batch,), num_choices)
            settings = _LossSettings(num_choices, "single_label_classification")
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=settings, **kwargs)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "ReformerForCausalLM",
    "ReformerForMaskedLM",
    "ReformerForMultipleChoice",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerForTokenClassification",
    "ReformerModel",
    "ReformerModelWithLMHead",
    "ReformerPreTrainedModel",
]
