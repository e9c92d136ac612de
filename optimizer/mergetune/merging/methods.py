"""The merge methods: what each makes of one tensor, exact to its paper.

θ₀ is the base, θᵢ an expert, τᵢ = θᵢ − θ₀ its task vector (Ilharco et al. 2023) and λᵢ its weight.
A method reduces a tensor to a `Step`: numbers, and an elementwise rule that `elementwise` carries out
in one pass over memory. What it has to know of whole tensors stands in the plan: `tables_of` says which
tables. The table of methods and their parameters is `method_table.METHODS`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mergetune.merging import spectral, spherical
from mergetune.merging.elementwise import (
    Combine,
    Keep,
    Numbers,
    Source,
    Step,
    formed,
    keep_limit,
    magnitude_sums,
    wide,
)
from mergetune.merging.operands import Operands
from mergetune.merging.tables import (
    CALIBRATION,
    DECORRELATED,
    GRAM,
    GRAM_BY_ROWS,
    IMPORTANCE,
    ISOTROPIC,
    RANKS,
    SELECTIONS,
    Array,
    Kind,
    bands,
    bands_kind,
    grid_place,
    next_above,
    overlaps,
    overlaps_kind,
    selections,
)
from mergetune.space.method_table import CHANGED, MethodName
from mergetune.space.recipe import MergeRecipe


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one layer group by name, and the recipe's options and seed.

    Those of `method_table.SMOOTH` may be scalar tensors, which autograd follows through every rule.
    """

    values: Mapping[str, Any]
    options: Mapping[str, str]
    seed: int

    def of(self, parameter: str, experts: Sequence[str]) -> list[float]:
        """Return a coefficient for each of these experts."""
        values: Mapping[str, float] = self.values[parameter]
        return [values[expert] for expert in experts]

    def single(self, parameter: str) -> float:
        """Return a coefficient that is one for all experts."""
        value: float = self.values[parameter]
        return value


def linear(operands: Operands, given: Coefficients) -> Step:
    """Average the experts: θ = Σ λᵢ θᵢ / Σ λᵢ (Wortsman et al. 2022; equal λ: the uniform soup).

    Computed as θ₀ + Σ λᵢ τᵢ / Σ λᵢ.
    """
    total = sum(given.of("lambda", operands.experts))
    return Step(Numbers([weight / total for weight in given.of("lambda", operands.changed)]))


def task_arithmetic(operands: Operands, given: Coefficients) -> Step:
    """Add scaled task vectors: θ = θ₀ + Σ λᵢ τᵢ (Ilharco et al. 2023, section 2)."""
    return Step(Numbers(given.of("lambda", operands.changed)))


def ties(operands: Operands, given: Coefficients) -> Step:
    """Trim, elect sign, disjoint merge (TIES; Yadav et al. 2023, algorithm 1).

    Each τᵢ keeps its k = max(1, ⌊density · n⌋) largest entries, and all that equal the k-th. With one
    λ for all experts the result is the paper's θ₀ + λ · mean of the entries that agree.
    """
    densities = given.of("density", operands.changed)
    kept = _bands(operands, densities, [0.0] * len(densities))
    numbers = Numbers(given.of("lambda", operands.changed), low=[low for low, _ in kept])
    return Step(numbers, "trim", _combine(given))


def breadcrumbs(operands: Operands, given: Coefficients) -> Step:
    """Drop the largest entries and the smallest, then add (Breadcrumbs; Davari & Belilovsky 2024, eq. 3).

    Of each τᵢ the share gamma at the top is dropped, then of the rest the largest are kept, density · n.
    """
    densities, gammas = given.of("density", operands.changed), given.of("gamma", operands.changed)
    kept = _bands(operands, densities, gammas)
    lambdas = given.of("lambda", operands.changed)
    numbers = Numbers(lambdas, low=[low for low, _ in kept], high=[high for _, high in kept])
    return Step(numbers, "band")


def breadcrumbs_ties(operands: Operands, given: Coefficients) -> Step:
    """Drop as Breadcrumbs does, then elect signs and merge what agrees, as TIES does."""
    return replace(breadcrumbs(operands, given), combine=_combine(given))


