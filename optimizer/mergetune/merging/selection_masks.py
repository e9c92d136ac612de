"""What methods that look at a whole tensor decide: DELLA's keep rates, SCE's and Arcee Fusion's masks.

Pure functions on float32 tensors of any shape, exact and deterministic; every tensor of a call has the
same shape, and so has the result. A row is the last dimension; a tensor of one dimension is one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def della_probabilities(task_vector: Tensor, density: float, epsilon: float) -> Tensor:
    """Return each entry's probability to be kept (MAGPRUNE of DELLA; Deep et al. 2024, section 3).

    Within a row the entries are ranked by magnitude, ties by position; the probability rises linearly
    with the rank from density - ε to density + ε, so its mean over the row is the density ∈ (0, 1].
    The paper's ε is the whole spread; here, as in mergekit, it is half of it. ε is cut to
    min(ε, density, 1 - density): density 1 keeps all, where mergekit's ends must lie inside (0, 1).
    (With three dimensions or more, mergekit ranks along the second.)
    """
    half_spread = min(epsilon, density, 1 - density)
    rows = task_vector.reshape(task_vector.shape or (1,))
    count = rows.shape[-1]
    order = rows.abs().sort(dim=-1, stable=True).indices
    ranks = torch.arange(count, dtype=torch.float64, device=rows.device)
    rising = density + half_spread * (2 * ranks - (count - 1)) / max(count - 1, 1)
    levels = rising.clamp_(0, 1).to(rows.dtype).expand_as(rows)
    return torch.empty_like(rows).scatter_(-1, order, levels).reshape(task_vector.shape)


def sce_mask(task_vectors: Sequence[Tensor], select_topk: float) -> Tensor:
    """Return True at the positions of largest variance across experts (SCE's Select; Wan et al. 2024).

    Selected are the first k = ⌊select_topk · m⌋ of the m positions whose variance is not zero, and
    all that tie with the last of them; none where k is 0, as with a single expert. `select_topk` 1
    keeps every position, also those where the experts agree.
    """
    if select_topk >= 1:
        return torch.ones_like(task_vectors[0], dtype=torch.bool)
    variance = torch.stack(list(task_vectors)).var(dim=0, unbiased=False)
    k = int(select_topk * int(variance.count_nonzero()) + 1e-9)
    if k == 0:
        return torch.zeros_like(variance, dtype=torch.bool)
    return variance >= variance.flatten().kthvalue(variance.numel() - k + 1).values


def sce(task_vectors: Sequence[Tensor], select_topk: float) -> Tensor:
    """Select, calculate, erase: return the merged task vector (SCE; Wan et al. 2024, arXiv 2408.07990).

    Select the positions of `sce_mask`; weigh each expert by the mean square of what is selected of it,
    normalized; drop the entries against the elected sign, that of the experts' sum (+ where it is 0);
    average the others, Σ wᵢ δᵢ / Σ wᵢ. Where all is zero, so is the result. (mergekit weighs the
    experts alike where the mean squares sum to less than 1e-6, as those of short fine-tunes do.)
    """
    mask = sce_mask(task_vectors, select_topk)
    selected = [vector.where(mask, 0.0) for vector in task_vectors]
    weights = _energy_shares(selected)
    total = torch.zeros_like(selected[0])
    for vector in selected:
        total.add_(vector)
    elects_plus = total >= 0
    merged, share = torch.zeros_like(total), torch.zeros_like(total)
    for vector, weight in zip(selected, weights, strict=True):
        agrees = torch.where(elects_plus, vector > 0, vector < 0)
        merged.add_(vector.where(agrees, 0.0), alpha=weight)
        share.add_(agrees, alpha=weight)
    return merged.div_(share.where(share > 0, 1.0))


def arcee_fusion_mask(weights: Tensor, base: Tensor) -> Tensor:
    """Return True where the expert's weights are to replace the base's (Arcee Fusion; Arcee AI 2025).

    The importance |θ - θ₀| · KL(softmax(θ) ‖ softmax(θ₀)), the divergence by rows, must reach the
    median + 1.5 · (Q3 - Q1) of the tensor. The quantile q of n values is number ⌊q · (n-1)⌋ of them
    in order, over the whole tensor: mergekit samples a million with replacement where there are more.
    """
    importance = _fusion_importance(weights, base)
    ordered = importance.flatten()
    q1, median, q3 = (ordered.kthvalue((ordered.numel() - 1) * i // 4 + 1).values for i in (1, 2, 3))
    return importance >= median + 1.5 * (q3 - q1)


def _energy_shares(vectors: Sequence[Tensor]) -> list[float]:
    """Return each vector's share in the sum of squares (SCE's Calculate); equal shares of nothing."""
    energies = [float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2 for vector in vectors]
    total = sum(energies)
    return [energy / total if total > 0 else 1 / len(energies) for energy in energies]


def _fusion_importance(weights: Tensor, base: Tensor) -> Tensor:
    """Return |θ - θ₀| · KL(p ‖ q) with p, q the rows' softmax, 1e-8 added to every probability."""
    p, q = (torch.softmax(tensor, dim=-1) + 1e-8 for tensor in (weights, base))
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)  # (..., 1)
    return (weights - base).abs() * divergence
