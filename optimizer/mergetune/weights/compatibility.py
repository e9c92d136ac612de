"""The same base, tokenizer and shapes: what cannot be merged is refused early, with the reason."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.space.recipe import tensor_place
from mergetune.space.stack import Stack
from mergetune.weights.adapter import CONFIG as ADAPTER_CONFIG
from mergetune.weights.adapter import LoraExpert
from mergetune.weights.architecture import left_out_by_transformers
from mergetune.weights.checkpoint import (
    Checkpoint,
    Expert,
    FullExpert,
    has_token_rows,
    is_embeddings,
    is_head,
)
from mergetune.weights.models import is_stack, reference_to
from mergetune.weights.tensor_files import read_json, shortened
from mergetune.weights.tokenizer_files import (
    VOCABULARY_REMEDY,
    VocabularyRule,
    has_tokenizer,
    read_added_tokens,
    read_chat_template,
    read_pipeline,
    read_vocabulary,
)
from mergetune.weights.vocabulary import tokens_of, tokens_of_base

# Keys of config.json that do not change what the weights compute.
_IGNORED_KEYS = {
    *("transformers_version", "name_or_path", "auto_map"),
    *("dtype", "torch_dtype", "use_cache", "pretraining_tp", "initializer_range"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "task_specific_params"),
    *("output_router_logits", "router_aux_loss_coef"),
    *("tie_word_embeddings", "vocab_size"),  # the tensors tell
}
# Keys that change the use of a model but not the function that its weights compute.
_NOTABLE_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
_LAYER_NUMBER = re.compile(r"\.\d+\.")
_PART = 1 << 22  # entries that are widened at a time
_LARGEST_RATIO = 5.0
LONGEST_SHARE_OF_BASE = 0.5
OF_A_STACK = "An expert of a stack is a stack of the same layers, of fine-tunes of its models."


@dataclass(frozen=True)
class _Finding:
    message: str
    is_fatal: bool = True


def check_compatibility(
    base: Checkpoint, experts: Sequence[Expert], vocabulary: VocabularyRule = "refuse"
) -> list[str]:
    """Compare configs, tensor headers and tokenizer files of the experts with the base's.

    Tokens that an expert added are refused unless another rule is given for them.

    Returns:
        Warnings, one sentence each.

    Raises:
        MergetuneError: experts are no fine-tunes of `base`; one line for each mismatch of each.
    """
    findings = [finding for expert in experts for finding in _compare(base, expert, vocabulary)]
    fatal = [finding.message for finding in findings if finding.is_fatal]
    if fatal:
        hint = f"\nThe base is a stack. {OF_A_STACK}" if is_stack(base.folder) else ""
        raise MergetuneError(
            f"Every expert must be a fine-tune of the base {reference_to(base.folder)}, with its tokenizer, "
            "but:" + "".join(f"\n  {message}" for message in fatal) + hint
        )
    return [finding.message for finding in findings]


def check_task_vectors(norms: Mapping[str, float], base_norm: float) -> list[str]:
    """Warn of task vectors that are zero, out of proportion or too long for a fine-tune.

    Args:
        norms: the Frobenius norm of every expert's task vector, as `task_vector_norms` gives it.
        base_norm: the norm of the base's matrices, as `base_norm` gives it.
    """
    warnings = []
    longest = LONGEST_SHARE_OF_BASE * base_norm
    for name, norm in norms.items():
        others = [other for key, other in norms.items() if key != name and 0 < other <= longest]
        ratio = norm / statistics.median(others) if others else 1.0
        if norm == 0:
            warnings.append(
                f"Expert `{name}` equals the base: it adds nothing to a merge, and can only be scaled "
                "(`passthrough`)."
            )
        elif norm > longest:
            warnings.append(
                f"The task vector of `{name}` is {norm / base_norm:.2f} times as long as the "
                "base's weights, too long for a fine-tune: it was probably trained from another "
                "base, and such a merge seldom works."
            )
        elif ratio > _LARGEST_RATIO:
            warnings.append(
                f"The task vector of `{name}` is {ratio:.1f} times as long as the others: with "
                f"equal weights it drowns them, so let the lambda of `{name}` reach lower values."
            )
        elif ratio < 1 / _LARGEST_RATIO and len(others) > 1:
            warnings.append(
                f"The task vector of `{name}` is {1 / ratio:.1f} times shorter than the others: "
                f"with equal weights it drowns, so let the lambda of `{name}` reach higher values."
            )
    return warnings


def check_finite(tensor: Tensor, name: str, owner: str) -> None:
    """Raise `MergetuneError` if `owner`'s tensor `name` holds NaN or Inf."""
    bad = tensor.numel() - sum(int(torch.isfinite(part).sum()) for part in _parts(tensor))
    if bad:
        raise MergetuneError(
            f"{owner}: weights must be finite, but {bad} of {tensor.numel()} values of `{name}` "
            "are NaN or Inf. Training diverged or the file is damaged: give an earlier checkpoint."
        )


