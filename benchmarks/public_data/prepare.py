"""Write training files of two experts and the suite and study that merge them, from public data.

    python benchmarks/public_data/prepare.py --bfcl DIR --gsm8k test.jsonl --blimp DIR --out OUT
    python benchmarks/public_data/train.py calls --out OUT
    python benchmarks/public_data/train.py arithmetic --out OUT
    mergetune run OUT/study.yaml

The files are read as they are published: the folder `data` of the package bfcl-eval, GSM8K's test problems
and a folder of BLiMP's paradigms. Hashes split them into training files and the suite's items:

- calls: BFCL's simple_python, multiple, irrelevance and live_simple, up to 1,200 letters each, which makes
  prompts of up to 425 tokens. No function's name is on both sides, for items that share one, directly or
  through others, stay together. live_simple, whose questions came from users, is for training alone. Of the
  values that are accepted the first is trained, and no argument that may be left out. Where no function fits,
  BFCL has no reply: there `NO_CALL` is trained.
- arithmetic: two thirds of the problems are trained with their worked solutions. The suite has those other
  problems whose solution calculates one to four numbers that the problem does not state.
- grammar: the first pairs of each paradigm, for the guard; nothing of it is trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any, NamedTuple

from mergetune.evaluation.item_files import ItemSource, read_items
from mergetune.evaluation.items import Item, ToolCall
from mergetune.evaluation.scorers.numeric import numbers_in
from mergetune.evaluation.scorers.tool_calls import ToolCallsScorer

HERE = Path(__file__).resolve().parent
COPIED = ("hermes.jinja", "train.yaml", "suite.yaml", "solved.yaml", "study.yaml")

IN_SUITE = ("simple_python", "multiple", "irrelevance")  # BFCL's categories
TRAINED = (*IN_SUITE, "live_simple")
SHARE_IN_SUITE = 0.5  # of the groups of functions
MOST_LETTERS = 1200  # of a question with its functions
NO_CALL = "None of the functions can do that."

SHARE_TRAINED = 2 / 3  # of the problems
MOST_RESULTS = 4  # of a problem in the suite
RESULT = re.compile(r"<<[^>]*=([^>]*)>>")  # of a calculation in a solution of GSM8K

N_PAIRS = 25  # of each paradigm
GRAMMAR_PROMPT = "Write a grammatical English sentence."

Row = dict[str, Any]


# ---------------------------------------------------------------- calls
class Question(NamedTuple):
    """A question of BFCL.

    `row` and `answer` are as published (None: no call is right), `item` is as mergetune reads them, and
    `names` are those of its functions.
    """

    category: str
    row: Row
    answer: Row | None
    item: Item
    names: frozenset[str]


def prepare_calls(bfcl: Path, out: Path) -> None:
    """Write the items of calls, those where no call is right, and the training dialogues of both kinds."""
    questions = list(read_questions(bfcl))
    groups = joined([question.names for question in questions])
    asked, trained = [], []
    for question in questions:
        if share(groups[min(question.names)]) >= SHARE_IN_SUITE:
            trained.append(dialogue(question.item))
        elif question.category in IN_SUITE:
            asked.append(question)
    write(out / "calls.jsonl", [question.row for question in asked if question.answer])
    write(out / "calls_answers.jsonl", [question.answer for question in asked if question.answer])
    write(out / "irrelevance.jsonl", [question.row for question in asked if not question.answer])
    write(out / "train" / "calls.jsonl", trained)


def read_questions(bfcl: Path) -> Iterator[Question]:
    """Yield the questions that can be scored and are short enough."""
    scorer = ToolCallsScorer()
    for category in TRAINED:
        name = f"BFCL_v4_{category}.json"
        answers = "none" if category == "irrelevance" else f"possible_answer/{name}"
        by_id = {} if answers == "none" else {row["id"]: row for row in read(bfcl / answers)}
        items = read_items(ItemSource(name, answers=answers), bfcl).items
        for row, item in zip(read(bfcl / name), items, strict=True):
            if scorer.check_item(item) is None and len(json.dumps(row)) <= MOST_LETTERS:
                names = frozenset(tool["function"]["name"] for tool in item.tools)
                yield Question(category, row, by_id.get(row["id"]), item, names)


def joined(sets: Iterable[Collection[str]]) -> Mapping[str, str]:
    """Return the group of each name, called by its first name: those that stand in one set are in one."""
    groups: dict[str, set[str]] = {}
    for names in sets:
        group = set(names).union(*(groups.get(name, ()) for name in names))
        groups |= dict.fromkeys(group, group)
    return {name: min(group) for name, group in groups.items()}


def dialogue(item: Item) -> Row:
    """Return a training dialogue in OpenAI's form."""
    calls = [
        {"id": f"call{i}", "type": "function", "function": needed(call, accepted[call.name])}
        for i, (call, accepted) in enumerate(
            zip(ToolCallsScorer().wanted_calls(item), item.answer, strict=True)
        )
    ]
    reply: Row = {"content": None, "tool_calls": calls} if calls else {"content": NO_CALL}
    asked = [message.as_dict() for message in item.conversation]
    return {"messages": [*asked, {"role": "assistant", **reply}], "tools": list(item.tools)}


