"""A configuration of mergekit, as far as it says what is merged: models or slices, with their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from mergetune.files.yaml_io import nearest
from mergetune.importing.methods import FOREIGN, Foreign
from mergetune.importing.notes import Notes, Place
from mergetune.importing.parameters import Scope, check_setting
from mergetune.importing.references import Reference, read_reference
from mergetune.space.method_table import MethodName

_INERT = {
    "dtype": "left out: the recipe computes in float32 and gives the merged model the base's dtype.",
    "out_dtype": "left out: the merged model has the base's dtype.",
    "tokenizer_source": "left out: the merged model has the base's tokenizer, and experts whose tokens "
    "differ are refused when it is merged.",
    "pad_to_multiple_of": "left out: no rows of padding are added to embeddings and head.",
    "chat_template": "left out: the merged model has the base's chat template, or else the experts'.",
    "name": "left out: the recipe's file has this name.",
    "out_path": "left out: `mergetune merge` is told where to write.",
}
_READ = {"merge_method", "base_model", "models", "slices", "parameters", "modules", "tokenizer"}
_NOT_READ = "left out: mergekit does not read it here either."
_INT8_MASK = "left out: it saves mergekit memory and changes no result."


@dataclass(frozen=True)
class Input:
    """A model that is merged in a slice, with the layers that it gives; None: all."""

    model: Reference
    place: Place
    parameters: Scope
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Layers that are merged from the same models: the whole depth where the file has no slices.

    `parameters` are those of all models, the scope that counts first at first.
    """

    place: Place
    inputs: tuple[Input, ...]
    base: Reference | None
    parameters: tuple[Scope, ...]

    def scopes(self, model: Reference) -> list[Scope]:
        """Return where parameters of a model stand, the scope that counts first at first."""
        return [*(each.parameters for each in self.inputs if each.model == model), *self.parameters]


@dataclass(frozen=True)
class MergeConfig:
    """What a configuration merges, read and checked key by key."""

    method: MethodName
    base: Reference | None
    slices: tuple[Slice, ...]

    @property
    def foreign(self) -> Foreign:
        """The merge method."""
        return FOREIGN[self.method]

    @property
    def settings(self) -> Iterator[tuple[Place, object]]:
        """Every setting that the method reads, with its place."""
        read = self.foreign.shared.keys() | self.foreign.each.keys()
        yield from (((*place, k), v) for place, given in self.scopes for k, v in given.items() if k in read)

    @property
    def scopes(self) -> Iterator[Scope]:
        """Every place where parameters stand."""
        for each in self.slices:
            yield from (model.parameters for model in each.inputs)
            yield from each.parameters

    def moves_layers(self, depth: int | None) -> bool:
        """Say whether layers are repeated, left out or moved in models of this depth, if that is known."""
        offset = 0
        for each in self.slices:
            if each.inputs[0].layers is None:
                return False
            if {source.layers for source in each.inputs} != {(offset, each.inputs[0].layers[1])}:
                return True
            offset = each.inputs[0].layers[1]
        return depth not in (None, offset)

    def where(self, parameter: str) -> Place:
        """Return the first place of a parameter, or that of the method where the file does not give it."""
        found = ((*place, parameter) for place, given in self.scopes if parameter in given)
        return next(found, ("merge_method",))


def read_merge_config(notes: Notes) -> MergeConfig:
    """Read a configuration, with a remark on every key that changes nothing.

    Raises:
        MergetuneError: something has no counterpart in a recipe, or is an error in mergekit, too.
    """
    data = notes.mapping((), ["merge_method"])
    method = cast(MethodName, str(data.get("merge_method")))
    if "merge_method" in data and method not in FOREIGN:
        notes.refuse(("merge_method",), f"is no method of mergetune.{nearest(method, FOREIGN)}")
    place = _place_of_inputs(notes, data)
    notes.settle()
    _remark_on_top_level(notes, data)
    base = read_reference(notes, ("base_model",)) if data.get("base_model") is not None else None
    modules = [(*place[:-1], "parameters")] if len(place) > 1 else []
    outer = tuple(_scope(notes, each) for each in (*modules, ("parameters",)))
    if place[-1] == "models":
        slices = [_models(notes, place, base, outer)]
    else:
        slices = _slices(notes, place, base, outer, FOREIGN[method].base == "merged")
    config = MergeConfig(method, base, tuple(slices))
    notes.settle()
    _check_parameters(notes, config)
    notes.settle()
    return config


def _place_of_inputs(notes: Notes, data: Mapping[str, object]) -> Place:
    """Return the place of `models` or `slices`, which may stand in the one module of a model of text."""
    outer: Place = ()
    if data.get("modules"):
        modules = list(notes.mapping(("modules",)))
        if len(modules) != 1:
            rule = "a recipe merges a whole model, not part by part. Write it by hand, with layer groups."
            notes.refuse(("modules",), rule)
        outer = ("modules", *modules[:1])
    given = [key for key in ("models", "slices") if notes.at((*outer, key))]
    if len(given) != 1 or (outer and any(data.get(key) for key in ("models", "slices"))):
        notes.refuse((*outer, *given[1:]), "must have either `models` or `slices`.")
    return (*outer, *given[:1])


