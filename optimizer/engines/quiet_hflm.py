"""lm-eval's transformers model without its progress bars: the study has a line of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval.models.huggingface import HFLM

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class QuietHFLM(HFLM):  # type: ignore[misc]
    """`HFLM` that draws no progress bars."""

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
        found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return found
