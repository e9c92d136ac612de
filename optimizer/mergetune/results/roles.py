"""What a candidate is, by its name: the one place where such names are made and read."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from mergetune.evaluation.suite import GuardConfig

BASE = "base"
GRADIENT = "gradient-"  # begins the names of the points that slopes led to
_EXPERT, _AVERAGE, _SOUP, _TRIAL = "expert-", "average-", "soup-", "trial-"
EQUALIZED = f"{_AVERAGE}equalized"  # the norm-equalized average
_LONGEST_NAME = 60  # a candidate's name is a file's name, too


def expert_name(expert: str) -> str:
    """Return the candidate's name of an expert measured alone."""
    return f"{_EXPERT}{expert}"


def reference_name(guard: GuardConfig) -> str:
    """Return the candidate's name of what a guard is compared to."""
    return BASE if guard.reference == BASE else expert_name(guard.reference)


def scaled_average_name(scale: float) -> str:
    """Return the candidate's name of the average of all experts with this lambda."""
    return f"{_AVERAGE}{scale:.2g}"


def uniform_name(n_experts: int) -> str:
    """Return the candidate's name of the plain average."""
    return scaled_average_name(1 / n_experts)


def average_name(members: Collection[str], experts: Sequence[str]) -> str:
    """Return the candidate's name of the average of some of the experts: one name for one set.

    The average of one expert is that expert, and the average of all is the plain one.
    """
    ordered = [name for name in experts if name in members]
    if len(ordered) == 1:
        return expert_name(ordered[0])
    if len(ordered) == len(experts):
        return uniform_name(len(experts))
    name = _SOUP + "+".join(ordered)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{_SOUP}of-{len(ordered)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def trial_name(number: int) -> str:
    """Return the candidate's name of what the sampler proposed as this number."""
    return f"{_TRIAL}{number:04d}"


def trial_number(name: str) -> int | None:
    """Return the number of what the sampler proposed, None for any other candidate."""
    return int(name.removeprefix(_TRIAL)) if name.startswith(_TRIAL) else None


def is_expert(name: str) -> bool:
    """Say whether a candidate's name is that of an expert measured alone."""
    return name.startswith(_EXPERT)


def is_merge(name: str) -> bool:
    """Say whether a candidate is neither the base nor an expert alone."""
    return name != BASE and not is_expert(name)


def is_average(name: str) -> bool:
    """Say whether a candidate's name is that of the average of all experts, with whatever lambda."""
    return name.startswith(_AVERAGE)


def is_soup(name: str) -> bool:
    """Say whether a candidate's name is that of the average of some of the experts."""
    return name.startswith(_SOUP)
