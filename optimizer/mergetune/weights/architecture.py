"""What transformers knows of an architecture: its class, and the parameters that stored tensors become."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mergetune.errors import MergetuneError
from mergetune.weights.tensor_files import read_json


def read_config(folder: Path) -> Any:
    """Return a model's configuration as transformers reads it; no code beside it is run.

    Raises:
        MergetuneError: transformers does not know the architecture, or the file is broken.
    """
    import transformers

    file = folder / "config.json"
    config = read_json(file)
    kind = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        own = (
            "its code stands beside the weights (`auto_map`), which is not supported: take a model of an "
            "architecture that transformers has"
            if "auto_map" in config
            else "take a newer transformers, or correct the file"
        )
        raise MergetuneError(
            f"{file}: `model_type` must be an architecture of transformers {transformers.__version__}, but "
            f"is {kind!r}: {own}."
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises at values that it does not expect
        raise MergetuneError(f"{file}: transformers cannot read it ({error}). Correct it.") from error


def model_class(folder: Path) -> Any:
    """Return transformers' class of a model that writes text, of text alone or of images and text.

    Raises:
        MergetuneError: as `read_config` does, or there is no such class.
    """
    from transformers.models.auto import modeling_auto

    config = read_config(folder)
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise MergetuneError(
        f"{folder / 'config.json'}: `model_type` must be that of a model that writes text, but is "
        f"{config.model_type!r}. Give a causal language model, or one of images and text."
    )


@dataclass(frozen=True)
class Part:
    """A stored tensor as a view into a parameter of the model in memory.

    Attributes:
        parameter: the parameter's name.
        whole: the parameter's shape; where it has three dimensions, the first counts a mixture's experts.
        shape: the stored tensor's shape, which begins at `offset` and has these `strides`, as in torch.
        is_in_out: whether a mixture's experts are stored as (in, out) rather than as (out, in).
    """

    parameter: str
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    is_in_out: bool

    @property
    def slices(self) -> range:
        """The slices of the parameter, along its first of three dimensions, that the stored tensor is in."""
        if len(self.whole) < 3:
            return range(1)
        size = self.whole[1] * self.whole[2]
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return range(self.offset // size, last // size + 1)

    def of(self, slices: Tensor) -> Tensor:
        """Return the stored tensor's part of the parameter's `slices`, (n_slices, …) or all of a matrix."""
        start = self.slices.start * (self.whole[1] * self.whole[2]) if len(self.whole) == 3 else 0
        return slices.contiguous().as_strided(self.shape, self.strides, self.offset - start).contiguous()


@dataclass(frozen=True)
class Layer:
    """A linear layer, or the embeddings, as an adapter names it: `path` leads to it in transformers' model.

    The base stores the weight of a `linear` layer as (out, in), of another kind as (in, out).
    """

    path: str
    kind: Literal["linear", "conv1d", "embedding"]


class Architecture:
    """The parameters of transformers' model of a base, and the stored tensors that they are read from.

    transformers renames tensors while it loads them (`language_model.model.layers…` becomes
    `model.language_model.layers…`, as an adapter names it) and fuses some (the experts of a mixture). Its own
    tables tell which; the model stands on the meta device, without weights.

    Args:
        folder: the base's directory.
        stored: its tensors' names.

    Raises:
        MergetuneError: as `model_class` does.
    """

    def __init__(self, folder: Path, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        of_class = model_class(folder)
        with torch.device("meta"):
            self._model: Any = of_class._from_config(read_config(folder))
        self._tensors: dict[str, Tensor] = self._model.state_dict()
        conversions: Any = get_model_conversion_mapping(self._model)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._stored = {name: self.parameter(name) for name in stored}
        # as `from_pretrained` does: those that were of use are reverted for the names in the file
        self._model._weight_conversions = [each for each in conversions if each.was_used()]

    def parameter(self, name: str) -> str | None:
        """Return the parameter that a tensor of this name becomes, or a part of; None where there is none.

        The name may be that of a file, of whatever version, of the model in memory, or of the language part
        on its own.
        """
        from transformers.core_model_loading import rename_source_key

        if name in self._tensors:
            return name
        prefix = self._model.base_model_prefix
        renamed, _ = rename_source_key(name, self._renamings, self._converters, prefix, self._tensors)
        if renamed not in self._tensors and self._language and name.startswith("model."):
            renamed = f"{self._language}.{name.removeprefix('model.')}"
        return renamed if renamed in self._tensors else None

    def pair(self, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
        """Return the base's name → their name of tensors that are one and the same parameter whole.

        `ours` are some of the base's names.
        """
        mine = _by_parameter({name: self._stored[name] for name in ours})
        others = _by_parameter({name: self.parameter(name) for name in theirs})
        return {
            names[0]: others[parameter][0]
            for parameter, names in mine.items()
            if len(names) == len(others.get(parameter, ())) == 1
        }

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Return the parameters that no tensor of these names becomes, or a part of."""
        found = {self.parameter(name) for name in names}
        return [name for name in self._tensors if name not in found]

    def parts(self, parameter: str) -> dict[str, Part]:
        """Return the stored tensors that a parameter is read from, by their names in the file."""
        tensor = self._tensors[parameter]
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        is_in_out = bool(getattr(module, "is_transposed", False))
        return {
            name: Part(
                parameter,
                tuple(tensor.shape),
                tuple(view.shape),
                view.stride(),
                int(view.storage_offset()),
                is_in_out,
            )
            for name, view in stored_views(self._model, {parameter: tensor}).items()
        }

    def layer(self, name: str) -> Layer | None:
        """Return the layer whose whole weight a stored tensor is; None where it is no such weight."""
        from transformers.pytorch_utils import Conv1D

        parameter = self._stored[name]
        if parameter is None or not parameter.endswith(".weight") or self._n_parts[parameter] > 1:
            return None
        path = parameter.removesuffix(".weight")
        module = self._model.get_submodule(path)
        if isinstance(module, torch.nn.Embedding):
            return Layer(path, "embedding") if module is self._model.get_input_embeddings() else None
        if isinstance(module, torch.nn.Linear):
            return Layer(path, "linear")
        return Layer(path, "conv1d") if isinstance(module, Conv1D) else None

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Return the parameters that stand directly in a module, in the order of their definition."""
        try:
            found = self._model.get_submodule(module)
        except AttributeError:
            return ()
        return tuple(f"{module}.{name}" for name, _ in found.named_parameters(recurse=False))

    @cached_property
    def _n_parts(self) -> Counter[str | None]:
        """How many stored tensors each parameter is read from."""
        return Counter(self._stored.values())

    @cached_property
    def _language(self) -> str | None:
        """Where the language part of a model of images and text stands, e.g. `model.language_model`."""
        text = self._model.config.get_text_config()
        if text is self._model.config:
            return None
        return next((path for path, module in self._model.named_modules() if _config(module) is text), None)


def _by_parameter(parameters: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return the names that become each parameter."""
    found: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter is not None:
            found.setdefault(parameter, []).append(name)
    return found


def _config(module: Any) -> Any:
    return getattr(module, "config", None) if hasattr(module, "base_model_prefix") else None


def left_out_by_transformers(folder: Path) -> Callable[[str], bool]:
    """Return what tells whether transformers leaves a tensor out of an architecture when it loads one.

    E.g. the layers for multi-token prediction of DeepSeek-V3, which therefore no fine-tune has.
    """
    try:
        patterns = model_class(folder)._keys_to_ignore_on_load_unexpected or ()
    except MergetuneError:  # an architecture that transformers does not know
        patterns = ()
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def stored_views(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a transformers model under the names, and in the parts, that they are stored in.

    All but those that transformers computes with in another form than is stored are views.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with _NoCopies():
        views: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    return views


class _NoCopies(TorchFunctionMode):
    """Leave tensors that would be copied into contiguous memory as the views that they are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))
