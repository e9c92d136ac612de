"""References: the evaluation's own prompts, what should follow, and where it comes from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from helpers import build_tokenizer
from mergetune.engines.completions import Choosing, CompletionsLM, Generation, Scored, Scoring
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.slopes.losses import item_losses
from mergetune.slopes.references import References, find_references

ITEMS: dict[str, list[dict[str, Any]]] = {
    "exact": [{"prompt": f"Say the word number {i}.", "answer": "yes" if i % 4 else "no"} for i in range(12)],
    "json": [{"prompt": f"Add {i} and 1.", "answer": {"sum": [i + 1, True]}} for i in range(12)],
    "contains": [{"prompt": f"Name {i} birds.", "answer": ["owl", "wren"][: 1 + i % 2]} for i in range(12)],
    "regex": [{"prompt": f"Cheer me up {i} times.", "patterns": ["!", r"\?"]} for i in range(12)],
    "choice": [{"prompt": f"Is {i} even?", "choices": ["Yes", "No way"], "answer": i % 2} for i in range(12)],
    "shots": [{"prompt": f"Example {i}", "answer": f"shown {i}"} for i in range(5)],
}
SHOTS = {"num_fewshot": 2, "fewshot_items": "shots.jsonl"}
OWN_TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "Question: {{prompt}}\nAnswer:"}
OWN_TASKS: dict[str, dict[str, Any]] = {
    "own_sums": {  # the answer stands at the end of a reply
        "output_type": "generate_until",
        "doc_to_target": "It is so. #### {{answer}}",
        "generation_kwargs": {"until": ["Question:"]},
        "filter_list": [
            {
                "name": "strict",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (\\w+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "process_results": "!function own.equal",
        "metric_list": [{"metric": "equal", "aggregation": "mean", "higher_is_better": True}],
    },
    "own_unknown": {  # its target is no reply, as that of IFEval
        "output_type": "generate_until",
        "doc_to_target": 0,
        "process_results": "!function own.equal",
        "metric_list": [{"metric": "equal", "aggregation": "mean", "higher_is_better": True}],
    },
    "own_wrong": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "perhaps",
        "metric_list": [{"metric": "acc"}],
    },
    "own_words": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "own_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "own_errors": {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["Question:"]},
        "process_results": "!function own.errors",
        "metric_list": [{"metric": "errors", "aggregation": "mean", "higher_is_better": False}],
    },
}
OWN_TASKS |= {
    "own_words_perplexity": {**OWN_TASKS["own_words"], "metric_list": [{"metric": "perplexity"}]},
    "own_text_bits": {**OWN_TASKS["own_text"], "metric_list": [{"metric": "bits_per_byte"}]},
    "own_choice_brier": {**OWN_TASKS["own_choice"], "metric_list": [{"metric": "brier_score"}]},
    "own_difference": {  # such as CrowS-Pairs' likelihood_diff: how far a model tells two sentences apart
        **OWN_TASKS["own_choice"],
        "process_results": "!function own.difference",
        "metric_list": [{"metric": "difference", "aggregation": "mean", "higher_is_better": False}],
    },
}
OWN_CODE = """
def equal(doc, results):
    return {"equal": float(results[0].strip() == doc["answer"])}

def errors(doc, results):
    return {"errors": float(results[0].strip() != doc["answer"])}

def difference(doc, results):
    (first, _), (second, _) = results
    return {"difference": abs(first - second)}
