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
"""Encoder and decoder, reversible on both sides (paper section 5, machine translation)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple

from ..configuration.configuration_reformer import ReformerConfig
from ..configuration.sides import config_of_side
from .argument_checks import PACKING_ARGUMENTS, check_labels, given_input
from .decoding.cache_naming import CACHE_NAME, takes_cache_by_either_name
from .decoding.generation import CachedGenerationMixin, check_cache
from .decoding.seq2seq_cache import ReformerSeq2SeqCache
from .layers.decoder import ReformerDecoderStack
from .layers.source import Source
from .lm_head import LMHeadMixin, ReformerOnlyLMHead, untie_embeddings
from .modeling_reformer import ReformerForCausalLM, ReformerModel, ReformerPreTrainedModel
from .ops.documents import lay_out
from .packed_rows import documents_of_call


# Settings in which the encoder and the decoder may differ.
OF_ONE_SIDE = (
    "attn_layers",
    "is_decoder",
    "local_num_chunks_after",
    "lsh_num_chunks_after",
    "lsh_value_shift",
    "tie_word_embeddings",
)
ENCODER_WORDS, DECODER_WORDS = (
    f"reformer.{side}.embeddings.word_embeddings.weight" for side in ("encoder", "decoder")
)


class ReformerDecoder(ReformerModel):
    """A causal `ReformerModel` whose layers also read a source."""

    stack_class = ReformerDecoderStack
    _no_split_modules = ["ReformerDecoderLayer"]

    # It has an argument that no other model has, and is no model of its own.
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        source: Source,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_hashes: int | None = None,
        cache: ReformerSeq2SeqCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As `ReformerModel`, with what the encoder has put out."""
        own = None if cache is None else cache.self_attention_cache
        last_hidden_state, hidden_states, maps, _ = self._read(
            input_ids, attention_mask, position_ids, inputs_embeds, num_hashes, own, False, source=source, **kwargs
        )
        attentions, cross_attentions = (None, None) if maps is None else list(zip(*maps, strict=True))[:2]
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state,
            hidden_states=hidden_states,
            attentions=attentions,
            cross_attentions=cross_attentions,
            **{CACHE_NAME: cache},
        )


@auto_docstring(custom_intro="Encoder and decoder without a head.")
class ReformerEncoderDecoderModel(ReformerPreTrainedModel):
    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        config.validate()
        untie_embeddings(config)
        # Each side has a plan of its own.
        config.base_model_fsdp_plan = {}  # type: ignore[misc]
        self.encoder = ReformerModel(config_of_side(config, is_decoder=False))
        self.decoder = ReformerDecoder(config_of_side(config, is_decoder=True))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.encoder.set_input_embeddings(value)
        if self.config.tie_word_embeddings:
            self.decoder.set_input_embeddings(value)

    @takes_cache_by_either_name
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        num_hashes: int | None = None,
        cache: ReformerSeq2SeqCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        r"""
        decoder_position_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
            Positions of the target's tokens; those of packed rows start again with each document.
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        cache (`ReformerSeq2SeqCache`, *optional*):
            What is known of both texts so far; the call continues the target. Also taken as `past_key_values`.
        use_cache (`bool`, *optional*):
            Make a cache and return it. Not in training, which needs none.
        """
        if cache is not None:
            check_cache(cache, ReformerSeq2SeqCache)
        elif use_cache and not self.training:
            cache = ReformerSeq2SeqCache(self.config)
        check_target(decoder_input_ids, decoder_inputs_embeds, None if cache else decoder_attention_mask, kwargs)
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.setdefault(name, getattr(self.config, name))
        kwargs["num_hashes"] = num_hashes  # type: ignore[typeddict-unknown-key]
        encoded: Any = encoder_outputs
        if encoded is None:
            encoded = self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        elif not isinstance(encoded, ModelOutput):
            encoded = BaseModelOutput(*((encoded,) if torch.is_tensor(encoded) else encoded))
        outputs = self.decoder(
            decoder_input_ids,
            source_of(encoded[0], attention_mask, position_ids, cache),
            decoder_attention_mask,
            decoder_position_ids,
            decoder_inputs_embeds,
            cache=cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoded[0],
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            **{CACHE_NAME: cache},
        )


def check_target(
    decoder_input_ids: torch.Tensor | None,
    decoder_inputs_embeds: torch.Tensor | None,
    mask: torch.Tensor | None,
    others: Mapping[str, Any],
):
    """ValueError unless the target is there once, with its mask, and documents are told apart by whose they are."""
    if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
        raise ValueError(
            "Give exactly one of `decoder_input_ids` and `decoder_inputs_embeds`, the target so far, or `labels`, "
            "from which a model with a head makes the first."
        )
    shape = given_input(decoder_input_ids, decoder_inputs_embeds).shape[:2]
    if mask is not None and mask.shape != shape:
        raise ValueError(
            f"`decoder_attention_mask` must have the target's shape {list(shape)}, but has {list(mask.shape)}."
        )
    named = [f"`{name}`" for name in PACKING_ARGUMENTS if others.get(name) is not None]
    if named:
        raise ValueError(
            f"{', '.join(named)}: it is not said whose documents these are. Number those of both sides by "
            "`attention_mask` and `decoder_attention_mask`, or by positions that start again."
        )


