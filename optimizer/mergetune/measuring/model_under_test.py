"""Models that are scored as they are: a directory, an adapter on its base, a recipe, a served model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mergetune.engines.engine import Engine, EngineConfig, EngineKind, LoadTime
from mergetune.engines.start import start_chosen
from mergetune.errors import MergetuneError
from mergetune.merging.inputs import Inputs, open_inputs, open_recipe
from mergetune.space.recipe import MergeRecipe
from mergetune.space.stack import is_file
from mergetune.weights.adapter import is_adapter
from mergetune.weights.chat_template import ChatTemplate, choose_template
from mergetune.weights.checkpoint import Checkpoint, answers_digest
from mergetune.weights.models import find_model, is_stack_file
from mergetune.weights.tokenizer_files import VocabularyRule

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from mergetune.engines.completions import CompletionsLM

_REQUESTS = 32  # under way at a time, unless told otherwise


@dataclass(frozen=True)
class LocalModel:
    """A model in files: `folder` as it is or, where there is a recipe, what is merged on top of it.

    `chat` takes the place of its chat template.
    """

    reference: str
    folder: Path
    inputs: Inputs | None = None
    recipe: MergeRecipe | None = None
    chat: ChatTemplate | None = None

    @classmethod
    def base_of(cls, inputs: Inputs) -> LocalModel:
        """Return the base of a merge, which its recipes are merged into."""
        return cls(str(inputs.base.folder), inputs.base.folder, inputs, chat=inputs.chat)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that its answers depend on: weights, configuration, tokenizer, chat template."""
        own = self.inputs.base if self.inputs else Checkpoint(self.folder, may_be_quantized=True)
        recipe = "" if self.recipe is None else self.recipe.digest
        return answers_digest(self.folder, own.digest, recipe, "" if self.chat is None else repr(self.chat))

    def prompts(self, max_length: int | None = None) -> CompletionsLM:
        """Return what renders its prompts and counts their tokens, as every engine does; none is started.

        `max_length` is the engine's option.
        """
        from mergetune.engines.completions import CompletionsLM
        from mergetune.engines.model_text import ModelText

        text = ModelText.read(self.folder, max_length, self.chat)
        return CompletionsLM(None, text.tokenizer, text.max_length)

    def start(
        self,
        config: EngineConfig,
        folder: Path | None,
        begun_with: EngineKind | None,
        say: Callable[[str], object],
    ) -> tuple[Engine, EngineConfig]:
        """Start an engine with this model's base, and merge nothing yet; see `start_chosen`."""
        return start_chosen(config, self.folder, self.inputs, folder, begun_with, say, self.chat)


@dataclass(frozen=True)
class ServedEngine:
    """A server as an engine: its weights are its own."""

    lm: LM

    def load(self, _recipe: MergeRecipe) -> LoadTime:
        """Raise `MergetuneError`: a server takes no weights."""
        raise MergetuneError("A server takes no weights: give a model in files to merge into.")

    def close(self) -> None:
        """Leave the server as it is."""


@dataclass(frozen=True)
class ServedModel:
    """What an OpenAI-compatible server answers with; its weights are not touched, and may change unseen.

    `name` is what the server knows it by, None where it serves only one; for `tokenizer` and `template` see
    `served_lm`; `key_variable` is the environment variable that holds the server's API key.
    """

    reference: str
    url: str
    name: str | None
    tokenizer: str | None
    key_variable: str | None = None
    template: str | None = None

    digest = None

    def start(
        self,
        config: EngineConfig,
        _folder: Path | None,
        _begun_with: EngineKind | None,
        say: Callable[[str], object],
    ) -> tuple[Engine, EngineConfig]:
        """Connect to the server; only `batch_size` is heeded.

        Raises:
            MergetuneError: the server or its model is not there.
        """
        from mergetune.engines.chat_lm import served_lm

        requests = config.batch_size or _REQUESTS
        say(f"engine: {self.url}, as it is served")
        key = None if self.key_variable is None else os.environ.get(self.key_variable)
        if self.key_variable is not None and not key:
            raise MergetuneError(f"{self.url}: the variable {self.key_variable} holds no API key. Set it.")
        lm = served_lm(self.url, self.name, self.tokenizer, requests, key, self.template)
        return ServedEngine(lm), config


ModelUnderTest = LocalModel | ServedModel


def open_model(
    reference: str,
    base: str | None = None,
    tokenizer: str | None = None,
    chat: bool | str = False,
    key_variables: Mapping[str, str] = MappingProxyType({}),
    vocabulary: VocabularyRule = "refuse",
    say: Callable[[str], object] = lambda _: None,
) -> ModelUnderTest:
    """Open a model to be scored; paths are relative to this folder.

    Args:
        reference: a directory, a hub id, `smollm2-demo`, an adapter, a recipe or a stack (`.yaml`), or a
            server's address, `http://host:port`, with `#name` where it serves several models.
        base: the model that an adapter belongs to.
        tokenizer: see `ServedModel`.
        chat: the suite's: whether it has conversations, or the chat template that writes them. A server
            writes those that it replies to with its own.
        key_variables: by host, or host:port, the environment variable that holds a server's API key; a key
            goes to no other host.
        vocabulary: what becomes of tokens that an adapter added; see `StudyConfig`.
        say: is told what is done, for large models take minutes.

    Raises:
        MergetuneError: there is no such model, an adapter came without its base, an option does not go
            with the model, or there is no chat template for the suite's conversations.
    """
    if reference.startswith(("http://", "https://")):
        url, _, name = reference.partition("#")
        address = urlsplit(url)
        variable = key_variables.get(address.netloc, key_variables.get(address.hostname or ""))
        template = chat if isinstance(chat, str) else None
        return ServedModel(reference, url, name or None, tokenizer, variable, template)
    here = Path()
    if is_file(reference) and not is_stack_file(reference):
        if not Path(reference).is_file():
            raise MergetuneError(f"{reference}: there is no such recipe or stack.")
        recipe, inputs = open_recipe(Path(reference), say)
        return _merged(reference, inputs.with_chat(chat), recipe)
    folder = find_model(reference, here)
    if not is_adapter(folder):
        return LocalModel(reference, folder, chat=choose_template(folder, chat))
    if base is None:
        raise MergetuneError(f"{folder}: is an adapter. Name the model it belongs to with --base.")
    inputs = open_inputs(find_model(base, here), {"adapter": folder}, vocabulary, say=say)
    return _merged(reference, inputs.with_chat(chat), _whole(inputs))


def _merged(reference: str, inputs: Inputs, recipe: MergeRecipe) -> LocalModel:
    return LocalModel(reference, inputs.base.folder, inputs, recipe, inputs.chat)


def _whole(inputs: Inputs) -> MergeRecipe:
    """Return the recipe that gives the experts' task vectors to the base as they are."""
    experts = inputs.expert_sources
    lambdas = dict.fromkeys(experts, 1.0)
    return MergeRecipe.of_one_group("task_arithmetic", inputs.base_source, experts, {"lambda": lambdas})