def _remark_on_top_level(notes: Notes, data: Mapping[str, object]) -> None:
    for key in (key for key in data if key not in _READ):
        notes.remark((key,), _INERT.get(key, _NOT_READ))
    tokenizer = notes.mapping(("tokenizer",))
    if tokenizer.get("tokens"):
        notes.refuse(
            ("tokenizer", "tokens"),
            "a recipe gives no token other embeddings. Leave it out, and set them in the merged model.",
        )
    for key in (key for key in tokenizer if key != "tokens"):
        notes.remark(
            ("tokenizer", key), _INERT.get("tokenizer_source" if key == "source" else key, _NOT_READ)
        )


def _models(notes: Notes, place: Place, base: Reference | None, outer: tuple[Scope, ...]) -> Slice:
    """Read `models`, to which mergekit adds the base where it is missing."""
    inputs = [_input(notes, each, {"model", "parameters"}) for each in notes.entries(place)]
    if base is not None and all(each.model != base for each in inputs):
        inputs.append(Input(base, ("base_model",), ((), {})))
    return _checked(notes, Slice(place, tuple(inputs), base, outer))


def _slices(
    notes: Notes, above: Place, base: Reference | None, outer: tuple[Scope, ...], is_merged: bool
) -> list[Slice]:
    """Read `slices`, each of which must have the base among its sources unless it is merged as any other."""
    found = []
    for place in notes.entries(above):
        given = notes.mapping(place, ["sources"])
        for key in (key for key in given if key not in ("sources", "parameters", "base_model")):
            notes.remark((*place, key), _NOT_READ)
        own = read_reference(notes, (*place, "base_model")) if given.get("base_model") is not None else base
        known = {"model", "parameters", "layer_range"}
        sources = notes.entries((*place, "sources")) if given.get("sources") is not None else []
        inputs = tuple(_input(notes, source, known) for source in sources)
        if own is not None and not is_merged and all(each.model != own for each in inputs):
            notes.refuse(place, f"the base `{own}` must be among the sources, as mergekit demands. Add it.")
        scopes = _scope(notes, (*place, "parameters")), *outer
        found.append(_checked(notes, Slice(place, inputs, own, scopes)))
        _check_lengths(notes, found[-1])
    return found


def _input(notes: Notes, place: Place, known: set[str]) -> Input:
    given = notes.mapping(place, ["model", *(["layer_range"] if "layer_range" in known else [])])
    for key in (key for key in given if key not in known):
        hint = " It may belong under `parameters`." if key in _ALL_PARAMETERS else ""
        notes.remark((*place, key), _NOT_READ + hint)
    model = read_reference(notes, (*place, "model")) if given.get("model") is not None else Reference("?")
    layers = given.get("layer_range") if "layer_range" in known else None
    if layers is not None and not _is_range(layers):
        notes.refuse((*place, "layer_range"), "must be the first layer and the one after the last: [0, 32].")
        layers = None
    scope = _scope(notes, (*place, "parameters"))
    return Input(model, (*place, "model"), scope, None if layers is None else (layers[0], layers[1]))


def _is_range(given: object) -> bool:
    is_pair = isinstance(given, list) and len(given) == 2 and all(type(end) is int for end in given)
    return is_pair and isinstance(given, list) and 0 <= given[0] < given[1]


def _checked(notes: Notes, found: Slice) -> Slice:
    """Refuse a model that is there twice, as mergekit does."""
    models = [each.model for each in found.inputs]
    for i, each in enumerate(found.inputs):
        if each.model in models[:i]:
            notes.refuse(each.place, "must be there once only. Add up its weights.")
    return found


def _check_lengths(notes: Notes, found: Slice) -> None:
    """Refuse models that give different numbers of layers to a slice, as mergekit does."""
    lengths = [last - first for first, last in (each.layers or (0, 0) for each in found.inputs)]
    for source, length in zip(found.inputs, lengths, strict=True):
        if length != lengths[0]:
            place = (*source.place[:-1], "layer_range")
            notes.refuse(place, f"must be as many layers as the slice's first model gives, {lengths[0]}.")


def _scope(notes: Notes, place: Place) -> Scope:
    return place, notes.mapping(place)


def _check_parameters(notes: Notes, config: MergeConfig) -> None:
    """Check every setting that the method reads, and remark on all others."""
    foreign, method = config.foreign, config.method
    for place, given in dict(config.scopes).items():
        for name in given:
            if name == "int8_mask":
                notes.remark((*place, name), _INT8_MASK)
            elif name not in foreign.shared and name not in foreign.each:
                notes.remark((*place, name), f"left out: it has no effect on `{method}` in mergekit either.")
            else:
                default = {**foreign.shared, **foreign.each}[name]
                check_setting(notes, (*place, name), isinstance(default, bool))
    _remark_on_idle(notes, config)


def _remark_on_idle(notes: Notes, config: MergeConfig) -> None:
    """Remark on parameters in places where the method does not look for them."""
    foreign = config.foreign
    for each in config.slices:
        for model in each.inputs:
            place, given = model.parameters
            is_base = foreign.base != "merged" and model.model == each.base
            for name in given:
                if name in foreign.shared:
                    text = "left out: mergekit reads it for all models together only, as in `parameters`."
                    notes.remark((*place, name), text)
                elif is_base and name in foreign.each:
                    notes.remark((*place, name), "left out: the base's own task vector is zero.")


_ALL_PARAMETERS = {name for method in FOREIGN.values() for name in (*method.shared, *method.each)}