def base_norm(base: Checkpoint) -> float:
    """Return the Frobenius norm over the base's matrices, the scale for `check_task_vectors`.

    The gains of norms are left out: few, but around 1 in every model, they would outweigh the
    matrices of a small model and hide that two models have nothing else in common.
    """
    matrices = (name for name in base.names if len(base.shape(name)) > 1)
    return math.sqrt(sum(_square(_parts(base.view(name))) for name in matrices))


def task_vector_norms(
    base: Checkpoint, experts: Sequence[Expert], say: Callable[[str], object] = lambda _: None
) -> dict[str, float]:
    """Return the Frobenius norm of every expert's task vector over all tensors.

    Tensors are read a part at a time; what is added to them, by adapters, a tensor at a time. `say` is told
    how far it is.

    Raises:
        MergetuneError: the base or an expert holds NaN or Inf.
    """
    squares = {expert.name: 0.0 for expert in experts}
    for number, name in enumerate(base.names, start=1):
        say(f"comparing the models: tensor {number} of {len(base.names)}")
        tensor = base.view(name)
        check_finite(tensor, name, f"The base {base.folder}")
        for expert in experts:
            square = _square(_vector_parts(expert, name, tensor))
            if not math.isfinite(square) and (vector := expert.task_vector(name, tensor)) is not None:
                check_finite(vector, name, f"Expert `{expert.name}` ({expert.folder})")
            squares[expert.name] += square
    return {name: math.sqrt(square) for name, square in squares.items()}


def _square(parts: Iterable[Tensor]) -> float:
    """Return the squared norm of a tensor in parts, accumulated in float64."""
    return sum(float(torch.linalg.vector_norm(part.float(), dtype=torch.float64)) ** 2 for part in parts)


def _vector_parts(expert: Expert, name: str, base: Tensor) -> Iterator[Tensor]:
    """Yield the parts of a task vector; none where the expert leaves the tensor as it is."""
    if (weights := expert.weights(name)) is not None:
        for own, start in zip(_parts(weights), _parts(base), strict=True):
            yield own.float() - start
    elif (vector := expert.task_vector(name, base)) is not None:
        yield from _parts(vector)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of a tensor's entries, so many that widening them takes little memory."""
    return torch.split(tensor.reshape(-1), _PART)


def _compare(base: Checkpoint, expert: Expert, vocabulary: VocabularyRule) -> Iterator[_Finding]:
    if isinstance(expert, FullExpert):
        yield from _compare_configs(base.folder, expert.folder)
        yield from _compare_names(base, expert)
        yield from _compare_tensors(base, expert)
        if not has_tokenizer(expert.folder):
            yield _Finding(
                f"{expert.folder}: holds no tokenizer files, so it is taken on trust that expert "
                f"`{expert.name}` uses the base's tokenizer.",
                is_fatal=False,
            )
        yield from _compare_slots(base, expert)
    if isinstance(expert, LoraExpert):
        yield from _compare_base_name(base, expert)
        yield from _warn_of_tied_embeddings(base, expert)
        yield from _warn_of_missing_layers(base, expert)
    yield from _warn_of_changed_towers(base, expert)
    if has_tokenizer(expert.folder):
        yield from _compare_tokenizers(base, expert, vocabulary)


def _compare_configs(base: Path, expert: Path) -> Iterator[_Finding]:
    path = expert / "config.json"
    for key, (ours, theirs) in _differences(base, expert).items():
        leaf = key.rpartition(".")[2]
        if leaf == "eos_token_id" and _takes_template(base, expert):
            continue
        differing = f"{path}: `{key}` is {theirs}, but the base has {ours}"
        if leaf in _NOTABLE_KEYS:
            yield _Finding(f"{differing}; the merged model takes the base's.", is_fatal=False)
        else:
            yield _Finding(
                f"{differing}. Give a fine-tune of this base (or, where one of the two configs is "
                "wrong, correct it)."
            )


