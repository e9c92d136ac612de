"""Train a LoRA expert of SmolLM2-135M-Instruct on a CPU, from the files that `prepare.py` wrote.

    python benchmarks/public_data/train.py calls --out OUT         # writes OUT/experts/calls
    python benchmarks/public_data/train.py arithmetic --out OUT

Tokens of prompts and replies come from mergetune itself, as it would evaluate the suite `train.yaml`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from mergetune.engines.completions import CompletionsLM, Scoring
from mergetune.engines.model_text import ModelText
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.slopes.references import find_references
from mergetune.weights.chat_template import choose_template
from mergetune.weights.models import DEMO_MODEL, find_model

RANK = 8
PEAK_RATE = 1e-3
BATCH_SIZE = 8
N_STEPS = 64  # at most, so that an expert takes a quarter of an hour on two cores
IGNORED = -100  # label of the tokens that carry no loss


def dialogues(suite_file: Path, skill: str, base: Path) -> list[Scoring]:
    """Return the dialogues of a skill as tokens, those of the reply scored."""
    evaluator = Evaluator(read_suite(suite_file))
    config = evaluator.suite.config
    text = ModelText.read(base, None, choose_template(base, config.chat_template))
    no_model = cast(Any, None)  # nothing is completed
    lm = CompletionsLM(no_model, text.tokenizer, text.max_length, end_tokens=text.end_tokens)
    every = evaluator.documents("search")
    documents = {name: own for name, own in every.items() if evaluator.tasks[name].score_name == skill}
    found = [text for each in find_references(evaluator, lm, documents).items for text in each.texts]
    n_tokens = sum(len(text.tokens) for text in found)
    n_items = sum(map(len, documents.values()))
    print(f"{skill}: {len(found)} of {n_items} dialogues, {n_tokens} tokens", flush=True)
    return found


def batches(texts: Sequence[Scoring], rng: random.Random) -> list[list[Scoring]]:
    """Return batches of texts of like lengths, in random order; no text stands in two."""
    some = rng.sample(texts, min(len(texts), N_STEPS * BATCH_SIZE))
    some.sort(key=lambda text: len(text.tokens))
    found = [some[i : i + BATCH_SIZE] for i in range(0, len(some), BATCH_SIZE)]
    return rng.sample(found, len(found))


def collate(batch: Sequence[Scoring]) -> tuple[Tensor, Tensor]:
    """Return tokens, padded on the right, and the one that follows each, where a reply has it."""
    width = max(len(text.tokens) for text in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # (batch, width)
    following = torch.full_like(ids, IGNORED)
    for row, text in enumerate(batch):
        ids[row, : len(text.tokens)] = torch.tensor(text.tokens)
        following[row, text.start - 1 : len(text.tokens) - 1] = torch.tensor(text.tokens[text.start :])
    return ids, following


def loss_of(model: Any, ids: Tensor, following: Tensor) -> Tensor:
    """Return the mean loss of the replies' tokens, for which alone the head is computed.

    Padding on the right needs no mask: no token sees what comes after it.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (batch, width, hidden)
    is_reply = following != IGNORED
    return cross_entropy(model.lm_head(hidden[is_reply]).float(), following[is_reply])


@dataclass(frozen=True)
class Schedule:
    """A rate that rises over a tenth of the steps, then falls linearly to a tenth of its peak."""

    n_steps: int

    def rate(self, step: int) -> float:
        """Return the rate of a step, from 1."""
        warm_up = max(1, self.n_steps // 10)
        return PEAK_RATE * min(step / warm_up, 1 - 0.9 * (step - warm_up) / (self.n_steps - warm_up))


def train(base: Path, every: Sequence[Sequence[Scoring]], seed: int, most_steps: int | None) -> PeftModel:
    """Train an adapter of every linear layer with AdamW."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    expert = get_peft_model(model, config)
    weights = [weight for weight in expert.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    schedule, started = Schedule(len(every)), time.perf_counter()
    for step, batch in enumerate(every[:most_steps], start=1):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        loss: Any = loss_of(expert.get_base_model(), *collate(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step in (1, len(every), most_steps):
            seconds = time.perf_counter() - started
            print(f"step {step} of {len(every)}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    return expert


def main() -> None:
    """Train one expert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("skill", choices=("calls", "arithmetic"))
    parser.add_argument("--out", type=Path, required=True, help="the folder that `prepare.py` wrote")
    parser.add_argument("--base", default=DEMO_MODEL, help="a directory, a hub id or smollm2-demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="end after so many, to try it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = find_model(args.base, Path())
    texts = dialogues(args.out / "train.yaml", args.skill, base)
    every = batches(texts, random.Random(args.seed))
    expert = train(base, every, args.seed, args.steps)
    cast(LoraConfig, expert.peft_config["default"]).base_model_name_or_path = args.base
    expert.save_pretrained(str(args.out / "experts" / args.skill))


if __name__ == "__main__":
    main()
