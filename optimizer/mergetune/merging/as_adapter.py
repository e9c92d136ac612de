"""A merge as one adapter: exact from the experts' factors, or the nearest of a rank, layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.merging.inputs import Inputs
from mergetune.merging.merger import Merger
from mergetune.merging.methods import RULES, Coefficients
from mergetune.space.method_table import MethodName
from mergetune.space.recipe import MergeRecipe, RecipeGroup, assign_groups
from mergetune.weights.adapter_writer import served_rank
from mergetune.weights.architecture import Layer
from mergetune.weights.checkpoint import Checkpoint, is_embeddings
from mergetune.weights.low_rank import LowRank, nearest, stacked
from mergetune.weights.tensor_files import shortened

# Methods whose merge is θ₀ + Σ wᵢ τᵢ, and the options that this holds for.
_LINEAR: Mapping[MethodName, Mapping[str, str]] = {
    "task_arithmetic": {},
    "linear": {},
    "model_stock": {"granularity": "tensor"},
    "nuslerp": {"origin": "base", "granularity": "tensor"},
    "multislerp": {"origin": "base"},
}
_ROUNDING = 1e-6  # the relative error that is no more than float32's
_NUMBER = re.compile(r"\.\d+\.")
_NO_LAYER = "no adapter can change what is no linear layer, or embeddings that are the head, too"
_REMEDY = (
    "Give a rank (--rank, in a study `export: {adapter: {rank: 32}}`): the nearest adapter of that rank is "
    "written, what no adapter can hold stays the base's, and the error is said. Or write a model."
)


@dataclass(frozen=True)
class Fit:
    """How near an adapter comes to the merge in one tensor of the base.

    Attributes:
        name: the tensor.
        rank: that of its update; 0: the tensor stays the base's.
        norm: ‖ΔW‖, the Frobenius norm of what the merge adds.
        error: ‖ΔW − B A‖.
    """

    name: str
    rank: int
    norm: float
    error: float

    @property
    def share(self) -> float:
        """The relative error, ‖ΔW − B A‖ / ‖ΔW‖."""
        return relative_error([self])


def relative_error(fits: Sequence[Fit]) -> float:
    """Return ‖ΔW − B A‖ / ‖ΔW‖ over several tensors."""
    norm = math.hypot(*(fit.norm for fit in fits))
    return math.hypot(*(fit.error for fit in fits)) / norm if norm else 0.0


@dataclass(frozen=True)
class AdapterMerge:
    """A merge as an adapter: the updates of layers, and how near they come to the merge in each tensor."""

    updates: Mapping[Layer, LowRank]
    fits: tuple[Fit, ...]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost but by rounding."""
        return self.share < _ROUNDING

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(fit.rank for fit in self.fits)

    @property
    def share(self) -> float:
        """The relative Frobenius error in all."""
        return relative_error(self.fits)

    @property
    def by_kind(self) -> dict[str, list[Fit]]:
        """The fits of tensors whose names differ in the number of a layer alone."""
        found: dict[str, list[Fit]] = {}
        for fit in self.fits:
            found.setdefault(_NUMBER.sub(".*.", fit.name), []).append(fit)
        return found

    @property
    def summary(self) -> tuple[str, ...]:
        """What it is and what serves it, in sentences."""
        ranks = {fit.rank for fit in self.fits if fit.rank}
        span = f"rank {self.rank}" if len(ranks) == 1 else f"ranks {min(ranks)} to {self.rank}"
        lines = [f"It changes {len(self.updates)} layers, {span}: {self._nearness}"]
        if lost := [fit for fit in self.fits if not fit.rank]:
            share = math.hypot(*(fit.error for fit in lost)) / math.hypot(*(fit.norm for fit in self.fits))
            names = shortened([fit.name for fit in lost], 3)
            lines.append(
                f"{len(lost)} tensors that the merge changes are in no adapter and stay the base's "
                f"({names}); of the relative error that is {share:.2%}."
            )
        served = served_rank(self.rank)
        lines.append(
            f"vLLM serves it with `--enable-lora --max-lora-rank {served}`."
            if served
            else f"warning: vLLM takes ranks up to 512, and this one is {self.rank}: give a smaller --rank."
        )
        return tuple(lines)

    @property
    def _nearness(self) -> str:
        if self.is_exact:
            return "exact."
        worst = max((fit for fit in self.fits if fit.rank), key=lambda fit: fit.share)
        return f"relative Frobenius error {self.share:.2%}, at most {worst.share:.2%} (`{worst.name}`)."


