"""lm-eval's transformers model: without progress bars, and with prompts that are whole or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval.models.huggingface import HFLM

from optimizer.engines.completions import excess_tokens, generation_settings, room_for_prompt
from optimizer.engines.conversations import render

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class QuietHFLM(HFLM):  # type: ignore[misc]
    """`HFLM` that draws no progress bars and drops no message."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the model's chat template writes it; see `render`."""
        return render(self.tokenizer, chat_history, add_generation_prompt)

    def excess_tokens(self, request: Instance) -> int:
        """Return by how many tokens a request is too long; see `excess_tokens`."""
        return excess_tokens(self, request, self.max_length)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations, as `HFLM.loglikelihood` does."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, as `HFLM.loglikelihood_rolling` does."""
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate replies, as `HFLM.generate_until` does."""
        for _, settings in (request.args for request in requests):
            room_for_prompt(generation_settings(settings)[0], self.max_length)
        found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return found
