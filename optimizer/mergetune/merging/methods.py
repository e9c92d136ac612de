"""The merge methods: what each makes of one tensor, exact to its paper.

θ₀ is the base, θᵢ an expert, τᵢ = θᵢ − θ₀ its task vector (Ilharco et al. 2023) and λᵢ its weight.
A method reduces a tensor to a `Step`: numbers, and an elementwise rule that `elementwise` carries out
in one pass over memory. The table of methods and their parameters is `method_table.METHODS`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mergetune.merging import selection_masks, spherical
from mergetune.merging.elementwise import Combine, Numbers, Step, hash32, keep_limit, wide
from mergetune.merging.operands import Operands
from mergetune.space.method_table import MethodName


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one layer group by name, and the recipe's options.

    Those of `method_table.SMOOTH` may be scalar tensors, which autograd follows through every rule.
    """

    values: Mapping[str, Any]
    options: Mapping[str, str]

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
    bands = [
        operands.band(expert, density)
        for expert, density in zip(operands.changed, given.of("density", operands.changed), strict=True)
    ]
    numbers = Numbers(given.of("lambda", operands.changed), low=[low for low, _ in bands])
    return Step(numbers, "trim", _combine(given))


def breadcrumbs(operands: Operands, given: Coefficients) -> Step:
    """Drop the largest entries and the smallest, then add (Breadcrumbs; Davari & Belilovsky 2024, eq. 3).

    Of each τᵢ the share gamma at the top is dropped, then of the rest the largest are kept, density · n.
    """
    wanted = zip(
        operands.changed,
        given.of("density", operands.changed),
        given.of("gamma", operands.changed),
        strict=True,
    )
    bands = [operands.band(expert, density, gamma) for expert, density, gamma in wanted]
    numbers = Numbers(
        given.of("lambda", operands.changed), low=[low for low, _ in bands], high=[high for _, high in bands]
    )
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
    rescale = given.options["rescale"]
    factors = [
        _dare_factor(operands, *pair, rescale) for pair in zip(operands.changed, densities, strict=True)
    ]
    numbers = Numbers(
        lambdas=[lam * factor for lam, factor in zip(lambdas, factors, strict=True)],
        limits=[keep_limit(density) for density in densities],
        keys=[hash_key(operands.seed, expert, operands.name) for expert in operands.changed],
        stream=hash_key(operands.seed, "", operands.name),
    )
    return Step(numbers, "random")


def dare_ties(operands: Operands, given: Coefficients) -> Step:
    """Drop and rescale as DARE does, then elect signs and merge what agrees (Yu et al. 2024, section 3.3)."""
    return replace(dare_linear(operands, given), combine=_combine(given))


def della_linear(operands: Operands, given: Coefficients) -> Step:
    """Drop by magnitude at random, rescale and add (DELLA; Deep et al. 2024, MAGPRUNE).

    Entry j is kept with probability pⱼ, which rises with the rank of its magnitude in its row from
    density − epsilon to density + epsilon, and is divided by pⱼ.
    """
    rows = zip(
        operands.changed,
        given.of("density", operands.changed),
        given.of("epsilon", operands.changed),
        strict=True,
    )
    vectors = [_magpruned(operands, *row, given.options["rescale"]) for row in rows]
    return Step(Numbers(given.of("lambda", operands.changed)), vectors=vectors)


def della(operands: Operands, given: Coefficients) -> Step:
    """Drop as `della_linear` does, then elect signs and merge what agrees (DELLA; Deep et al. 2024)."""
    return replace(della_linear(operands, given), combine=_combine(given))


def sce(operands: Operands, given: Coefficients) -> Step:
    """Select by variance, calculate weights by mean square, erase minority signs (SCE; Wan et al. 2024)."""
    merged = selection_masks.sce(
        [operands.vector(expert) for expert in operands.experts], given.single("select_topk")
    )
    return Step(Numbers([1.0]), vectors=[merged])


def model_stock(operands: Operands, given: Coefficients) -> Step:
    """Move towards the estimated centre of fine-tunes: θ₀ + t · mean τ (model stock; Jang et al. 2024).

    t = N cos θ / (1 + (N − 1) cos θ), with cos θ the mean cosine between task vectors, of the tensor
    or of each row.
    """
    by_rows = given.options["granularity"] == "rows"
    gram = operands.gram(by_rows)
    return _combination(operands, spherical.model_stock(gram[..., 1:, 1:]), base=1.0)


def slerp(operands: Operands, given: Coefficients) -> Step:
    """Follow the arc between two experts' weights (Shoemake 1985).

    θ = sin((1−t)Ω)/sinΩ · θ₁ + sin(tΩ)/sinΩ · θ₂ with Ω the angle between them; the straight line
    where they are nearly parallel (|cos Ω| > 0.9995).
    """
    return _combination(operands, spherical.slerp(_gram_of_weights(operands), given.single("t")))


