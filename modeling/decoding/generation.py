"""What `generate` asks of a model with a cache of its own."""

from typing import TYPE_CHECKING

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..ops.implementations import check_keeps_weights
from .cache_naming import CACHE_NAME, with_cache_named
from .decoding_cache import ReformerCache
from .seq2seq_cache import ReformerSeq2SeqCache


if TYPE_CHECKING:

    class Model(PreTrainedModel, GenerationMixin):
        """What a mixin is mixed into, for a type checker."""

else:
    Model = object


class CachedGenerationMixin(Model):
    """For a causal model beside `GenerationMixin`, whose default caches do not know buckets."""

    cache_class: "type[ReformerCache] | type[ReformerSeq2SeqCache]" = ReformerCache

    def generate(self, *args, **kwargs):
        """`GenerationMixin.generate`, which takes a cache by either name."""
        return super().generate(*args, **with_cache_named(CACHE_NAME, kwargs))

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse what `generate_batch` and `transformers serve --continuous-batching` begin with."""
        raise ValueError(
            "Continuous batching is not possible: its pages hold keys and values, but a Reformer keeps queries, "
            "values and the order of buckets in a cache of its own. Call `generate` with a padded batch."
        )

    def _prefill(self, *args, **kwargs):
        # Also of a compiled model: a program for the length of one prompt is not worth its while, and could not ask
        # where padding ends.
        with torch.compiler.set_stance("force_eager"):
            return super()._prefill(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # transformers would ask whether the cache is a static one.
        is_wanted = generation_config.compile_config is not None and not generation_config.disable_compile
        return is_wanted and isinstance(model_kwargs.get(CACHE_NAME), self.cache_class)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    ):
        cache, implementation = model_kwargs.get(CACHE_NAME), generation_config.cache_implementation
        # In training mode each pass draws new rotations.
        if self.training:
            generation_config.use_cache = False
        uses_cache = generation_config.use_cache is not False
        # Without a cache, padding takes positions, too.
        mask = model_kwargs.get("decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask")
        self._check_generated_length(mask if uses_cache else None, max_cache_length)
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation={implementation!r}` is not possible: a Reformer keeps queries, values and the "
                "order of buckets in a cache of its own, which grows as needed. Leave `cache_implementation` out."
            )
        if cache is not None:
            check_cache(cache, self.cache_class)
            if not uses_cache:
                raise ValueError(
                    f"`{CACHE_NAME}` is given, but `use_cache=False` or training mode does without. Leave one of them "
                    "out."
                )
            cache._is_user_defined = True
            return
        if not uses_cache:
            if model_kwargs.get("inputs_embeds") is not None and not self.config.is_encoder_decoder:
                raise ValueError(
                    "`generate` cannot continue `inputs_embeds` without a cache. Call `model.eval()` and leave "
                    "`use_cache` out, or give the prompt as `input_ids`."
                )
            return
        model_kwargs[CACHE_NAME] = self.cache_class(self.config, max_length=max_cache_length)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # The next token's is one more than the last: padding behind a prompt has that of the token before it.
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs).cummax(dim=-1).values

    def _check_generated_length(self, attention_mask, max_cache_length: int):
        longest = self.config.max_sequence_length
        padding = 0 if attention_mask is None else int((attention_mask == 0).sum(1).min())
        if longest is not None and max_cache_length - padding > longest:
            raise ValueError(
                f"The text would have up to {max_cache_length + 1 - padding} tokens, the position embeddings reach "
                f"{longest}. Shorten the prompt or `max_new_tokens`, or load the model with a larger "
                "`axial_pos_shape` (or `max_position_embeddings`)."
            )


def check_cache(cache, cache_class: type = ReformerCache):
    """ValueError unless `cache` is one of ours."""
    if not isinstance(cache, cache_class):
        raise ValueError(
            f"`{CACHE_NAME}` is a {type(cache).__name__}; a Reformer takes a `hf_reformer.{cache_class.__name__}`, "
            "because its layers need more than keys and values. Give one, or leave it out. Adapters that are keys and "
            "values (prefix tuning) cannot be used; prompt tuning and P-tuning can."
        )


def cache_of_call(model, cache, use_cache: bool | None, output_attentions: bool) -> ReformerCache | None:
    """
    The cache for one call of the base model: the one given, or a new one where `use_cache=True` asks for it.

    Raises:
        ValueError: A cache where none can be used.
    """
    if (use_cache or cache is not None) and torch.compiler.is_exporting():
        raise ValueError(
            "A model with a cache cannot be exported: its shapes follow from how much of each row is padding and from "
            f"what shares a bucket. Export it with `use_cache=False` and without `{CACHE_NAME}`."
        )
    if cache is None:
        can_be_used = model.config.is_decoder and not model.training
        return ReformerCache(model.config) if use_cache and can_be_used else None
    check_cache(cache)
    if not model.config.is_decoder:
        raise ValueError(f"`{CACHE_NAME}` needs causal attention: use `ReformerForCausalLM`, or `is_decoder=True`.")
    if model.training:
        raise ValueError(f"`{CACHE_NAME}` is for evaluation: call `model.eval()`, or leave it out.")
    if output_attentions:
        check_keeps_weights(model.config._attn_implementation)
    return cache
