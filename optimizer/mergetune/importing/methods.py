"""What mergekit's merge methods are in a recipe: one table, and a rule for each family of methods.

wᵢ is mergekit's weight of an expert and `lambda` its factor of the sum; λᵢ is the recipe's coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mergetune.importing.parameters import Value
from mergetune.space.method_table import MethodName

Refuse = Callable[[str, str], None]  # a parameter's name, and the rule with its remedy
Coefficients = dict[str, Any]


@dataclass(frozen=True)
class Resolved:
    """mergekit's parameters for some tensors: those for all models, and those of each expert by its name."""

    shared: Mapping[str, Any]
    each: Mapping[str, Mapping[str, Any]]

    def of(self, parameter: str) -> dict[str, float]:
        """Return a parameter of each expert."""
        return {expert: given[parameter] for expert, given in self.each.items()}


@dataclass(frozen=True)
class Translation:
    """The method, options and coefficients of a recipe, these for every `Resolved` in turn."""

    method: MethodName
    coefficients: list[Coefficients]
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Foreign:
    """A merge method of mergekit.

    Attributes:
        translate: makes of its parameters what a recipe has.
        base: whether `base_model` must be given and has no weight of its own, may be given, or is merged as
            any other model.
        shared: its parameters for all models with their defaults; None: it must be given.
        each: its parameters for each model, likewise.
        can_lack: whether an expert that is not in a slice is one with a weight of 0 there.
        warning: how merges differ though all settings agree; where there are densities, if one is below 1.
    """

    translate: Callable[[Sequence[Resolved], Refuse], Translation]
    base: Literal["required", "optional", "merged"] = "required"
    shared: Mapping[str, Value | None] = field(default_factory=dict)
    each: Mapping[str, Value | None] = field(default_factory=dict)
    can_lack: bool = False
    warning: str = ""


def _sum(method: MethodName) -> Callable[[Sequence[Resolved], Refuse], Translation]:
    """θ₀ + lambda · Σ wᵢτᵢ, divided by Σ wᵢ where `normalize` is given: all of it goes into the λᵢ."""

    def translate(found: Sequence[Resolved], refuse: Refuse) -> Translation:
        lambdas = []
        for each in found:
            weights, total = each.of("weight"), sum(each.of("weight").values())
            divisor = total if each.shared["normalize"] and abs(total) >= 1e-8 else 1.0
            lambdas.append({name: each.shared["lambda"] * w / divisor for name, w in weights.items()})
        thinned = [_thinned(*pair) for pair in zip(found, lambdas, strict=True)]
        return Translation(method, thinned, _rescale(method, found, refuse))

    return translate


def _vote(method: MethodName) -> Callable[[Sequence[Resolved], Refuse], Translation]:
    """θ₀ + lambda · Σ wᵢτᵢ over what agrees in sign, divided by its Σ wᵢ where `normalize` is given.

    Undivided, lambda goes into the λᵢ. Divided, it would cancel there; with one weight for all experts the
    quotient is lambda times the mean, which is division by the count.
    """

    def translate(found: Sequence[Resolved], refuse: Refuse) -> Translation:
        normalize = {bool(each.shared["normalize"]) for each in found}
        if len(normalize) > 1:
            refuse(
                "normalize", "must be one for all tensors, as the recipe's options are. Make it one value."
            )
        how, factors = "none", [each.shared["lambda"] for each in found]
        lambdas = [
            {name: factor * w for name, w in each.of("weight").items()}
            for factor, each in zip(factors, found, strict=True)
        ]
        if True in normalize and all(factor == 1 for factor in factors):
            how = "weights"
        elif True in normalize:
            how = "count"
            lambdas = [dict.fromkeys(each.each, f) for f, each in zip(factors, found, strict=True)]
            if not all(_are_alike(each) for each in found):
                refuse(
                    "lambda",
                    "with `normalize: true` it has a counterpart only where the weights of all models are "
                    "the same, not 0, and no density is 0. Make it 1, or the weights alike, or say "
                    "`normalize: false`.",
                )
        thinned = [_thinned(*pair) for pair in zip(found, lambdas, strict=True)]
        return Translation(method, thinned, {"normalize": how} | _rescale(method, found, refuse))

    return translate


def _are_alike(resolved: Resolved) -> bool:
    """Say whether all experts take part with the same weight."""
    weights = set(resolved.of("weight").values())
    return (
        len(weights) == 1 and 0 not in weights and all(kept > 0 for kept in resolved.of("density").values())
    )


