"""Recipe → merged tensors, streamed; what does not depend on the coefficients is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from optimizer.errors import MergetuneError, TrialError
from optimizer.merging import methods
from optimizer.merging.checkpoint import Checkpoint, Expert
from optimizer.recipe import MergeRecipe, RecipeGroup, assign_groups

# Densities live on this grid, so that one table of exact thresholds serves a whole study.
DENSITY_STEP = 0.01
_GRID = tuple(step / 100 for step in range(1, 101))


class Merger:
    """Merge experts into a base, again and again, with new coefficients each time.

    The same recipe gives the same bits: sums are accumulated in float32 in the order of the experts
    and cast once to the base's dtype; DARE's masks are a pure function of (seed, expert, tensor).
    """

    def __init__(self, base: Checkpoint, experts: Sequence[Expert]) -> None:
        self.base = base
        self.experts = {expert.name: expert for expert in experts}
        self._thresholds: dict[tuple[str, str], list[float]] = {}

    def merge(self, recipe: MergeRecipe) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the merged model, in the base's order, shape and dtype.

        Raises:
            MergetuneError: the recipe names an expert that was not given, or its groups do not take
                every tensor exactly once.
            TrialError: these coefficients make a weight infinite or NaN.
        """
        if missing := set(recipe.experts) - set(self.experts):
            raise MergetuneError(
                f"The recipe names the experts {', '.join(sorted(missing))}, "
                f"but those given are {', '.join(self.experts)}."
            )
        groups = assign_groups(recipe.groups, self.base.names)
        for name in self.base.names:
            stored = self.base.tensor(name)
            merged = self._merge_tensor(recipe, groups[name], name, stored)
            yield name, stored if merged is None else _cast(merged, stored.dtype, name)

    def _merge_tensor(
        self, recipe: MergeRecipe, group: RecipeGroup, name: str, stored: Tensor
    ) -> Tensor | None:
        """Merge one tensor in float32; None where no expert changes it."""
        if not stored.is_floating_point():
            return None
        found = {expert: self.experts[expert].task_vector(name, stored) for expert in recipe.experts}
        changed = {expert: vector for expert, vector in found.items() if vector is not None}
        if not changed:
            return None
        base = stored.float()
        if recipe.method in ("linear", "slerp"):
            return self._average(recipe, group, base, found)
        vectors = list(changed.values())
        lambdas = [group.per_expert("lambda")[expert] for expert in changed]
        if recipe.method == "task_arithmetic":
            return methods.task_arithmetic(base, vectors, lambdas)
        densities = [group.per_expert("density")[expert] for expert in changed]
        if recipe.method == "ties":
            thresholds = [
                self._threshold(expert, name, vector, density)
                for (expert, vector), density in zip(changed.items(), densities, strict=True)
            ]
            return methods.ties(base, vectors, lambdas, thresholds)
        masks = [
            methods.keep_mask(base.shape, density, _mask_key(recipe.seed, expert, name))
            for expert, density in zip(changed, densities, strict=True)
        ]
        dare = methods.dare_linear if recipe.method == "dare_linear" else methods.dare_ties
        return dare(base, vectors, lambdas, masks, densities)

    def _average(
        self,
        recipe: MergeRecipe,
        group: RecipeGroup,
        base: Tensor,
        found: Mapping[str, Tensor | None],
    ) -> Tensor:
        """Merge by a method that averages whole weights: an expert without a change holds the base's."""
        weights = [base if vector is None else base + vector for vector in found.values()]
        if recipe.method == "linear":
            return methods.linear(weights, [group.per_expert("lambda")[expert] for expert in found])
        return methods.slerp(weights[0], weights[1], group.single("t"))

    def _threshold(self, expert: str, name: str, task_vector: Tensor, density: float) -> float:
        """Look the trimming threshold up in the table of this tensor, made at its first use."""
        step = round(density / DENSITY_STEP)
        if abs(step * DENSITY_STEP - density) > 1e-9 or step < 1:
            return methods.trim_thresholds(task_vector, [density])[0]
        if (expert, name) not in self._thresholds:
            self._thresholds[expert, name] = methods.trim_thresholds(task_vector, _GRID)
        return self._thresholds[expert, name][step - 1]


def _cast(merged: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    result = merged.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise TrialError(f"The merge makes `{name}` infinite or NaN: its coefficients are too large.")
    return result


def _mask_key(seed: int, expert: str, name: str) -> int:
    """Derive the 64-bit key of one mask from the recipe's seed, the expert and the tensor."""
    digest = hashlib.blake2b(f"{seed}\0{expert}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
