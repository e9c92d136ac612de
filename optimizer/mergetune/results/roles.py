"""What a candidate is in its study, and the names of candidates: the one place that makes and reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Literal

from mergetune.evaluation.suite import GuardConfig

# An average is that of all experts, a soup that of some; `slopes` is a point that these led to.
Role = Literal["base", "expert", "average", "soup", "default", "slopes", "trial"]
SEARCHED: tuple[Role, ...] = ("slopes", "trial")  # all others are baselines: measured before the search

BASE = "base"
_EXPERT, _AVERAGE, _SOUP, _SLOPES, _TRIAL = "expert-", "average-", "soup-", "gradient-", "trial-"
_ROLES: dict[str, Role] = {
    _EXPERT: "expert",
    _AVERAGE: "average",
    _SOUP: "soup",
    _SLOPES: "slopes",
    _TRIAL: "trial",
}
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


def slopes_name(number: int) -> str:
    """Return the candidate's name of the point that slopes led to as this number, from 1."""
    return f"{_SLOPES}{number}"


def role_of(name: str) -> Role:
    """Return the role of the candidate with this name."""
    if name == BASE:
        return "base"
    return next((role for prefix, role in _ROLES.items() if name.startswith(prefix)), "default")


def is_expert(name: str) -> bool:
    """Say whether a candidate's name is that of an expert measured alone."""
    return role_of(name) == "expert"


def is_merge(name: str) -> bool:
    """Say whether a candidate is neither the base nor an expert alone."""
    return role_of(name) not in ("base", "expert")
