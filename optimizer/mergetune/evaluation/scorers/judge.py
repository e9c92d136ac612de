"""The scorer `judge`: a model scores the reply."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.judging import questions, verdicts
from mergetune.evaluation.judging.agreement import Agreement, JudgeQuality
from mergetune.evaluation.judging.judge import Judge, JudgeSettings, judge_of
from mergetune.evaluation.judging.local_judge import judge_digest
from mergetune.evaluation.judging.questions import (
    Question,
    comparing_question,
    scoring_question,
    wanted_reply,
)
from mergetune.evaluation.judging.reply_files import (
    ByItem,
    LabelledReply,
    ReplyRow,
    read_labels,
    read_references,
)
from mergetune.evaluation.judging.verdict_store import default_store
from mergetune.evaluation.judging.verdicts import Explained, graded, mean_of_given, preferred
from mergetune.evaluation.scorers.scorer import BaseScorer
from mergetune.files.library import placed
from mergetune.files.yaml_io import KindAlone, Strict, read_text
from mergetune.weights.models import find_model

_MOST_GRADES = 101
_OF_SERVERS = ("key_variable", "concurrency", "max_requests", "timeout_s")


class Pairwise(Strict):
    """What replies are compared with: the item's `answer`, or a file's reply to it.

    Once the suite is read, it holds the file's replies.
    """

    reference: str | tuple[ReplyRow, ...]


class JudgeScorer(BaseScorer):
    """A model scores replies, by a rubric or against a reference.

    `model` is its name on an OpenAI-compatible server at `url`. Without one it is a directory or a hub id,
    which `engine` runs on this machine while replies are scored; once the suite is read, it is a digest.

    `rubric` is a file relative to the suite's folder; once the suite is read, it is the file's text. By it
    a reply gets a whole number of the `scale`, one for each of the `criteria` if there are any; the ends
    count 0 and 1. `pairwise` asks instead which is better, the reply or a reference, in both orders.

    Each verdict is asked for `repeats` times and a reply's score is the mean of those that are given, NaN
    where there is none. `labels` are replies to items that people gave scores; a judge that agrees too little
    with them is warned of.

    The options that no verdict depends on, such as `url`, are no part of the rules or of a study's record:
    they may change when a study goes on.
    """

    needs = "nothing; `answer`, if there is one, is shown to the judge, and `pairwise` may compare with it"
    scores = (
        "what another model gives the reply: its place on a scale by a rubric, the mean of several "
        "criteria, or the share of comparisons with a reference that it wins, a tie counting half"
    )
    modules = (questions, verdicts)

    kind: Literal["judge"] = "judge"
    model: str = Field(min_length=1)
    rubric: str = ""
    scale: tuple[int, int] = (1, 5)
    criteria: tuple[str, ...] = ()
    pairwise: Pairwise | None = None
    repeats: int = Field(1, gt=0)
    temperature: float | None = Field(0.0, ge=0)
    max_new_tokens: int | None = Field(512, gt=0)

    url: str = Field("", exclude=True)
    engine: Annotated[EngineConfig, KindAlone] = Field(EngineConfig(), exclude=True)
    key_variable: str | None = Field(None, exclude=True)
    concurrency: int = Field(8, gt=0, exclude=True)
    max_requests: int | None = Field(None, gt=0, exclude=True)
    timeout_s: float = Field(120, gt=0, exclude=True)
    labels: str | tuple[LabelledReply, ...] = Field("", exclude=True)

    _folder: Path | None = PrivateAttr(None)
    _agreement: Agreement | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        low, high = self.scale
        if not low < high < low + _MOST_GRADES:
            raise ValueError(f"`scale` must be two whole numbers, the lower first, but is [{low}, {high}]")
        if self.pairwise is None and not self.rubric:
            raise ValueError("the scorer `judge` needs a `rubric`, or `pairwise`")
        if self.pairwise is not None and (self.criteria or self.scale != (1, 5)):
            raise ValueError("`scale` and `criteria` do not go with `pairwise`, which grades nothing")
        if "reason" in self.criteria or len(set(self.criteria)) < len(self.criteria):
            raise ValueError("`criteria` must differ, and none may be `reason`")
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError("`repeats` need a `temperature` above 0, where a judge may say something else")
        return self

    def with_files(self, folder: Path, items: Sequence[Item]) -> Self:
        """See `BaseScorer.with_files`."""
        if self.url and not self.url.startswith(("http://", "https://")):
            raise MergetuneError(
                f"`url` must be a server's address, http://… or https://…, but is {self.url!r}."
            )
        self._refuse_foreign()
        place, model = self._found(folder)
        found: dict[str, Any] = {"model": model}
        if self.rubric:
            found["rubric"] = read_text(placed(folder, self.rubric))
            if not found["rubric"].strip():
                raise MergetuneError(f"{placed(folder, self.rubric)}: must say how to score, but is empty.")
        reference = self.pairwise.reference if self.pairwise else "answer"
        if isinstance(reference, str) and reference != "answer":
            rows = read_references(placed(folder, reference), items)
            found["pairwise"] = Pairwise(reference=rows)
        if isinstance(self.labels, str) and self.labels:
            ends = (0.0, 1.0) if self.pairwise else self.scale
            found["labels"] = read_labels(placed(folder, self.labels), items, ends)
        own = self.model_copy(update=found)
        own._folder = place
        return own

    def _refuse_foreign(self) -> None:
        """Refuse options that only a server has or, with a server, only a judge on this machine."""
        default = {name: field.default for name, field in type(self).model_fields.items()}
        names = ("engine",) if self.url else _OF_SERVERS
        if wrong := [name for name in names if getattr(self, name) != default[name]]:
            where = "on a server, with `url`" if self.url else "on this machine, without `url`"
            raise MergetuneError(f"`{'`, `'.join(wrong)}` does not go with a judge {where}. Leave it out.")
        if not self.url and None in (self.temperature, self.max_new_tokens):
            raise MergetuneError(
                "`temperature` and `max_new_tokens` may be null where a server has its own, but there is no "
                "`url`. Give both."
            )

    def _found(self, folder: Path) -> tuple[Path | None, str]:
        """Return the directory of a judge on this machine and its digest; None and its name on a server."""
        if self.url:
            return None, self.model
        try:
            place = find_model(self.model, folder)
            return place, f"sha256:{judge_digest(place)}"
        except MergetuneError as error:
            raise MergetuneError(
                f"`model` without `url` is a model on this machine: {error} Serve it, and give `url`, where "
                "it cannot run here."
            ) from error

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`."""
        is_compared = self.pairwise is not None and self.pairwise.reference == "answer"
        if item.patterns or (is_example and item.answer is None):
            return self.lacking(item, is_example=is_example)
        if is_compared and wanted_reply(item) is None:
            return self.missing_answer(is_example)
        return None

    def target_text(self, item: Item) -> str:
        """See `BaseScorer.target_text`."""
        return wanted_reply(item) or "what the judge is told to look for"

    def wanted_reply(self, item: Item) -> Message | None:
        """See `BaseScorer.wanted_reply`; a reply in the data is judged alone."""
        return None if item.target else super().wanted_reply(item)

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`; a judge that cannot be used or gives too few verdicts is an error."""
        return [own.score for own in self.explained(items, replies)]

    def explained(self, items: Sequence[Item], replies: Sequence[str]) -> list[Explained]:
        """Return the scores with what the judge wrote, a line for each verdict; raises as `score` does."""
        if self.labels and self._agreement is None:
            self._agreement = self._compared()
        return [
            Explained(_mean(own), "\n".join(each.reason for each in own if each.reason))
            for own in self._repeated(items, replies)
        ]

    @property
    def agreement(self) -> Agreement | None:
        """How far the judge agrees with people; None without `labels`, and before it has scored a reply."""
        return self._agreement

    def quality(self, items: Sequence[Item], replies: Sequence[str]) -> JudgeQuality:
        """Measure the judge's noise on replies, and its agreement with people on those that have labels.

        What was judged before costs no request. Raises as `score` does.
        """
        from mergetune.evaluation.judging.agreement import judge_quality

        labels = self.labels if isinstance(self.labels, tuple) else ()
        judged = self._repeated([each.item for each in labels], [each.reply for each in labels])
        return judge_quality(
            [[each.score for each in own] for own in self._repeated(items, replies)],
            [_mean(own) for own in judged],
            [each.score for each in labels],
            2 if self.pairwise else self.scale[1] - self.scale[0],
        )

    def _repeated(self, items: Sequence[Item], replies: Sequence[str]) -> list[list[Explained]]:
        """Return the scores of each item, one a repeat: (n_items, repeats)."""
        references = self._references(items)
        asked = [self._questions(*each) for each in zip(items, replies, references, strict=True)]
        return self._judge.judged(asked, self.repeats)

    def _questions(self, item: Item, reply: str, reference: str) -> list[Question]:
        """Return what is asked of one reply: how good it is, or which is better, in both orders."""
        if self.pairwise is None:
            return [
                scoring_question(self.rubric, graded(self.criteria or ("score",), self.scale), item, reply)
            ]
        return [
            comparing_question(self.rubric, preferred(of_first=True), item, reply, reference),
            comparing_question(self.rubric, preferred(of_first=False), item, reference, reply),
        ]

    def _references(self, items: Sequence[Item]) -> list[str]:
        """Return what the reply to each item is compared with."""
        if self.pairwise is None or isinstance(self.pairwise.reference, str):
            return [wanted_reply(item) or "" for item in items]
        rows = ByItem(self.pairwise.reference)
        return [rows.of(item)[0].reply for item in items]

    @property
    def _settings(self) -> JudgeSettings:
        names = JudgeSettings.__dataclass_fields__.keys() - {"folder"}
        return JudgeSettings(**{name: getattr(self, name) for name in names}, folder=self._folder)

    @property
    def _judge(self) -> Judge:
        return judge_of(self._settings, default_store().folder)

    def _compared(self) -> Agreement | None:
        """Compare the judge with people, and warn where it agrees too little; None without a verdict."""
        found = self.quality([], [])
        if not found.n_labels:
            return None
        kappa = None if math.isnan(found.kappa) else found.kappa
        own = Agreement(self._settings.name, found.n_labels, found.agreement, kappa)
        if own.is_low:
            warnings.warn(own.warning, stacklevel=2)
        return own


def _mean(repeated: Sequence[Explained]) -> float:
    """Return the mean over the repeats that have a verdict; NaN where none has."""
    return mean_of_given([each.score for each in repeated])
