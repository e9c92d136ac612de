"""A configuration of mergekit-evolve as a study: its genome as a search space, its tasks as a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from mergetune.evaluation.suite import SuiteConfig
from mergetune.files.yaml_io import nearest, validate
from mergetune.importing.depth import Part, count_layers_of
from mergetune.importing.notes import Notes, Place
from mergetune.importing.parameters import by_names
from mergetune.importing.references import Places, Reference, expert_names, read_reference, source_paths
from mergetune.importing.tasks import NOT_READ, suite_of
from mergetune.results.config import StudyConfig
from mergetune.space.search_space_config import SearchSpaceConfig

Method = Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
_METHODS: tuple[Method, ...] = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
_MAX_FEVALS = 100  # what mergekit-evolve takes where it is not told otherwise
_GENOME = {
    *("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize"),
    *("allow_negative_weights", "filters", "smooth"),
}
_INERT = {
    "random_init": "left out: a study begins with its baselines and where slopes lead.",
    "shuffle": "left out: the same items are asked of every merge, the first `limit` in the task's order.",
    "fewshot_as_multiturn": "left out: with a chat template, examples are turns of the conversation; without "
    "one, text before the prompt.",
}
_READ = {"genome", "tasks", "limit", "num_fewshot", "apply_chat_template"}


@dataclass(frozen=True)
class EvolveStudy:
    """The three files of a study, checked, as plain data."""

    study: dict[str, Any]
    search_space: dict[str, Any]
    suite: dict[str, Any]


@dataclass(frozen=True)
class _Genome:
    """What is merged, by which method, and the base; `options` and ranges as a search space has them."""

    method: str
    base: Reference
    experts: tuple[Reference, ...]
    ranges: Mapping[str, Any]
    options: Mapping[str, str]


def study_of(
    notes: Notes, places: Places, layers: int | None = None, include_path: str | None = None
) -> EvolveStudy:
    """Return the study of a configuration; `notes` are told what it leaves out and why.

    Args:
        notes: of the configuration's document.
        places: of models.
        layers: the number of the models' layers, where their files are not at hand.
        include_path: where lm-eval finds tasks of one's own.

    Raises:
        MergetuneError: something has no counterpart in a study.
    """
    data = notes.mapping((), ["genome", "tasks"])
    given = notes.mapping(("genome",), ["models", "merge_method"])
    _remark_on_others(notes, data, given)
    if "merge_method" in given and given["merge_method"] not in _METHODS:
        rule = f"must be one that mergekit-evolve has.{nearest(str(given['merge_method']), _METHODS)}"
        notes.refuse(("genome", "merge_method"), rule)
    suite = suite_of(notes, data, include_path)
    notes.settle()
    found = _models(notes)
    genome = _genome(notes, given, found)
    notes.settle()
    at = {**found, genome.base: found.get(genome.base, ("genome", "base_model"))}
    experts = {expert: at[expert] for expert in genome.experts}
    base, paths = source_paths(notes, places, genome.base, experts, at[genome.base])
    space = _search_space(notes, given, genome, layers or _layers(notes, given, base))
    notes.settle()
    names = expert_names(genome.experts)
    study: dict[str, Any] = {"base": base, "experts": {names[expert]: path for expert, path in paths.items()}}
    study |= {"search_space": "search_space.yaml", "suite": "suite.yaml", **_vocabulary(notes, given)}
    study["budget"] = {"trials": _MAX_FEVALS}
    text = f"the search has mergekit-evolve's {_MAX_FEVALS} trials, or as many as 8 hours allow (`budget`)."
    notes.remark(("genome",), text)
    for model, content in ((StudyConfig, study), (SearchSpaceConfig, space), (SuiteConfig, suite)):
        validate(content, model, str(notes.file))
    return EvolveStudy(study, space, suite)


def _remark_on_others(notes: Notes, data: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Remark on the keys that have no counterpart."""
    for key in (key for key in data if key not in _READ):
        notes.remark((key,), _INERT.get(key, NOT_READ))
    for key in (key for key in given if key not in _GENOME):
        notes.remark(("genome", key), NOT_READ)