def differing_settings(base: Path, other: Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings that change what weights compute, where two models differ: (ours, theirs)."""
    found = _differences(base, other)
    return {key: pair for key, pair in found.items() if key.rpartition(".")[2] not in _NOTABLE_KEYS}


def _differences(base: Path, other: Path) -> dict[str, tuple[Any, Any]]:
    ours, theirs = _read_configs(base, other)
    return {
        key: (ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if not _is_ignored(key.rpartition(".")[2]) and ours.get(key) != theirs.get(key)
    }


def _takes_template(base: Path, expert: Path) -> bool:
    """Say whether the merged model may take a chat template from an expert: see `shared_template`."""
    return not read_chat_template(base) and bool(read_chat_template(expert))


def _is_ignored(key: str) -> bool:
    return key in _IGNORED_KEYS or key.startswith(("_", "unsloth")) or "dropout" in key


def _read_configs(base: Path, expert: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read both configs with the defaults of their class filled in, or as they are written.

    transformers writes the same setting differently over the years (`rope_theta`, then
    `rope_parameters`) and leaves out defaults, so that files of equal meaning differ.
    """
    from transformers import AutoConfig

    try:
        read = [AutoConfig.from_pretrained(path, trust_remote_code=False) for path in (base, expert)]
        if type(read[0]) is not type(read[1]) and type(read[0].get_text_config()) is type(read[1]):
            read[0] = read[0].get_text_config()  # the expert is the language part alone
            read[0].architectures = read[1].architectures
        ours, theirs = (config.to_dict() for config in read)
    except Exception:  # an architecture that transformers does not know, or a config it refuses
        ours, theirs = (read_json(path / "config.json") for path in (base, expert))
    return _flatten(ours), _flatten(theirs)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _compare_names(base: Checkpoint, expert: FullExpert) -> Iterator[_Finding]:
    theirs = expert.checkpoint
    untied = theirs if base.is_tied else base
    if base.is_tied != theirs.is_tied and not untied.repeats_embeddings:
        yield _Finding(_explain_heads(base, theirs))
    own = set(expert.own_names.values())
    missing = [name for name in base.names if name not in expert.own_names and not is_head(name)]
    extra = [name for name in theirs.names if name not in own and not is_head(name)]
    if not missing and not extra:
        return
    if not any(_is_vision(name) for name in theirs.names):
        missing = [name for name in missing if not _is_vision(name)]
    left_out = left_out_by_transformers(base.folder)
    spared = [name for name in missing if left_out(name)]
    if spared:
        yield _Finding(
            f"{expert.folder}: lacks {shortened(spared)}, which transformers leaves out of this "
            "architecture; the merged model has the base's.",
            is_fatal=False,
        )
    remedy = "Give a checkpoint saved from the same model class as the base."
    if missing := sorted(set(missing) - set(spared)):
        yield _Finding(f"{expert.folder}: lacks {shortened(missing)}. {remedy}")
    if extra := sorted(name for name in extra if not left_out(name)):
        yield _Finding(f"{expert.folder}: has {shortened(extra)}, which the base lacks. {remedy}")


def _is_vision(name: str) -> bool:
    return tensor_place(name).role == "vision"


def _warn_of_changed_towers(base: Checkpoint, expert: Expert) -> Iterator[_Finding]:
    """Say that a vision tower was trained, which a merge leaves as the base's unless told otherwise."""
    towers = [name for name in expert.targets if _is_vision(name)]
    changed = [
        name
        for name in towers
        if (weights := expert.weights(name)) is None or not torch.equal(weights, base.view(name))
    ]
    if changed:
        yield _Finding(
            f"{expert.folder}: changes {len(changed)} tensors of the vision tower ({shortened(changed, 2)}), "
            "which stays the base's, unless a layer group of the search space names it (`roles: [vision]`).",
            is_fatal=False,
        )


def _explain_heads(base: Checkpoint, expert: Checkpoint) -> str:
    tied, untied = (base, expert) if base.is_tied else (expert, base)
    head, embeddings = next(filter(is_head, untied.names)), next(filter(is_embeddings, tied.names), None)
    return (
        f"{untied.folder}: has a head of its own, `{head}`, but {tied.folder} takes its embeddings for one. "
        f"Untie the latter: add a copy of `{embeddings}` to its weights as `{head}` and set "
        "`tie_word_embeddings: false` in its config.json."
    )


def _compare_slots(base: Checkpoint, expert: FullExpert) -> Iterator[_Finding]:
    """Warn of a stack whose layers are others than the base's: their difference is no fine-tuning."""
    ours, theirs = reference_to(base.folder), reference_to(expert.folder)
    layers = [
        [layer for slot in each.stack for layer in range(*slot.layers)]
        for each in (ours, theirs)
        if isinstance(each, Stack)
    ]
    if len(layers) == 2 and layers[0] != layers[1]:
        yield _Finding(
            f"Expert `{expert.name}` has other layers than the base: {theirs}. {OF_A_STACK}", False
        )


def _compare_tensors(base: Checkpoint, expert: FullExpert) -> Iterator[_Finding]:
    theirs = {name: weights for name in base.names if (weights := expert.weights(name)) is not None}
    misfits = [
        name
        for name, weights in theirs.items()
        if weights.shape != base.shape(name) and not _differ_in_rows(name, weights.shape, base.shape(name))
    ]
    if misfits:
        shown = [f"`{name}` is {tuple(theirs[name].shape)} instead of {base.shape(name)}" for name in misfits]
        yield _Finding(
            f"{expert.folder}: shapes differ from the base's: {shortened(shown)}. Give a fine-tune of it."
        )
    cast = [name for name, weights in theirs.items() if weights.dtype != base.dtype(name)]
    if cast:
        yield _Finding(
            f"{expert.folder}: {len(cast)} of {len(theirs)} tensors are {theirs[cast[0]].dtype}, "
            f"but {base.dtype(cast[0])} in the base; the merged model has the base's dtype.",
            is_fatal=False,
        )


def _differ_in_rows(name: str, shape: Sequence[int], other: Sequence[int]) -> bool:
    """Say whether two shapes of a tensor differ in the number of tokens alone."""
    return has_token_rows(name) and shape[0] != other[0] and tuple(shape[1:]) == tuple(other[1:])


def _compare_base_name(base: Checkpoint, expert: LoraExpert) -> Iterator[_Finding]:
    given = str(expert.config.get("base_model_name_or_path") or "").rstrip("/")
    stored = str(base.config.get("_name_or_path") or "").rstrip("/")
    # The Hub's cache keeps a model in `models--OWNER--NAME/snapshots/REVISION`.
    cached = [part for part in base.folder.resolve().parts if part.startswith("models--")]
    names = {base.folder.name, Path(stored).name, *(part.rpartition("--")[2] for part in cached)}
    if given and Path(given).name not in names:
        yield _Finding(
            f"{expert.folder / ADAPTER_CONFIG}: names `{given}` as its base, and the base given is "
            f"{base.folder}; the shapes fit, but make sure that the weights are the same.",
            is_fatal=False,
        )


def _warn_of_tied_embeddings(base: Checkpoint, expert: LoraExpert) -> Iterator[_Finding]:
    embeddings = next(filter(is_embeddings, expert.targets), None)
    if base.is_tied and embeddings and not expert.config.get("ensure_weight_tying"):
        yield _Finding(
            f"{expert.folder}: trains `{embeddings}`, which is also the base's head; the head was "
            "left as it was in training, but changes with the embeddings in a merged model.",
            is_fatal=False,
        )


def _warn_of_missing_layers(base: Checkpoint, expert: LoraExpert) -> Iterator[_Finding]:
    """Warn of an adapter that lacks some layers' part of a module, as a save that was cut off does."""
    if expert.config.get("layers_to_transform") is not None:
        return
    layers: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"has": [], "lacks": []})
    for name in base.names:
        kind = _LAYER_NUMBER.sub(".*.", name)
        if kind != name:
            layers[kind]["has" if name in expert.targets else "lacks"].append(name)
    partial = [(own["has"], own["lacks"]) for own in layers.values() if own["has"] and own["lacks"]]
    if partial:
        lacking = [name for _, lacks in partial for name in lacks]
        yield _Finding(
            f"{expert.folder}: changes {sum(len(has) for has, _ in partial)} tensors, but not those of the "
            f"same kind in other layers: {shortened(lacking)}. Was that not meant, its file is not whole.",
            is_fatal=is_stack(base.folder),  # it was trained on a model of fewer layers
        )