def needed(call: ToolCall, accepted: Mapping[str, Sequence[Any]]) -> Row:
    """Return a call without the arguments that may be left out."""
    arguments = {name: value for name, value in call.arguments.items() if "" not in accepted[name]}
    return {"name": call.name, "arguments": json.dumps(arguments, ensure_ascii=False)}


# ---------------------------------------------------------------- arithmetic
def prepare_arithmetic(gsm8k: Path, out: Path) -> None:
    """Write worked solutions to train on, and other problems."""
    rows = read(gsm8k)
    is_trained = [share(row["question"]) < SHARE_TRAINED for row in rows]
    write(out / "train" / "arithmetic.jsonl", [solved(row) for row in compress(rows, is_trained)])
    asked = [problem(row) for row in compress(rows, map(not_, is_trained))]
    write(out / "arithmetic.jsonl", [row for row in asked if 0 < len(row["results"]) <= MOST_RESULTS])


def solved(row: Row) -> Row:
    """Return a training dialogue: a problem and its worked solution."""
    question = {"role": "user", "content": row["question"]}
    return {"messages": [question, {"role": "assistant", "content": row["answer"]}]}


def problem(row: Row) -> Row:
    """Return a problem with a pattern for each number that its solution calculates and it does not state.

    For the scorer `choice` it has the right number among three that stand in the problem or its solution
    or, where these are too few, near the right one.
    """
    stated = numbers_in(row["question"])
    results = [number for text in RESULT.findall(row["answer"]) for number in numbers_in(text)]
    right = numbers_in(row["answer"].rpartition("####")[2])[0]
    others = dict.fromkeys([*stated, *results, 2 * right, right + 1, right + 10, 3 * right])
    choices = [f"{number:f}" for number in [right, *(each for each in others if each != right)][:4]]
    random.Random(row["question"]).shuffle(choices)
    found = [pattern(number) for number in dict.fromkeys(results) if number not in stated]
    return {**row, "results": found, "numbers": choices, "right": f"{right:f}"}


def pattern(number: Decimal) -> str:
    """Return a pattern of a number's size, with or without commas between thousands."""
    whole, _, fraction = f"{abs(number):f}".partition(".")
    digits = f"{int(whole):,}".replace(",", ",?")
    decimals = rf"\.{fraction.rstrip('0')}0*" if fraction.strip("0") else r"(?:\.0+)?"
    return rf"(?<![\d.,]){digits}{decimals}(?!\d|[.,]\d)"


# ---------------------------------------------------------------- grammar, and files
def prepare_grammar(blimp: Path, out: Path) -> None:
    """Write the first minimal pairs of each paradigm; some pairs are twice the same sentence."""
    items = []
    for file in sorted(blimp.glob("*.jsonl")):
        pairs = [[row["sentence_good"], row["sentence_bad"]] for row in read(file)]
        different = [pair for pair in pairs if pair[0] != pair[1]]
        items += [{"prompt": GRAMMAR_PROMPT, "choices": pair, "answer": 0} for pair in different[:N_PAIRS]]
    write(out / "grammar.jsonl", items)


def share(text: str) -> float:
    """Return a number in [0, 1) by a text; a suite's own splits are by another hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64


def read(file: Path) -> list[Row]:
    """Read JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write(file: Path, rows: Sequence[Row | None]) -> None:
    """Write JSON lines, and say how many."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{file}: {len(lines)}")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bfcl", type=Path, required=True, help="the folder of BFCL_v4_simple_python.json")
    parser.add_argument("--gsm8k", type=Path, required=True, help="the file of the test problems")
    parser.add_argument("--blimp", type=Path, required=True, help="the folder of the paradigms")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (args.out / "train").mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copy(HERE / name, args.out / name)
    prepare_calls(args.bfcl, args.out)
    prepare_arithmetic(args.gsm8k, args.out)
    prepare_grammar(args.blimp, args.out)


if __name__ == "__main__":
    main()
