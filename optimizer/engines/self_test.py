"""Does the engine compute with the weights that are put in? Shown before any score is believed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer.atomic_files import write_text
from optimizer.engines.choice import installed_version
from optimizer.engines.completions import Scoring
from optimizer.engines.engine import EngineConfig
from optimizer.engines.vllm_engine import VllmEngine
from optimizer.errors import MergetuneError
from optimizer.merging.inputs import Inputs
from optimizer.merging.writer import write_model
from optimizer.recipe import MergeRecipe

RECORD, MODEL = "self_test.json", "self-test"
_TOLERANCE = 0.02  # nats, in the mean: what the order of sums does in bfloat16 on a GPU
_SCALE = 0.9  # of the second model's weights: every tensor differs
_N_TEXTS, _N_TOKENS = 8, 32


def start_tested(config: EngineConfig, inputs: Inputs, folder: Path) -> VllmEngine:
    """Start vLLM; the first time in `folder`, show that it follows a swap of weights.

    With A the first expert and B the same scaled by 0.9, the engine starts on B from disk, then takes
    A, B and A again: B put in must score texts as B from disk, and A as A. One start serves for both. B
    stands in `folder` until the engine has read it.

    Raises:
        MergetuneError: it does not, with the differences of the log-probabilities; or there is no room for B.
    """
    log, record, key = folder / "engine.log", folder / RECORD, _key(config, inputs)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["of"] == key:
        return VllmEngine(config, inputs.base.folder, inputs.paths, log, inputs.chat)
    a, b = _scaled(inputs, 1.0), _scaled(inputs, _SCALE)
    place = folder / MODEL
    write_model(place, inputs.merger.merge(b), inputs.base)
    try:
        engine = VllmEngine(config, place, inputs.paths, log, inputs.chat)
    finally:
        shutil.rmtree(place)
    try:
        from_disk = _probe(engine)
        first, swapped, again = (_probe_with(engine, recipe) for recipe in (a, b, a))
        found = {
            "a_to_b": _distance(first, swapped),
            "a_to_a_again": _distance(first, again),
            "b_to_b_from_disk": _distance(swapped, from_disk),
        }
        _check(found)
    except BaseException:
        engine.close()
        raise
    write_text(record, json.dumps({"of": key, **found}, indent=1))
    return engine


def _key(config: EngineConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what another result may be expected of."""
    return {
        "vllm": installed_version(),
        "base": inputs.base.digest,
        "engine": config.model_dump(mode="json", exclude={"timeout_s"}),
    }


def _scaled(inputs: Inputs, scale: float) -> MergeRecipe:
    """Return the recipe of the first expert, all its weights scaled."""
    name, source = next(iter(inputs.expert_sources.items()))
    return MergeRecipe.of_one_group("passthrough", inputs.base_source, {name: source}, {"scale": scale})


def _probe_with(engine: VllmEngine, recipe: MergeRecipe) -> list[float]:
    engine.load(recipe)
    return _probe(engine)


def _check(found: Mapping[str, float]) -> None:
    """Raise `MergetuneError` where the engine did not follow."""
    worst = max(found["a_to_a_again"], found["b_to_b_from_disk"])
    if worst <= min(_TOLERANCE, found["a_to_b"] / 10):
        return
    raise MergetuneError(
        "vLLM does not compute with the weights that are put in: log-probabilities of the same model must "
        f"agree to {_TOLERANCE} nats in the mean, and those of other models differ by much more, but A, B "
        f"and A again gave |A - A again| = {found['a_to_a_again']:.4f}, |B - B from disk| = "
        f"{found['b_to_b_from_disk']:.4f} and |A - B| = {found['a_to_b']:.4f}. Take `engine: transformers`, "
        "or another version of vLLM."
    )


def _probe(engine: VllmEngine) -> list[float]:
    """Return the log-probabilities of fixed random tokens."""
    draw = random.Random(0)
    n_tokens = len(engine.lm.tokenizer)
    texts = [[draw.randrange(n_tokens) for _ in range(_N_TOKENS)] for _ in range(_N_TEXTS)]
    scored = engine.vllm.score([Scoring(tokens, 1) for tokens in texts])
    return [logprob for each in scored for logprob in each.logprobs]


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean absolute difference, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
