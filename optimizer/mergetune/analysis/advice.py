"""Merge or retrain: a plain verdict on task vectors, each sentence with the figures behind it.

Weights alone do not decide. They show what adding task vectors does to each of them, not what the
models can do: the verdict says what to expect and what to try first, and a study measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from mergetune.analysis.task_vectors import (
    GAUSSIAN_OVERLAP,
    GAUSSIAN_REDUNDANCY,
    TOP_SHARE,
    PairStatistics,
    PartStatistics,
    TaskVectorStatistics,
    VectorStatistics,
)
from mergetune.weights.compatibility import LONGEST_SHARE_OF_BASE as LONGEST_SHARE_OF_BASE
from mergetune.weights.tensor_files import shortened

Kind = Literal["complementary", "partial conflict", "conflict", "outside one basin"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the worst last

# The sum of two task vectors of one length and cosine c keeps 1 + c of each in its own direction.
# Task vectors of different tasks have cosines near 0 or above (Ilharco et al. 2023, section 6), so
# that a tenth lost is no chance; where three tenths are lost, it takes lambdas beyond 1.4 to bring
# both back, farther than the fine-tunes themselves went.
OPPOSED = -0.1
CONFLICT = -0.3
# Opposed layer groups make a partial conflict if they hold this share of the Σ ‖a‖‖b‖ of all groups.
SMALLEST_SHARE = 0.1
# From this cosine on, plain addition counts what the two have in common noticeably twice.
ALIGNED = 0.3
# Half of what unrelated dense vectors have: most of each lies where the other changes little.
LITTLE_OVERLAP = GAUSSIAN_OVERLAP / 2
# The demo's experts differ by 2.1, and their plain average lost nearly all of the shorter one.
ASYMMETRIC = 2.0
# Trimmed to its largest 20 %, a task vector then keeps √0.8 = 0.9 of its length.
REDUNDANT = 0.8

_SUMMARIES: dict[Kind, str] = {
    "complementary": "Complementary: {} do not undo each other.",
    "partial conflict": "Partial conflict: {} oppose each other in part.",
    "conflict": "Conflict: {} oppose each other.",
}
# Measured on SmolLM2-135M: full fine-tunes that answer the same prompts with yes and with no have a
# cosine of 0.20, briefly and at length of 0.13, for what they share outweighs the contrast; one skill
# learned twice has 0.56 (as LoRA adapters of two seeds 0.13, yes and no 0.03).
_MEASURE = (
    "Weights alone do not decide: experts that learned opposite answers to the same prompts share a "
    "direction, too. Measure merges on your own items with `mergetune run`."
)


@dataclass(frozen=True)
class PairAdvice:
    """What to expect of two experts; `kind` is None where one of them equals the base."""

    first: str
    second: str
    kind: Kind | None
    opposed_groups: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """What to expect of a merge of all experts, which is that of the worst pair, and what to do next.

    `kind` is None where there is nothing to compare: one expert only, or experts that equal the base.
    """

    kind: Kind | None
    summary: str
    pairs: tuple[PairAdvice, ...]
    notes: tuple[str, ...]
    next_steps: tuple[str, ...]


@dataclass(frozen=True)
class _Opposition:
    """The layer groups in which a pair is opposed, and the cosine over all others."""

    cosines: Mapping[str, float]
    share: float
    elsewhere: float | None


def advise(statistics: TaskVectorStatistics) -> Advice:
    """Judge from the figures of the task vectors whether a merge is worth trying, and which."""
    experts = statistics.whole.experts
    by_pair = zip(*(group.pairs for group in statistics.groups), strict=True)
    pairs = tuple(
        _judge_pair(pair, _opposition(pair, statistics.groups, in_groups), experts)
        for pair, in_groups in zip(statistics.whole.pairs, by_pair, strict=True)
    )
    found = {pair.kind for pair in pairs}
    if any(is_outside(vector) for vector in experts.values()):
        found.add("outside one basin")
    kind = next((kind for kind in reversed(KINDS) if kind in found), None)
    return Advice(
        kind,
        _summary(kind, statistics.whole, pairs),
        pairs,
        tuple(_redundancy(experts)),
        tuple(_next_steps(kind, experts)),
    )


def is_outside(vector: VectorStatistics) -> bool:
    """Say whether a task vector is too long for a fine-tune of this base, as the warnings do."""
    return vector.relative_norm is not None and vector.relative_norm > LONGEST_SHARE_OF_BASE


def as_data(statistics: TaskVectorStatistics, verdict: Advice, warnings: Sequence[str]) -> dict[str, object]:
    """Return figures, verdict and warnings as what JSON can hold."""
    judged = [asdict(pair) for pair in verdict.pairs]
    figures = [asdict(pair) for pair in statistics.whole.pairs]
    overall = {key: value for key, value in asdict(verdict).items() if key != "pairs"}
    return {
        "n_parameters": statistics.whole.n_parameters,
        "experts": {name: asdict(vector) for name, vector in statistics.whole.experts.items()},
        "pairs": [one | other for one, other in zip(figures, judged, strict=True)],
        "groups": [asdict(group) for group in statistics.groups],
        "verdict": overall,
        "warnings": list(warnings),
    }


def _opposition(
    pair: PairStatistics, groups: Sequence[PartStatistics], in_groups: Sequence[PairStatistics]
) -> _Opposition:
    """Find the layer groups that are opposed; each counts with its ‖a‖‖b‖."""
    cosines = {group.name: found.cosine for group, found in zip(groups, in_groups, strict=True)}
    sizes = {group.name: group.experts[pair.first].norm * group.experts[pair.second].norm for group in groups}
    opposed = {name: cosine for name, cosine in cosines.items() if cosine is not None and cosine <= OPPOSED}
    others = {name: cosine or 0.0 for name, cosine in cosines.items() if name not in opposed}
    rest = sum(sizes[name] for name in others)
    total = sum(sizes.values())
    return _Opposition(
        opposed,
        share=1 - rest / total if total else 0.0,
        elsewhere=sum(cosine * sizes[name] for name, cosine in others.items()) / rest if rest else None,
    )


def _judge_pair(
    pair: PairStatistics, opposition: _Opposition, experts: Mapping[str, VectorStatistics]
) -> PairAdvice:
    reasons: Iterable[str]
    kind: Kind | None
    outside = [name for name in (pair.first, pair.second) if is_outside(experts[name])]
    if outside:
        kind, reasons = "outside one basin", [_too_long(name, experts[name]) for name in outside]
    elif pair.cosine is None:
        equal = [f"`{name}`" for name in (pair.first, pair.second) if experts[name].norm == 0]
        kind, reasons = None, [f"Nothing to compare: {' and '.join(equal)} adds nothing to the base."]
    elif pair.cosine <= CONFLICT:
        kind, reasons = "conflict", _conflict(pair, pair.cosine)
    elif pair.cosine <= OPPOSED or opposition.share >= SMALLEST_SHARE:
        kind, reasons = "partial conflict", _partial_conflict(pair, opposition)
    else:
        kind, reasons = "complementary", _complementary(pair, pair.cosine)
    asymmetry = _asymmetry(pair) if kind != "outside one basin" else []
    return PairAdvice(pair.first, pair.second, kind, tuple(opposition.cosines), (*reasons, *asymmetry))


def _too_long(name: str, vector: VectorStatistics) -> str:
    return (
        f"The task vector of `{name}` is {vector.relative_norm:.2f} times as long as the base's weights, "
        f"where a fine-tune's stays below {LONGEST_SHARE_OF_BASE}."
    )


def _conflict(pair: PairStatistics, cosine: float) -> Iterator[str]:
    yield f"They oppose each other: {_figures(pair)}."
    ratio = pair.norm_ratio or 1.0
    yield (
        f"Added with equal weights, their sum keeps {1 + cosine / ratio:.0%} of `{pair.first}` and "
        f"{1 + cosine * ratio:.0%} of `{pair.second}` along their own directions."
    )


def _partial_conflict(pair: PairStatistics, opposition: _Opposition) -> Iterator[str]:
    worst = sorted(opposition.cosines, key=opposition.cosines.__getitem__)
    where = shortened((f"`{name}` (cosine {opposition.cosines[name]:z.2f})" for name in worst), 3)
    elsewhere = (
        "" if opposition.elsewhere is None else f"; elsewhere the cosine is {opposition.elsewhere:z.2f}"
    )
    yield f"They oppose each other in {where}, {opposition.share:.0%} of what both change{elsewhere}."
    yield f"Over the whole model: {_figures(pair)}."


def _complementary(pair: PairStatistics, cosine: float) -> Iterator[str]:
    if cosine >= ALIGNED:
        yield (
            f"They share much of their direction: {_figures(pair)}. Their sum counts it twice, so start "
            f"near lambda {1 / (1 + cosine):.2f} each; and if both were tuned from one later checkpoint, "
            "give that one as the base."
        )
    elif pair.overlap is not None and pair.overlap < LITTLE_OVERLAP:
        yield (
            f"They change different entries (overlap {pair.overlap:.0%}; unrelated dense task vectors: "
            f"{GAUSSIAN_OVERLAP:.0%}), so that neither undoes the other (cosine {cosine:z.2f})."
        )
    else:
        yield f"Neither undoes the other: {_figures(pair)}."


def _figures(pair: PairStatistics) -> str:
    conflict = "none" if pair.weighted_conflict is None else f"{pair.weighted_conflict:.0%}"
    return f"cosine {pair.cosine:z.2f}, weighted sign conflict {conflict} (unrelated: 0 and 50%)"


def _asymmetry(pair: PairStatistics) -> Iterator[str]:
    ratio = pair.norm_ratio
    if not ratio or 1 / ASYMMETRIC < ratio < ASYMMETRIC:
        return
    longer, shorter = (pair.first, pair.second) if ratio > 1 else (pair.second, pair.first)
    times = max(ratio, 1 / ratio)
    yield (
        f"`{longer}` is {times:.1f} times as long as `{shorter}` and drowns it under equal weights: "
        f"start its lambda {times:.1f} times lower."
    )


def _redundancy(experts: Mapping[str, VectorStatistics]) -> Iterator[str]:
    """Say which task vectors can be trimmed, and how to thin the others."""
    shares = {name: vector.redundancy for name, vector in experts.items() if vector.redundancy is not None}
    yield from _shares(
        {name: share for name, share in shares.items() if share >= REDUNDANT},
        "`ties_layer_groups` can trim the rest at little cost",
    )
    yield from _shares(
        {name: share for name, share in shares.items() if share < REDUNDANT},
        "too little to trim that far: keep the densities of `ties_layer_groups` high, or drop at random "
        "(`dare_ties_layer_groups`)",
    )


def _shares(shares: Mapping[str, float], advice: str) -> Iterator[str]:
    if shares:
        listed = shortened(f"`{name}` {share:.0%}" for name, share in shares.items())
        yield (
            f"Squared norm in the largest {TOP_SHARE:.0%} of the entries: {listed} (Gaussian noise: "
            f"{GAUSSIAN_REDUNDANCY:.0%}); {advice}."
        )


def _summary(kind: Kind | None, whole: PartStatistics, pairs: Sequence[PairAdvice]) -> str:
    """Say the verdict in one sentence, with the pairs or experts that it is due to."""
    if kind is None:
        return "Nothing to compare: that takes two experts that differ from the base."
    if kind == "outside one basin":
        long = [_too_long(name, vector) for name, vector in whole.experts.items() if is_outside(vector)]
        return f"Outside one basin: {' '.join(long)}"
    judged = zip(whole.pairs, pairs, strict=True)
    causes = [pair for pair, verdict in judged if verdict.kind == kind and pair.cosine is not None]
    causes.sort(key=lambda pair: pair.cosine or 0.0)
    named = shortened((f"`{p.first}` and `{p.second}` (cosine {p.cosine:z.2f})" for p in causes), 3)
    return _SUMMARIES[kind].format(named)


def _next_steps(kind: Kind | None, experts: Mapping[str, VectorStatistics]) -> Iterator[str]:
    known = [vector.redundancy for vector in experts.values() if vector.redundancy is not None]
    electing = "ties_layer_groups" if min(known, default=0.0) >= REDUNDANT else "dare_ties_layer_groups"
    if kind == "outside one basin":
        yield (
            "Retrain rather than merge: fine-tune the same base for each skill; or, if an expert came "
            "from another base, give that one and the experts that share it."
        )
        return
    if kind == "conflict":
        others = "leave one of the two out, or " if len(experts) > 2 else ""
        yield (
            "Retrain one model on the data of both rather than merge: what one expert adds, the other "
            f"takes away. If the data cannot be brought together, {others}a study with `{electing}`, which "
            "elects one sign per weight, shows what each compromise costs."
        )
    elif kind == "partial conflict":
        yield (
            "Merge with lambdas by layer group (`task_arithmetic_layer_groups`), so that either expert "
            f"can yield where they oppose; if that is not enough, elect signs (`{electing}`)."
        )
    elif kind == "complementary":
        yield "Merge plainly: task arithmetic with lambdas by layer group (`task_arithmetic_layer_groups`)."
    yield _MEASURE
