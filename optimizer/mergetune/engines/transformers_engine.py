"""The engine that runs everywhere: a transformers model in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergetune.engines.completions import CompletionsLM
from mergetune.engines.engine import EngineConfig, LoadTime
from mergetune.engines.model_text import ModelText
from mergetune.engines.stored_weights import StoredWeights
from mergetune.engines.weight_facts import WeightFacts
from mergetune.errors import MergetuneError
from mergetune.machine.memory import check_room, free_bytes, free_memory
from mergetune.weights.architecture import model_class, read_config
from mergetune.weights.models import is_stack
from mergetune.weights.tensor_files import open_weights

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from mergetune.merging.merger import Merger
    from mergetune.space.recipe import MergeRecipe
    from mergetune.weights.chat_template import ChatTemplate

_BATCH_SIZE = 32
_BATCHES = 4  # at a time: sorted by length among each other, and lost together where the process ends
_SHARE = 0.8  # of a GPU's free memory that weights may take where they are spread; activations take the rest


class TransformersEngine:
    """A model of transformers, of text or of images and text, whose weights are copied in place.

    Args:
        config: the engine's options.
        base: the directory that it starts with.
        merger: what merges recipes; None where nothing is to be merged.
        chat: takes the place of the model's chat template.
    """

    def __init__(
        self,
        config: EngineConfig,
        base: Path,
        merger: Merger | None = None,
        chat: ChatTemplate | None = None,
    ) -> None:
        from transformers import GenerationConfig

        from mergetune.engines.transformers_completer import TransformersCompleter

        device = _usable(config.device)
        text = ModelText.read(base, config.max_length, chat)
        facts = WeightFacts.read(base, config.dtype)
        spread = _spread(device, facts.nbytes) if config.device == "auto" else None
        if spread is None:
            check_room(str(base), facts.nbytes, device)
        # a configuration of our own: what the base's generation_config.json says must not change replies
        neutral: Any = GenerationConfig
        placed = {} if spread is None else {"device_map": "auto", "max_memory": spread}
        model: Any = model_class(base).from_pretrained(
            **_source(base),
            dtype=facts.dtype,
            generation_config=neutral(),
            trust_remote_code=False,
            **placed,
        )
        model.eval()
        if spread is None:
            model.to(device)
        if getattr(model, "hf_quantizer", None) is not None:
            with torch.inference_mode():  # unpacks the weights; the completer goes around this hook
                model(torch.zeros((1, 1), dtype=torch.long, device=model.device))
        self._merger = merger
        batch_size = config.batch_size or _BATCH_SIZE
        self.completer = TransformersCompleter(model, text.tokenizer, batch_size)
        if merger is not None:
            _ = self._weights  # an architecture whose weights cannot be swapped is refused at once
        self._lm = CompletionsLM(
            self.completer,
            text.tokenizer,
            text.max_length,
            config.seed,
            text.end_tokens,
            requests_at_a_time=_BATCHES * batch_size,
        )

    @property
    def lm(self) -> LM:
        """The model as lm-eval sees it."""
        return self._lm

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.completer.model

    @cached_property
    def _weights(self) -> StoredWeights:
        """The weights that can be replaced; those of a quantized model, which is only scored, cannot."""
        return StoredWeights(self.model)

    def load(self, recipe: MergeRecipe) -> LoadTime:
        """Merge straight into the model's own tensors; see `Engine.load`."""
        assert self._merger is not None  # an engine that was started to merge
        return LoadTime.of(self.replace, self._merger.merge(recipe, into=self._weights))

    @torch.no_grad()
    def replace(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put these weights in place of the present ones.

        Args:
            tensors: every tensor of the model by its name in the base's checkpoint (a tied head left
                out), full and unsharded.

        Raises:
            MergetuneError: a tensor is missing, unknown or of another shape.
        """
        loaded: set[int] = set()
        for name, tensor in tensors:
            target = self._weights.get(name)
            if target is None and self._weights.ignores(name):
                continue
            if target is None or target.shape != tensor.shape:
                has = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
                raise MergetuneError(
                    f"`{name}` of shape {tuple(tensor.shape)} does not fit the model in transformers, "
                    f"which has {has}. Save the base with `save_pretrained` of transformers 5."
                )
            if target is not tensor:  # it was merged in place
                target.copy_(tensor)
            loaded.add(target.data_ptr())
        kept = [name for name, weight in self._weights.items() if weight.data_ptr() not in loaded]
        if kept:  # a tied head shares its memory with the embeddings, so it counts as loaded
            raise MergetuneError(f"The candidate has no tensor for {', '.join(kept[:5])} of the model.")

    def close(self) -> None:
        """Free the model."""
        self.__dict__.pop("_weights", None)
        del self._lm, self.completer
        free_memory()


def _source(model: Path) -> dict[str, Any]:
    """Return what transformers reads a model from: its directory, or a stack's weights where they are."""
    if not is_stack(model):
        return {"pretrained_model_name_or_path": model}
    files = open_weights(model)
    weights = {name: _OnDemand(files.view(name)) for name in files.names}
    return {"pretrained_model_name_or_path": None, "config": read_config(model), "state_dict": weights}


@dataclass(frozen=True)
class _OnDemand:
    """A tensor that transformers copies when it takes it, as it does with a slice of a safetensors file.

    What it takes becomes the model's own parameter, and a layer may stand in a stack twice.
    """

    view: Tensor

    def __getitem__(self, index: Any) -> Tensor:
        return self.view[index].clone()


def _usable(device: str) -> str:
    """Return the device that computes, CUDA for `auto` where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MergetuneError(
            f"The device `{device}` cannot compute here ({reason}). Give `auto`, or `cpu`."
        ) from error
    return device


def _spread(device: str, needed: int) -> dict[int, int] | None:
    """Return the bytes that each GPU may take where a model fits none alone, but all together."""
    if device != "cuda" or needed <= _SHARE * free_bytes(device):
        return None
    room = {i: int(_SHARE * free_bytes(f"cuda:{i}")) for i in range(torch.cuda.device_count())}
    return room if len(room) > 1 and needed <= sum(room.values()) else None
