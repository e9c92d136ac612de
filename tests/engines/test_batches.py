"""Which texts are computed together: each once, cheaply, the longest first."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from mergetune.engines.batches import common_length, joined_batches, plan_batches

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=14)


def cost(texts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], overhead: float) -> float:
    """Count the tokens that batches compute, what they begin with alike once, the rest padded."""
    total = 0.0
    for batch in batches:
        own = [list(texts[number]) for number in batch]
        n_alike = len(os.path.commonprefix(own))  # noqa: RUF071 (of lists)
        total += overhead + n_alike + len(own) * (max(map(len, own)) - n_alike)
    return total


@given(TEXTS)
def test_the_common_length_is_that_of_all_texts(texts: list[list[int]]) -> None:
    assert common_length(texts) == len(os.path.commonprefix(texts))  # noqa: RUF071 (of lists)


@given(TEXTS, st.integers(1, 5), st.floats(0, 30))
@example([[0, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], 2, 0.0)  # some of a group share more than all
def test_every_text_is_in_one_batch_and_a_plan_costs_no_more_than_sorting(
    texts: list[list[int]], batch_size: int, overhead: float
) -> None:
    plan = plan_batches(texts, batch_size, overhead)
    assert sorted(number for batch in plan for number in batch) == list(range(len(texts)))
    assert max(map(len, plan)) <= batch_size
    longest = [max(len(texts[number]) for number in batch) for batch in plan]
    assert longest == sorted(longest, reverse=True)
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    plain = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    assert cost(texts, plan, overhead) <= cost(texts, plain, overhead) + 1e-9


def test_texts_are_put_together_by_what_they_begin_with_where_that_is_long_enough() -> None:
    one, other = list(range(100)), list(range(200, 300))
    texts = [[*beginning, 500 + number] for number in range(10) for beginning in (one, other)]
    alike = [list(range(0, 20, 2)), list(range(1, 20, 2))]
    assert plan_batches(texts, 20, overhead=50) == alike
    assert len(plan_batches(texts, 20, overhead=5_000)) == 1
    assert len(plan_batches(texts, 4, overhead=50)) == 6


def test_texts_of_like_lengths_are_put_together_where_padding_costs_more_than_a_batch() -> None:
    texts = [[number] * length for number, length in enumerate([400] * 3 + [10] * 30)]
    assert [len(batch) for batch in plan_batches(texts, 50, overhead=1_000)] == [3, 30]
    assert [len(batch) for batch in plan_batches(texts, 50, overhead=100_000)] == [33]


def test_batches_are_joined_where_padding_costs_less_than_a_step() -> None:
    texts = [[1] * length for length in (9, 9, 8, 5, 5, 2)]
    batches = [[0, 1], [2], [3, 4], [5]]
    assert joined_batches(texts, batches, 6, overhead=100) == [batches]
    assert joined_batches(texts, batches, 4, overhead=100) == [batches[:2], batches[2:]]
    assert joined_batches(texts, batches, 6, overhead=7) == [[[0, 1], [2]], [[3, 4], [5]]]
    assert joined_batches(texts, batches, 6, overhead=-1) == [[batch] for batch in batches]
