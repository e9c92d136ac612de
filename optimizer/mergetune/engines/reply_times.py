"""How long replies take, in whatever engine: each is asked for alone, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergetune.machine import clock

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class ReplyTimes:
    """What a model, as lm-eval sees it, needs beside `generate_until` to be asked how long replies take."""

    generate_until: Any  # lm-eval's, which has no types

    def reply_seconds(self, requests: list[Instance], **_: Any) -> list[float]:
        """Return the seconds from sending each request to the whole reply, nothing else being under way.

        The first one is asked once before: what a model does at its first request is no part of a time.
        """
        self.generate_until(requests[:1])
        return [self._seconds(request) for request in requests]

    def _seconds(self, request: Instance) -> float:
        began = clock.seconds()
        self.generate_until([request])
        return clock.seconds() - began