def check_adapter(inputs: Inputs, method: MethodName, options: Mapping[str, str], rank: int | None) -> None:
    """Raise `MergetuneError` where merges of these models by a method, and their averages, are no adapter.

    Nothing is computed, so that a study can know it before its search.
    """
    layers = _layers(inputs)
    if rank is not None:
        return
    if not _is_linear(method, options):
        raise MergetuneError(_explain({_not_linear(method): []}))
    sources = inputs.base_source, inputs.expert_sources
    lambdas = dict.fromkeys(inputs.expert_sources, 1.0)
    average = MergeRecipe.of_one_group("task_arithmetic", *sources, {"lambda": lambdas})
    _refuse(_exact_updates(inputs, average, layers)[1])


def merge_as_adapter(
    inputs: Inputs,
    recipe: MergeRecipe,
    rank: int | None = None,
    at_work: Callable[[str], object] = lambda _: None,
) -> AdapterMerge:
    """Return the merge of `recipe` as an adapter of the base.

    A sum of plain products is taken as it is: its factors side by side, and with a rank cut by a singular
    value decomposition of them. With a rank, anything else is merged one tensor at a time, in float32, and
    what is added to the base is cut.

    Args:
        inputs: the models of the recipe.
        recipe: what to merge.
        rank: the largest rank of a layer; None: whatever it takes to be exact.
        at_work: is told what is done.

    Raises:
        MergetuneError: the merge is no adapter, or without a rank not exactly one.
    """
    layers = _layers(inputs)
    exact, others = _exact_updates(inputs, recipe, layers)
    if rank is None:
        _refuse(others)
    updates: dict[str, LowRank] = {}
    fits: dict[str, Fit] = {}
    for name, update in exact.items():
        norm = _checked(update.norm, name)
        updates[name], error = (update, 0.0) if rank is None else update.cut(rank)
        fits[name] = Fit(name, updates[name].rank, norm, error)
    base = _WideBase(inputs.base, list(others))
    for name, merged in Merger(base, inputs.experts, is_for_one=True).merge(recipe) if others else ():
        at_work(f"the nearest adapter: {name}")
        added, layer = merged - base.view(name), layers.get(name)
        norm = _checked(float(torch.linalg.vector_norm(added, dtype=torch.float64)), name)
        if norm and layer is not None and rank is not None:
            updates[name], error = nearest(added, rank)
            fits[name] = Fit(name, updates[name].rank, norm, error)
        elif norm:
            fits[name] = Fit(name, 0, norm, norm)
    if not updates:
        raise MergetuneError("An adapter must change a layer, but this merge changes none. Write a model.")
    in_order = [name for name in inputs.base.names if name in fits]
    return AdapterMerge(
        {layers[name]: _of_layer(layers[name], updates[name]) for name in in_order if name in updates},
        tuple(fits[name] for name in in_order),
    )


@dataclass(frozen=True)
class _WideBase:
    """Some tensors of a base in the precision that merging computes in, so that no result is rounded."""

    base: Checkpoint
    names: Sequence[str]

    def view(self, name: str) -> Tensor:
        """Return a tensor."""
        view = self.base.view(name)
        return view.float() if view.is_floating_point() else view


