"""The merge methods and their parameters: the one table that YAML checks, searches and docs draw from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

MethodName = Literal[
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della_linear",
    "della",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "ram",
    "ramplus_tl",
    "tsv_merge",
    "iso_c",
    "svc",
    "model_stock",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "nearswap",
    "arcee_fusion",
    "passthrough",
]


@dataclass(frozen=True)
class Interval:
    """The values that a parameter may take; an end counts unless it is open."""

    low: float
    high: float
    is_open_low: bool = False
    is_open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.is_open_low else value >= self.low
        below = value < self.high if self.is_open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "ℝ"
        low, high = (str(end).replace("inf", "∞") for end in (f"{self.low:g}", f"{self.high:g}"))
        is_open_high = self.is_open_high or math.isinf(self.high)
        return f"{'(' if self.is_open_low else '['}{low}, {high}{')' if is_open_high else ']'}"


@dataclass(frozen=True)
class SearchInterval:
    """What a search space takes where it says nothing: an interval, on a grid where `step` is given."""

    low: float
    high: float
    step: float | None = None


@dataclass(frozen=True)
class Parameter:
    """A coefficient of a method: one value per expert, or one for all of them, in each layer group.

    `default` is what a search space takes where it says nothing: an interval to search, or a number
    to hold. `is_position`: it is a place between two experts, the second one's share of the two.
    """

    name: str
    meaning: str
    valid: Interval
    default: SearchInterval | float
    is_per_expert: bool = True
    is_position: bool = False


@dataclass(frozen=True)
class Option:
    """A choice that a method leaves open, one for the whole recipe; the first is the default."""

    name: str
    meaning: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class MergekitForm:
    """How a configuration of mergekit says the same merge; coefficients per expert stand with their models.

    Attributes:
        base_model: what mergekit takes for `base_model`.
        single: where a coefficient stands that is one for all experts: once for all models, with its model,
            or, a position t, as the weights 1 − t and t of the two models.
        has_weights: whether it weighs models; else it takes every lambda for 1.
    """

    base_model: Literal["base", "first expert", "none"] = "base"
    single: Literal["all models", "model", "weights"] = "all models"
    has_weights: bool = True


@dataclass(frozen=True)
class Method:
    """All that is known of a merge method beside its rule: `merging.methods.RULES`.

    Attributes:
        summary: what it does, in a line.
        parameters: the coefficients that it reads.
        options: the choices that it leaves open.
        min_experts: how many experts it takes at least.
        max_experts: how many it takes at most; None: any number.
        is_joint: whether the coefficient of an expert counts even for tensors that this expert leaves alone.
        changes_every_tensor: whether it changes even tensors that no expert changes.
        divides_by_sum: whether it divides by the sum of the lambdas, which then must not be 0.
        usual_density: the density that is usual without a search, where the lambdas are 1; None: there is
            no such default.
        mergekit: how mergekit says the same; None: it cannot, or merges otherwise.
    """

    summary: str
    parameters: tuple[Parameter, ...] = ()
    options: tuple[Option, ...] = ()
    min_experts: int = 1
    max_experts: int | None = None
    is_joint: bool = False
    changes_every_tensor: bool = False
    divides_by_sum: bool = False
    usual_density: float | None = None
    mergekit: MergekitForm | None = None

    @property
    def coefficients(self) -> str:
        """The coefficients with their valid values, e.g. `lambda ∈ ℝ, density ∈ (0, 1]`."""
        return ", ".join(f"{parameter.name} ∈ {parameter.valid}" for parameter in self.parameters) or "none"

    @property
    def choices(self) -> str:
        """The options with their choices, the default first, e.g. `rescale: probability | l1 | none`."""
        return "; ".join(f"{option.name}: {' | '.join(option.choices)}" for option in self.options)

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of this name, or None."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


_ANY = Interval(-math.inf, math.inf)
_LAMBDA = Parameter("lambda", "weight of the task vector", _ANY, SearchInterval(0.0, 2.0))
_SHARE = Parameter("lambda", "share of the expert, normalized to sum 1", _ANY, SearchInterval(0.0, 2.0))
_DENSITY = Parameter(
    "density",
    "fraction of the task vector's entries kept",
    Interval(0.0, 1.0, is_open_low=True),
    SearchInterval(0.1, 1.0, 0.01),
)
_GAMMA = Parameter(
    "gamma", "fraction dropped at the top, as outliers", Interval(0.0, 1.0, is_open_high=True), 0.01
)
_EPSILON = Parameter(
    "epsilon", "how far the keep probability leaves the density, down and up", Interval(0.0, 0.5), 0.15
)
_T = Parameter(
    "t",
    "position between the first expert (0) and the second (1)",
    Interval(0.0, 1.0),
    SearchInterval(0.0, 1.0),
    is_per_expert=False,
    is_position=True,
)
_TOPK = Parameter(
    "select_topk",
    "fraction of the entries kept, those that vary most between experts",
    Interval(0.0, 1.0, is_open_low=True),
    SearchInterval(0.1, 1.0, 0.01),
    False,
)
CHANGED = 1e-5  # mergekit's default
_CHANGED = Parameter(
    "epsilon",
    "magnitude above which an entry of a task vector counts as changed",
    Interval(0.0, math.inf),
    CHANGED,
    False,
)
_AMPLIFICATION = Parameter(
    "r",
    "how much the entries that one expert alone changes grow with the share of those that others change",
    Interval(0.0, math.inf),
    SearchInterval(0.0, 2.0),
    False,
)
_CEILING = Parameter("alpha", "the most that this share counts", Interval(0.0, math.inf), 0.2, False)
_REACH = Parameter(
    "t", "the largest change of a weight", Interval(0.0, math.inf), SearchInterval(0.0, 0.01), False
)
_SCALE = Parameter("scale", "factor of the weights", _ANY, SearchInterval(0.5, 1.5), False)
_MERGED = Parameter("scale", "factor of the merged task vector", _ANY, SearchInterval(0.0, 2.0), False)
_SUPPRESSION = Parameter(
    "alpha",
    "the least that an expert counts as amplified in a direction; from 1 on nothing is amplified",
    Interval(0.0, math.inf, is_open_low=True),
    SearchInterval(0.1, 1.0),
    False,
)

_RESCALE = Option(
    "rescale",
    "what makes up for dropped entries: division by the probability of being kept, equal sum of "
    "magnitudes before and after (mergekit's), or nothing",
    ("probability", "l1", "none"),
)
_NORMALIZE = Option(
    "normalize",
    "what the sum of the agreeing λτ is divided by: their count, the sum of their λ (mergekit's "
    "`normalize: true`), or nothing (its `normalize: false`)",
    ("count", "weights", "none"),
)
_ORIGIN = Option(
    "origin", "centre of the sphere: the base (task vectors turn) or zero (weights turn)", ("base", "zero")
)
_GRANULARITY = Option("granularity", "what is taken as one vector", ("tensor", "rows"))

_USUAL_IN_DARE = 0.1  # Yu et al. 2024: nine entries in ten dropped of fine-tunes of this kind

METHODS: dict[MethodName, Method] = {
    "linear": Method(
        "Σ wᵢθᵢ with w = λ / Σλ; equal λ: the uniform soup",
        (_SHARE,),
        is_joint=True,
        divides_by_sum=True,
        mergekit=MergekitForm(base_model="none"),
    ),
    "task_arithmetic": Method(
        "θ₀ + Σ λᵢτᵢ with τᵢ = θᵢ − θ₀; λ < 0 removes a skill", (_LAMBDA,), mergekit=MergekitForm()
    ),
    "ties": Method(
        "trim each τᵢ to its largest entries, elect a sign, average the λᵢτᵢ that agree",
        (_LAMBDA, _DENSITY),
        (_NORMALIZE,),
        usual_density=0.2,  # Yadav et al. 2023, section 4: the top 20 %
        mergekit=MergekitForm(),
    ),
    "dare_linear": Method(
        "drop entries of τᵢ at random, rescale, add",
        (_LAMBDA, _DENSITY),
        (_RESCALE,),
        usual_density=_USUAL_IN_DARE,
    ),
    "dare_ties": Method(
        "drop at random, rescale, elect a sign, average what agrees",
        (_LAMBDA, _DENSITY),
        (_RESCALE, _NORMALIZE),
        usual_density=_USUAL_IN_DARE,
    ),
    "della_linear": Method(
        "drop at random, small entries of a row more often than large ones, rescale, add",
        (_LAMBDA, _DENSITY, _EPSILON),
        (_RESCALE,),
    ),
    "della": Method(
        "drop as `della_linear` does, elect a sign, average what agrees",
        (_LAMBDA, _DENSITY, _EPSILON),
        (_RESCALE, _NORMALIZE),
    ),
    "breadcrumbs": Method(
        "drop the largest entries of τᵢ and the smallest, add",
        (_LAMBDA, _DENSITY, _GAMMA),
        mergekit=MergekitForm(),
    ),
    "breadcrumbs_ties": Method(
        "drop as `breadcrumbs` does, elect a sign, average what agrees",
        (_LAMBDA, _DENSITY, _GAMMA),
        (_NORMALIZE,),
        mergekit=MergekitForm(),
    ),
    "sce": Method(
        "keep the entries that vary most, weigh τᵢ by its mean square, elect a sign",
        (_TOPK,),
        min_experts=2,
    ),
    "ram": Method(
        "average the λᵢτᵢ of entries that several experts change, keep the others whole",
        (_LAMBDA, _CHANGED),
        mergekit=MergekitForm(has_weights=False),
    ),
    "ramplus_tl": Method(
        "average as `ram` does, amplify what one expert alone changes by 1 + r · min(shared/alone, alpha)",
        (_LAMBDA, _CHANGED, _AMPLIFICATION, _CEILING),
        mergekit=MergekitForm(has_weights=False),
    ),
    "tsv_merge": Method(
        "θ₀ + Σ λᵢτ̃ᵢ with the leading singular vectors of the τᵢ made orthogonal to each other's", (_LAMBDA,)
    ),
    "iso_c": Method("θ₀ + scale · Σ τᵢ with each singular value replaced by their mean", (_MERGED,)),
    "svc": Method(
        "θ₀ + scale · Σ τᵢ with singular values lowered by how often experts share their directions",
        (_MERGED, _SUPPRESSION),
    ),
    "model_stock": Method(
        "θ₀ + t · mean τ, with t from the angle between the τᵢ",
        (),
        (_GRANULARITY,),
        min_experts=2,
        is_joint=True,
        mergekit=MergekitForm(),
    ),
    "slerp": Method(
        "the arc from the first expert's weights to the second's",
        (_T,),
        min_experts=2,
        max_experts=2,
        is_joint=True,
        mergekit=MergekitForm(base_model="first expert"),
    ),
    "nuslerp": Method(
        "the arc between two task vectors, or weights, by their directions",
        (_T,),
        (_ORIGIN, _GRANULARITY),
        min_experts=2,
        max_experts=2,
        is_joint=True,
        mergekit=MergekitForm(single="weights"),
    ),
    "multislerp": Method(
        "the direction of the weighted mean of unit vectors, times their mean norm",
        (_SHARE,),
        (_ORIGIN,),
        min_experts=2,
        is_joint=True,
        divides_by_sum=True,
        mergekit=MergekitForm(),
    ),
    "karcher": Method(
        "mean on the sphere by Riemannian averaging, times the mean norm",
        min_experts=2,
        is_joint=True,
        mergekit=MergekitForm(base_model="none"),
    ),
    "nearswap": Method(
        "move each weight to the expert's, but by t at most",
        (_REACH,),
        max_experts=1,
        mergekit=MergekitForm(),
    ),
    "arcee_fusion": Method("take over the weights that matter most (|τ| times KL divergence)", max_experts=1),
    "passthrough": Method(
        "the expert itself, scaled",
        (_SCALE,),
        max_experts=1,
        is_joint=True,
        changes_every_tensor=True,
        mergekit=MergekitForm(base_model="none", single="model"),
    ),
}
assert set(METHODS) == set(get_args(MethodName))

# The coefficients that weights are piecewise smooth in; the others decide which entries are kept.
SMOOTH = ("lambda", "t", "scale")

PARAMETER_NAMES = tuple(
    dict.fromkeys(parameter.name for method in METHODS.values() for parameter in method.parameters)
)


def full_options(method: MethodName, given: dict[str, str]) -> dict[str, str]:
    """Return all options of a method: those given, and the defaults of the others.

    Raises:
        ValueError: an option is not the method's, or not one of its choices.
    """
    options = {option.name: option for option in METHODS[method].options}
    for name, choice in given.items():
        if name not in options:
            raise ValueError(f"`{method}` has no option `{name}`: {', '.join(options) or 'it has none'}")
        if choice not in options[name].choices:
            choices = ", ".join(options[name].choices)
            raise ValueError(f"`options.{name}` of `{method}` must be one of {choices}, but is {choice}")
    return {name: given.get(name, option.choices[0]) for name, option in options.items()}