def _compare_tokenizers(
    checkpoint: Checkpoint, model: Expert, vocabulary: VocabularyRule
) -> Iterator[_Finding]:
    base, expert = checkpoint.folder, model.folder
    if not has_tokenizer(base):
        yield _Finding(
            f"{base}: holds no tokenizer files to compare with those of {expert}. Copy the base's "
            "tokenizer there."
        )
        return
    yield from _compare_vocabularies(checkpoint, model, vocabulary)
    ours, theirs = read_pipeline(base), read_pipeline(expert)
    steps = [step for step in ours if ours[step] and theirs[step] and ours[step] != theirs[step]]
    if steps:
        yield _Finding(
            f"{expert / 'tokenizer.json'}: {' and '.join(steps)} differ from the base's, so the "
            "expert may have been trained on other tokens; the merged model takes the base's.",
            is_fatal=False,
        )
    if read_chat_template(base) != read_chat_template(expert) and not _takes_template(base, expert):
        yield _Finding(
            f"{expert}: the chat template differs from the base's; the merged model takes the "
            "base's, so check that it is the one that this expert was trained with.",
            is_fatal=False,
        )


def _compare_vocabularies(
    checkpoint: Checkpoint, model: Expert, vocabulary: VocabularyRule
) -> Iterator[_Finding]:
    base, expert = checkpoint.folder, model.folder
    ours, theirs = tokens_of_base(checkpoint), tokens_of(model, checkpoint)
    if ours is None or theirs is None:
        if _sentencepiece(base) != _sentencepiece(expert):
            yield _Finding(
                f"{expert}: its vocabulary could not be compared with the base's. Save both "
                "tokenizers with the same version of transformers (`save_pretrained`)."
            )
        return
    rowless = [token for token in read_vocabulary(expert) or () if token not in theirs]
    yield from _find_rowless(expert, rowless, vocabulary)
    differing = [token for token, number in theirs.items() if ours.get(token) != number]
    differing += [token for token in ours if token not in theirs]
    if not differing:
        return
    added = _stand_beside_pieces(differing, base, expert)
    if not added or vocabulary == "refuse":
        shown = [f"{token!r} ({theirs.get(token)}, not {ours.get(token)})" for token in differing]
        yield _Finding(
            f"{expert}: {len(differing)} tokens differ from the base's tokenizer: {shortened(shown, 3)}. "
            f"Give a fine-tune with the base's tokenizer.{f' {VOCABULARY_REMEDY}' if added else ''}"
        )
    elif vocabulary == "base" and (dropped := [repr(token) for token in theirs if token not in ours]):
        yield _Finding(
            f"{expert}: the merged model leaves out {len(dropped)} tokens that this expert added: "
            f"{shortened(dropped)}. Their text is split into other tokens than in training.",
            is_fatal=False,
        )


