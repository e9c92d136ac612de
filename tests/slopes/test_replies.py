"""Replies of conversations: tokens, losses and slopes against a dozen plain lines with transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional

from helpers import CHATML, HERMES, build_llama, build_tokenizer, fine_tune
from mergetune.engines.completions import Scoring
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.slopes.gradients import slopes
from mergetune.slopes.losses import item_losses, mean_losses
from mergetune.slopes.references import References, find_references
from mergetune.space.recipe import MergeRecipe

ZONE = {"zone": {"type": "string"}, "seconds": {"type": "boolean"}}
TOOL = {"name": "get_time", "parameters": {"type": "object", "properties": ZONE}}
TOOLS = [{"type": "function", "function": TOOL}]
ASKED = [{"role": "user", "content": "What time is it?"}]


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_time", "arguments": arguments}}


def says(content: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    """A message of the model as chat templates take it."""
    message = {"role": "assistant", "content": content}
    return {**message, "tool_calls": list(calls)} if calls else message


TALK = [
    *ASKED,
    says("", call(zone="UTC")),
    {"role": "tool", "content": '{"time": "12:30"}', "name": "get_time"},
    says("It is half past twelve, my lord."),
    {"role": "user", "content": "And in Oslo?"},
]
UTC = says("", call(zone="UTC"))
# Rows, with the reply that a model should learn from each; None: there is none.
CALLS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    (
        {"messages": ASKED, "answer": [{"get_time": {"zone": ["UTC", "GMT"], "seconds": [True, ""]}}]},
        says("", call(zone="UTC", seconds=True)),
    ),
    ({"messages": ASKED, "answer": [{"name": "get_time", "arguments": {"zone": "UTC"}}]}, UTC),
    ({"messages": [*TALK, says("Let me see.", call(zone="Oslo"))]}, says("Let me see.", call(zone="Oslo"))),
    (
        {"messages": [*TALK, says("", call(zone="Oslo"), call(zone="Bergen"))]},
        says("", call(zone="Oslo"), call(zone="Bergen")),
    ),
    ({"messages": [*ASKED, says("I can't say.")], "answer": []}, says("I can't say.")),
    ({"messages": ASKED, "answer": []}, None),
    ({"messages": ASKED, "answer": {"call": "any"}}, None),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Models in float64, whose tokenizer has marks of calls and thoughts."""
    folder = tmp_path_factory.mktemp("models")
    start = build_llama(folder / "start")
    base = fine_tune(start, folder / "base", seed=0, std=0.05, dtype=torch.float64)
    experts = {name: fine_tune(base, folder / name, seed, 0.02) for seed, name in enumerate("ab", 1)}
    for each in (base, *experts.values()):
        build_tokenizer(("<tool_call>", "</tool_call>", "<think>", "</think>")).save_pretrained(each)
    return open_inputs(base, experts)


@pytest.fixture
def engine(inputs: Inputs) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(EngineConfig(device="cpu"), inputs.base.folder, inputs.merger)
    engine.lm.tokenizer.chat_template = HERMES
    yield engine
    engine.close()


def evaluator(
    folder: Path, rows: Sequence[Mapping[str, Any]], task: Mapping[str, Any], **suite: Any
) -> Evaluator:
    (folder / "items.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    score = {"tasks": [{"items": "items.jsonl", "max_new_tokens": 128, **task}]}
    data = {"description": "x", "chat_template": True, "holdout": 0, "objectives": {"o": score}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(data | suite))
    return Evaluator(read_suite(folder / "suite.yaml"))


def plain_text(tokenizer: Any, asked: Sequence[Any], reply: Mapping[str, Any], **given: Any) -> Scoring:
    """A conversation up to the end of its last turn, by transformers alone."""
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **given)
    whole = tokenizer.apply_chat_template([*asked, reply], tokenize=False, **given)
    assert whole.startswith(prompt)
    whole = whole[: whole.rindex("<|im_end|>") + len("<|im_end|>")]
    return Scoring(tokenizer(whole)["input_ids"], len(tokenizer(prompt)["input_ids"]))


