"""The engine for GPUs and for speed: vLLM, with every candidate merged inside its workers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from mergetune.engines.completions import CompletionsLM, Scoring
from mergetune.engines.engine import EngineConfig, LoadTime
from mergetune.engines.model_text import ModelText
from mergetune.engines.vllm_process import VllmProcess
from mergetune.engines.weight_facts import WeightFacts
from mergetune.errors import EngineError, MergetuneError, TrialError
from mergetune.merging.inputs import ModelPaths

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from mergetune.space.recipe import MergeRecipe
    from mergetune.weights.chat_template import ChatTemplate


class VllmEngine:
    """vLLM, with every candidate merged inside its workers.

    Args:
        config: the engine's options.
        model: the directory that it starts with.
        paths: the models that recipes name; None where nothing is to be merged.
        log: the file that its output is added to.
        chat: takes the place of the model's chat template.

    Raises:
        EngineError: vLLM does not start; the message says why.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Path,
        paths: ModelPaths | None,
        log: Path,
        chat: ChatTemplate | None = None,
    ) -> None:
        text = ModelText.read(model, config.max_length, chat)
        dtype = WeightFacts.read(model, config.dtype).dtype
        self.vllm = VllmProcess(config, model, dtype, text.max_length, log)
        self._counts = itertools.count(1)
        try:
            self._lm = CompletionsLM(
                self.vllm, text.tokenizer, self.vllm.max_length, config.seed, text.end_tokens
            )
            self.vllm.score(
                [Scoring([self._lm.eot_token_id] * 2, 1)]
            )  # vLLM starts with some models whose first request fails
            if paths is not None:
                self.vllm.open_models(paths.model_dump_json())
        except BaseException:
            self.close()
            raise

    @property
    def lm(self) -> LM:
        """The model as lm-eval sees it."""
        return self._lm

    def load(self, recipe: MergeRecipe) -> LoadTime:
        """Have every worker merge; see `Engine.load`."""
        answers = self.vllm.load(recipe.model_dump_json(by_alias=True))
        for answer in answers:
            if "error" in answer:
                raise (TrialError if answer["of_trial"] else MergetuneError)(answer["error"])
            if answer["digest"] != recipe.digest:
                raise EngineError(f"A worker merged the recipe {answer['digest']}, not {recipe.digest}.")
        self.vllm.renew(f"{next(self._counts)}-{recipe.digest}")
        slowest = max(answers, key=lambda answer: float(answer["merge_s"] + answer["load_s"]))
        return LoadTime(slowest["merge_s"], slowest["load_s"])

    def close(self) -> None:
        """End vLLM's processes."""
        self.vllm.close()
