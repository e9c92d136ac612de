"""How fast the transformers engine replies, against `generate` of transformers on the same batches.

    python benchmarks/decoding.py      # --rounds N, --dtype float32

SmolLM2-135M replies to the search split of the demo's suite, both ways by turns, in batches of up to 100. The
engine computes the beginning that prompts share once, and generates together what begins otherwise, too; it
keeps room in its cache, reads keys and values once for all heads that share them, and goes on with fewer
rows when half of them have ended.
`same` is the share of replies that are equal: in bfloat16 a sum in another order may tip the choice between
two tokens that are nearly as likely, in float32 hardly ever.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteriaList,
    StopStringCriteria,
)

from mergetune.engines.completions import Generation
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.files.library import shared_folder
from mergetune.weights.chat_template import choose_template
from mergetune.weights.models import demo_model

_BATCH_SIZE = 100


@torch.no_grad()
def plain(model: Any, tokenizer: Any, requests: Sequence[Generation]) -> list[str]:
    """Reply by `generate` alone, the longest prompts first."""
    order = sorted(range(len(requests)), key=lambda number: -len(requests[number].tokens))
    replies: dict[int, str] = {}
    for start in range(0, len(order), _BATCH_SIZE):
        numbers = order[start : start + _BATCH_SIZE]
        batch = [requests[number] for number in numbers]
        length = max(len(each.tokens) for each in batch)
        first = batch[0]
        stop = StopStringCriteria(tokenizer, list(first.stop))
        kind: Any = GenerationConfig  # it has no types
        tokens = model.generate(
            input_ids=torch.tensor([[0] * (length - len(each.tokens)) + [*each.tokens] for each in batch]),
            attention_mask=torch.tensor(
                [[0] * (length - len(each.tokens)) + [1] * len(each.tokens) for each in batch]
            ),
            generation_config=kind(
                do_sample=False,
                max_new_tokens=first.max_new_tokens,
                eos_token_id=list(first.stop_tokens),
                pad_token_id=0,
            ),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        texts = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
        replies |= zip(numbers, texts, strict=True)
    return [replies[number] for number in range(len(requests))]


def asked_of(engine: TransformersEngine, evaluator: Evaluator) -> list[list[Generation]]:
    """Return the requests for replies that a suite makes of an engine, those of each call together."""
    asked: list[list[Generation]] = []
    completer = engine.completer
    reply = completer.generate

    def record(requests: Sequence[Generation]) -> list[str]:
        asked.append(list(requests))
        return [""] * len(requests)

    completer.generate = record  # type: ignore[method-assign]
    try:
        evaluator.measure(engine.lm, "search")
    finally:
        completer.generate = reply  # type: ignore[method-assign]
    return asked


def main() -> None:
    """Time both ways by turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    suite = read_suite(shared_folder("evals") / "taskmaster.yaml")
    base = demo_model()
    chat = choose_template(base, suite.config.chat_template)
    config = EngineConfig(kind="transformers", dtype=arguments.dtype, batch_size=_BATCH_SIZE)
    engine = TransformersEngine(config, base, chat=chat)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=engine.model.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    table = Table("replies", "prompt tokens", "generate s", "engine s", "ratio", "same")
    for requests in asked_of(engine, Evaluator(suite)):
        seconds: dict[str, list[float]] = {"generate": [], "engine": []}
        replies = {}
        for _ in range(arguments.rounds):
            for name, reply in (
                ("generate", lambda own: plain(model, tokenizer, own)),
                ("engine", engine.completer.generate),
            ):
                start = time.perf_counter()
                replies[name] = reply(requests)
                seconds[name].append(time.perf_counter() - start)
        slow, fast = (statistics.median(seconds[name]) for name in ("generate", "engine"))
        same = sum(map(str.__eq__, *replies.values())) / len(requests)
        n_tokens = sum(len(each.tokens) for each in requests)
        table.add_row(
            str(len(requests)),
            str(n_tokens),
            f"{slow:.1f}",
            f"{fast:.1f}",
            f"{slow / fast:.1f}",
            f"{same:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