def _thinned(resolved: Resolved, lambdas: dict[str, float]) -> Coefficients:
    """Return λ with density, gamma and epsilon; a density of 0 or less is a λ of 0, one above 1 is 1."""
    given = next(iter(resolved.each.values()), {})
    if "density" not in given:
        return {"lambda": lambdas}
    densities = resolved.of("density")
    found: Coefficients = {
        "lambda": {name: w if densities[name] > 0 else 0.0 for name, w in lambdas.items()},
        "density": {name: min(kept, 1.0) if kept > 0 else 1.0 for name, kept in densities.items()},
    }
    return found | {name: resolved.of(name) for name in ("gamma", "epsilon") if name in given}


def _rescale(method: MethodName, found: Sequence[Resolved], refuse: Refuse) -> dict[str, str]:
    """Return the option `rescale`; it matters only where entries are dropped."""
    if "rescale" not in found[0].shared:
        return {}
    thinned = [each for each in found if any(kept < 1 for kept in each.of("density").values())]
    rescale = {bool(each.shared["rescale"]) for each in thinned}
    if method.startswith(("dare", "della")):
        if len(rescale) > 1:
            refuse("rescale", "must be one for all tensors, as the recipe's options are. Make it one value.")
        return {"rescale": "none" if rescale == {False} else "l1"}
    if True in rescale:
        refuse("rescale", f"`{method}` of a recipe does not rescale. Leave it out, or raise the weights.")
    return {}


def _linear(found: Sequence[Resolved], refuse: Refuse) -> Translation:
    """Σ wᵢθᵢ / Σ wᵢ, or without `normalize` Σ wᵢθᵢ, which is the same where Σ wᵢ = 1."""
    for each in found:
        total = sum(each.of("weight").values())
        if total == 0:
            refuse("weight", "the weights sum to 0, by which mergekit divides. Change one.")
        elif not each.shared["normalize"] and abs(total - 1) > 1e-6:
            refuse(
                "normalize",
                f"a recipe's shares sum to 1, but these weights to {total:g}. Say `normalize: true`, or take "
                "`task_arithmetic` with a base.",
            )
    return Translation("linear", [{"lambda": each.of("weight")} for each in found])


def _multislerp(found: Sequence[Resolved], refuse: Refuse) -> Translation:
    for each in found:
        total = sum(each.of("weight").values())
        if total == 0 or (not each.shared["normalize_weights"] and abs(total - 1) > 1e-6):
            refuse(
                "weight", f"a recipe's shares are normalized, but these weights sum to {total:g}. Change one."
            )
        if not 0 <= each.shared["eps"] <= 1e-6:
            refuse("eps", "a recipe adds nothing to norms. Make it 1e-6 or less.")
    return Translation("multislerp", [{"lambda": each.of("weight")} for each in found])


def _nuslerp(found: Sequence[Resolved], refuse: Refuse) -> Translation:
    """T is the second expert's share of the weights, and ½ where they sum to 0."""
    by_rows = {not each.shared["nuslerp_flatten"] for each in found}
    if any(each.shared["nuslerp_row_wise"] and not each.shared["nuslerp_flatten"] for each in found):
        refuse("nuslerp_row_wise", "a recipe turns whole tensors, or each output's row. Leave it out.")
    if len(by_rows) > 1:
        refuse(
            "nuslerp_flatten", "must be one for all tensors, as the recipe's options are. Make it one value."
        )
    positions = []
    for each in found:
        weights = list(each.of("weight").values())
        positions.append({"t": 0.5 if abs(sum(weights)) < 1e-6 else weights[-1] / sum(weights)})
    return Translation("nuslerp", positions, {"granularity": "rows" if True in by_rows else "tensor"})


def _model_stock(found: Sequence[Resolved], refuse: Refuse) -> Translation:
    by_rows = {bool(each.shared["filter_wise"]) for each in found}
    if len(by_rows) > 1:
        refuse("filter_wise", "must be one for all tensors, as the recipe's options are. Make it one value.")
    granularity = "rows" if True in by_rows else "tensor"
    return Translation("model_stock", [{} for _ in found], {"granularity": granularity})


def _karcher(found: Sequence[Resolved], refuse: Refuse) -> Translation:
    """The mean moves by less than the tolerance after 10 steps, so that more or finer ones change nothing."""
    for each in found:
        if each.shared["max_iter"] < 10:
            refuse("max_iter", "a recipe takes up to 10 steps. Make it 10 or more.")
        if not 0 <= each.shared["tol"] <= 1e-5:
            refuse("tol", "a recipe stops at steps of under 1e-5. Make it 1e-5 or less.")
    return Translation("karcher", [{} for _ in found])


