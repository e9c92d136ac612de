"""Run directories of studies that never ran: written through RunDir, measured by a seeded simulation.

A merge's skill is a smooth function of its lambdas, so that fronts, trade-offs and noise look as
they do in life; an item is answered where the skill exceeds its difficulty.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from mergetune.evaluation.evaluate import Measurement
from mergetune.evaluation.suite import Split, SuiteConfig
from mergetune.results.roles import BASE, expert_name, role_of
from mergetune.results.run_dir import Candidate, Cost, HoldoutUse, RunDir, StudyRecord
from mergetune.results.selection import choose
from mergetune.space.coordinates import Coordinate
from mergetune.space.recipe import MergeRecipe, RecipeGroup, Source, tensor_place

EXPERTS = ("tools", "persona")
N_LAYERS = 30
GROUPS: tuple[dict[str, object], ...] = (
    {"name": "outside", "roles": ["embeddings", "head", "norms"]},
    {"name": "early", "layers": [0, 9], "roles": ["attention", "mlp"]},
    {"name": "middle", "layers": [10, 19], "roles": ["attention", "mlp"]},
    {"name": "late-attention", "layers": [20, 29], "roles": ["attention"]},
    {"name": "late-mlp", "layers": [20, 29], "roles": ["mlp"]},
)
# What every score is to a merge: (base skill, gain by expert); a guard loses with the sum of lambdas.
SKILLS: dict[str, tuple[float, dict[str, float]]] = {
    "tool_calls": (0.08, {"tools": 0.78}),
    "persona": (0.22, {"persona": 0.62}),
    "brevity": (0.35, {"tools": 0.25, "persona": 0.2}),
    "latency": (0.3, {"tools": 0.3}),
    "general": (0.72, {}),
}
Lambdas = dict[str, dict[str, float]]  # by group, by expert


@dataclass(frozen=True)
class Plan:
    """What the simulated study looks like."""

    objectives: tuple[str, ...] = ("tool_calls", "persona")
    minimized: tuple[str, ...] = ()
    guard_margin: float | None = 0.05
    n_trials: int = 25
    n_baselines: int = 7
    n_items: int = 60  # of each score in each split
    holdout: bool = True
    n_finalists: int = 3
    n_holdout_uses: int = 1
    noise: float = 0.0  # the share of items that a second measurement of the base answers anew
    failed: tuple[int, ...] = (6,)
    responses: Mapping[str, str] = field(default_factory=dict)  # by candidate, instead of the usual


def write_run(path: Path, plan: Plan = Plan()) -> RunDir:
    """Write the run directory of a study that went as planned."""
    run = RunDir(path)
    with run.claim(_record(plan)):
        pass
    run.write_items(_items(plan))
    run.write_json("warnings.json", ["The task vector of `persona` is 2.1 times as long as that of `tools`."])
    run.write_json("versions.json", {"mergetune": "0.1.0", "torch": "2.9.0"})
    run.write_json("model.json", {"n_layers": N_LAYERS, "tensors": _tensors()})
    places = [(group["name"], expert) for group in GROUPS for expert in EXPERTS]
    run.write_coordinates(
        {each.key: each for each in (Coordinate(parameter="lambda", group=g, expert=e) for g, e in places)}
    )
    points = dict(list(_baselines().items())[: plan.n_baselines]) | _trials(plan.n_trials)
    for name, lambdas in points.items():
        _write(run, plan, name, lambdas)
    if plan.noise and BASE in points:
        run.write_noise(_second_measurement(plan, points[BASE]))
    if plan.holdout:
        _confirm(run, plan, points)
    return run


def _confirm(run: RunDir, plan: Plan, points: Mapping[str, Lambdas]) -> None:
    """Measure on the holdout what a study measures there."""
    choice = choose(run)
    chosen = choice.finalists(plan.n_finalists, run.study.suite_config) if choice else ()
    at = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    for _ in range(plan.n_holdout_uses):
        run.add_holdout_use(HoldoutUse(at=at, finalists=chosen, n_candidates=len(run.candidates())))
    names = [BASE, *map(expert_name, EXPERTS), "average-0.5", *chosen]
    for name in dict.fromkeys(names):
        if run.scores(name, "search") is not None:
            run.write_measurement(name, "holdout", measure(plan, name, points[name], "holdout"))


def _second_measurement(plan: Plan, lambdas: Lambdas) -> Measurement:
    first, other = (measure(plan, name, lambdas, "search") for name in (BASE, "base again"))
    anew = np.random.default_rng(2).random(len(first.items)) < plan.noise
    items = first.items.assign(score=np.where(anew, other.items["score"], first.items["score"]))
    return Measurement(items, first.seconds)


def _record(plan: Plan) -> StudyRecord:
    task = {"items": "items.jsonl", "scorer": "regex"}
    scores = {
        name: {"tasks": [task], "direction": "minimize" if name in plan.minimized else "maximize"}
        for name in plan.objectives
    }
    guards = {"general": {"tasks": [task], "margin": plan.guard_margin}}
    suite = {
        "description": "A synthetic suite.",
        "chat_template": True,
        "objectives": scores,
        "guards": guards if plan.guard_margin is not None else {},
    }
    return StudyRecord(
        base="/models/smollm2",
        experts={name: f"/models/{name}" for name in EXPERTS},
        search_space="/spaces/task_arithmetic_layer_groups.yaml",
        suite="/suites/taskmaster.yaml",
        budget={"trials": 25},
        suite_name="taskmaster",
        suite_config=SuiteConfig.model_validate(suite),
        digests={"suite": "5" * 64, "search_space": "a" * 64, "base": "b" * 64, "tools": "c" * 64},
    )


def _baselines() -> dict[str, Lambdas]:
    models = {BASE: (0.0, 0.0), expert_name("tools"): (1.0, 0.0), expert_name("persona"): (0.0, 1.0)}
    averages = {f"average-{lam:.2g}": (lam, lam) for lam in (0.5, 0.8, 1.0, 0.3)}
    return {
        name: {str(g["name"]): dict(zip(EXPERTS, pair, strict=True)) for g in GROUPS}
        for name, pair in {**models, **averages}.items()
    }


def _trials(count: int) -> dict[str, Lambdas]:
    rng = np.random.default_rng(1)
    return {
        f"trial-{number:04d}": {
            str(group["name"]): {expert: round(rng.uniform(0, 1.3), 2) for expert in EXPERTS}
            for group in GROUPS
        }
        for number in range(1, count + 1)
    }


def _tensors() -> list[str]:
    parts = ["input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    inside = [f"model.layers.{i}.{part}.weight" for i in range(N_LAYERS) for part in parts]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def _items(plan: Plan) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "score_name": score,
            "task": f"{score}:items.jsonl",
            "item": f"{score}-{split}-{i:03d}",
            "split": split,
            "prompt": f"Question {i} of {score}: please add 'call <Ann & Bo>' to my list.",
            "target": f"answer {i}",
        }
        for score in _score_names(plan)
        for split in ("search", "holdout")
        for i in range(plan.n_items)
    )


def _score_names(plan: Plan) -> tuple[str, ...]:
    return plan.objectives if plan.guard_margin is None else (*plan.objectives, "general")


def _write(run: RunDir, plan: Plan, name: str, lambdas: Lambdas) -> None:
    failed = name in {f"trial-{number:04d}" for number in plan.failed}
    groups = [RecipeGroup.model_validate({**g, "lambda": lambdas[str(g["name"])]}) for g in GROUPS]
    recipe = MergeRecipe(
        method="task_arithmetic",
        base=Source(path="/models/smollm2", digest="b" * 64),
        experts={e: Source(path=f"/models/{e}", digest=e * 8) for e in EXPERTS},
        groups=tuple(groups),
    )
    candidate = Candidate(
        name=name,
        number=len(run.candidates()),
        role=role_of(name),
        recipe=recipe,
        params={f"lambda.{g}.{e}": v for g, own in lambdas.items() for e, v in own.items()},
        state="failed" if failed else "complete",
        reason="`score` of `persona` is nan: the model's output is broken." if failed else None,
        cost=Cost(merge_s=2.1, load_s=0.4, evaluate_s=31.0 + len(name), n_items=3 * plan.n_items),
    )
    run.write_candidate(candidate, None if failed else measure(plan, name, lambdas, "search"))


def measure(plan: Plan, name: str, lambdas: Lambdas, split: Split) -> Measurement:
    """Answer every item of a split, as a model with these lambdas would."""
    items = _items(plan)
    items = items[items["split"] == split]
    seen = [
        (key := f"{row.item}", _skill(str(row.score_name), lambdas), _uniform(key), _uniform(key + name))
        for row in items.itertuples()
    ]
    right = [0.8 * difficulty + 0.2 * luck < skill for _, skill, difficulty, luck in seen]
    minimized = items["score_name"].isin(plan.minimized).to_numpy()
    scores = np.asarray(right) ^ minimized
    reply = plan.responses.get(name)
    return Measurement(
        items[["score_name", "task", "item"]].assign(
            score=scores.astype(float),
            response=[
                reply or ("answer " + k[-3:] if ok else "I am not sure.")
                for (k, *_), ok in zip(seen, right, strict=True)
            ],
        ),
        30.0,
    )


def sensitivity_frame(scales: Mapping[str, float], digests: Mapping[str, str] = {}) -> pd.DataFrame:
    """Measure slopes at points of these scales: persona's upper layers harm the tool calls."""
    rng = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "point": point,
            "digest": digests.get(point, point),
            "score_name": score,
            "fold": fold,
            "n_items": 3,
            "loss": 2.0 + 0.1 * fold,
            "tensor": tensor,
            "parameter": "lambda",
            "expert": expert,
            "slope": -scale * (_pull(score, expert, tensor) + rng.normal(scale=0.02)),
        }
        for point, scale in scales.items()
        for score in ("tool_calls", "persona", "general")
        for fold in range(4)
        for tensor in _tensors()
        for expert in EXPERTS
    )