def dare_linear(operands: Operands, given: Coefficients) -> Step:
    """Drop entries at random, rescale and add: θ₀ + Σ λᵢ (mᵢ ∘ τᵢ) / p (DARE; Yu et al. 2024, eq. 1–2).

    mᵢ keeps an entry with probability p, the density. The option `rescale: l1` divides by the share
    of the magnitude that was kept instead, as mergekit does.
    """
    lambdas, densities = given.of("lambda", operands.changed), given.of("density", operands.changed)
    keys, stream = hash_keys(given.seed, operands.changed, operands.name)
    if given.options["rescale"] == "probability":
        lambdas = [weight / density for weight, density in zip(lambdas, densities, strict=True)]
    limits = [keep_limit(density) for density in densities]
    step = Step(Numbers(lambdas, limits=limits, keys=keys, stream=stream), "random")
    if given.options["rescale"] == "l1":
        factors = _l1_factors(step, operands)
        lambdas = [weight * factor for weight, factor in zip(lambdas, factors, strict=True)]
        return replace(step, numbers=step.numbers._replace(lambdas=lambdas))
    return step


def dare_ties(operands: Operands, given: Coefficients) -> Step:
    """Drop and rescale as DARE does, then elect signs and merge what agrees (Yu et al. 2024, section 3.3)."""
    return replace(dare_linear(operands, given), combine=_combine(given))


def della_linear(operands: Operands, given: Coefficients) -> Step:
    """Drop by magnitude at random, rescale and add (DELLA; Deep et al. 2024, MAGPRUNE).

    Entry j is kept with probability pⱼ, which rises with the rank of its magnitude in its row from
    density − epsilon to density + epsilon, and is divided by pⱼ.
    """
    wanted = zip(given.of("density", operands.changed), given.of("epsilon", operands.changed), strict=True)
    lines = [keep_line(*pair, operands.row_length) for pair in wanted]
    keys, stream = hash_keys(given.seed, operands.changed, operands.name)
    numbers = Numbers(
        given.of("lambda", operands.changed),
        low=[low for low, _ in lines],
        steps=[step for _, step in lines],
        factors=[1.0] * len(lines),
        keys=keys,
        stream=stream,
    )
    tables = [operands.table(RANKS, expert) for expert in operands.changed]
    ranks = [torch.from_numpy(table).to(operands.base.device) for table in tables]
    rescale = given.options["rescale"]
    step = Step(numbers, "rescaled" if rescale == "probability" else "ranked", ranks=ranks)
    if rescale == "l1":
        return replace(step, numbers=numbers._replace(factors=_l1_factors(step, operands)))
    return step


def della(operands: Operands, given: Coefficients) -> Step:
    """Drop as `della_linear` does, then elect signs and merge what agrees (DELLA; Deep et al. 2024)."""
    return replace(della_linear(operands, given), combine=_combine(given))


def sce(operands: Operands, given: Coefficients) -> Step:
    """Select by variance, calculate weights by mean square, erase minority signs (SCE; Wan et al. 2024).

    Selected are the positions of largest variance across experts, the share `select_topk` of those where
    it is not zero; 1 selects every position. Each expert weighs by its mean square there, normalized; the
    entries against the sign of the experts' sum (+ where it is 0) are dropped and the others averaged.
    (mergekit weighs the experts alike where the mean squares sum to less than 1e-6, as those of short
    fine-tunes do.)
    """
    topk = given.single("select_topk")
    place, sources = grid_place(topk), operands.all_sources
    if place is None:
        row = selections(operands.base, formed(sources), [topk])[0]
    else:
        row = operands.table(SELECTIONS)[place]
    threshold, *energies = row.tolist()
    total = sum(energies)
    shares = [energy / total if total > 0 else 1 / len(energies) for energy in energies]
    keep: Keep = "all" if threshold == -math.inf else "selected"
    return Step(Numbers(shares, low=[threshold]), keep, "shares", sources=sources)


def ram(operands: Operands, given: Coefficients) -> Step:
    """Average what several experts change, and keep whole what one alone does (RAM; Yuan et al. 2026).

    An expert changes an entry where |τᵢ| > epsilon. Where several do, the mean of their λᵢτᵢ is added, and
    where one does its λᵢτᵢ; λᵢ = 1 is the paper's.
    """
    lambdas = given.of("lambda", operands.changed)
    low = [next_above(given.single("epsilon"))] * len(lambdas)
    return Step(Numbers(lambdas, low=low, factors=lambdas), "trim", "overlap")


