"""What a checkpoint needs beyond the base class's loading: another position table, and weights that can be trusted."""

import copy
from collections.abc import Sequence
from math import prod

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

POSITION_TABLE = ("axial_pos_shape", "max_position_embeddings")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CheckpointMixin:
    """`from_pretrained` that resizes the position table on request and refuses damaged weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        Same as `PreTrainedModel.from_pretrained`, and more.

        - With another `axial_pos_shape` or `max_position_embeddings` than the checkpoint's, as an argument or in
          `config`, the position table is cropped or extended, with one log line.
        - A damaged file, weights that are not finite, and a config that contradicts the checkpoint's kind of position
          embeddings raise a `ValueError`.
        """
        path = pretrained_model_name_or_path
        wanted = {name: kwargs.pop(name) for name in POSITION_TABLE if name in kwargs}
        if isinstance(config, PreTrainedConfig):
            wanted = {name: getattr(config, name) for name in POSITION_TABLE} | wanted
            config = _with_saved_table(cls.config_class, path, config, kwargs)
        try:
            loaded = super().from_pretrained(path, *model_args, config=config, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"A weights file of {path!r} is damaged or incomplete ({error}). Copy or download it again."
            ) from error
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        _check_finite(model, path)
        if "axial_pos_shape" in wanted and model.config.axial_pos_embds:
            model.resize_position_embeddings(wanted["axial_pos_shape"])
            model.config.max_position_embeddings = wanted.get(
                "max_position_embeddings", model.config.max_position_embeddings
            )
        elif "max_position_embeddings" in wanted:
            model.resize_position_embeddings(wanted["max_position_embeddings"])
        return loaded

    def resize_position_embeddings(self, new_num_position_embeddings: int | Sequence[int]):
        """
        Crop or extend the position table; where it ends it starts again.

        Args:
            new_num_position_embeddings: Axial: the length of each axis. With learned positions: their number. A single
                number for axial positions changes `max_position_embeddings` alone, within the table.

        Raises:
            ValueError: Another number of axes, or a length below 1.
        """
        config, wanted = self.config, new_num_position_embeddings
        if config.axial_pos_embds and isinstance(wanted, int):
            config.max_position_embeddings = wanted
            return
        old = config.axial_pos_shape if config.axial_pos_embds else config.max_position_embeddings
        wanted = tuple(wanted) if config.axial_pos_embds else wanted
        if wanted == old:
            return
        self.get_position_embeddings().resize(wanted)
        if config.axial_pos_embds:
            config.axial_pos_shape = wanted
            config.max_position_embeddings = max(config.max_position_embeddings, prod(wanted))
        else:
            config.max_position_embeddings = wanted
        logger.warning(
            f"The position table was resized from {old} to {wanted}: vectors beyond the old one repeat it from its "
            "start. Fine-tune before you rely on the added positions."
            + (" Positions keep their vectors only if all axes but the first keep their length." * (wanted != old))
        )

    def get_position_embeddings(self) -> torch.nn.Module:
        """The position embeddings of the base model."""
        return self.base_model.embeddings.position_embeddings


def _with_saved_table(config_class, path, config, kwargs):
    """`config` with the position table of the checkpoint's own config file, if there is one."""
    if path is None:
        return config
    try:
        saved = config_class.from_pretrained(path, **{k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs})
    except OSError:
        return config
    if saved.axial_pos_embds != config.axial_pos_embds:
        raise ValueError(
            f"The checkpoint has `axial_pos_embds={saved.axial_pos_embds}` and the given config "
            f"`axial_pos_embds={config.axial_pos_embds}`: there are no weights for that. Use the checkpoint's value."
        )
    config = copy.deepcopy(config)
    for name in POSITION_TABLE:
        setattr(config, name, getattr(saved, name))
    return config


def _check_finite(model, path):
    damaged = [
        name
        for name, weight in model.state_dict().items()
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all()
    ]
    if damaged:
        raise ValueError(
            f"The weights of {path!r} hold values that are not finite (NaN or infinity), in {damaged[:5]}"
            f"{' and others' if len(damaged) > 5 else ''}. The training run diverged or the file is damaged; use an "
            "earlier checkpoint."
        )