def _models(notes: Notes) -> dict[Reference, Place]:
    found: dict[Reference, Place] = {}
    for place in notes.entries(("genome", "models")):
        model = read_reference(notes, place)
        if model in found:
            notes.refuse(place, "must be there once only.")
        found[model] = place
    return found


def _base(notes: Notes, given: Mapping[str, Any], found: Mapping[Reference, Place]) -> Reference:
    """Return the base, or the first model where the method does without."""
    if given.get("base_model") is not None:
        return read_reference(notes, ("genome", "base_model"))
    if given["merge_method"] in ("task_arithmetic", "ties", "dare_ties"):
        notes.refuse(("genome", "base_model"), f"`{given['merge_method']}` must have a base. Name it.")
    base = next(iter(found), Reference("?"))
    notes.remark(("genome", "base_model"), f"is not given: the study takes `{base}`, the first model.")
    return base


def _genome(notes: Notes, given: Mapping[str, Any], found: Mapping[Reference, Place]) -> _Genome:
    """Return what the method's parameters are in a search space.

    Shares of models that have the base among them are task arithmetic: Σ wᵢθᵢ / Σ wᵢ = θ₀ + Σ λᵢτᵢ with
    λᵢ = wᵢ / Σ wⱼ, a dimension less. Task arithmetic that is divided by the sum of its weights is `linear`.
    """
    method, base = cast(Method, given["merge_method"]), _base(notes, given, found)
    if method == "slerp":
        return _slerp(notes, given, base, tuple(found))
    normalize = given.get("normalize")
    is_normalized = method in ("ties", "dare_ties", "linear") if normalize is None else bool(normalize)
    are_shares_of_base = method == "linear" and base in found
    if method == "linear" and not is_normalized:
        rule = "shares of a search space sum to 1. Say `true`, or search `task_arithmetic` with a base."
        notes.refuse(("genome", "normalize"), rule)
    if base in found:
        share = "it has no coefficient of its own, what the others lack of 1 being its share."
        text = share if are_shares_of_base else "its task vector is zero."
        notes.remark(found[base], f"is the base: {text}")
    low = -1.0 if given.get("allow_negative_weights") else 0.0
    high = 1.0 if are_shares_of_base and low == 0 else 2.0
    text = f"lambdas are searched in [{low:g}, {high:g}] (search_space.yaml); mergekit-evolve has no bounds."
    notes.remark(("genome", "allow_negative_weights"), text)
    ranges: dict[str, Any] = {"lambda": {"low": low, "high": high}}
    options: dict[str, str] = {}
    target: str = "task_arithmetic" if are_shares_of_base else method
    if method == "task_arithmetic" and is_normalized:
        notes.remark(("genome", "normalize"), "task vectors divided by the sum of their weights: `linear`.")
        target = "linear"
    if method in ("ties", "dare_ties"):
        ranges["density"] = {"low": 0.01, "high": 1.0, "step": 0.01}
        options["normalize"] = "weights" if is_normalized else "none"
        options |= {"rescale": "l1"} if method == "dare_ties" else {}
    return _Genome(target, base, tuple(model for model in found if model != base), ranges, options)


def _slerp(notes: Notes, given: Mapping[str, Any], base: Reference, models: tuple[Reference, ...]) -> _Genome:
    """Return a search from one model to the other, of which the genome searches either half from its end."""
    if len(models) != 2:
        notes.refuse(
            ("genome", "models"),
            f"`slerp` of a search space is between two models, but here are {len(models)}, of which "
            "mergekit-evolve takes two in each group of layers. Leave two, or search `linear`.",
        )
    for key in ("normalize", "allow_negative_weights"):
        if given.get(key) is not None:
            notes.remark(("genome", key), "left out: it has no effect on `slerp` in mergekit-evolve either.")
    return _Genome("slerp", base, models, {"t": {"low": 0.0, "high": 1.0}}, {})


