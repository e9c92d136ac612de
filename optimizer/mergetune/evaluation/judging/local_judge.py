"""A judge on this machine: a model in an engine of its own, which lives as long as questions are asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError
from mergetune.machine.memory import is_out_of_memory

Messages = Sequence[Mapping[str, str]]
Asked = tuple[Messages, int]  # a conversation, and the seed of its reply
_LOG = logging.getLogger(__name__)


def judge_digest(folder: Path) -> str:
    """Return the SHA-256 of all that a judge's verdicts depend on, beside the questions.

    Raises:
        MergetuneError: the folder holds no model, or a quantized one.
    """
    from mergetune.weights.checkpoint import Checkpoint, answers_digest

    return answers_digest(folder, Checkpoint(folder).digest)


@contextmanager
def local_judge(
    folder: Path, config: EngineConfig, temperature: float, max_new_tokens: int
) -> Iterator[Callable[[Sequence[Asked]], list[str]]]:
    """Start an engine, yield what returns its replies, and free its memory at the end.

    Raises:
        MergetuneError: it cannot start or breaks, its weights do not fit beside what is in memory, or the
            chat template does not take a question.
    """
    from lm_eval.api.instance import Instance

    from mergetune.engines.start import start_chosen

    settings = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": temperature > 0}

    def replies(asked: Sequence[Asked]) -> list[str]:
        lm: Any = engine.lm  # not kept, so that `close` frees the model
        made = []
        for number, (messages, seed) in enumerate(asked):
            prompt = lm.apply_chat_template([dict(message) for message in messages])
            drawn = {"temperature": temperature, "seed": seed} if temperature > 0 else {}
            made.append(Instance("generate_until", {}, (prompt, {**settings, **drawn}), number))
        found: list[str] = lm.generate_until(made)
        return found

    try:
        engine, _ = start_chosen(config, folder, None, None, None, _LOG.info)
        with closing(engine):
            yield replies
    except (MergetuneError, OSError):
        raise
    except Exception as error:  # whatever an engine raises, lest it is held against the model under test
        is_small = is_out_of_memory(error)
        what = "memory is too small for it beside the model under test" if is_small else "its engine broke"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MergetuneError(
            f"{what} ({reason}). Give the judge another `engine.device`, or serve it (`url`)."
        ) from error