def nuslerp(operands: Operands, given: Coefficients) -> Step:
    """Follow the arc between two task vectors, or weights, taken as directions (mergekit's NuSLERP)."""
    by_rows, of_weights = given.options["granularity"] == "rows", given.options["origin"] == "zero"
    gram = _gram_of_weights(operands, by_rows) if of_weights else operands.gram(by_rows)[..., 1:, 1:]
    weights = spherical.nuslerp(gram, given.single("t"))
    return _combination(operands, weights, base=None if of_weights else 1.0)


def multislerp(operands: Operands, given: Coefficients) -> Step:
    """Average on the sphere in the tangent space at the mean direction (Goddard 2025, multi-SLERP)."""
    of_weights = given.options["origin"] == "zero"
    gram = _gram_of_weights(operands) if of_weights else operands.gram()[1:, 1:]
    weights = spherical.multislerp(gram, given.of("lambda", operands.experts))
    return _combination(operands, weights, base=None if of_weights else 1.0)


def karcher(operands: Operands, given: Coefficients) -> Step:  # noqa: ARG001
    """Take the Karcher mean of the experts' directions, times their mean norm (Karcher 1977)."""
    return _combination(operands, spherical.karcher(_gram_of_weights(operands)))


def nearswap(operands: Operands, given: Coefficients) -> Step:  # noqa: ARG001
    """Move each weight to the expert's, but by t at most: θ₀ + sign(τ) min(|τ|, t) (mergekit's NearSwap)."""
    return Step(Numbers([1.0], low=[given.single("t")]), "clip")


def arcee_fusion(operands: Operands, given: Coefficients) -> Step:  # noqa: ARG001
    """Take over the weights of importance |τ| · KL ≥ median + 1.5 IQR (mergekit's Arcee Fusion)."""
    vector = operands.vector(operands.experts[0])
    base = operands.base.float()
    mask = selection_masks.arcee_fusion_mask(base + vector, base)
    return Step(Numbers([1.0]), vectors=[torch.where(mask, vector, 0.0)])


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
    "model_stock": model_stock,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "passthrough": passthrough,
}


@functools.cache
def hash_key(seed: int, expert: str, name: str) -> int:
    """Derive an int32 key for `hash32` from the recipe's seed, the expert and the tensor."""
    digest = hashlib.blake2b(f"{seed}\0{expert}\0{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


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
    rows, device = (*operands.base.shape[:-1], 1), operands.base.device
    by_row = [each.reshape(rows).to(wide(operands.base).dtype).to(device) for each in (total, *changed)]
    return Step(Numbers(by_row[1:], by_row[0]))


def _gram_of_weights(operands: Operands, by_rows: bool = False) -> Tensor:
    """Return the inner products of the experts' weights θᵢ = θ₀ + τᵢ: (…, n, n)."""
    gram = operands.gram(by_rows)
    cross = gram[..., 0, 1:]
    return gram[..., :1, :1] + cross[..., None, :] + cross[..., :, None] + gram[..., 1:, 1:]


def _magpruned(operands: Operands, expert: str, density: float, epsilon: float, rescale: str) -> Tensor:
    """Return an expert's task vector with entries dropped by MAGPRUNE and rescaled."""
    vector = operands.vector(expert)
    probabilities = selection_masks.della_probabilities(vector, density, epsilon)
    limits = (probabilities.double() * 2**32).round().clamp_(min=1) - 2**31 - 1  # as `keep_limit`
    mask = (_hashes(operands, expert) <= limits.to(torch.int32)) & (probabilities > 0)
    if rescale == "probability":
        vector = vector / probabilities.clamp(min=2**-32)
    kept = torch.where(mask, vector, 0.0)
    return kept * _l1_factor(vector, mask) if rescale == "l1" else kept


def _l1_factor(vector: Tensor, mask: Tensor) -> float:
    """Return Σ|τ| before over Σ|τ| after masking; 1 where either is about zero, as mergekit has it."""
    magnitudes = vector.abs().cpu().numpy()
    before = float(np.sum(magnitudes, dtype=np.float64))
    after = float(np.sum(magnitudes, where=mask.cpu().numpy(), dtype=np.float64))
    return before / after if min(before, after) >= 1e-7 else 1.0


def _dare_factor(operands: Operands, expert: str, density: float, rescale: str) -> float:
    if rescale == "l1":
        return _l1_factor(operands.vector(expert), _hashes(operands, expert) <= keep_limit(density))
    return 1 / density if rescale == "probability" else 1.0


def _hashes(operands: Operands, expert: str) -> Tensor:
    """Return a uniform int32 for every entry of the tensor, the same as `merge_chunk` draws."""
    index = torch.arange(operands.base.numel(), device=operands.base.device).to(torch.int32)
    stream, key = (hash_key(operands.seed, who, operands.name) for who in ("", expert))
    return hash32(index, stream, key).view(operands.base.shape)
