"""What a checkpoint needs beyond the base class: another position table, weights that can be trusted, its card."""

import copy
from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_reformer import is_remote_code
from .decoding.generation import Model
from .layers.position_embeddings import AxialPositionEmbeddings, PositionEmbeddings
from .model_card import write_card
from .remote_code import AUTO_CLASS_OF, add_code, check_has_code


logger = logging.get_logger(__name__)

# Settings of the position table that can change when loading, and those that its weights settle.
POSITION_TABLE = ("axial_pos_shape", "max_position_embeddings")
POSITION_KIND = ("axial_pos_embds", "axial_pos_embds_dim", "position_embedding_type")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CheckpointMixin(Model):
    """`from_pretrained` that resizes the position table on request and refuses damaged weights, and cards."""

    # Whether `push_to_hub` sends code, too, where that is otherwise, and what the card says.
    _pushes: "tuple[bool, str | None, dict[str, Any]]" = (False, None, {})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        Same as `PreTrainedModel.from_pretrained`, and more.

        - With another `axial_pos_shape` or `max_position_embeddings` than the checkpoint's, as an argument or in
          `config`, the position table is cropped or extended, with one log line. More `max_position_embeddings` than
          the axes hold make the first axis longer.
        - A damaged file, weights that are not finite, and a config that contradicts the checkpoint's kind of position
          embeddings raise a `ValueError`.
        """
        path = pretrained_model_name_or_path
        given = {name: kwargs.pop(name) for name in POSITION_TABLE + POSITION_KIND if name in kwargs}
        wanted = {name: value for name, value in given.items() if value is not None}
        if isinstance(config, PreTrainedConfig):
            wanted = _positions_of(config) | wanted
        if wanted:
            config, wanted = _with_saved_table(cls.config_class, path, config, wanted, kwargs)
        try:
            loaded = super().from_pretrained(path, *model_args, config=config, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"A weights file of {path!r} is damaged or incomplete ({error}). Copy or download it again."
            ) from error
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        _check_finite(model, path)
        positions = model.get_position_embeddings()
        axial = isinstance(positions, AxialPositionEmbeddings)
        table = wanted.get("axial_pos_shape" if axial else "max_position_embeddings")
        if table is not None and positions is not None:
            model.resize_position_embeddings(table)
        if "max_position_embeddings" in wanted:
            for part in filter(lambda module: isinstance(module, PreTrainedModel), model.modules()):
                part.config.max_position_embeddings = wanted["max_position_embeddings"]
        return loaded

    def resize_position_embeddings(self, new_num_position_embeddings: int | Sequence[int]):
        """
        Crop or extend the position table; where it ends it starts again.

        Args:
            new_num_position_embeddings: The length of each axis; for learned positions their number.

        Raises:
            ValueError: Another number of axes, or a length below 1; a table that is offloaded; no table.
        """
        positions = self.get_position_embeddings()
        if positions is None:
            raise ValueError(
                f"A model with `position_embedding_type={self.config.position_kind!r}` has no table of positions, and "
                "takes inputs of any length. Leave the resizing out."
            )
        old = positions.shape
        offloaded = any(hasattr(module, "_hf_hook") for module in positions.modules())
        if offloaded and any(table.is_meta for table in positions.parameters()):
            raise ValueError(
                "The position table is offloaded and cannot be resized. Load the model without offloading, save it "
                "with the new table, and load that; or keep the embeddings on a device by `device_map`."
            )
        cast(Any, positions).resize(new_num_position_embeddings)
        if positions.shape == old:
            return
        if isinstance(positions, AxialPositionEmbeddings):
            self.config.axial_pos_shape = positions.shape
            self.config.max_position_embeddings = max(self.config.max_position_embeddings, prod(positions.shape))
            moved = " Positions keep their vectors only where all axes but the first keep their length."
        else:
            self.config.max_position_embeddings = positions.shape
            moved = ""
        logger.warning(
            f"The position table was resized from {old} to {positions.shape}. Beyond its old end it repeats itself "
            f"from its start, so fine-tune before relying on added positions.{moved}"
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        remote_code: bool = False,
        code_repository: str | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs,
    ):
        """
        Same as `PreTrainedModel.push_to_hub`, with the code that computes the model if `remote_code=True`.

        Args:
            remote_code: Push that, too, so that the model loads with `trust_remote_code=True` without the package.
            code_repository: See `hf_reformer.export`.
            metadata: What the card says, such as `{"license": "mit", "language": "en", "datasets": ["a/b"]}`.
        """
        # Code that came with a checkpoint is written by saving.
        if remote_code and not is_remote_code():
            check_has_code(type(self), code_repository)
        elif code_repository is not None:
            raise ValueError("`code_repository` is for `remote_code=True` and models of the package.")
        self._pushes = remote_code, code_repository, metadata or {}
        try:
            return cast(Any, super()).push_to_hub(repo_id, **kwargs)
        finally:
            self._pushes = False, None, {}

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # Where `push_to_hub` and `save_pretrained(push_to_hub=True)` have written the card, and before it is sent.
        (with_code, code_repository, metadata), model_class = self._pushes, type(self).__name__
        if with_code and not is_remote_code():
            add_code(working_dir, code_repository)
        auto_class = AUTO_CLASS_OF.get(model_class) if with_code or is_remote_code() else None
        write_card(working_dir, model_class, repo_id, auto_class, code_repository, **metadata)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def get_position_embeddings(self) -> AxialPositionEmbeddings | PositionEmbeddings | None:
        """The position embeddings of the base model; None where positions have no table."""
        base_model: Any = self.base_model
        return base_model.embeddings.position_embeddings


def _with_saved_table(config_class, path, config, wanted, kwargs):
    """`config` with the position table of the checkpoint's own config file, and what of that table is to change."""
    saved = _saved_config(config_class, path, kwargs)
    if saved is None:
        # Weights without a config file fit the config they come with.
        return config, {}
    found = _positions_of(saved)
    changed = {name: value for name, value in wanted.items() if _plain(value) != _plain(found[name])}
    for name in POSITION_KIND:
        # The sizes of the axes say nothing about other positions.
        if name in changed and (saved.axial_pos_embds or name != "axial_pos_embds_dim"):
            raise ValueError(
                f"The checkpoint has `{name}={found[name]}` and not `{name}={changed[name]}`: there are no "
                "weights for that. Use the checkpoint's value."
            )
    if saved.axial_pos_embds and "axial_pos_shape" not in changed:
        rows = -(-changed.get("max_position_embeddings", 0) // prod(saved.axial_pos_shape[1:]))
        if rows > saved.axial_pos_shape[0]:
            changed["axial_pos_shape"] = (rows, *saved.axial_pos_shape[1:])
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
        for name in POSITION_TABLE:
            setattr(config, name, getattr(saved, name))
    return config, changed


def _positions_of(config):
    settings = {name: getattr(config, name) for name in POSITION_TABLE + POSITION_KIND}
    return settings | {"position_embedding_type": config.position_kind}


def _saved_config(config_class, path, kwargs):
    if path is None:
        return None
    try:
        found, _ = config_class.get_config_dict(path, **{k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs})
    except OSError:
        return None
    return config_class.from_dict(found) if found else None


def _plain(setting):
    return list(setting) if isinstance(setting, Sequence) else setting


def _check_finite(model, path):
    damaged = [
        name for name, weight in model.state_dict().items() if _holds_numbers(weight) and not weight.isfinite().all()
    ]
    if damaged:
        raise ValueError(
            f"The weights of {path!r} hold values that are not finite (NaN or infinity), in {damaged[:5]}"
            f"{' and others' if len(damaged) > 5 else ''}. The training run diverged or the file is damaged; use an "
            "earlier checkpoint."
        )


def _holds_numbers(weight):
    # Quantised weights and those of other devices are subclasses of their own, or not floating-point, or neither.
    plain = type(weight) is torch.Tensor and weight.is_floating_point() and not weight.is_meta
    return plain and weight.itemsize > 1