def ramplus_tl(operands: Operands, given: Coefficients) -> Step:
    """Average as RAM does, and amplify what one expert alone changes (RAM+; Yuan et al. 2026).

    Expert i's own entries are multiplied by 1 + r · min(ρᵢ, alpha), with ρᵢ the number of entries that it
    changes together with others over that of those that it changes alone. As in mergekit, ρᵢ is of the
    tensor (its `tl`: tensor-local), where the paper's is of the whole model.
    """
    step, epsilon = ram(operands, given), given.single("epsilon")
    if epsilon == CHANGED:
        counts = operands.table(overlaps_kind(epsilon))
    else:
        counts = overlaps(operands.base, formed(operands.all_sources), epsilon)
    rows = zip(operands.experts, counts.tolist(), strict=True)
    ratios = {expert: shared / max(alone, 1) for expert, (shared, alone) in rows}
    amplified = [1 + given.single("r") * min(ratios[e], given.single("alpha")) for e in operands.changed]
    factors = [weight * more for weight, more in zip(step.numbers.lambdas, amplified, strict=True)]
    return replace(step, numbers=step.numbers._replace(factors=factors))


def tsv_merge(operands: Operands, given: Coefficients) -> Step:
    """Add task vectors whose singular vectors do not interfere (TSV-Merge; Gargiulo et al. 2025).

    θ₀ + Σ λᵢ τ̃ᵢ with τ̃ᵢ of `spectral.decorrelated`; λᵢ = 1 is the paper's. As in the authors' code, task
    vectors of anything but matrices are averaged.
    """
    lambdas, n_experts = given.of("lambda", operands.changed), len(operands.experts)
    if operands.base.ndim != 2:
        return Step(Numbers([weight / n_experts for weight in lambdas]))
    parts = _planned(operands, DECORRELATED)
    places = [operands.experts.index(expert) for expert in operands.changed]
    return Step(Numbers(lambdas), sources=[Source(parts[place], "vector") for place in places])


def iso_c(operands: Operands, given: Coefficients) -> Step:
    """Add the sum of the task vectors with all singular values alike (Iso-C; Marczak et al. 2025).

    θ₀ + scale · Δ with Δ of `spectral.isotropic`. As in the authors' code, Δ is the mean of the task vectors
    for anything but matrices.
    """
    scale = given.single("scale")
    if operands.base.ndim != 2:
        return Step(Numbers([scale / len(operands.experts)] * len(operands.changed)))
    return Step(Numbers([scale]), sources=[Source(_planned(operands, ISOTROPIC), "vector")])


def svc(operands: Operands, given: Coefficients) -> Step:
    """Add the sum of the task vectors, less of what several of them share (SVC; Li et al. 2026).

    θ₀ + scale · Δ with Δ of `spectral.calibrated`, over the experts that change the tensor. A factor λ of the
    sum, as task arithmetic has it, is alpha / λ in the place of alpha. Anything but a matrix is calibrated as
    one direction.
    """
    table, n_out = _planned(operands, CALIBRATION), operands.base.shape[0] if operands.base.ndim == 2 else 1
    left, rows, shares = table.tensor_split((n_out, table.shape[1] - len(operands.experts)), dim=1)
    changed = shares[:, [operands.experts.index(expert) for expert in operands.changed]]
    merged = spectral.calibrated(left.T, rows, changed, given.single("alpha"))
    vector = merged.reshape(operands.base.shape)
    return Step(Numbers([given.single("scale")]), sources=[Source(vector, "vector")])


def model_stock(operands: Operands, given: Coefficients) -> Step:
    """Move towards the estimated centre of fine-tunes: θ₀ + t · mean τ (model stock; Jang et al. 2024).

    t = N cos θ / (1 + (N − 1) cos θ), with cos θ the mean cosine between task vectors, of the tensor
    or of each row.
    """
    by_rows = given.options["granularity"] == "rows"
    gram = _gram(operands, by_rows)
    return _combination(operands, spherical.model_stock(gram[..., 1:, 1:]), base=1.0)


