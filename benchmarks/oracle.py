"""What lambdas can reach at best: one for each tensor and expert, found by gradient on all search items.

    export OMP_NUM_THREADS=1 TQDM_DISABLE=1
    python benchmarks/oracle.py FOLDER [--seed 0] [--experts uneven] [--grain tensors]

An oracle beside the methods of search.py, in plain torch and without mergetune's merging, slopes or scores:
Adam on the log of the summed odds that an answer is lost, (loss / 0.3 nats) to the power 1.5, over every item
of the search split. Each weighting of the skills has a descent of its own. The table has the share of exact
answers of each skill after so many steps, on the search split and on the holdout split, which no step saw.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import small_skills
from letters import Example
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite

STEPS = (5, 10, 20, 40, 80, 160)
RATE, BEGIN, HIGHEST = 0.05, 0.3, 2.0  # of lambdas
HALF, STEEPNESS = 0.3, 1.5  # of the odds
EMPHASIS = 10.0  # how many times more one skill counts than the others

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reached:
    """Where a descent was after so many steps: shares of exact answers by skill, on both splits."""

    weighting: tuple[float, ...]
    n_steps: int
    search: dict[str, float]
    holdout: dict[str, float]


def descend(folder: Path, skills: Sequence[str], grain: str = "tensors") -> Iterator[Reached]:
    """Yield what descents reach on the models and the suite that `small_skills` wrote.

    Args:
        folder: of the models.
        skills: of the experts.
        grain: `tensors`, `layers`, or how many slices the depth is cut into.
    """
    items = Evaluator(read_suite(folder / "suite.yaml")).items()
    splits = {
        split: {
            skill: list(zip(own["prompt"], own["target"], strict=True))
            for skill, own in part.groupby("score_name")
        }
        for split, part in items.groupby("split")
    }
    base = _weights(folder / "base")
    vectors = {
        skill: {name: weight - base[name] for name, weight in _weights(folder / skill).items()}
        for skill in skills
    }
    groups = [_group(name, grain) for name in base]
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")

    def merged(lambdas: Tensor) -> dict[str, Tensor]:
        return {
            name: base[name]
            + sum(lambdas[i, places[group]] * vectors[skill][name] for i, skill in enumerate(skills))
            for name, group in zip(base, groups, strict=True)
        }

    for weighting in _weightings(len(skills)):
        lambdas = torch.full((len(skills), len(places)), BEGIN, requires_grad=True)
        optimizer = torch.optim.Adam([lambdas], lr=RATE)
        for step in range(1, max(STEPS) + 1):
            weights, odds = merged(lambdas), torch.zeros(())
            for skill, factor in zip(skills, weighting, strict=True):
                odds = odds + factor * (_loss(model, weights, splits["search"][skill]) / HALF) ** STEEPNESS
            optimizer.zero_grad()
            odds.log().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                lambdas.clamp_(0, HIGHEST)
                if step in STEPS:
                    model.load_state_dict(merged(lambdas))
                    found = {
                        split: {skill: small_skills.exact_matches(model, own[skill]) for skill in skills}
                        for split, own in splits.items()
                    }
                    yield Reached(weighting, step, found["search"], found["holdout"])


def _weightings(n_skills: int) -> list[tuple[float, ...]]:
    """Return equal weights, and those that emphasize one skill, moderately and strongly."""
    own = [1.0] * n_skills
    return [
        tuple(own),
        *(
            tuple(factor if i == place else 1.0 for i in range(n_skills))
            for factor in (math.sqrt(EMPHASIS), EMPHASIS)
            for place in range(n_skills)
        ),
    ]


def _loss(model: Any, weights: Weights, examples: Sequence[Example]) -> Tensor:
    tokens, labels = small_skills.tensors(examples)
    logits = functional_call(model, dict(weights), kwargs={"input_ids": tokens}).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=small_skills.IGNORED)


def _weights(folder: Path) -> dict[str, Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def _group(name: str, grain: str) -> str:
    if grain == "tensors":
        return name
    _, found, rest = name.partition(".layers.")
    if not found:
        return "0" if "embed" in name else str(small_skills.N_LAYERS - 1)
    layer = int(rest.partition(".")[0])
    n_slices = small_skills.N_LAYERS if grain == "layers" else int(grain)
    return str(layer * n_slices // small_skills.N_LAYERS)


def main() -> None:
    """Descend and print what was reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", choices=small_skills.EXPERTS, default="uneven")
    parser.add_argument("--grain", default="tensors", help="tensors, layers or a number of slices")
    arguments = parser.parse_args()
    small_skills.write_models(arguments.folder, arguments.seed, arguments.experts)
    skills = list(small_skills.EXPERTS[arguments.experts])
    shown = Table("weights", "steps", *(f"{skill}, search" for skill in skills), *skills)
    for found in descend(arguments.folder, skills, arguments.grain):
        shares = [*found.search.values(), *found.holdout.values()]
        weights = " : ".join(f"{factor:.3g}" for factor in found.weighting)
        shown.add_row(weights, str(found.n_steps), *(f"{share:.2f}" for share in shares))
    Console(width=max(110, Console().width)).print(shown)


if __name__ == "__main__":
    main()