"""


class RecordingCompleter:
    """Answers every request the same and writes down the tokens of each prompt."""

    def __init__(self) -> None:
        self.prompts: set[tuple[int, ...]] = set()

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        self.prompts |= {tuple(request.tokens) for request in requests}
        return ["yes"] * len(requests)

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        self.prompts |= {tuple(request.tokens[: request.start]) for request in requests}
        return [Scored([-1.0] * (len(each.tokens) - each.start), [False]) for each in requests]

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        self.prompts |= {tuple(request.tokens) for request in requests}
        return [Scored([-1.0] * len(each.candidates), [False]) for each in requests]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    for name, items in ITEMS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    (folder / "own.py").write_text(OWN_CODE)
    for name, task in OWN_TASKS.items():
        files = {"data_files": {"test": str(folder / "exact.jsonl")}}
        text = yaml.safe_dump({"task": name, **OWN_TASK, "dataset_kwargs": files, **task})
        (folder / f"{name}.yaml").write_text(re.sub(r"'(!function own\.\w+)'", r"\1", text))
    return folder


def evaluator(folder: Path, *, chat: bool = True, holdout: float = 0.0, **tasks: Any) -> Evaluator:
    """A suite of one score for each name: a task, a list of them, or the whole score."""
    suite = {
        "description": "test",
        "chat_template": chat,
        "holdout": holdout,
        "include_path": ".",
        "objectives": {
            name: own if "tasks" in own else {"tasks": own if isinstance(own, list) else [own]}
            for name, own in tasks.items()
        },
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return Evaluator(read_suite(path))


def task(scorer: str, **settings: Any) -> dict[str, Any]:
    return {"items": f"{scorer}.jsonl", "scorer": scorer, **settings}


def model(completer: Any = None) -> CompletionsLM:
    return CompletionsLM(completer or RecordingCompleter(), build_tokenizer(), max_length=400)


def decoded(references: References) -> list[str]:
    """The text of each reference after its prompt, special tokens shown."""
    tokenizer = build_tokenizer()
    return [
        str(tokenizer.decode(list(text.tokens[text.start :])))
        for each in references.items
        for text in each.texts
    ]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_prompts_are_those_of_the_evaluation_and_holdout_items_are_left_out(folder: Path, chat: bool) -> None:
    ready = evaluator(
        folder,
        chat=chat,
        holdout=0.5,
        words=task("exact", system="Be brief.", **SHOTS),
        sums=task("json"),
        parity=task("choice"),
        own={"lm_eval": "own_words", "num_fewshot": 1},
    )
    completer = RecordingCompleter()
    ready.measure(model(completer), "search")
    found = find_references(ready, model(completer))
    prompts = {tuple(text.tokens[: text.start]) for each in found.items for text in each.texts}
    assert prompts == completer.prompts
    assert len(found.items) == ready.count("search")
    assert not found.missing


def test_an_answer_is_written_as_in_examples_and_ends_the_reply(folder: Path) -> None:
    chat = find_references(evaluator(folder, words=task("exact"), sums=task("json")), model())
    assert {"yes<|im_end|>", "no<|im_end|>", '{"sum": [3, true]}<|im_end|>'} <= set(decoded(chat))
    stopped = evaluator(folder, chat=False, words=task("exact", stop=["\n"]))
    assert set(decoded(find_references(stopped, model()))) == {" yes\n", " no\n"}
    shots = evaluator(folder, chat=False, words=task("exact", **SHOTS))
    assert set(decoded(find_references(shots, model()))) == {" yes\n\n", " no\n\n"}
    unending = evaluator(folder, chat=False, words=task("exact", max_new_tokens=1))
    assert {len(r.texts[0].tokens) - r.texts[0].start for r in find_references(unending, model()).items} == {
        1
    }


def test_a_list_of_words_to_contain_is_no_reply(folder: Path) -> None:
    found = find_references(evaluator(folder, birds=task("contains")), model())
    assert not found.items
    assert found.missing == {
        "birds:contains.jsonl": "`birds:contains.jsonl` has no references: "
        "no answer of its items, and no reply given, has a high score."
    }


def test_each_task_without_references_says_why(folder: Path) -> None:
    """Though another task of its score has some: the score's loss is then that of the others."""
    mixed = [task("exact"), {"lm_eval": "own_wrong"}]
    bias = {"direction": "minimize", "tasks": [task("exact"), {"lm_eval": "own_difference"}]}
    found = find_references(evaluator(folder, chat=False, mixed=mixed, bias=bias), model())
    assert set(found.by_score) == {"mixed", "bias"}
    assert found.missing == {
        "own_wrong": "`own_wrong` has no references: no item names one of its choices, and not all of them, "
        "as the right one.",
        "own_difference": "`own_difference` has no references: its metric does not tell whether it gets "
        "better as the right text becomes likelier.",
    }


@pytest.mark.parametrize("higher_is_better", [True, False], ids=["maximize", "minimize"])
@pytest.mark.parametrize(
    ("name", "rises"),
    [
        ("own_words", True),
        ("own_words_perplexity", False),
        ("own_text", False),
        ("own_text_bits", False),
        ("own_choice", True),
        ("own_choice_brier", False),
        ("own_errors", False),
        ("own_sums", True),
    ],
)
def test_direction_and_metric_say_together_what_is_to_become_likelier(
    folder: Path, name: str, rises: bool, higher_is_better: bool
) -> None:
    """An accuracy maximized and a perplexity minimized want more of the text; the reverses want less."""
    direction = "maximize" if higher_is_better else "minimize"
    score = {"direction": direction, "against_task": True, "tasks": [{"lm_eval": name}]}
    found = find_references(evaluator(folder, chat=False, score=score), model())
    assert len(found.items) == 12
    for each in found.items:
        if name.startswith("own_choice"):
            right = 1 - int(each.item in yes_items(folder, name))
            assert each.wanted == (right if rises == higher_is_better else 1 - right,)
        assert each.is_unwanted == (rises != higher_is_better and len(each.texts) == 1)


