"""Does the engine compute with the weights that are put in? Shown before any score is believed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mergetune.engines.choice import installed_version
from mergetune.engines.completions import Scoring
from mergetune.engines.engine import EngineConfig
from mergetune.engines.vllm_engine import VllmEngine
from mergetune.errors import MergetuneError
from mergetune.files.atomic_files import write_text
from mergetune.merging.inputs import Inputs
from mergetune.space.recipe import MergeRecipe

RECORD = "self_test.json"
_TOLERANCE = 0.02  # nats, in the mean: what the order of sums does in bfloat16 on a GPU
_SCALE = 0.9  # of the other model's weights: every tensor differs
_N_TEXTS, _N_TOKENS = 8, 32


def start_tested(config: EngineConfig, inputs: Inputs, folder: Path) -> VllmEngine:
    """Start vLLM; the first time in `folder`, show that it follows a swap of weights.

    An engine that starts on noise takes the base, another model (the first expert, scaled by 0.9) and the
    base again: both times it must score texts as the engine that starts on the base from disk, which is the
    one returned. A weight that a swap does not reach would still be noise. Nothing is written for it.

    Raises:
        MergetuneError: it does not, with the differences of the log-probabilities.
    """
    log, record, key = folder / "engine.log", folder / RECORD, _key(config, inputs)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["of"] == key:
        return VllmEngine(config, inputs.base.folder, inputs.paths, log, inputs.chat)
    noise = config.model_copy(update={"arguments": {**config.arguments, "load_format": "dummy"}})
    base, other = MergeRecipe.of_base(inputs.base_source, inputs.expert_sources), _other(inputs)
    with closing(VllmEngine(noise, inputs.base.folder, inputs.paths, log, inputs.chat)) as engine:
        first, between, again = (_probe_with(engine, recipe) for recipe in (base, other, base))
    engine = VllmEngine(config, inputs.base.folder, inputs.paths, log, inputs.chat)
    try:
        from_disk = _probe(engine)
        found = {
            "base_to_other": _distance(first, between),
            "base_to_base_from_disk": _distance(first, from_disk),
            "base_again_to_base_from_disk": _distance(again, from_disk),
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


def _other(inputs: Inputs) -> MergeRecipe:
    """Return the recipe of the first expert, all its weights scaled."""
    name, source = next(iter(inputs.expert_sources.items()))
    scaled = {"scale": _SCALE}
    return MergeRecipe.of_one_group("passthrough", inputs.base_source, {name: source}, scaled)


def _probe_with(engine: VllmEngine, recipe: MergeRecipe) -> list[float]:
    engine.load(recipe)
    return _probe(engine)


def _check(found: Mapping[str, float]) -> None:
    """Raise `MergetuneError` where the engine did not follow."""
    worst = max(found["base_to_base_from_disk"], found["base_again_to_base_from_disk"])
    if worst <= min(_TOLERANCE, found["base_to_other"] / 10):
        return
    raise MergetuneError(
        "vLLM does not compute with the weights that are put in: log-probabilities of the base must be those "
        f"of the base from disk, to {_TOLERANCE} nats in the mean, and another model's differ by much more, "
        "but the base put in, another model put in and the base put in again gave |base - from disk| = "
        f"{found['base_to_base_from_disk']:.4f}, |base - other| = {found['base_to_other']:.4f} and "
        f"|base again - from disk| = {found['base_again_to_base_from_disk']:.4f}. Take "
        "`engine: transformers`, or another version of vLLM."
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
