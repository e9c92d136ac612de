"""The recipe: plain data that says which merge, with which coefficient in which layer group."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from optimizer.errors import MergetuneError
from optimizer.yaml_io import Regex, Strict, read_yaml, write_yaml

Role = Literal["embeddings", "attention", "mlp", "norms", "head"]
MethodName = Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"]


@dataclass(frozen=True)
class Method:
    """What a merge method is, which coefficients it reads and how many experts it takes."""

    summary: str
    parameters: tuple[str, ...]
    min_experts: int = 1
    max_experts: int | None = None


METHODS: dict[MethodName, Method] = {
    "linear": Method("weighted average of the experts, weights normalized to 1", ("lambda",)),
    "task_arithmetic": Method("base + Σ lambda · task vector", ("lambda",)),
    "ties": Method("trim by magnitude, elect signs, average what agrees", ("lambda", "density")),
    "dare_linear": Method("drop at random, rescale by 1/density, add", ("lambda", "density")),
    "dare_ties": Method("drop at random, rescale, elect signs", ("lambda", "density")),
    "slerp": Method("arc from the first expert (t=0) to the second (t=1)", ("t",), 2, 2),
}

# A tensor's role, from its name alone, so that no list of architectures is needed. The order counts:
# `post_attention_layernorm` is a norm, `self_attn.out_proj` is attention.
_ROLE_PATTERNS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("norms", re.compile(r"norm|(^|[._])ln(_|\d|\.)")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.")),
    ("embeddings", re.compile(r"embed|(^|\.)(wte|wpe)\.")),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_proj\.")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|expert|(^|\.)(gate|up|down)_proj\.|(^|\.)fc\d?\.")),
)
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor stands in the model: its layer (None outside the layers) and its role."""

    layer: int | None
    role: Role | None


def tensor_place(name: str) -> TensorPlace:
    """Read layer and role off a tensor's name, e.g. `model.layers.3.mlp.up_proj.weight`."""
    layer = _LAYER.search(name)
    role = next((role for role, pattern in _ROLE_PATTERNS if pattern.search(name)), None)
    return TensorPlace(int(layer.group(1)) if layer else None, role)


def count_layers(names: Iterable[str]) -> int:
    """Count the layers of a model from its tensor names."""
    layers = [place.layer for name in names if (place := tensor_place(name)).layer is not None]
    return 1 + max((layer for layer in layers if layer is not None), default=-1)


class LayerGroup(Strict):
    """A named set of tensors that share coefficients; a tensor belongs if every selector given takes it.

    `layers` holds the first and the last layer (both included); `match` is a regular expression
    searched for in the tensor's name. Without any selector the group takes every tensor.
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
        if self.roles is not None and place.role not in self.roles:
            return False
        return self.match is None or re.search(self.match, name) is not None


G = TypeVar("G", bound=LayerGroup)


class RecipeGroup(LayerGroup):
    """A layer group with its coefficients.

    `lambda` and `density` hold one value per expert; `t` is SLERP's position between the first
    expert (0) and the second (1). `METHODS` says which of them a method reads.
    """

    lambdas: dict[str, float] = Field(default_factory=dict, alias="lambda")
    densities: dict[str, float] = Field(default_factory=dict, alias="density")
    t: float | None = Field(None, ge=0.0, le=1.0)

    @field_validator("densities")
    @classmethod
    def _is_fraction(cls, densities: dict[str, float]) -> dict[str, float]:
        if not all(0.0 < density <= 1.0 for density in densities.values()):
            raise ValueError("0 < density <= 1 must hold")
        return densities


class Source(Strict):
    """Where a model comes from, and the SHA-256 of its weights, so that a recipe names its inputs."""

    path: str
    digest: str | None = None


class MergeRecipe(Strict):
    """Everything that determines the merged weights; the file `recipe.yaml`."""

    method: MethodName
    base: Source
    experts: dict[str, Source] = Field(min_length=1)
    groups: tuple[RecipeGroup, ...] = Field(min_length=1)
    seed: int = 0

    @model_validator(mode="after")
    def _is_complete(self) -> MergeRecipe:
        method = METHODS[self.method]
        count = len(self.experts)
        if not method.min_experts <= count <= (method.max_experts or count):
            raise ValueError(f"`{self.method}` merges exactly {method.min_experts} experts")
        for group in self.groups:
            _check_coefficients(group, self.method, list(self.experts))
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of what determines the weights (paths left out: they do not)."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for source in [data["base"], *data["experts"].values()]:
            del source["path"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> MergeRecipe:
        """Read a recipe from YAML; raises `MergetuneError` as `read_yaml` does."""
        return read_yaml(path, cls)

    def write(self, path: Path) -> None:
        """Write the recipe as YAML; reading it back gives an equal recipe."""
        write_yaml(path, self)


def _check_coefficients(group: RecipeGroup, method: MethodName, experts: list[str]) -> None:
    """Check that the group has each coefficient its method reads, for each expert, and no other."""
    parameters = METHODS[method].parameters
    if ("t" in parameters) != (group.t is not None):
        raise ValueError(
            f"`t` must {'' if 't' in parameters else 'not '}stand in `{group.name}` of `{method}`"
        )
    for parameter, values in (("lambda", group.lambdas), ("density", group.densities)):
        wanted = experts if parameter in parameters else []
        if set(values) != set(wanted):
            raise ValueError(
                f"`{parameter}` must stand in `{group.name}` of `{method}` for "
                f"{', '.join(wanted) or 'none'}, but it does for {', '.join(values) or 'none'}"
            )
    if method == "linear" and sum(group.lambdas.values()) == 0:
        raise ValueError(f"`linear` divides by the sum of the lambdas, which is 0 in `{group.name}`")


def assign_groups(groups: Iterable[G], names: Iterable[str]) -> dict[str, G]:
    """Return the one group of every tensor.

    Raises:
        MergetuneError: a tensor falls into no group or into several; the tensors are named.
    """
    groups = list(groups)
    assigned: dict[str, G] = {}
    orphans: list[str] = []
    for name in names:
        takers = [group for group in groups if group.takes(name)]
        if len(takers) > 1:
            raise MergetuneError(
                f"Every tensor must fall into exactly one layer group, but `{name}` falls into "
                f"{' and '.join(f'`{group.name}`' for group in takers)}. Make their selectors disjoint."
            )
        if takers:
            assigned[name] = takers[0]
        else:
            orphans.append(name)
    if orphans:
        shown = ", ".join(orphans[:5]) + (f" and {len(orphans) - 5} more" if len(orphans) > 5 else "")
        raise MergetuneError(
            f"Every tensor must fall into exactly one layer group, but none takes {shown}. "
            "Add a group for them (`match: …` takes a regular expression)."
        )
    return assigned