def source_of(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: ReformerSeq2SeqCache | None = None,
) -> Source:
    """
    What a decoder's layers are given of the encoder.

    Args:
        hidden_states: The encoder's last, `[B, L, output_size]`, in the caller's order.
        attention_mask, position_ids: Those of the source.
        cache: Of the call.
    """
    if attention_mask is not None and attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`attention_mask` is that of the source and must have its shape {list(hidden_states.shape[:2])}, but has "
            f"{list(attention_mask.shape)}. That of the target is `decoder_attention_mask`."
        )
    if cache is not None:
        cache.check_source(hidden_states)
    if cache is None or not cache.has_source:
        past_length = None if cache is None else 0
        numbers = documents_of_call(hidden_states, attention_mask, position_ids, {}, past_length)
        if numbers is not None:
            layout, is_real, documents = lay_out(numbers, alignment=1)
            return Source(layout.into(hidden_states), is_real, layout, documents)
    return Source(hidden_states, None if attention_mask is None else attention_mask.bool(), cache=cache)


@auto_docstring(
    custom_intro="The Reformer as a sequence-to-sequence model: a text is read in both directions, another is written."
)
class ReformerForConditionalGeneration(LMHeadMixin, CachedGenerationMixin, ReformerPreTrainedModel, GenerationMixin):
    cache_class = ReformerSeq2SeqCache

    def __init__(self, config: ReformerConfig):
        if not config.is_encoder_decoder:
            raise ValueError(
                "`ReformerForConditionalGeneration` needs a config with `is_encoder_decoder=True`. To begin with two "
                "trained models, call `from_encoder_decoder_pretrained`."
            )
        # It may have been assigned since the config was made.
        config.complete_sides()
        super().__init__(config)
        # Labels are aligned with the logits. transformers would shift them by the class's name.
        self.loss_type = "ForMaskedLM"
        self.reformer = ReformerEncoderDecoderModel(config)
        self.lm_head = ReformerOnlyLMHead(config)
        self.post_init()

    @property
    def _tied_weights_keys(self) -> dict[str, str] | None:
        # CODEPATH: both streams side by side are wider than a word embedding; their mean is not.
        if self.config.output_size != self.config.hidden_size:
            return None
        return {DECODER_WORDS: ENCODER_WORDS, "lm_head.decoder.weight": ENCODER_WORDS}

    @classmethod
    def from_encoder_decoder_pretrained(cls, encoder: str, decoder: str, **settings):
        """
        A model that begins with two trained ones. What is new, attention to the encoder, is random.

        Args:
            encoder: Folder or repository of a Reformer that reads in both directions, such as a `ReformerForMaskedLM`.
            decoder: The same of a `ReformerForCausalLM`, whose settings for `generate` and dtype are kept.
            settings: Of the new config, such as `decoder_start_token_id`, or what both sides shall have where they
                differ.

        Raises:
            ValueError: The two differ in a setting that both sides share, or cannot be such a side.
        """
        reader, writer = ReformerModel.from_pretrained(encoder), ReformerForCausalLM.from_pretrained(decoder)
        config = _joined_config(reader.config, writer.config, settings)
        words = [each.get_input_embeddings().weight for each in (reader, writer)]
        if config.tie_word_embeddings and not all(
            torch.equal(words[0], other) for other in (words[1], writer.lm_head.decoder.weight)
        ):
            raise ValueError(
                "`tie_word_embeddings=True` is not possible: encoder, decoder and head have learned words of their "
                "own, and one matrix cannot be all of them. Leave it out."
            )
        model = cls(config)
        model.reformer.encoder.load_state_dict(reader.state_dict())
        model.reformer.decoder.load_state_dict(model.reformer.decoder.state_dict() | writer.reformer.state_dict())
        model.lm_head.load_state_dict(writer.lm_head.state_dict())
        model.generation_config = writer.generation_config
        model.generation_config.decoder_start_token_id = config.decoder_start_token_id
        return model.to(writer.dtype).eval()

    def resize_position_embeddings(self, new_num_position_embeddings: int | Sequence[int]):
        """`ReformerModel.resize_position_embeddings` for the tables of both sides."""
        for side in (self.reformer.encoder, self.reformer.decoder):
            side.resize_position_embeddings(new_num_position_embeddings)
            for name in ("axial_pos_shape", "max_position_embeddings"):
                setattr(self.config, name, getattr(side.config, name))

    def get_position_embeddings(self):
        """Those of the encoder, as large as the decoder's; None where positions have no table."""
        return self.reformer.encoder.get_position_embeddings()

    def _resize_token_embeddings(self, new_num_tokens, *args, **kwargs):
        resized = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if not self.config.tie_word_embeddings:
            self.reformer.decoder._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for side in (self.reformer.encoder, self.reformer.decoder):
            side.config.vocab_size = resized.num_embeddings
        return resized

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        What the decoder reads to predict `labels`, `[B, L]`: the same one place further, behind the start token.

        Called by `DataCollatorForSeq2Seq`. Labels that do not count, -100, become padding.
        """
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("The config has neither `decoder_start_token_id` nor `pad_token_id`. Set one of them.")
        padding = start if self.config.pad_token_id is None else self.config.pad_token_id
        shifted = nn.functional.pad(labels, (1, 0), value=start)[:, :-1]
        return shifted.masked_fill(shifted == -100, padding)

    @takes_cache_by_either_name
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        labels: torch.Tensor | None = None,
        num_hashes: int | None = None,
        cache: ReformerSeq2SeqCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        r"""
        decoder_position_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
            Positions of the target's tokens; those of packed rows start again with each document.
        labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
            The target. Without inputs for the decoder it reads these, one place further. Where they are -100 they do
            not count, and columns behind the last that counts are padding, unless `decoder_attention_mask` is given.
        num_hashes (`int`, *optional*):
            Hashing rounds for this call, instead of `config.num_hashes`.
        cache (`ReformerSeq2SeqCache`, *optional*):
            What is known of both texts so far; the call continues the target. Also taken as `past_key_values`.
        use_cache (`bool`, *optional*):
            Make a cache and return it. Not in training, which needs none.
        """
        if labels is not None and cache is None:
            ignored = kwargs.get("ignore_index", -100)
            check_labels(labels, (*labels.shape, "length")[:2], self.config.vocab_size, ignore_index=ignored)
            if decoder_attention_mask is None and decoder_position_ids is None:
                decoder_attention_mask = _counts_or_comes_before(labels, ignored)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                read = labels.masked_fill(labels == ignored, -100)
                decoder_input_ids = self._inputs_of(read, decoder_attention_mask, decoder_position_ids)
        outputs = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_outputs=encoder_outputs,
            num_hashes=num_hashes,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, labels, kept, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **others)

    def _inputs_of(self, labels, attention_mask, position_ids):
        """`prepare_decoder_input_ids_from_labels`, for each document of a row."""
        inputs = self.prepare_decoder_input_ids_from_labels(labels)
        numbers = documents_of_call(labels, attention_mask, position_ids, {})
        if numbers is None:
            return inputs
        begins = numbers != nn.functional.pad(numbers, (1, 0))[:, :-1]
        return inputs.masked_fill(begins, self.config.decoder_start_token_id)


def _counts_or_comes_before(labels, ignore_index):
    """`[B, L]`, bool: all columns up to the last label that counts, and the first."""
    counts = labels != ignore_index
    reaches = counts.flip(1).cumsum(1).flip(1) > 0
    reaches[:, 0] = True
    return reaches


def _joined_config(encoder, decoder, settings):
    """The config of a model of two, which are alike but for what each side has of its own."""
    names = ReformerConfig.__annotations__
    shared = [name for name in names if name not in OF_ONE_SIDE and name not in settings]
    both = {name: (getattr(encoder, name), getattr(decoder, name)) for name in shared}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    if differing:
        given = ", ".join(f"{name} ({values[0]} and {values[1]})" for name, values in sorted(differing.items()))
        raise ValueError(
            f"The encoder and the decoder differ in settings that both sides share: {given}. Train them alike, "
            f"or say which it shall be, such as `{next(iter(sorted(differing)))}=...`; they may differ in "
            f"{', '.join(OF_ONE_SIDE[:-1])}."
        )
    if encoder.is_decoder:
        raise ValueError("The encoder was trained to look back only. Take a model that reads in both directions.")
    if decoder.lsh_num_chunks_after and "lsh" in decoder.attn_layers:
        raise ValueError(
            f"The decoder has `lsh_num_chunks_after={decoder.lsh_num_chunks_after}`, but beside an encoder it looks "
            "back only. Take one that was trained with 0."
        )
    sides = {
        "attn_layers": encoder.attn_layers,
        "decoder_attn_layers": decoder.attn_layers,
        "is_encoder_decoder": True,
        "is_decoder": False,
        "local_num_chunks_after": encoder.local_num_chunks_after,
        "lsh_num_chunks_after": encoder.lsh_num_chunks_after,
        "tie_word_embeddings": False,
    }
    return ReformerConfig(**({name: getattr(decoder, name) for name in names} | sides | settings))
