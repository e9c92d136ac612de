"""Replies: what could be said to each item, and the best of it after the evaluation's own prompt."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.models.utils import postprocess_generated_text

from mergetune.engines.completions import Scoring, generation_settings
from mergetune.engines.conversations import MARKERS, left_out
from mergetune.errors import MergetuneError
from mergetune.evaluation.bound_task import BoundTask, right_answer
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.lm_requests import conversation_with, spoken_text
from mergetune.evaluation.metric_direction import reply_scores
from mergetune.evaluation.thinking import ending_of_thoughts
from mergetune.slopes.continuation import Closing, closing, replied, written_reply
from mergetune.stats.gains import ROUNDING

if TYPE_CHECKING:
    import pandas as pd
    from lm_eval.api.instance import Instance

    from mergetune.engines.completions import CompletionsLM
    from mergetune.evaluation.suite import SuiteConfig

# A reply is a reference from this share of the best score of its task on: it shows most of what is scored.
SUFFICIENT = 0.75


@dataclass(frozen=True)
class Turn:
    """A request for a reply: its document, the item as of this turn (None: lm-eval's own) and the prompt."""

    index: int
    item: Item | None
    prompt: str
    settings: Mapping[str, Any]


class Option(NamedTuple):
    """What could be said: as it follows the prompt, what ends it, as it is scored, and who wrote it."""

    text: str
    closing: Closing
    said: str
    is_written: bool = False  # by the chat template


@dataclass(frozen=True)
class Found:
    """The replies of a task's documents, of each turn that has one.

    Attributes:
        texts: by document.
        rise: whether the score is higher (1) or lower (−1) with these replies than without.
        n_plain: how many follow a conversation as plain text, because the chat template does not write them.
    """

    texts: Mapping[int, tuple[Scoring, ...]]
    rise: int
    n_plain: int


class TaskReplies:
    """What could be said to the items of one task, and how it scores."""

    def __init__(self, bound: BoundTask, lm: CompletionsLM, suite: SuiteConfig) -> None:
        self._bound, self._lm, self._suite = bound, lm, suite
        self._chat = bool(suite.chat_template)
        self._closing = closing(lm, bound.task, self._chat)

    def best(self, asked: Mapping[int, Sequence[Instance]], measured: Sequence[pd.DataFrame]) -> Found:
        """Return the best reply to each turn, if it has most of the best score of the task.

        Args:
            asked: the task's requests by document.
            measured: what models replied; see `find_references`.
        """
        turns = [turn for index, own in asked.items() for turn in self._turns(index, own)]
        scored = self._scored(asked, turns, self._shown(measured))
        most = max((score for own in scored for score, _ in own), key=abs, default=0.0)
        rise = 1 if most > 0 else -1  # an error rate falls from silence to the answer
        texts: dict[int, list[Scoring]] = defaultdict(list)
        n_plain = 0
        for turn, own in zip(turns, scored, strict=True):
            # of equal scores the first one counts: that of the better model, then the reply in the data
            score, option = max(own, key=lambda each: rise * each[0], default=(0.0, None))
            if option is not None and most and rise * score >= (SUFFICIENT - ROUNDING) * abs(most):
                text = replied(self._lm, turn.prompt, turn.settings, option.text, option.closing)
                texts[turn.index].append(text)
                n_plain += self._chat and turn.item is not None and not option.is_written
        return Found({index: tuple(own) for index, own in texts.items()}, rise, n_plain)

    def _turns(self, index: int, requests: Sequence[Instance]) -> Iterator[Turn]:
        """Yield the turns of a document; of a reply that is drawn several times the first request."""
        config = self._bound.config
        first = requests[:: config.repeats]
        has_item = config.items is not None
        items = self._bound.items[index].turns(config.score_turns) if has_item else (None,)
        for item, request in zip(items, first, strict=True):
            yield Turn(index, item, *request.args[:2])

    def _scored(
        self,
        asked: Mapping[int, Sequence[Instance]],
        turns: Sequence[Turn],
        shown: Mapping[str, Sequence[tuple[float, str]]],
    ) -> list[list[tuple[float, Option]]]:
        """Return what could be said at each turn with its score, what models said first."""
        ids = self._bound.item_ids
        found = [
            [(score, self._options(turn, _text(reply))[0]) for score, reply in shown.get(ids[turn.index], ())]
            for turn in turns
        ]
        stated = [
            (turn, own, option)
            for turn, own in zip(turns, found, strict=True)
            for option in self._stated(turn)
        ]
        scores = self._scores(asked, [(turn, option) for turn, _own, option in stated])
        for (_turn, own, option), score in zip(stated, scores, strict=True):
            if score is not None and not math.isnan(score):
                own.append((score, option))
        return found

    def _scores(
        self, asked: Mapping[int, Sequence[Instance]], stated: Sequence[tuple[Turn, Option]]
    ) -> Sequence[float | None]:
        """Score what items state, an answer of an lm-eval task above saying nothing; None: it has no score.

        A JSONL item's score is taken as it is: it counts what a reply has.
        """
        scorer = self._bound.config.scorer
        if scorer is not None:
            items = [turn.item for turn, _ in stated if turn.item is not None]
            texts: Any = [option.said for _, option in stated]
            return scorer.score(items, texts)
        silent = reply_scores(self._bound, asked, dict.fromkeys(asked, ""))
        scores = reply_scores(self._bound, asked, {turn.index: option.said for turn, option in stated})
        above = {index: score - silent.get(index, 0.0) for index, score in scores.items()}
        return [above.get(turn.index) for turn, _ in stated]

    def _stated(self, turn: Turn) -> list[Option]:
        """Return what an item says is right: the reply in the data, then the one that its answer is."""
        scorer = self._bound.config.scorer
        if turn.item is None or scorer is None:
            answer = right_answer(self._bound.task, self._bound.docs[turn.index])
            first = next(iter(answer if isinstance(answer, (list, tuple)) else [answer]), None)
            text = f"{self._delimiter(turn)}{first}"
            return [] if first is None else [Option(text, self._closing, text)]
        found: dict[str, Option] = {}
        if scorer.asks == "reply":
            for reply in filter(None, (turn.item.target, scorer.wanted_reply(turn.item))):
                for option in self._options(turn, reply, self._delimiter(turn)):
                    found.setdefault(option.said, option)
        return list(found.values())

    def _options(self, turn: Turn, reply: Message, delimiter: str = "") -> list[Option]:
        """Return a reply as the chat template writes it, where it does, and as plain text."""
        scorer = self._bound.config.scorer
        assert scorer is not None  # lm-eval's own tasks have no messages
        plain = f"{delimiter or ending_of_thoughts(turn.prompt)}{scorer.reply_text(reply)}"
        found = Option(plain, self._closing, self._said(plain, turn))
        written = self._written(turn, reply) if self._chat else None
        return [found] if written is None else [written, found]

    def _written(self, turn: Turn, reply: Message) -> Option | None:
        """Return a reply as the chat template writes it after the prompt; None where it does not."""
        assert turn.item is not None  # `_options`
        for own in (reply, reply.with_call_ids()):
            try:
                whole = conversation_with(own, self._bound, turn.item, self._lm.tokenizer, self._suite)
            except MergetuneError:  # some templates want each call to have an id
                continue
            rest = whole[len(turn.prompt) :]
            if not whole.startswith(turn.prompt) or left_out(rest, own.as_dict()) is not None:
                return None
            text, end = written_reply(self._lm, rest)
            return Option(text, end, self._said(text, turn), is_written=True)
        return None

    def _said(self, text: str, turn: Turn) -> str:
        """Return a reply as it is scored: without special tokens, what is after a stop, and thoughts."""
        _limit, stop, _sampling = generation_settings(turn.settings)
        added = self._lm.tokenizer.added_tokens_decoder.values()
        for token in {str(each) for each in added if each.special} - MARKERS:
            text = text.replace(token, "")
        return spoken_text(postprocess_generated_text(text, stop, think_end_token=None), self._suite)

    def _delimiter(self, turn: Turn) -> str:
        """Return what stands between a prompt and an answer."""
        task = self._bound.task
        if prefix := task.doc_to_prefix(self._bound.docs[turn.index]):
            return "" if prefix[-1].isspace() else " "
        return "" if self._chat else str(task.config.target_delimiter)

    def _shown(self, measured: Sequence[pd.DataFrame]) -> dict[str, list[tuple[float, str]]]:
        """Return what models replied to each item, with its score, the better model first.

        lm-eval's own tasks are left out: what is on record of them may be a part of the reply only; and so
        are items with several replies each.
        """
        config = self._bound.config
        if config.items is None or config.score_turns != "last" or config.repeats > 1:
            return {}
        own = [frame[frame["task"] == self._bound.name] for frame in measured]
        found: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for frame in sorted(own, key=lambda frame: -frame["score"].mean()):
            for item, score, reply in zip(frame["item"], frame["score"], frame["response"], strict=True):
                if not math.isnan(score):  # a judge gave no verdict
                    found[item].append((score, reply))
        return found


def _text(reply: str) -> Message:
    return Message(role="assistant", content=reply)