def _find_rowless(expert: Path, tokens: Sequence[str], vocabulary: VocabularyRule) -> Iterator[_Finding]:
    """Say what becomes of tokens without a row, such as a padding token that no text has."""
    template = "" if vocabulary == "base" else str(read_chat_template(expert))
    if needed := [repr(token) for token in tokens if token in template]:
        yield _Finding(
            f"{expert}: every token of its chat template must have a row in its embeddings, but "
            f"{shortened(needed, 3)} has none. Give the embeddings that were trained: for an adapter, save "
            "them with it (peft: `save_embedding_layers=True`)."
        )
    elif tokens:
        yield _Finding(
            f"{expert}: {len(tokens)} tokens of its tokenizer have no row in its embeddings, so that no text "
            f"had them in training; they are left out: {shortened(map(repr, tokens), 3)}.",
            is_fatal=False,
        )


def _stand_beside_pieces(tokens: Sequence[str], base: Path, expert: Path) -> bool:
    """Say whether all these tokens were added to a vocabulary, wherever they are known."""
    for folder in (base, expert):
        known, added = read_vocabulary(folder) or {}, read_added_tokens(folder)
        if any(token in known and token not in added for token in tokens):
            return False
    return True


def _sentencepiece(folder: Path) -> bytes | None:
    path = folder / "tokenizer.model"
    return path.read_bytes() if path.exists() else None