def yes_items(folder: Path, name: str) -> set[str]:
    """The items whose answer is yes."""
    items = evaluator(folder, chat=False, score={"lm_eval": name}).items()
    return set(items.loc[items["target"] == "yes", "item"])


def test_a_reply_is_to_become_less_likely_where_what_it_has_is_not_wanted(folder: Path) -> None:
    """A score of what replies have: the reply that has most shows it, whichever the direction."""
    found = {}
    for direction in ("maximize", "minimize"):
        ready = evaluator(folder, cheer={"direction": direction, "tasks": [task("regex")]})
        said = replies(ready, "cheer:regex.jsonl", [(1.0, "Well done! More?"), (0.5, "Hm?"), (0.0, "")])
        found[direction] = find_references(ready, model(), replies=[said])
    assert decoded(found["minimize"]) == decoded(found["maximize"]) == ["Well done! More?<|im_end|>"] * 4
    assert all(each.is_unwanted for each in found["minimize"].items)
    assert not any(each.is_unwanted for each in found["maximize"].items)


@pytest.mark.parametrize("name", ["exact", "own_words", "choice"])
def test_the_order_in_which_documents_are_asked_for_changes_nothing(folder: Path, name: str) -> None:
    """lm-eval runs them in ascending order, whatever the order asked for."""
    own = {"lm_eval": name} if name.startswith("own") else task(name)
    ready = evaluator(folder, chat=False, score=own)
    (key,) = ready.tasks
    found, other = (find_references(ready, model(), {key: order}) for order in ([2, 5, 9], [9, 2, 5, 2]))
    assert other == found
    prompts = ready.items().set_index("item")["prompt"]
    texts = [each.texts[0] for each in other.items]
    asked = [str(build_tokenizer().decode(list(text.tokens[: text.start]))) for text in texts]
    assert all(prompts[each.item] in prompt for each, prompt in zip(other.items, asked, strict=True))


def replies(evaluator: Evaluator, task: str, said: Sequence[tuple[float, str]]) -> pd.DataFrame:
    """A measurement with these scores and replies, in turn."""
    rows = evaluator.items()
    rows = rows[rows["task"] == task].assign(number=range(len(rows)))
    turns = [said[number % len(said)] for number in rows["number"]]
    return rows[["score_name", "task", "item"]].assign(
        score=[score for score, _ in turns], response=[reply for _, reply in turns]
    )


def test_items_without_an_answer_take_the_best_reply_if_it_is_good(folder: Path) -> None:
    ready = evaluator(folder, cheer=task("regex"))
    name = "cheer:regex.jsonl"
    assert find_references(ready, model()).missing
    good = replies(ready, name, [(1.0, "Well done! More?"), (0.5, "Hm?"), (1.0, "Yes! Now?"), (0.0, "")])
    other = replies(ready, name, [(1.0, "Oh! Oh?"), (0.5, "Oh"), (0.5, "No!"), (0.8, "Go! Go?")])
    found = find_references(ready, model(), replies=[good, other])
    said = {"Oh! Oh?<|im_end|>", "Yes! Now?<|im_end|>", "Go! Go?<|im_end|>"}
    assert set(decoded(found)) == said, "ties go to the model that is better on the whole"
    assert len(found.items) == 9
    assert not found.missing


def test_a_reply_that_a_judge_gave_no_verdict_on_is_none_to_learn(folder: Path) -> None:
    ready = evaluator(folder, cheer=task("regex"))
    first = replies(ready, "cheer:regex.jsonl", [(math.nan, "Well?"), (1.0, "Yes! Now?")])
    second = replies(ready, "cheer:regex.jsonl", [(0.8, "Go! Go?"), (math.nan, "Hm?")])
    found = find_references(ready, model(), replies=[first, second])
    assert set(decoded(found)) == {"Yes! Now?<|im_end|>", "Go! Go?<|im_end|>"}
    assert len(found.items) == 12


def test_a_reply_that_scores_no_better_than_the_answer_comes_first(folder: Path) -> None:
    """It is what a model says of itself; the answer helps where all fail."""
    ready = evaluator(folder, sums=task("json"))
    compact = replies(ready, "sums:json.jsonl", [(1.0, '{"sum":[1,true]}'), (0.0, "sum")])
    texts = decoded(find_references(ready, model(), replies=[compact]))
    assert texts.count('{"sum":[1,true]}<|im_end|>') == 6
    assert sum(text.startswith('{"sum": [') for text in texts) == 6