def _ram(method: MethodName) -> Callable[[Sequence[Resolved], Refuse], Translation]:
    """Take parameters for all models as they are; mergekit weighs none."""

    def translate(found: Sequence[Resolved], _: Refuse) -> Translation:
        return Translation(
            method, [{"lambda": dict.fromkeys(each.each, 1.0), **each.shared} for each in found]
        )

    return translate


def _passthrough(found: Sequence[Resolved], _: Refuse) -> Translation:
    """The one model; or where each slice has its own, unscaled, shares of 1 and 0."""
    experts = list(dict.fromkeys(name for each in found for name in each.each))
    if len(experts) == 1:
        return Translation("passthrough", [{"scale": each.each[experts[0]]["scale"]} for each in found])
    shares = [{name: float(name in each.each) for name in experts} for each in found]
    return Translation("linear", [{"lambda": each} for each in shares])


def _single(method: MethodName, *parameters: str) -> Callable[[Sequence[Resolved], Refuse], Translation]:
    """Take parameters for all models as they are."""

    def translate(found: Sequence[Resolved], _: Refuse) -> Translation:
        return Translation(method, [{name: each.shared[name] for name in parameters} for each in found])

    return translate


def _summing(normalize: bool, rescale: bool, **each: Value) -> dict[str, Any]:
    """Return what all methods have in common that add task vectors."""
    shared = {"normalize": normalize, "rescale": rescale, "lambda": 1.0}
    return {"shared": shared, "each": {"weight": None, "density": 1.0, **each}, "can_lack": True}


_MASKS = "entries are dropped at random by another generator: the same share of them, but not the same ones."

_TIES = (
    "of entries whose magnitudes equal the threshold all are kept, by mergekit some: in bfloat16, where many "
    "are equal, about 1 % of the entries differ."
)

FOREIGN: dict[MethodName, Foreign] = {
    "linear": Foreign(_linear, "merged", {"normalize": True}, {"weight": None}, can_lack=True),
    "task_arithmetic": Foreign(
        _sum("task_arithmetic"),
        shared={"normalize": False, "lambda": 1.0},
        each={"weight": None},
        can_lack=True,
    ),
    "ties": Foreign(_vote("ties"), **_summing(True, False), warning=_TIES),
    "dare_linear": Foreign(_sum("dare_linear"), **_summing(False, True), warning=_MASKS),
    "dare_ties": Foreign(_vote("dare_ties"), **_summing(False, True), warning=_MASKS),
    "della_linear": Foreign(_sum("della_linear"), **_summing(False, True, epsilon=0.15), warning=_MASKS),
    "della": Foreign(_vote("della"), **_summing(True, True, epsilon=0.15), warning=_MASKS),
    "breadcrumbs": Foreign(_sum("breadcrumbs"), **_summing(False, False, gamma=0.01), warning=_TIES),
    "breadcrumbs_ties": Foreign(
        _vote("breadcrumbs_ties"), **_summing(False, False, gamma=0.01), warning=_TIES
    ),
    "sce": Foreign(
        _single("sce", "select_topk"),
        shared={"select_topk": 1.0},
        warning="mergekit weighs task vectors alike where the mean squares of a tensor sum to under 1e-6; "
        "the recipe weighs them by their mean squares everywhere.",
    ),
    "ram": Foreign(_ram("ram"), shared={"epsilon": 1e-5}),
    "ramplus_tl": Foreign(_ram("ramplus_tl"), shared={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "model_stock": Foreign(_model_stock, shared={"filter_wise": False}),
    "slerp": Foreign(_single("slerp", "t"), shared={"t": None}),
    "nuslerp": Foreign(
        _nuslerp, "optional", {"nuslerp_flatten": True, "nuslerp_row_wise": False}, {"weight": None}
    ),
    "multislerp": Foreign(
        _multislerp, "optional", {"normalize_weights": True, "eps": 1e-8}, {"weight": None}, can_lack=True
    ),
    "karcher": Foreign(_karcher, "merged", {"max_iter": 10, "tol": 1e-5}),
    "nearswap": Foreign(_single("nearswap", "t"), shared={"t": None}),
    "arcee_fusion": Foreign(
        _single("arcee_fusion"),
        warning="mergekit draws a million entries of larger tensors for its threshold; the recipe takes all.",
    ),
    "passthrough": Foreign(_passthrough, "merged", each={"scale": 1.0}, can_lack=True),
}