def slerp(operands: Operands, given: Coefficients) -> Step:
    """Follow the arc between two experts' weights (Shoemake 1985).

    θ = sin((1−t)Ω)/sinΩ · θ₁ + sin(tΩ)/sinΩ · θ₂ with Ω the angle between them; the straight line
    where they are nearly parallel (|cos Ω| > 0.9995).
    """
    return _combination(operands, spherical.slerp(_of_weights(_gram(operands)), given.single("t")))


def nuslerp(operands: Operands, given: Coefficients) -> Step:
    """Follow the arc between two task vectors, or weights, taken as directions (mergekit's NuSLERP)."""
    by_rows, of_weights = given.options["granularity"] == "rows", given.options["origin"] == "zero"
    whole = _gram(operands, by_rows)
    gram = _of_weights(whole) if of_weights else whole[..., 1:, 1:]
    weights = spherical.nuslerp(gram, given.single("t"))
    return _combination(operands, weights, base=None if of_weights else 1.0)


def multislerp(operands: Operands, given: Coefficients) -> Step:
    """Average on the sphere in the tangent space at the mean direction (Goddard 2025, multi-SLERP)."""
    of_weights = given.options["origin"] == "zero"
    whole = _gram(operands)
    gram = _of_weights(whole) if of_weights else whole[1:, 1:]
    weights = spherical.multislerp(gram, given.of("lambda", operands.experts))
    return _combination(operands, weights, base=None if of_weights else 1.0)


def karcher(operands: Operands, given: Coefficients) -> Step:  # noqa: ARG001
    """Take the Karcher mean of the experts' directions, times their mean norm (Karcher 1977)."""
    return _combination(operands, spherical.karcher(_of_weights(_gram(operands))))


def nearswap(operands: Operands, given: Coefficients) -> Step:  # noqa: ARG001
    """Move each weight to the expert's, but by t at most: θ₀ + sign(τ) min(|τ|, t) (mergekit's NearSwap)."""
    return Step(Numbers([1.0], low=[given.single("t")]), "clip")


def arcee_fusion(operands: Operands, given: Coefficients) -> Step:  # noqa: ARG001
    """Take over the weights of importance |τ| · KL ≥ median + 1.5 IQR (mergekit's Arcee Fusion)."""
    *divergences, threshold = operands.table(IMPORTANCE, operands.experts[0])
    scales = torch.tensor(np.array(divergences), device=operands.base.device)[:, None]
    ones = torch.ones_like(scales)
    return Step(Numbers([ones], ones, low=[float(threshold)], scales=scales), "trim")


def passthrough(operands: Operands, given: Coefficients) -> Step:
    """Take the expert itself, scaled: θ = scale · θ₁."""
    scale = given.single("scale")
    return Step(Numbers([scale] * len(operands.changed), base_weight=scale))


RULES: dict[MethodName, Callable[[Operands, Coefficients], Step]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della_linear": della_linear,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "tsv_merge": tsv_merge,
    "iso_c": iso_c,
    "svc": svc,
    "model_stock": model_stock,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "passthrough": passthrough,
}


def tables_of(recipe: MergeRecipe) -> list[Kind]:
    """Return the kinds of tables that a recipe's method reads of the plan."""
    by_rows = recipe.choices.get("granularity") == "rows"
    match recipe.method:
        case "ties":
            return [bands_kind(0.0)]
        case "breadcrumbs" | "breadcrumbs_ties":
            gammas = {gamma for group in recipe.groups for gamma in group.per_expert("gamma").values()}
            return [bands_kind(gamma) for gamma in sorted(gammas) if _is_kept(gamma)]
        case "della_linear" | "della":
            return [RANKS]
        case "sce":
            return [SELECTIONS]
        case "ramplus_tl" if any(group.single("epsilon") == CHANGED for group in recipe.groups):
            return [overlaps_kind(CHANGED)]
        case "tsv_merge":
            return [DECORRELATED]
        case "iso_c":
            return [ISOTROPIC]
        case "svc":
            return [CALIBRATION]
        case "arcee_fusion":
            return [IMPORTANCE]
        case "model_stock" | "slerp" | "nuslerp" | "multislerp" | "karcher":
            return [GRAM_BY_ROWS if by_rows else GRAM]
        case _:
            return []