# How much a score gains by an expert, and around which layer.
_PULLS = {
    ("tool_calls", "tools"): (0.5, 12),
    ("tool_calls", "persona"): (-0.3, 24),
    ("persona", "persona"): (0.4, 22),
    ("persona", "tools"): (-0.04, 14),
}


def _pull(score: str, expert: str, tensor: str) -> float:
    size, middle = _PULLS.get((score, expert), (0.0, 0))
    layer = tensor_place(tensor).layer
    return 0.0 if layer is None else size * float(np.exp(-(((layer - middle) / 5) ** 2)))


def _skill(score: str, lambdas: Lambdas) -> float:
    base, gains = SKILLS[score]
    weights = np.array([0.5, 1.0, 1.4, 0.8, 1.3])
    weights /= weights.sum()
    means = {e: float(weights @ [own[e] for own in lambdas.values()]) for e in EXPERTS}
    total = sum(means.values())
    gained = sum(gain * np.tanh(2.2 * means[e]) / np.tanh(2.2) for e, gain in gains.items())
    interference = 0.16 * max(0.0, total - sum(means[e] for e in gains)) * (1 if gains else 0)
    return float(base + gained - interference - 0.10 * max(0.0, total - 1.0) ** 2)


def _uniform(text: str) -> float:
    return zlib.crc32(text.encode()) / 2**32
