"""The recipe: plain data that says which merge, with which coefficient in which layer group."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import Regex, Strict, read_yaml, refuse_unknown, write_yaml
from mergetune.space.method_table import METHODS, PARAMETER_NAMES, MethodName, full_options
from mergetune.space.stack import ModelReference

Role = Literal["embeddings", "attention", "mlp", "norms", "head", "other", "vision"]
ROLES: tuple[Role, ...] = get_args(Role)

# A tensor's role, from its name alone, so that no list of architectures is needed. The order counts:
# `post_attention_layernorm` is a norm, `self_attn.out_proj` is attention, `mixer.up_proj` an MLP and
# any other `mixer` a state-space layer, which mixes positions as attention does. A norm is named by the
# tensor's own module: DBRX keeps its attention inside `norm_attn_norm`. All of a tower that reads images or
# sound, and of what projects from it, is `vision`.
_ROLE_PATTERNS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (
        "vision",
        re.compile(
            r"(^|[._])(vision|visual|image|img|video|audio|speech|mm|multi_?modal|modality|connector|aligner"
            r"|resampler|qformer|vpm|apm)[._]"
        ),
    ),
    ("norms", re.compile(r"(norm|(^|[._])ln(_|\d|(?=\.)))[^.]*(\.[^.]+)?$", re.IGNORECASE)),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.|^output\.")),
    ("embeddings", re.compile(r"embed|(^|\.)(wte|wpe)\.")),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_proj\.")),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_forward|expert|moe|router|(^|\.)gate\.|(^|\.)(gate|up|down)_proj\.|(^|\.)fc\d?\."
        ),
    ),
    ("attention", re.compile(r"mixer|mamba|ssm|(^|\.)conv\.")),
)
_LANGUAGE = tuple(role for role in ROLES if role != "vision")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor stands in the model: its layer (None outside the layers) and its role.

    The layers of a vision tower are counted by themselves.
    """

    layer: int | None
    role: Role


@functools.cache
def tensor_place(name: str) -> TensorPlace:
    """Read layer and role off a tensor's name, e.g. `model.layers.3.mlp.up_proj.weight`."""
    layer = _LAYER.search(name)
    role: Role = next((role for role, pattern in _ROLE_PATTERNS if pattern.search(name)), "other")
    return TensorPlace(int(layer.group(1)) if layer else None, role)


def count_layers(names: Iterable[str]) -> int:
    """Count the layers of a model from its tensor names, a vision tower's left out."""
    places = map(tensor_place, names)
    return 1 + max((p.layer for p in places if p.layer is not None and p.role != "vision"), default=-1)


OUTSIDE_LAYERS = r"^(?!(?:.*\.)?\d+\.)"  # matches names without a numbered part


class LayerGroup(Strict):
    """A named set of tensors that share coefficients; a tensor belongs if every selector given takes it.

    `layers` holds the first and the last layer (both included); `match` is a regular expression
    searched for in the tensor's name. Without any selector the group takes every tensor. What has the role
    `vision` belongs only where `roles` names it, and its layers are the tower's own.
    """

    name: str
    layers: tuple[int, int] | None = None
    roles: tuple[Role, ...] | None = None
    match: Regex | None = None

    def takes(self, name: str) -> bool:
        """Say whether the tensor `name` belongs to this group."""
        place = tensor_place(name)
        if self.layers is not None:
            first, last = self.layers
            if place.layer is None or not first <= place.layer <= last:
                return False
        if place.role not in (self.roles or _LANGUAGE):
            return False
        return self.match is None or re.search(self.match, name) is not None


def single_layers(names: Iterable[str]) -> list[LayerGroup]:
    """Return a layer group for each layer, in the order of depth, after one for what is outside them."""
    layers = [LayerGroup(name=f"layer{i}", layers=(i, i)) for i in range(count_layers(names))]
    return [LayerGroup(name="outside", match=OUTSIDE_LAYERS), *layers]


G = TypeVar("G", bound=LayerGroup)