def test_answers_of_lm_eval_tasks_count_if_they_score(folder: Path) -> None:
    ready = evaluator(folder, chat=False, sums={"lm_eval": "own_sums"}, unknown={"lm_eval": "own_unknown"})
    found = find_references(ready, model())
    assert set(decoded(found)) == {" It is so. #### yesQuestion:", " It is so. #### noQuestion:"}
    assert list(found.missing) == ["own_unknown"]


def test_texts_to_be_scored_are_references(folder: Path) -> None:
    ready = evaluator(folder, chat=False, words={"lm_eval": "own_words"}, text={"lm_eval": "own_text"})
    found = find_references(ready, model()).by_score
    assert set(decoded(References(tuple(found["words"])))) == {" yes", " no"}
    (first, *_) = decoded(References(tuple(found["text"])))
    assert first.startswith("Say the word number")


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(EngineConfig(device="cpu", dtype="float32"), tiny_base)
    yield engine
    engine.close()


@pytest.mark.parametrize("per_character", [False, True])
def test_a_choice_is_lost_where_its_loss_says_so(
    folder: Path, engine: TransformersEngine, per_character: bool
) -> None:
    scorer = {"kind": "choice", "per_character": per_character}
    ready = evaluator(folder, parity={"items": "choice.jsonl", "scorer": scorer})
    found = find_references(ready, engine.lm)
    measured = ready.measure(engine.lm, "search").items.set_index("item")["score"]
    with torch.no_grad():
        losses = item_losses(engine.model, found.items)
    for reference, loss in zip(found.items, losses.tolist(), strict=True):
        # of two choices the right one has more than half the likelihood exactly where it wins
        assert (loss < torch.tensor(2.0).log()) == (measured[reference.item] == 1)
    assert [r.scales for r in found.items] == [(1.5, 0.75) if per_character else (1, 1)] * 12


def test_losses_are_those_of_lm_eval(folder: Path, engine: TransformersEngine) -> None:
    """lm-eval's own log-likelihood of the reply, per token."""
    ready = evaluator(folder, chat=False, words={"lm_eval": "own_words"})
    found = find_references(ready, engine.lm)
    asked = ready.requests(engine.lm, ready.documents("search"))["own_words"]
    instances = [instance for own in asked.values() for instance in own]
    expected = [logprob for logprob, _ in engine.lm.loglikelihood(instances)]
    with torch.no_grad():
        losses = item_losses(engine.model, found.items)
    lengths = [len(r.texts[0].tokens) - r.texts[0].start for r in found.items]
    own = [-loss * length for loss, length in zip(losses.tolist(), lengths, strict=True)]
    assert own == pytest.approx(expected, rel=1e-4)


def test_samples_and_batches_are_spread_over_tasks(folder: Path) -> None:
    ready = evaluator(folder, mixed=[task("exact"), task("json")], parity=task("choice"))
    found = find_references(ready, model())
    sample = found.sample(8)
    assert sample == find_references(ready, model()).sample(8)
    assert [each.task for each in sample.by_score["mixed"]].count("mixed:json.jsonl") == 4
    batches = found.cut(4)
    for batch in batches:
        assert [each.task for each in batch.by_score["mixed"]].count("mixed:json.jsonl") == 2
        assert len(batch.by_score["parity"]) == 4
    taken = {(each.task, each.item) for batch in batches for each in batch.items}
    assert taken == {(each.task, each.item) for each in found.items}
    assert found.only("mixed").joined(found.only("parity")).by_score == found.by_score


def test_references_ask_as_the_evaluation_does(folder: Path) -> None:
    """A system message is written where the suite wants it, in references as in what models are asked."""
    words = {**task("exact"), "system": "Be brief."}
    ready = evaluator(folder, words=words)
    config = ready.suite.config.model_copy(update={"system": "merge_into_user"})
    ready.suite = replace(ready.suite, config=config)
    lm, name = model(), next(iter(ready.tasks))
    asked = ready.requests(lm, ready.documents("search"))[name]
    for reference in find_references(ready, lm).items:
        (text,) = reference.texts
        prompt = asked[ready.tasks[name].item_ids.index(reference.item)][0].args[0]
        assert "user\nBe brief.\n\n" in prompt
        assert lm.tokenizer.decode(text.tokens).startswith(prompt)
