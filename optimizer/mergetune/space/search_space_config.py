"""The file of a search space: method, layer groups, and the ranges of their coefficients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import Regex, Strict, read_yaml, refuse_unknown
from mergetune.space.method_table import METHODS, PARAMETER_NAMES, MethodName, Parameter
from mergetune.space.recipe import (
    OUTSIDE_LAYERS,
    ROLES,
    LayerGroup,
    Role,
    assign_groups,
    check_options,
    count_layers,
    single_layers,
)

# Of the groups that slopes are followed in.
Grain = Literal["auto", "search_space", "layers", "attention_mlp", "tensors"]

_MOST_TENSORS = 2000  # each of which may be a group of its own


class Range(Strict):
    """An interval of a coefficient; `shared` gives all experts one value, `step` makes it a grid."""

    low: float
    high: float
    step: float | None = Field(None, gt=0)
    shared: bool = False

    @model_validator(mode="after")
    def _is_interval(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"`low <= high` must hold (low={self.low}, high={self.high})")
        return self


Coefficient = Range | float  # a number is held fixed


class Ranges(Strict):
    """The ranges of coefficients, by the names of `METHODS`; where one is absent, a wider scope's holds."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Coefficient]

    @model_validator(mode="before")
    @classmethod
    def _has_known_keys(cls, data: object) -> object:
        if isinstance(data, dict):
            refuse_unknown(data, (*cls.model_fields, *PARAMETER_NAMES))
        return data

    @property
    def ranges(self) -> Mapping[str, Coefficient]:
        """The ranges given, by the coefficient's name."""
        return self.__pydantic_extra__


def default_range(parameter: Parameter) -> Coefficient:
    """Return what is searched, or held, where a search space says nothing."""
    default = parameter.default
    if isinstance(default, float):
        return default
    return Range(low=default.low, high=default.high, step=default.step)


class SpaceGroup(Ranges):
    """A layer group of a search space: selectors (as in a recipe, with `depth` as well) and ranges.

    `depth` is a half-open interval of the relative depth in [0, 1]: layer i of n stands at (i + ½)/n.
    """

    name: str
    depth: tuple[float, float] | None = None
    layers: tuple[int, int] | None = None
    roles: tuple[Role, ...] | None = None
    match: Regex | None = None

    @model_validator(mode="after")
    def _has_one_depth(self) -> SpaceGroup:
        if self.depth is not None and self.layers is not None:
            raise ValueError(f"group `{self.name}` must have `depth` or `layers`, not both")
        if self.depth is not None and not 0 <= self.depth[0] < self.depth[1] <= 1:
            raise ValueError(f"0 <= depth[0] < depth[1] <= 1 must hold in group `{self.name}`")
        return self

    def resolve(self, n_layers: int) -> LayerGroup | None:
        """Return the layer group for a model of `n_layers`; None where no layer stands in `depth`."""
        layers = self.layers
        if self.depth is not None:
            low, high = self.depth
            inside = [i for i in range(n_layers) if low <= (i + 0.5) / n_layers < high]
            if not inside:
                return None
            layers = (inside[0], inside[-1])
        return LayerGroup(name=self.name, layers=layers, roles=self.roles, match=self.match)


class SearchSpaceConfig(Ranges):
    """The file of a search space: a method, and either layer groups or anchors over depth.

    With `anchors: n`, each coefficient is given at n points equally spaced over the layers and
    interpolated linearly between them; tensors before the layers take the first anchor's value,
    those after them (final norm, head) the last one's.
    """

    description: str
    method: MethodName
    options: dict[str, str] | None = None
    groups: tuple[SpaceGroup, ...] = ()
    anchors: int | None = Field(None, ge=2)
    _file: str = PrivateAttr("the search space")  # for messages

    @field_validator("options")
    @classmethod
    def _are_of_method(cls, options: dict[str, str] | None, info: ValidationInfo) -> dict[str, str] | None:
        return check_options(options, info)

    @model_validator(mode="after")
    def _fits_its_method(self) -> SearchSpaceConfig:
        for scope in (self, *self.groups):
            for name, coefficient in scope.ranges.items():
                parameter = METHODS[self.method].parameter(name)
                if parameter is None:
                    raise ValueError(f"`{self.method}` has no `{name}`")
                for end in _ends(coefficient):
                    if end not in parameter.valid:
                        raise ValueError(f"`{name}` ∈ {parameter.valid} must hold, but got {end:g}")
        return self

    @model_validator(mode="after")
    def _has_groups(self) -> SearchSpaceConfig:
        if bool(self.groups) == bool(self.anchors):
            raise ValueError("a search space must have either `groups` or `anchors`")
        names = [group.name for group in self.groups]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"layer groups must have distinct names; given twice: {', '.join(twice)}")
        return self


def _ends(coefficient: Coefficient) -> tuple[float, ...]:
    return (coefficient.low, coefficient.high) if isinstance(coefficient, Range) else (coefficient,)