class RecipeGroup(LayerGroup):
    """A layer group with its coefficients, by the names of `METHODS`.

    Each is a mapping from expert to number, or one number where the method has one for all experts.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, float] | float]

    @model_validator(mode="before")
    @classmethod
    def _has_known_keys(cls, data: object) -> object:
        if isinstance(data, dict):
            refuse_unknown(data, (*cls.model_fields, *PARAMETER_NAMES))
        return data

    @property
    def coefficients(self) -> Mapping[str, dict[str, float] | float]:
        """The coefficients by name, e.g. `{"lambda": {"tools": 0.7, "persona": 0.4}}`."""
        return self.__pydantic_extra__

    def per_expert(self, parameter: str) -> dict[str, float]:
        """Return a coefficient that each expert has its own of."""
        values = self.coefficients[parameter]
        assert isinstance(values, dict)  # MergeRecipe
        return values

    def single(self, parameter: str) -> float:
        """Return a coefficient that is one for all experts."""
        value = self.coefficients[parameter]
        assert isinstance(value, float)  # MergeRecipe
        return value


class Source(Strict):
    """Where a model comes from, and the SHA-256 of its weights, so that a recipe names its inputs."""

    path: ModelReference
    digest: str | None = None


class MergeRecipe(Strict):
    """Everything that determines the merged weights; the file `recipe.yaml`."""

    method: MethodName
    base: Source
    experts: dict[str, Source] = Field(min_length=1)
    groups: tuple[RecipeGroup, ...] = Field(min_length=1)
    options: dict[str, str] | None = None
    seed: int = 0

    @field_validator("options")
    @classmethod
    def _are_of_method(cls, options: dict[str, str] | None, info: ValidationInfo) -> dict[str, str] | None:
        return check_options(options, info)

    @model_validator(mode="after")
    def _is_complete(self) -> MergeRecipe:
        check_expert_count(self.method, len(self.experts))
        for group in self.groups:
            _check_coefficients(group, self.method, list(self.experts))
        return self

    @property
    def choices(self) -> dict[str, str]:
        """The method's options, with the defaults of those that are not given."""
        return full_options(self.method, self.options or {})

    @property
    def digest(self) -> str:
        """SHA-256 of what determines the weights (paths left out: they do not)."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for source in [data["base"], *data["experts"].values()]:
            del source["path"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @classmethod
    def of_one_group(
        cls, method: MethodName, base: Source, experts: Mapping[str, Source], coefficients: Mapping[str, Any]
    ) -> MergeRecipe:
        """Return the recipe whose coefficients are the same for all tensors."""
        group = RecipeGroup.model_validate({"name": "all", **coefficients})
        return cls(method=method, base=base, experts=dict(experts), groups=(group,))

    @classmethod
    def of_base(cls, base: Source, experts: Mapping[str, Source]) -> MergeRecipe:
        """Return the recipe that gives the base back, bit by bit."""
        return cls.of_one_group("task_arithmetic", base, experts, {"lambda": dict.fromkeys(experts, 0.0)})

    @classmethod
    def read(cls, path: Path) -> MergeRecipe:
        """Read a recipe from YAML; raises `MergetuneError` as `read_yaml` does."""
        return read_yaml(path, cls)

    def write(self, path: Path) -> None:
        """Write the recipe as YAML; reading it back gives an equal recipe."""
        write_yaml(path, self)


def check_options(options: dict[str, str] | None, info: ValidationInfo) -> dict[str, str] | None:
    """Return options if they are those of the method, as a validator of a field after `method` does."""
    method: MethodName | None = info.data.get("method")  # absent where it is itself in error
    if method is not None and options:
        if not METHODS[method].options:
            raise ValueError(f"`{method}` has no options; leave them out")
        refuse_unknown(options, [option.name for option in METHODS[method].options])
        full_options(method, options)
    return options


def check_expert_count(method: MethodName, count: int) -> None:
    """Raise `ValueError` if the method does not take this number of experts."""
    low, high = METHODS[method].min_experts, METHODS[method].max_experts
    if not low <= count <= (high or count):
        wanted = f"exactly {low}" if low == high else f"at least {low}"
        raise ValueError(f"`{method}` merges {wanted} expert{'' if low == 1 else 's'}, but got {count}")


def _check_coefficients(group: RecipeGroup, method: MethodName, experts: list[str]) -> None:
    """Check that the group has each coefficient its method reads, for each expert, and no other."""
    parameters = {parameter.name: parameter for parameter in METHODS[method].parameters}
    for name in dict.fromkeys((*parameters, *group.coefficients)):
        parameter, given = parameters.get(name), group.coefficients.get(name)
        if parameter is None or given is None:
            if parameter is None:
                raise ValueError(f"`{method}` has no coefficient `{name}`, which group `{group.name}` gives")
            raise ValueError(f"`{method}` needs the coefficient `{name}`, which group `{group.name}` lacks")
        _check_shape(f"`{name}` of `{group.name}`", given, experts if parameter.is_per_expert else None)
        for value in given.values() if isinstance(given, dict) else [given]:
            if value not in parameter.valid:
                raise ValueError(f"`{name}` ∈ {parameter.valid} must hold in `{group.name}`, but got {value}")
    if METHODS[method].divides_by_sum and sum(group.per_expert("lambda").values()) == 0:
        raise ValueError(f"`{method}` divides by the sum of the lambdas, which is 0 in `{group.name}`")


def _check_shape(what: str, given: dict[str, float] | float, experts: list[str] | None) -> None:
    """Check that a coefficient is one number, or where `experts` are named one number for each."""
    if experts is None and isinstance(given, dict):
        raise ValueError(f"{what} must be one number, but is one for each of {', '.join(given)}")
    if experts is not None and (not isinstance(given, dict) or set(given) != set(experts)):
        found = ", ".join(given) if isinstance(given, dict) else "all of them at once"
        raise ValueError(f"{what} must be given for {', '.join(experts)}, but is for {found or 'none'}")


def assign_groups(groups: Iterable[G], names: Iterable[str]) -> dict[str, G]:
    """Return the one group of every tensor; what has the role `vision` may have none and stays the base's.

    Raises:
        MergetuneError: a tensor falls into no group or into several; the tensors are named.
    """
    names = list(names)
    patterns = {f"^{re.escape(name)}$" for name in names}
    of_one: dict[str | None, list[G]] = {}  # by the pattern: of single tensors there may be thousands
    others: list[G] = []
    for group in groups:
        (of_one.setdefault(group.match, []) if group.match in patterns else others).append(group)
    assigned: dict[str, G] = {}
    orphans: list[str] = []
    for name in names:
        asked = (*others, *of_one.get(f"^{re.escape(name)}$", ()))
        takers = [group for group in asked if group.takes(name)]
        if len(takers) > 1:
            raise MergetuneError(
                f"Every tensor must fall into exactly one layer group, but `{name}` falls into "
                f"{' and '.join(f'`{group.name}`' for group in takers)}. Make their selectors disjoint."
            )
        if takers:
            assigned[name] = takers[0]
        elif tensor_place(name).role != "vision":
            orphans.append(name)
    if orphans:
        shown = ", ".join(orphans[:5]) + (f" and {len(orphans) - 5} more" if len(orphans) > 5 else "")
        raise MergetuneError(
            f"Every tensor must fall into exactly one layer group, but none takes {shown}. "
            "Add a group for them (`match: …` takes a regular expression)."
        )
    return assigned