def plain_loss(model: Any, text: Scoring) -> float:
    tokens = torch.tensor([text.tokens])
    with torch.no_grad():
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
    own = logprobs[torch.arange(len(text.tokens) - 1), tokens[0, 1:]][text.start - 1 :]
    return float(-own.mean())


def by_row(ready: Evaluator, references: References) -> list[Any]:
    """The reference of each row; None: it has none."""
    (bound,) = ready.tasks.values()
    found = {each.item: each for each in references.items}
    return [found.get(item) for item in bound.item_ids]


def losses(engine: TransformersEngine, references: References) -> list[float]:
    with torch.no_grad():
        return [float(each) for each in item_losses(engine.model, references.items)]


def with_tools(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "tools": TOOLS} for row in rows]


def asked_of(row: Mapping[str, Any]) -> list[Any]:
    messages: list[Any] = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def test_a_call_is_learned_as_the_models_own_template_writes_it(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    rows = with_tools([row for row, _ in CALLS])
    ready = evaluator(tmp_path, rows, {"scorer": "tool_calls"})
    found = find_references(ready, engine.lm)
    assert not found.remarks
    tokenizer = engine.lm.tokenizer
    expected = [
        None if reply is None else plain_text(tokenizer, asked_of(row), reply, tools=TOOLS)
        for row, reply in CALLS
    ]
    own = by_row(ready, found)
    assert [each and (list(each.texts[0].tokens), each.texts[0].start) for each in own] == [
        each and (list(each.tokens), each.start) for each in expected
    ]
    assert '<tool_call>{"name": "get_time", "arguments": {"zone": "UTC"}}</tool_call><|im_end|>' in (
        tokenizer.decode(own[1].texts[0].tokens)
    )
    plain = [plain_loss(engine.model, each) for each in expected if each]
    assert losses(engine, References(tuple(each for each in own if each))) == pytest.approx(plain, rel=1e-5)


def test_slopes_of_conversations_agree_with_differences_of_the_plain_loss(
    tmp_path: Path, inputs: Inputs, engine: TransformersEngine
) -> None:
    chosen = [CALLS[0], CALLS[2], CALLS[4]]
    ready = evaluator(tmp_path, with_tools([row for row, _ in chosen]), {"scorer": "tool_calls"})
    texts = [
        plain_text(engine.lm.tokenizer, asked_of(row), reply, tools=TOOLS) for row, reply in chosen if reply
    ]

    def recipe(a: float) -> MergeRecipe:
        lambdas = {"lambda": {"a": a, "b": 0.4}}
        return MergeRecipe.of_one_group("task_arithmetic", inputs.base_source, inputs.expert_sources, lambdas)

    def loss_at(a: float) -> float:
        engine.load(recipe(a))
        return sum(plain_loss(engine.model, each) for each in texts) / len(texts)

    found = slopes(engine, inputs.merger, recipe(0.6), find_references(ready, engine.lm))
    own = found.table[found.table["expert"] == "a"]["slope"].sum()
    step = 0.05
    near, far = (loss_at(0.6 + k * step) - loss_at(0.6 - k * step) for k in (1, 2))
    assert own == pytest.approx((8 * near - far) / (12 * step), rel=1e-3)
    assert abs(own) > 1e-3


def test_each_turn_that_is_scored_is_a_text_and_an_item_counts_once(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    last = says("Half past one, my lord.")
    rows = with_tools([{"messages": [*TALK, last]}, {"messages": [*ASKED, says("Noon.")]}])
    ready = evaluator(tmp_path, rows, {"scorer": "tool_calls", "score_turns": "all"})
    found = find_references(ready, engine.lm)
    first, second = by_row(ready, found)
    places = [1, 3, 5]
    talk = [*TALK, last]
    expected = [plain_text(engine.lm.tokenizer, talk[:i], talk[i], tools=TOOLS) for i in places]
    assert [list(each.tokens) for each in first.texts] == [list(each.tokens) for each in expected]
    assert len(second.texts) == 1
    means = [
        sum(plain_loss(engine.model, text) for text in each.texts) / len(each.texts)
        for each in (first, second)
    ]
    assert losses(engine, References((first, second))) == pytest.approx(means, rel=1e-5)
    assert mean_losses(engine.model, found)["o"] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_a_reply_that_is_drawn_several_times_is_one_text(tmp_path: Path, engine: TransformersEngine) -> None:
    rows = [{"messages": [*ASKED, says("Noon.")]}] * 2
    once = find_references(evaluator(tmp_path, rows, {"scorer": "exact"}), engine.lm)
    sampling = {"temperature": 1.0, "repeats": 3}
    ready = evaluator(tmp_path, rows, {"scorer": "exact", "sampling": sampling})
    assert find_references(ready, engine.lm) == once
    assert [len(each.texts) for each in once.items] == [1, 1]


def test_the_reply_in_the_data_comes_before_a_bare_answer_unless_it_scores_less(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    rows = [
        {"messages": [*ASKED, says("It is noon, my lord.")], "answer": "noon"},
        {"messages": [*ASKED, says("Who asks?")], "answer": "midnight"},
    ]
    ready = evaluator(tmp_path, rows, {"scorer": "contains"})
    texts = [each.texts[0] for each in by_row(ready, find_references(ready, engine.lm))]
    said = [engine.lm.tokenizer.decode(text.tokens[text.start :]) for text in texts]
    assert said == ["It is noon, my lord.<|im_end|>", "midnight<|im_end|>"]


def test_preferences_are_learned_by_the_margin_of_the_likelihoods_that_are_scored(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    pairs = [("My lord, it is noon.", "Noon."), ("Noon, my lord.", "Dunno. Look it up.")]
    rows = [{"prompt": TALK, "chosen": [says(a)], "rejected": [says(b)]} for a, b in pairs]
    ready = evaluator(tmp_path, rows, {"scorer": "choice"})
    found = by_row(ready, find_references(ready, engine.lm))
    (asked,) = ready.requests(engine.lm, ready.documents("search")).values()
    prompt = engine.lm.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    for number, (reference, pair) in enumerate(zip(found, pairs, strict=True)):
        instances = asked[number]
        assert [each.args for each in instances] == [(prompt, reply) for reply in pair]
        own = [engine.lm.tokenizer.decode(text.tokens) for text in reference.texts]
        assert own == [prompt + reply for reply in pair]  # the text alone, in both: no end of the turn
        scored = [total for total, _ in engine.lm.loglikelihood(instances)]
        plain = [-plain_loss(engine.model, t) * (len(t.tokens) - t.start) for t in reference.texts]
        assert scored == pytest.approx(plain, rel=1e-5)
        expected = functional.softplus(torch.tensor(plain[1] - plain[0]))
        assert losses(engine, References((reference,))) == pytest.approx([float(expected)], rel=1e-4)


REPLY = "{{ message['content'] }}<|im_end|>\n"
# Templates, with what of them follows the prompt, and whether they write otherwise than after it.
TEMPLATES = {
    # as Qwen3 after its last question: the marks of thoughts, and none in them
    "empty thoughts": (
        "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + REPLY,
        "<think>\n\n</think>\n\nNoon.<|im_end|>",
    ),
    "white space": ("{{ message['content'] | trim }}\n<|im_end|>\n", "Noon.\n<|im_end|>"),
    "no end": ("{{ message['content'] }}\n", "Noon.<|im_end|>"),
    "another end": ("{{ message['content'] }}<|endoftext|>\n", "Noon.<|endoftext|>"),
    # as Phi's: the first token that ends every reply is the end
    "two ends": ("{{ message['content'] }}<|im_end|>\n<|endoftext|>", "Noon.<|im_end|>"),
    # as Cohere's
    "special tokens": ("<|endoftext|>{{ message['content'] }}<|im_end|>\n", "<|endoftext|>Noon.<|im_end|>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_adds_to_a_reply_is_learned(
    tmp_path: Path, engine: TransformersEngine, name: str
) -> None:
    reply, expected = TEMPLATES[name]
    engine.lm.tokenizer.chat_template = CHATML.replace(REPLY, reply)
    engine.lm.end_tokens = ()  # beside the tokenizer's own
    ready = evaluator(tmp_path, [{"messages": [*ASKED, says("Noon.")]}] * 2, {"scorer": "exact"})
    found = find_references(ready, engine.lm)
    (text,) = found.items[0].texts
    assert engine.lm.tokenizer.decode(text.tokens[text.start :]) == expected
    assert not found.remarks


def test_where_a_template_writes_a_reply_otherwise_than_after_the_prompt_its_text_is_learned(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    """As DeepSeek's: the prompt begins a thought, and replies are written without."""
    engine.lm.tokenizer.chat_template = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")
    ready = evaluator(tmp_path, [{"messages": [*ASKED, says("Noon.")]}] * 2, {"scorer": "exact"})
    found = find_references(ready, engine.lm)
    (text,) = found.items[0].texts
    assert engine.lm.tokenizer.decode(text.tokens[text.start :]) == "\n</think>\n\nNoon.<|im_end|>"
    assert found.remarks["o:items.jsonl"].startswith("`o:items.jsonl`: 2 of 2 replies follow the prompt as")


LLAMA = HERMES.replace(
    "<tool_call>{{ call.function | tojson }}</tool_call>",
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}',
)
MISTRAL = HERMES.replace(
    "<tool_call>{{ call.function | tojson }}</tool_call>",
    "{% if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    "[TOOL_CALLS]{{ call.function.name }}{{ call.function.arguments | tojson }}",
)


@pytest.mark.parametrize(
    ("template", "form", "expected"),
    [
        (LLAMA, "auto", '{"name": "get_time", "parameters": {"zone": "UTC"}}'),
        (LLAMA, "llama_json", '{"name": "get_time", "parameters": {"zone": "UTC"}}'),
        (LLAMA, "hermes", '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'),
        (MISTRAL, "auto", '[TOOL_CALLS]get_time{"zone": "UTC"}'),
    ],
)
def test_calls_are_in_the_templates_form_if_the_server_reads_it(
    tmp_path: Path, engine: TransformersEngine, template: str, form: str, expected: str
) -> None:
    engine.lm.tokenizer.chat_template = template
    scorer = {"kind": "tool_calls", "format": form}
    ready = evaluator(tmp_path, with_tools([CALLS[1][0]] * 2), {"scorer": scorer})
    found = find_references(ready, engine.lm)
    (text,) = found.items[0].texts
    assert engine.lm.tokenizer.decode(text.tokens[text.start :]) == f"{expected}<|im_end|>"
    assert bool(found.remarks) == (form == "hermes")


def test_a_call_that_is_not_wanted_is_to_become_less_likely(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    ready = evaluator(tmp_path, with_tools([CALLS[1][0]] * 2), {"scorer": "tool_calls"})
    path = tmp_path / "suite.yaml"
    data = yaml.safe_load(path.read_text())
    data["objectives"]["o"]["direction"] = "minimize"
    path.write_text(yaml.safe_dump(data))
    wanted, unwanted = (
        find_references(each, engine.lm).items[0] for each in (ready, Evaluator(read_suite(path)))
    )
    assert wanted.texts == unwanted.texts
    assert (wanted.is_unwanted, unwanted.is_unwanted) == (False, True)
