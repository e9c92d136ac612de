"""Leakage: what was trained on, stands twice or is public is named; like sentences are no leak."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from datasets import Dataset, DatasetDict

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.leakage import benchmark_warnings, find_leaks, leakage_warnings, read_training_texts
from mergetune.evaluation.suite import read_suite
from mergetune.files.library import shared_folder
from mergetune.files.yaml_io import validate
from mergetune.results.config import StudyConfig, read_study
from mergetune.study.plan import Plan

QUESTION = (
    "Janet's ducks lay 16 eggs per day; she eats three for breakfast. How many are left on Monday evening?"
)
SHORT = "Who painted Guernica?"
EXAMPLE = shared_folder("examples") / "taskmaster"


def frame(*rows: tuple[str, str], score: str = "skill", split: str = "search") -> pd.DataFrame:
    """Return items of one task with these prompts and targets."""
    return pd.DataFrame(
        [
            {
                "score_name": score,
                "task": score,
                "item": f"id-{number}",
                "split": split,
                "system": "",
                "earlier": "[]",
                "prompt": prompt,
                "target": target,
            }
            for number, (prompt, target) in enumerate(rows)
        ]
    )


def trained(items: pd.DataFrame, *texts: str) -> list[str]:
    """Return the ids of the items that stand in the texts."""
    return [item.item for item in find_leaks(items, {"expert": texts}).trained.get("expert", ())]


def random_words(rng: random.Random, n: int) -> list[str]:
    return ["".join(rng.choices("abcdefgh", k=5)) for _ in range(n)]


class TestTraining:
    def test_a_long_prompt_is_found_within_a_text_a_short_one_as_a_line(self) -> None:
        items = frame((QUESTION, "13"), (SHORT, "Picasso"), ("Name a colour that you like.", "red"))
        text = f"user says: {QUESTION.upper()} Think!\nwho   painted guernica\nPicasso"
        assert trained(items, text) == ["id-0", "id-1"]
        assert trained(items, f"He asked: {SHORT} Nobody knew.") == []

    def test_the_frame_of_a_task_does_not_hide_a_prompt(self) -> None:
        prompts = [f"Question: {text}\nAnswer:" for text in (QUESTION, SHORT, "Where is Bern?")]
        assert trained(frame(*((prompt, "?") for prompt in prompts)), QUESTION, SHORT) == ["id-0", "id-1"]

    def test_a_shared_instruction_or_passage_is_no_leak(self) -> None:
        rng = random.Random(0)
        passage = " ".join(random_words(rng, 200))
        prompts = [f"{passage} {' '.join(random_words(rng, 8))}" for _ in range(40)]
        texts = [f"{passage} {' '.join(random_words(rng, 8))}" for _ in range(40)]
        leaks = find_leaks(frame(*((prompt, "yes") for prompt in prompts)), {"expert": texts})
        assert leaks.warnings() == ()

    def test_items_of_one_prompt_are_told_apart_by_their_targets(self) -> None:
        sentences = [("", "Cats who sleep dream a lot."), ("", "Dogs that bark bite nobody here.")]
        assert trained(frame(*sentences), "cats who sleep dream a lot") == ["id-0"]
        same = "Which of these two sentences is the grammatical one, please?"
        asked = [(same, target) for _, target in sentences]
        assert trained(frame(*asked), f"{same}\nNeither.") == []
        assert trained(frame(*asked), f"{same}\n{asked[1][1]}") == ["id-1"]
        among_others = frame(*asked, (QUESTION, "13"))
        assert trained(among_others, f"{same}\nNeither.") == []
        assert trained(among_others, f"{same}\nThe second: {asked[1][1]}") == ["id-1"]

    def test_a_near_copy_is_found_but_not_with_other_numbers_or_many_other_words(self) -> None:
        words = random_words(random.Random(1), 30)
        prompt = " ".join([*words[:15], "17", *words[15:]])
        assert trained(frame((prompt, "")), "Well: " + prompt.replace(words[20], "other")) == ["id-0"]
        assert trained(frame((prompt, "")), prompt.replace("17", "18")) == []
        assert trained(frame((prompt, "")), prompt.replace(words[4], "x1").replace(words[20], "other")) == []

    def test_operators_between_numbers_count(self) -> None:
        items = frame(("What is 12 + 5?", "17"))
        assert trained(items, "what is 12+5") == ["id-0"]
        assert trained(items, "What is 12 * 5?", "What is 12 - 5?") == []

    def test_letters_before_choices_do_not_hide_an_item(self) -> None:
        words = random_words(random.Random(2), 40)
        choices = [" ".join(words[i : i + 5]) for i in range(20, 40, 5)]
        question = " ".join(words[:20])
        prompt = "\n".join(
            [question, *(f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True))]
        )
        assert trained(frame((prompt, "B")), "\n".join([question, *choices])) == ["id-0"]

    def test_a_turn_is_found_with_what_the_user_said_before_it(self) -> None:
        items = frame((SHORT, ""), (SHORT, ""))
        earlier = [["Hello, I like art.", "Tell me more."], ["Hello, I like food."]]
        items["earlier"] = list(map(json.dumps, earlier))
        assert trained(items, f"Hello, I like art.\nDo you?\nTell me more.\nGladly.\n{SHORT}") == ["id-0"]
        assert trained(items, SHORT, "Hello, I like food.") == []

    def test_text_without_spaces_is_compared_by_characters(self) -> None:
        prompt = "请问珍妮特的鸭子每天下几个蛋？"
        assert trained(frame((prompt, "16")), f"用户：{prompt} 助手：十六个。") == ["id-0"]

    def test_many_items_of_one_prompt_take_no_longer_than_others(self) -> None:
        rng = random.Random(4)
        asked = ["Which of these sentences is the grammatical one?", "Which of these two is right, please?"]
        targets = [" ".join(random_words(rng, 6)) for _ in range(5000)]
        items = frame(*((asked[number % 2], target) for number, target in enumerate(targets)))
        texts = [f"{asked[number % 2]}\n{target}" for number, target in enumerate(targets[:3])]
        assert trained(items, *texts, *(f"{asked[0]}\nNo." for _ in range(1000))) == ["id-0", "id-1", "id-2"]

    def test_the_warning_names_expert_share_and_items(self) -> None:
        items = frame((QUESTION, "13"), (SHORT, "Picasso"), ("Where is Bern?", "CH"))
        (warning,) = find_leaks(items, {"tools": [QUESTION], "persona": ["Hello."]}).warnings()
        assert "Items of `skill` that stand in the training data of `tools`: 1 of 3." in warning
        assert "id-0 “Janet's ducks" in warning
        assert "train without them" in warning


class TestWithinASuite:
    def test_copies_are_named_in_both_splits_or_as_repeated(self) -> None:
        items = pd.concat(
            [
                frame((QUESTION, "13"), (SHORT, "Picasso"), (SHORT.upper(), "picasso")),
                frame((QUESTION.replace(";", ","), "13"), ("Hi", "a"), split="holdout"),
            ]
        )
        leaks = find_leaks(items, {})
        ((seen, confirmed),) = leaks.across_splits
        assert (seen.split, confirmed.split) == ("search", "holdout")
        ((first, again),) = leaks.repeated
        assert (first.item, again.item) == ("id-1", "id-2")
        across, repeated = leaks.warnings()
        assert "the same or nearly: 1 of 5. They confirm nothing" in across
        assert "the same or nearly: 1 of 5. They count twice" in repeated

    def test_a_near_copy_needs_the_same_target(self) -> None:
        words = random_words(random.Random(3), 25)
        prompt, twin = " ".join(words), " ".join([*words[:20], "other", *words[21:]])
        assert len(find_leaks(frame((prompt, "yes"), (twin, "yes")), {}).repeated) == 1
        assert find_leaks(frame((prompt, "yes"), (twin, "no")), {}).repeated == ()
        assert find_leaks(frame(("", "Cats sleep here."), ("", "Cats sleep there.")), {}).repeated == ()

    def test_a_question_of_two_scores_is_named_with_both(self) -> None:
        both = pd.concat([frame((QUESTION, "13")), frame((QUESTION, "13"), (SHORT, "?"), score="guard")])
        (warning,) = find_leaks(both, {}).warnings()
        assert "Items of `guard` that repeat" in warning
        assert "of `skill` as well" in warning

    def test_the_order_of_items_decides_only_which_is_named(self) -> None:
        items = frame((QUESTION, "13"), (SHORT, "?"), (QUESTION.lower(), "13"), ("Where is Bern?", "CH"))
        assert len(find_leaks(items, {}).repeated) == len(find_leaks(items.iloc[::-1], {}).repeated) == 1


class TestReading:
    def test_all_strings_of_an_example_count_however_nested(self, tmp_path: Path) -> None:
        path = tmp_path / "chat.jsonl"
        chat = {
            "messages": [{"role": "user", "content": "Hi\u2028there"}, {"content": ["a", {"b": "c"}]}],
            "n": 1,
        }
        path.write_text(json.dumps(chat, ensure_ascii=False) + "\n\n" + json.dumps(["x"]) + "\n")
        assert read_training_texts(path) == ["user\nHi\u2028there\na\nc", "x"]

    def test_json_lists_and_lines_are_both_json(self, tmp_path: Path) -> None:
        path = tmp_path / "data.json"
        path.write_text('[{"text": "a"},\n {"text": "b"}]')
        assert read_training_texts(path) == ["a", "b"]
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
        assert read_training_texts(path) == ["a", "b"]

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        for name, content in (("data.jsonl", '{"text": "a"}\r\n'), ("data.txt", "a\r\n")):
            (tmp_path / name).write_text(content, encoding="utf-8-sig", newline="")
            assert read_training_texts(tmp_path / name) == ["a"]

    def test_plain_text_is_read_by_paragraphs_or_else_by_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "data.txt"
        path.write_text("one\ntwo\n\n \nthree\n")
        assert read_training_texts(path) == ["one\ntwo", "three"]
        path.write_text("one\ntwo\n")
        assert read_training_texts(path) == ["one", "two"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"a": "b"}\n{"a": \n', r"a\.jsonl, line 2: is not JSON"),
            ("a.json", b'[{"a": "b"},\n{"a": ]', r"a\.json, line 2: is not JSON"),
            ("a.txt", b"\xff\xfe\x00", r"a\.txt: must be text in UTF-8, but is text in UTF-16"),
        ],
    )
    def test_what_cannot_be_read_is_named(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MergetuneError, match=message):
            read_training_texts(tmp_path / name)


class TestStudy:
    def write(self, folder: Path, training_data: object) -> Path:
        study = {
            "base": "smollm2-demo",
            "experts": {name: str(EXAMPLE / "experts" / name) for name in ("tools", "persona")},
            "training_data": training_data,
            "search_space": "task_arithmetic",
            "suite": "taskmaster",
        }
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        return folder / "study.yaml"

    def test_files_are_read_relative_to_the_study(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / f"{name}.txt").write_text(f"{name}\n")
        path = self.write(tmp_path, {"tools": ["one.txt", "two.txt"], "persona": "two.txt"})
        assert Plan.read(path).training_texts() == {"tools": ["one", "two"], "persona": ["two"]}

    def test_a_key_that_is_no_expert_is_an_error_with_the_nearest_name(self, tmp_path: Path) -> None:
        with pytest.raises(MergetuneError, match=r"`training_data\.tool`: unknown key. Did you mean `tools`"):
            read_study(self.write(tmp_path, {"tool": "one.txt"}))

    def test_a_missing_file_is_an_error_before_any_work(self, tmp_path: Path) -> None:
        with pytest.raises(MergetuneError, match=r"one\.txt: there is no such file"):
            Plan.read(self.write(tmp_path, {"tools": "one.txt"}))

    def test_without_the_key_nothing_is_read(self) -> None:
        config = {"base": "b", "experts": {"a": "a"}, "search_space": "s", "suite": "s"}
        assert validate(config, StudyConfig, "study.yaml").training_data == {}

    def test_the_demo_names_its_training_files_and_has_no_leak(self) -> None:
        plan = Plan.read(EXAMPLE / "study.yaml")
        texts = plan.training_texts()
        assert min(map(len, texts.values())) > 400
        assert leakage_warnings(Evaluator(plan.suite), texts) == ()

    def test_a_demo_trained_on_its_own_items_is_found_out(self) -> None:
        plan = Plan.read(EXAMPLE / "study.yaml")
        own = read_training_texts(shared_folder("evals") / "taskmaster" / "tool_calls.jsonl")
        calls, joint = leakage_warnings(Evaluator(plan.suite), {"tools": own[:50]})
        assert "Items of `tool_calls` that stand in the training data of `tools`: 50 of 60." in calls
        assert "Items of `joint` that stand in the training data of `tools`" in joint  # the same requests


class TestBenchmarks:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder that `datasets` takes for the hub as long as it is the working directory."""
        rows = Dataset.from_list([{"prompt": f"Is {i} even?", "answer": i % 2} for i in range(20)])
        for name, splits in (("many", ("train", "test")), ("one", ("train",))):
            for split, data in DatasetDict(dict.fromkeys(splits, rows)).items():
                data.to_json(tmp_path / "lab" / name / f"{split}.jsonl")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def evaluator(self, folder: Path, kind: str = "objectives", **config: Any) -> Evaluator:
        task = {
            "task": "own_task",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": ["yes", "no"],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / "own_task.yaml").write_text(yaml.safe_dump({**task, **config}))
        (folder / "own.jsonl").write_text(
            "".join(json.dumps({"prompt": f"Say {i} twice.", "answer": f"{i} {i}"}) + "\n" for i in range(20))
        )
        tasks = {"tasks": [{"lm_eval": "own_task"}]}
        suite = {
            "description": "test",
            "chat_template": False,
            "include_path": ".",
            "objectives": {"own": {"tasks": [{"items": "own.jsonl", "scorer": "exact"}]}},
        }
        if kind == "objectives":
            suite["objectives"]["public"] = tasks  # type: ignore[index]
        else:
            suite["guards"] = {"public": {"margin": 0.1, **tasks}}
        (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
        return Evaluator(read_suite(folder / "suite.yaml"))

    def test_a_test_set_of_the_hub_is_no_objective_but_may_be_a_guard(
        self, hub: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        objective = self.evaluator(hub, dataset_path="lab/many", test_split="test")
        guard = self.evaluator(hub, "guards", dataset_path="lab/many", test_split="test")
        dev = self.evaluator(hub, dataset_path="lab/many", validation_split="train")
        only = self.evaluator(hub, dataset_path="lab/one", validation_split="train")
        assert benchmark_warnings(objective) == ()  # a folder here is no data set of the hub
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        (warning,) = benchmark_warnings(objective)
        assert "objective `public` is optimized on the test split of lab/many (`own_task`)" in warning
        assert "as a guard" in warning
        assert benchmark_warnings(guard) == ()
        assert benchmark_warnings(dev) == ()
        assert "the train split of lab/one" in benchmark_warnings(only)[0]

    def test_local_files_are_ones_own(self, hub: Path) -> None:
        files = {"data_files": {"test": str(hub / "lab" / "many" / "test.jsonl")}}
        own = self.evaluator(hub, dataset_path="json", dataset_kwargs=files, test_split="test")
        assert benchmark_warnings(own) == ()