def _layers(notes: Notes, given: Mapping[str, Any], base: str) -> int | None:
    granularity = given.get("layer_granularity") or 0
    return count_layers_of(base, notes.file.parent, fetches=isinstance(granularity, int) and granularity > 0)


def _search_space(
    notes: Notes, given: Mapping[str, Any], genome: _Genome, layers: int | None
) -> dict[str, Any]:
    space: dict[str, Any] = {"description": f"The genome of {notes.file.name}.", "method": genome.method}
    if genome.options:
        space["options"] = dict(genome.options)
    space |= dict(genome.ranges)
    parts, filters = _parts(notes, given, layers), _filters(notes, given)
    n_blocks = sum(part.layers is not None for part in parts)
    if given.get("smooth") and n_blocks > 1 and not filters:
        notes.remark(
            ("genome", "smooth"),
            f"{n_blocks} anchors over the depth. Final norm and head take the last one's values, in "
            "mergekit-evolve the first one's.",
        )
        return space | {"anchors": n_blocks}
    if given.get("smooth") and n_blocks > 1:
        notes.remark(("genome", "smooth"), "left out: filters are layer groups, which do not interpolate.")
    if n_blocks:
        notes.remark(
            ("genome", "layer_granularity"),
            f"{n_blocks} group{'s' if n_blocks > 1 else ''} of layers. Embeddings, and final norm with head, "
            "have groups of their own; in mergekit-evolve they are in the first and the last.",
        )
    kinds = by_names(lambda names: next((text for text in filters if names.contain(text)), None))
    groups = [part.selectors(names) for part in parts for names, _ in kinds]
    return space | {"groups": groups}


def _filters(notes: Notes, given: Mapping[str, Any]) -> Sequence[str]:
    if given.get("filters") is None:
        return []
    texts = [notes.at(place) for place in notes.entries(("genome", "filters"))]
    if not all(isinstance(text, str) and text for text in texts):
        notes.refuse(("genome", "filters"), "must be texts, each a part of the tensors' names.")
        return []
    return list(dict.fromkeys(texts))


def _parts(notes: Notes, given: Mapping[str, Any], layers: int | None) -> list[Part]:
    """Return the blocks of layers, with what lies before and after them; one part for a genome without."""
    place, size = ("genome", "layer_granularity"), given.get("layer_granularity") or 0
    if type(size) is not int:
        notes.refuse(place, "must be a whole number of layers.")
    elif size > 0 and layers is None:
        notes.refuse(
            place,
            "must divide the number of layers, but the models are not here to count them. Say how many they "
            "have: --layers N (`num_hidden_layers` in config.json).",
        )
    elif size > 0 and layers is not None and layers % size:
        notes.refuse(place, f"must divide the number of layers, {layers}, as mergekit-evolve demands.")
    elif size > 0 and layers is not None:
        blocks = [Part("layers", layers=(i, i + size - 1)) for i in range(0, layers, size)]
        return [Part("before"), *blocks, Part("after")]
    return [Part("all")]


def _vocabulary(notes: Notes, given: Mapping[str, Any]) -> dict[str, str]:
    """Return what becomes of tokens that experts added."""
    source = given.get("tokenizer_source")
    if source is None:
        return {}
    rule = "mean" if source == "union" else "base"
    what = {
        "base": "experts' other tokens are left out (`vocabulary: base`).",
        "mean": "tokens that experts added are kept; each takes the mean of its experts' rows, whatever the "
        "coefficients (`vocabulary: mean`).",
    }[rule]
    of_another = "" if source in ("base", "union") else "the tokenizer is the base's, and "
    notes.remark(("genome", "tokenizer_source"), of_another + what)
    return {"vocabulary": rule}