def hash_key(seed: int, expert: str, name: str) -> int:
    """Derive an int32 key for `hash32` from the recipe's seed, the expert and the tensor."""
    digest = hashlib.blake2b(f"{seed}\0{expert}\0{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


@functools.cache
def hash_keys(seed: int, experts: tuple[str, ...], name: str) -> tuple[tuple[int, ...], int]:
    """Return the experts' keys for a tensor, and its stream."""
    return tuple(hash_key(seed, expert, name) for expert in experts), hash_key(seed, "", name)


def keep_line(density: float, epsilon: float, row_length: int) -> tuple[float, float]:
    """Return low and step of the probability to be kept, low + step · rank (MAGPRUNE; Deep et al. 2024).

    Within a row the entries are ranked by magnitude, ties by position; the probability rises linearly with
    the rank from density − ε to density + ε, so its mean over the row is the density ∈ (0, 1]. The paper's
    ε is the whole spread; here, as in mergekit, it is half of it. ε is cut to min(ε, density, 1 − density):
    density 1 keeps all, where mergekit's ends must lie inside (0, 1). (With three dimensions or more,
    mergekit ranks along the second.)
    """
    if row_length == 1:
        return density, 0.0
    half_spread = min(epsilon, density, 1 - density)
    return density - half_spread, 2 * half_spread / (row_length - 1)


def _is_kept(gamma: float) -> bool:
    """Say whether the plan holds the bands of a gamma: of those on the grid, and 0."""
    return gamma == 0 or grid_place(gamma) is not None


def _bands(
    operands: Operands, densities: Sequence[float], gammas: Sequence[float]
) -> list[tuple[float, float]]:
    """Return the magnitudes low and high between which each expert's entries stay; see `tables.bands`."""
    found = []
    for expert, density, gamma in zip(operands.changed, densities, gammas, strict=True):
        place = grid_place(density)
        if place is not None and _is_kept(gamma):
            row: Array = operands.table(bands_kind(gamma), expert)[place]
        else:
            (source,) = formed([operands.sources[expert]])
            row = bands(operands.base, source, [density], gamma)[0]
        found.append(tuple(row.tolist()))
    return found


def _planned(operands: Operands, kind: Kind) -> Tensor:
    """Return a table of all experts together as a tensor on the base's device."""
    return torch.from_numpy(operands.table(kind)).to(operands.base.device)


def _combine(given: Coefficients) -> Combine:
    return cast(Combine, given.options["normalize"])


def _combination(operands: Operands, weights: Tensor, base: float | None = None) -> Step:
    """Return θ₀ + Σ wᵢ τᵢ where `base` is 1, or Σ wᵢ θᵢ where it is None.

    `weights` has shape (n_experts,), or (rows, n_experts) for a weight in each row.
    """
    total = weights.sum(-1) if base is None else torch.full_like(weights[..., 0], base)
    changed = weights[..., [operands.experts.index(expert) for expert in operands.changed]].movedim(-1, 0)
    if weights.requires_grad and weights.ndim == 1:
        return Step(Numbers(list(changed), total))
    if weights.ndim == 1:
        return Step(Numbers(changed.tolist(), float(total)))
    rows, device = (-1, 1), operands.base.device
    by_row = [each.reshape(rows).to(wide(operands.base).dtype).to(device) for each in (total, *changed)]
    return Step(Numbers(by_row[1:], by_row[0]))


def _gram(operands: Operands, by_rows: bool = False) -> Tensor:
    """Return the inner products of θ₀, τ₁ … τₙ for all experts, in float64: (n + 1, n + 1), or by rows."""
    table = torch.from_numpy(operands.table(GRAM_BY_ROWS if by_rows else GRAM))
    return table if by_rows else table[0]


def _of_weights(gram: Tensor) -> Tensor:
    """Return the inner products of the experts' weights θᵢ = θ₀ + τᵢ from those of θ₀, τᵢ: (…, n, n)."""
    cross = gram[..., 0, 1:]
    return gram[..., :1, :1] + cross[..., None, :] + cross[..., :, None] + gram[..., 1:, 1:]


def _l1_factors(step: Step, operands: Operands) -> list[float]:
    """Return Σ|τ| over that of what is kept, for each expert; 1 where either is about zero, as mergekit."""
    sums = magnitude_sums(step, operands.base, list(operands.sources.values()))
    return [before / after if min(before, after) >= 1e-7 else 1.0 for before, after in sums]