def _layers(inputs: Inputs) -> dict[str, Layer]:
    """Return the layers that an adapter can change, by the base's tensor that is their weight.

    Embeddings that are the head, too, are none: an adapter would change one of the two.
    """
    base = inputs.base
    if inputs.given is not None:
        raise MergetuneError(
            f"{inputs.given}: an adapter must have the base's tokens, but `vocabulary: mean` adds the "
            "experts'. Leave them out with `vocabulary: base`, or write a model."
        )
    if base.architecture is None:
        raise MergetuneError(
            f"{base.folder}: an adapter must name layers of transformers' model, but transformers does not "
            "know this architecture. Write a model."
        )
    found = {name: base.architecture.layer(name) for name in base.names}
    return {
        name: layer
        for name, layer in found.items()
        if layer is not None and not (base.is_tied and is_embeddings(name))
    }


def _exact_updates(
    inputs: Inputs, recipe: MergeRecipe, layers: Mapping[str, Layer]
) -> tuple[dict[str, LowRank], dict[str, str]]:
    """Return the sums of the experts' own factors by tensor; and why other tensors may change otherwise."""
    experts = {expert.name: expert for expert in inputs.experts}
    groups = assign_groups(recipe.groups, inputs.base.names)
    groups = {name: group for name, group in groups.items() if inputs.base.dtype(name).is_floating_point}
    if not _is_linear(recipe.method, recipe.choices):
        return {}, dict.fromkeys(groups, _not_linear(recipe.method))
    exact: dict[str, LowRank] = {}
    others: dict[str, str] = {}
    for name, group in groups.items():
        changed = [each for each in recipe.experts if name in experts[each].targets]
        weights = _weights(inputs.merger, recipe, name, group) if changed else {}
        changed = [each for each in changed if weights[each] != 0]
        factors = {each: own for each in changed if (own := experts[each].factors(name)) is not None}
        if not changed:
            continue
        if name not in layers:
            others[name] = _NO_LAYER
        elif lacking := [each for each in changed if each not in factors]:
            others[name] = f"`{lacking[0]}` adds no plain product here, as a full fine-tune or DoRA does not"
        else:
            exact[name] = stacked([(weights[each], own) for each, own in factors.items()])
    return exact, others


def _is_linear(method: MethodName, options: Mapping[str, str]) -> bool:
    return method in _LINEAR and all(options[key] == value for key, value in _LINEAR[method].items())


def _weights(merger: Merger, recipe: MergeRecipe, name: str, group: RecipeGroup) -> Mapping[str, float]:
    """Return the weight of each expert's task vector in a tensor that the experts change."""
    if recipe.method == "task_arithmetic":
        return group.per_expert("lambda")
    if recipe.method == "linear":
        lambdas = group.per_expert("lambda")
        return {expert: value / sum(lambdas.values()) for expert, value in lambdas.items()}
    operands = merger.operands(recipe, name)
    step = RULES[recipe.method](operands, Coefficients(group.coefficients, recipe.choices, recipe.seed))
    return {each: float(w) for each, w in zip(operands.changed, step.numbers.lambdas, strict=True)}


def _of_layer(layer: Layer, update: LowRank) -> LowRank:
    """Return the update of a layer's stored tensor as that of its weight (out, in)."""
    return update if layer.kind == "linear" else update.transposed


def _checked(norm: float, name: str) -> float:
    if not math.isfinite(norm):
        raise MergetuneError(f"The merge makes `{name}` infinite or NaN: its coefficients are too large.")
    return norm


def _not_linear(method: str) -> str:
    return f"`{method}`, with these options, is no sum of weighted task vectors"


def _refuse(reasons: Mapping[str, str]) -> None:
    """Raise `MergetuneError`, with the reasons, if no exact adapter changes these tensors as a merge does."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    if names:
        raise MergetuneError(_explain(names))


def _explain(reasons: Mapping[str, Sequence[str]]) -> str:
    found = (f"{reason}{f': {shortened(names, 3)}' if names else ''}" for reason, names in reasons.items())
    return (
        "An exact adapter must be a sum of the experts' own products B A, but is not: "
        f"{'; '.join(found)}. {_REMEDY}"
    )
