"""LoRA adapters in peft's format as experts: the adapter is the task vector."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.weights.architecture import Part
from mergetune.weights.checkpoint import (
    Checkpoint,
    Expert,
    FullExpert,
    has_token_rows,
    is_embeddings,
    is_head,
    match_names,
)
from mergetune.weights.low_rank import LowRank
from mergetune.weights.tensor_files import TensorFiles, explain_no_weights, read_json, shortened

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
# In memory, and in files that are no save of peft's own, the adapter's name (`default`) stands in between.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB]|magnitude_vector)"
    r"(\.(?!weight$)[^.]+)?(\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
# Where embeddings were both trained and resized, peft saves them a second and a third time.
_COPY = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")
# How these begin training leaves the base's own weights as they are.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_UNSUPPORTED = {
    "lora_bias": "`lora_bias` adds to the base's biases",
    "use_qalora": "QA-LoRA's update needs the quantized base",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes between adapters token by token",
    "kasa_config": "KaSA changes the base's own weights",
    "monteclora_config": "MonteCLoRA samples its update",
    "layer_replication": "`layer_replication` repeats the base's layers",
}
_AS_FULL_MODEL = (
    "Merge it into the model that it was trained on (peft: `merge_and_unload`, then "
    "`save_pretrained`) and give that directory as the expert."
)
# What, beside the tensors, determines the task vector.
_SCALING_KEYS = ("lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out")
_RARE_KEYS = ("trainable_token_indices", "target_parameters")  # part of the digest only where they are given


@dataclass
class _Update:
    """What an adapter does to one tensor: a low-rank product, a tensor or rows in its place, or several.

    `a`, `b`, `magnitude`, `rows` and `saved` name tensors in the adapter's file, `module` the module (or
    parameter) in peft's words; `tokens` are the rows that `rows` takes the place of. `part` is the tensor's
    place in a parameter that the adapter changes as a whole.
    """

    module: str = ""
    part: Part | None = None

    a: str | None = None  # (rank, in), of a mixture's n experts (n · rank, in)
    b: str | None = None  # (out, rank), of a mixture's n experts (out, rank · n)
    magnitude: str | None = None  # (out,)
    rows: str | None = None  # (n_tokens, width)
    tokens: tuple[int, ...] = ()
    saved: str | None = None  # of the base's shape
    is_transposed: bool = False


class LoraExpert:
    """A LoRA adapter as an expert: (scale · B) @ A (Hu et al. 2021, §4.1), in float32.

    The scale is alpha / rank, or alpha / √rank with `use_rslora` (Kalajdzievski 2023). Other
    tensors in the file (`modules_to_save`, biases) were trained in full: saved − base. With DoRA (Liu et al.
    2024, equation 5) the tuned weights are m ⊙ (W + scale · B @ A) / ‖W + scale · B @ A‖, the norms being
    those of the rows, and the task vector is their difference to the base's; so is that of single rows of the
    embeddings that were trained (`trainable_token_indices`).

    Attributes:
        name: the user's name for it.
        folder: the adapter's directory.
        config: its `adapter_config.json`.
        targets: the base's tensors that it changes.

    Embeddings and head may have been saved with another number of rows than the base's: see `resized`.

    Raises:
        MergetuneError: the adapter is of a kind that is no task vector, or does not fit `base`.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    targets: tuple[str, ...]

    def __init__(self, name: str, folder: Path, base: Checkpoint) -> None:
        self.name = name
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        _refuse_unsupported(folder / CONFIG, self.config)
        if not (folder / WEIGHTS).exists():
            raise MergetuneError(f"{folder}: {explain_no_weights(folder, WEIGHTS)}")
        self._files = TensorFiles([folder / WEIGHTS])
        self._updates = self._read_updates(base)
        if problems := list(self._find_problems(base)):
            raise MergetuneError("\n".join(f"{folder / WEIGHTS}: {line}" for line in problems))
        self.targets = tuple(self._updates)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the adapter's tensors and of what sets their scale."""
        scaling = {key: self.config.get(key) for key in _SCALING_KEYS}
        scaling |= {key: self.config[key] for key in _RARE_KEYS if self.config.get(key)}
        parts = [json.dumps(scaling, sort_keys=True), self._files.digest(self._files.names)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def weights(self, name: str) -> Tensor | None:
        """Return a tensor that the adapter holds in full (`modules_to_save`), read only."""
        update = self._updates.get(name)
        if update is None or update.saved is None or update.a is not None:
            return None
        return self._files.view(update.saved)

    def task_vector(self, name: str, base: Tensor) -> Tensor | None:
        """Return what the adapter adds to the base's tensor `name`, or None if nothing.

        It is computed on the CPU, and in the end on the device of `base`.
        """
        update = self._updates.get(name)
        if update is None:
            return None
        if (factors := self.factors(name)) is not None:
            return factors.product().to(base.device)
        product = self._product(update.a, update.b, update) if update.a and update.b else None
        if update.rows:
            return self._rows(update, base.cpu()).to(base.device)
        if update.magnitude and product is not None:
            return self._rescaled(update.magnitude, product, update, base.cpu().float()).to(base.device)
        if not update.saved:
            return None if product is None else product.to(base.device)
        saved = self._files.view(update.saved).float() - base.cpu().float()
        return (saved if product is None else saved + product).to(base.device)

    def resized(self, name: str, base: Tensor) -> Tensor | None:
        """Return a whole tensor in float32, with as many rows as the adapter has, or None if it has none."""
        update = self._updates.get(name)
        if update is None:
            return None
        start = self._files.view(update.saved) if update.saved else base
        return start.float() + (self._product(update.a, update.b, update) if update.a and update.b else 0)

    def factors(self, name: str) -> LowRank | None:
        """Return the factors of what the adapter adds to the base's tensor `name`, in its layout.

        None where it does not just add a product to it: DoRA, tensors trained in full, fused parameters.
        """
        update = self._updates.get(name)
        if update is None or not update.a or not update.b:
            return None
        if update.magnitude or update.part or update.saved:
            return None
        return self._low_rank(update.a, update.b, update)

    def _low_rank(self, a: str, b: str, update: _Update) -> LowRank:
        """Return scale · B and A, in the layout of the base's tensor."""
        left, right = self._files.view(b).float(), self._files.view(a).float()
        found = LowRank(left * _scale(self.config, update.module, rank=len(right)), right)
        return found.transposed if update.is_transposed else found

    def rows_of(self, name: str) -> int | None:
        """Return how many rows of a tensor the adapter holds in full, None where it holds none."""
        update = self._updates.get(name)
        return self._shape(update.saved)[0] if update is not None and update.saved else None

    def _product(self, a: str, b: str, update: _Update) -> Tensor:
        """Return scale · B @ A in the layout of the base's tensor."""
        if update.part is None:
            return self._low_rank(a, b, update).product()
        left, right = self._files.view(b).float(), self._files.view(a).float()
        return _part_of_product(self.config, left, right, update.part, update)

    def _rescaled(self, magnitude: str, product: Tensor, update: _Update, base: Tensor) -> Tensor:
        """Return what DoRA adds: m ⊙ V / ‖V‖ − W with V = W + product, the norms being those of V's rows."""
        whole = base + product
        rows = whole.T if update.is_transposed else whole  # (out, in)
        factor = self._files.view(magnitude).float().reshape(-1, 1) / rows.norm(dim=1, keepdim=True)
        rescaled: Tensor = whole * (factor.T if update.is_transposed else factor)
        return rescaled.sub_(base)

    def _rows(self, update: _Update, base: Tensor) -> Tensor:
        """Return what rows that were trained apart add to the base's."""
        assert update.rows is not None
        tokens, vector = torch.tensor(update.tokens), torch.zeros(base.shape)
        vector[tokens] = self._files.view(update.rows).float() - base[tokens].float()
        return vector

    def _read_updates(self, base: Checkpoint) -> dict[str, _Update]:
        """Gather the adapter's tensors by the base's tensor that they change."""
        updates: dict[str, _Update] = {}
        known = set(self._files.names)
        for stored in self._files.names:
            name = stored.removeprefix(PREFIX)
            if ".original_module." in stored:
                continue
            if _COPY.search(stored):
                name = _COPY.sub("", name)
                if PREFIX + name in known:
                    continue
            if (tokens := _TOKENS.fullmatch(name)) is not None:
                update = updates.setdefault(f"{tokens['module']}.weight", _Update())
                update.rows, update.tokens = stored, _token_indices(self.config, tokens["module"])
                continue
            match = _FACTOR.fullmatch(name)
            if match is None:
                # `base_layer` stands between a module and its own tensors once LoRA wraps it.
                updates.setdefault(name.replace(".base_layer.", "."), _Update()).saved = stored
                continue
            update = updates.setdefault(f"{match['module']}.weight", _Update())
            update.module = match["module"]
            update.is_transposed = bool(match["embedding"] or self.config.get("fan_in_fan_out"))
            if match["factor"] == "A":
                update.a = stored
            elif match["factor"] == "B":
                update.b = stored
            else:
                update.magnitude = stored
        if base.is_tied:
            _drop_tied_copy(updates, self._files)
        ours = {theirs: our for our, theirs in match_names(base, tuple(updates)).items()}
        found: dict[str, _Update] = {}
        for name, update in updates.items():
            if name in ours or not (update.a and update.b) or update.saved:
                found[ours.get(name, name)] = update
            else:
                found |= self._spread(name, update, base)
        known_to_base = set(base.names)
        for name, update in found.items():
            if name in known_to_base and self._only_repeats(update, base.view(name)):
                update.saved = None
        return found

    def _only_repeats(self, update: _Update, base: Tensor) -> bool:
        """Say whether a saved tensor is the base's: peft saves embeddings that LoRA wraps, trained or not."""
        if not update.saved or not update.a or update.magnitude:
            return False
        saved = self._files.view(update.saved)
        return saved.shape == base.shape and torch.equal(saved.float(), base.float())

    def _spread(self, name: str, update: _Update, base: Checkpoint) -> dict[str, _Update]:
        """Return what a product does to the stored tensors that its parameter is read from.

        It is a parameter of a module (`target_parameters`), whose wrappers stand around each other, the last
        parameter's outermost; or the weight of a module that transformers fuses.
        """
        own = {name: update}
        if base.architecture is None:
            return own
        module, _, wrapped = update.module.partition(".base_layer")
        targets = tuple(self.config.get("target_parameters") or ())
        trained = [
            each
            for each in base.architecture.parameters_of(module)
            if any(f".{each}".endswith(f".{target}") for target in targets)
        ]
        n_inside = wrapped.count(".base_layer") + 1 if ".base_layer" in update.module else 0
        parameter = base.architecture.parameter(f"{module}.weight")
        if n_inside < len(trained):
            parameter = trained[-1 - n_inside]
            update = replace(update, module=parameter)
        if parameter is None:
            return own
        parts = base.architecture.parts(parameter)
        return {stored: replace(update, part=part) for stored, part in parts.items()}

    def _find_problems(self, base: Checkpoint) -> Iterator[str]:
        """Yield what does not fit the base, one line for each kind of problem."""
        given = self.config.get("base_model_name_or_path")
        remedy = f"The adapter names `{given}` as its base: give that one, or another adapter."
        known = set(base.names)
        heads = [name for name in self._updates if base.is_tied and is_head(name)]
        if heads:
            yield (
                f"trains {heads[0]} on its own, but the base {base.folder} ties the head to the "
                f"embeddings. {_AS_FULL_MODEL}"
            )
        if self.config.get("trainable_token_indices") and not any(u.rows for u in self._updates.values()):
            yield f"the rows are missing that `trainable_token_indices` names. {remedy}"
        strays = [name for name in self._updates if name not in known and name not in heads]
        if strays:
            yield f"{shortened(strays)}: no such tensor in the base {base.folder}. {remedy}"
        shapes = {
            name: self._shape_with_tokens(name, base.shape(name)) for name in self._updates if name in known
        }
        misfits = [
            f"{name}: {misfit}, but the base's shape is {base.shape(name)}"
            for name, shape in shapes.items()
            if (misfit := self._find_misfit(self._updates[name], shape))
        ]
        if misfits:
            yield f"{shortened(misfits)}. {remedy}"

    def _shape_with_tokens(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the base's tensor would have with the adapter's number of tokens."""
        saved = self._updates[name].saved
        if saved is None or not has_token_rows(name) or self._shape(saved)[1:] != shape[1:]:
            return shape
        return self._shape(saved)

    def _find_misfit(self, update: _Update, shape: tuple[int, ...]) -> str | None:
        """Say what about an update does not fit a tensor of this shape."""
        if update.saved and (saved := self._shape(update.saved)) != shape:
            return f"a tensor of shape {saved} was saved"
        if update.rows:
            wanted = (len(update.tokens), *shape[1:])
            is_alone = not (update.a or update.b or update.saved)
            is_known = all(0 <= token < shape[0] for token in update.tokens)
            if self._shape(update.rows) == wanted and is_alone and is_known:
                return None
            return f"`trainable_token_indices` names {len(update.tokens)} rows, and others were trained"
        if not update.a and not update.b:
            return None if not update.magnitude else "DoRA's magnitudes stand without a product"
        if not update.a or not update.b:
            there, missing = "AB" if update.a else "BA"
            return f"LoRA's {there} stands without its {missing}"
        a, b = self._shape(update.a), self._shape(update.b)
        if update.part is not None:
            return _find_misfit_of_part(a, b, update, shape)
        if len(a) == len(b) == 2 and a[0] == b[1] > 0:
            product = (a[1], b[0]) if update.is_transposed else (b[0], a[1])
            if update.magnitude and (is_embeddings(f"{update.module}.weight") or update.saved):
                return "DoRA of embeddings is not merged"
            if self.config.get("use_dora") and not update.magnitude:
                return "DoRA's magnitudes are missing"
            if update.magnitude and math.prod(self._shape(update.magnitude)) != b[0]:
                return f"DoRA's magnitudes have shape {self._shape(update.magnitude)}"
            return None if product == shape else f"LoRA's B @ A has shape {product}"
        return f"LoRA's A has shape {a} and B {b}"

    def _shape(self, stored: str) -> tuple[int, ...]:
        return tuple(self._files.view(stored).shape)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter in peft's format."""
    return (folder / CONFIG).is_file()


def open_expert(name: str, folder: Path, base: Checkpoint) -> Expert:
    """Open a LoRA adapter (a folder with `adapter_config.json`) or else a full checkpoint."""
    if is_adapter(folder):
        return LoraExpert(name, folder, base)
    checkpoint = Checkpoint(folder)
    names = match_names(base, checkpoint.names)
    head = next(filter(is_head, base.names), None)
    if head is not None and checkpoint.is_tied and base.repeats_embeddings:
        names[head] = next(filter(is_embeddings, checkpoint.names))
    return FullExpert(name, checkpoint, names)


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MergetuneError(
            f"{path}: `peft_type: LORA` must hold, but got {kind}, which is no sum with the base's "
            f"weights. {_AS_FULL_MODEL}"
        )
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise MergetuneError(f"{path}: `{key}` is set: {reason}. {_AS_FULL_MODEL}")
    alphas = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
    if wrong := [alpha for alpha in alphas if isinstance(alpha, bool) or not isinstance(alpha, (int, float))]:
        raise MergetuneError(f"{path}: `lora_alpha` must be a number, but is {wrong[0]!r}. Correct it.")
    start = config.get("init_lora_weights", True)
    if start not in _INITIALIZATIONS:
        raise MergetuneError(
            f"{path}: `init_lora_weights: {start}` changes the base's own weights, so the adapter "
            f"alone is not the difference to the base. {_AS_FULL_MODEL}"
        )


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank or, rank-stabilized, alpha / √rank of one module.

    The first pattern that matches the end of the module's path counts, as in peft.
    """
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = float(next(matching, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _part_of_product(
    config: dict[str, Any], left: Tensor, right: Tensor, part: Part, update: _Update
) -> Tensor:
    """Return scale · B @ A of a stored tensor's part of a parameter, in the way of peft's `ParamWrapper`.

    Of a mixture's n experts, B is (out, rank · n), the expert being the faster index, and A (n · rank, in),
    it being the slower.
    """
    n = part.whole[0] if len(part.whole) == 3 else 1
    rank = len(right) // n
    b = left.reshape(len(left), rank, n).permute(2, 0, 1)[part.slices.start : part.slices.stop]
    a = right.reshape(n, rank, -1)[part.slices.start : part.slices.stop]
    product = (b @ a).mul_(_scale(config, update.module, rank))  # (n_slices, out, in)
    is_turned = part.is_in_out if len(part.whole) == 3 else update.is_transposed
    return part.of(product.transpose(1, 2) if is_turned else product)


def _find_misfit_of_part(
    a: tuple[int, ...], b: tuple[int, ...], update: _Update, shape: tuple[int, ...]
) -> str | None:
    """Say what about a product does not fit the parameter that a stored tensor is a part of."""
    part = update.part
    assert part is not None
    *n, rows, columns = part.whole
    is_turned = part.is_in_out if n else update.is_transposed
    wanted = (columns, rows) if is_turned else (rows, columns)  # (out, in)
    if part.shape != shape:
        return f"transformers reads a tensor of shape {part.shape}"
    if update.magnitude:
        return "DoRA of fused weights is not merged"
    is_matrix = len(a) == len(b) == 2 and a[0] == b[1] > 0 and a[0] % math.prod(n) == 0
    return None if is_matrix and (b[0], a[1]) == wanted else f"LoRA's A has shape {a} and B {b}"


def _token_indices(config: dict[str, Any], module: str) -> tuple[int, ...]:
    """Return the rows of a module that `trainable_token_indices` names, for it or for the embeddings."""
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((own for key, own in given.items() if f".{module}".endswith(f".{key}")), [])
    return tuple(given or ())


def _drop_tied_copy(updates: dict[str, _Update], files: TensorFiles) -> None:
    """Drop a saved head that repeats the saved embeddings: the base keeps one tensor for both."""
    head = next(filter(is_head, updates), None)
    embeddings = next(filter(is_embeddings, updates), None)
    if head is None or embeddings is None:
        return
    copy, original = updates[head].saved, updates[embeddings].saved
    if not copy or not original or updates[head].a or updates[head].b:
        return
    if torch.equal(files.view(copy), files.view(original)):
        del updates[head]