def read_search_space(path: Path) -> SearchSpaceConfig:
    """Read a search space from YAML; raises `MergetuneError` as `read_yaml` does."""
    config = read_yaml(path, SearchSpaceConfig)
    config._file = str(path)
    return config


def finer(config: SearchSpaceConfig, grain: Grain, tensor_names: Sequence[str]) -> SearchSpaceConfig:
    """Return a search space of layer groups with smaller ones, each within one of them and of its ranges.

    `auto` is a group for each tensor; for attention and MLP of each layer in models of very many tensors, and
    the space as it is where it has anchors.

    Raises:
        MergetuneError: there are too many tensors for a group each.
    """
    if grain == "auto":
        grain = "tensors" if len(tensor_names) <= _MOST_TENSORS else "attention_mlp"
        grain = "search_space" if config.anchors is not None else grain
    if grain == "search_space":
        return config
    pieces = _single_tensors(tensor_names) if grain == "tensors" else single_layers(tensor_names)
    if grain == "attention_mlp":
        pieces = [part for piece in pieces for part in _attention_and_others(piece)]
    piece_of = assign_groups(pieces, tensor_names)
    groups = {group.name: group for group in layer_groups(config, tensor_names)}
    group_of = assign_groups(groups.values(), tensor_names)
    ranges = {group.name: group.ranges for group in config.groups}
    found: list[SpaceGroup] = []
    for piece in pieces:
        within: dict[str, list[str]] = {}  # the piece's tensors by the group that they are in
        for name in tensor_names:
            if piece_of.get(name) is piece:
                within.setdefault(group_of[name].name, []).append(name)
        for name, names in within.items():
            own = piece if len(within) == 1 else _common(piece, groups[name], names)
            found.append(SpaceGroup.model_validate({**own.model_dump(exclude_none=True), **ranges[name]}))
    towers = [each for each in groups.values() if "vision" in (each.roles or ())]
    for group in towers:  # as coarse as they are
        own = group.model_copy(update={"name": f"vision-{group.name}", "roles": ("vision",)})
        found.append(SpaceGroup.model_validate({**own.model_dump(exclude_none=True), **ranges[group.name]}))
    return config.model_copy(update={"groups": tuple(found)})


def _single_tensors(tensor_names: Sequence[str]) -> list[LayerGroup]:
    if len(tensor_names) > _MOST_TENSORS:
        raise MergetuneError(
            f"`grain: tensors` takes models of up to {_MOST_TENSORS} tensors, but this one has "
            f"{len(tensor_names)}. Take `grain: attention_mlp`, or `layers`."
        )
    return [LayerGroup(name=name.replace(".", "-"), match=f"^{re.escape(name)}$") for name in tensor_names]


def _attention_and_others(piece: LayerGroup) -> list[LayerGroup]:
    """Return attention and all else of a layer; what lies outside the layers as it is."""
    if piece.layers is None:
        return [piece]
    i, _ = piece.layers
    return [
        LayerGroup(name=f"attention{i}", layers=(i, i), roles=("attention",)),
        LayerGroup(name=f"others{i}", layers=(i, i), roles=_all_but("attention")),
    ]


def _common(piece: LayerGroup, group: LayerGroup, tensor_names: Sequence[str]) -> LayerGroup:
    """Return the layer group of the tensors that a piece and a layer group have in common: these."""
    match = piece.match or group.match
    if piece.match and group.match:  # of what lies outside the layers, few
        match = f"^({'|'.join(map(re.escape, tensor_names))})$"
    roles = [
        role for role in ROLES if all(each.roles is None or role in each.roles for each in (piece, group))
    ]
    return LayerGroup(
        name=f"{piece.name}-{group.name}",
        layers=piece.layers,
        roles=tuple(roles) if piece.roles or group.roles else None,
        match=match,
    )


def layer_groups(config: SearchSpaceConfig, tensor_names: Sequence[str]) -> list[LayerGroup]:
    """Return the layer groups of a search space for a model with these tensors.

    Raises:
        MergetuneError: a tensor falls into no group or several, or the model has no layers to
            interpolate over.
    """
    if config.anchors is not None:
        groups = _anchor_groups(tensor_names)
    else:
        n_layers = count_layers(tensor_names)
        resolved = [group.resolve(n_layers) for group in config.groups]
        groups = [group for group in resolved if group is not None]
    try:
        assign_groups(groups, tensor_names)
    except MergetuneError as error:
        raise MergetuneError(f"{config._file}: {error}") from error
    return groups


def _anchor_groups(tensor_names: Sequence[str]) -> list[LayerGroup]:
    """One group per layer, one before the layers and one after them."""
    _outside, *layers = single_layers(tensor_names)
    if not layers:
        raise MergetuneError("`anchors` needs a model with numbered layers. Use `groups` instead.")
    return [
        LayerGroup(name="before", roles=("embeddings",), match=OUTSIDE_LAYERS),
        *layers,
        LayerGroup(name="after", roles=_all_but("embeddings"), match=OUTSIDE_LAYERS),
    ]


def _all_but(role: Role) -> tuple[Role, ...]:
    return tuple(each for each in ROLES if each not in (role, "vision"))
