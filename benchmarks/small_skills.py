"""Small Llamas with one skill each, trained from scratch on a CPU: a base, experts and their suite.

    OMP_NUM_THREADS=1 TQDM_DISABLE=1 python benchmarks/small_skills.py FOLDER [--seed 0] [--experts uneven]

Each skill answers a string of letters: `reverse` turns it round, `sort` puts it in order, `shift` moves each
letter on by its place, and `swap` changes places in pairs. The base learns a mixture of them on strings of
many lengths, until it answers a part of the longest right; each expert goes on with its own skill on the
longest alone, all weights free, and forgets much of the others. Everything follows from the seed, and what
FOLDER has already is kept.

The `uneven` experts are two, one trained much longer than the other: their task vectors' norms are as 1 to 4,
and every plain average loses the first skill.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from letters import LETTERS, LONGEST, SHORTEST, SKILLS, Example, distinct, example

N_SEARCH, N_HOLDOUT = 62, 218  # items of each skill in the suite's splits, or nearly so
N_LAYERS = 8

N_TIMES = {"reverse": 2, "shift": 2}  # in the base's mixture, else once: sorting is learnt first
BASE_SCORE = 0.3  # mean over the skills at which the base's training ends
BASE_STEPS, BASE_RATE = 1000, 2e-3  # at most so many
BATCH_SIZE = 80
WARM_UP = 50  # steps
CHECK_EVERY, N_CHECKED = 10, 100  # steps; examples of each skill that tell how far the base is

IGNORED = -100  # label of what carries no loss


class Training(NamedTuple):
    """How an expert is trained: steps, and the highest learning rate."""

    n_steps: int
    rate: float


THREE = ("reverse", "sort", "shift")
EXPERTS = {
    "even": dict.fromkeys(THREE, Training(80, 5e-4)),
    "four": dict.fromkeys(SKILLS, Training(80, 5e-4)),
    "uneven": {"shift": Training(80, 5e-4), "reverse": Training(500, 1e-3)},
}
PAD, END = "<pad>", "<end>"
TOKENS = (PAD, END, *SKILLS, *LETTERS, " ", ":")


def write_models(folder: Path, seed: int, experts: str = "even", n_search: int = N_SEARCH) -> None:
    """Write `base`, an expert for each skill by the skill's name, and `suite.yaml` with its items.

    Args:
        folder: where to.
        seed: all follows from it.
        experts: which of `EXPERTS`.
        n_search: items of each skill in the search split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items = {skill: distinct(skill, n_search + N_HOLDOUT, f"{seed} items") for skill in SKILLS}
    write_suite(folder, {skill: items[skill] for skill in EXPERTS[experts]}, n_search)
    kept_out = {prompt for examples in items.values() for prompt, _ in examples}
    if not (folder / "base").is_dir():
        learned = SKILLS if experts == "four" else THREE
        save(_train_base(list(learned), kept_out, seed), folder / "base")
    for skill, training in EXPERTS[experts].items():
        if not (folder / skill).is_dir():
            save(_train_expert(folder / "base", skill, training, kept_out, seed), folder / skill)


def _train_base(skills: Sequence[str], kept_out: Collection[str], seed: int) -> Any:
    """Train a new model on a mixture of skills until it is as good as it shall be."""
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM  # `from_config` has no types
    model = auto.from_config(small_config())
    checked = {skill: distinct(skill, N_CHECKED, f"{seed} checked") for skill in skills}
    mixture = [skill for skill in skills for _ in range(N_TIMES.get(skill, 1))]
    stream = _stream(mixture, SHORTEST, kept_out, f"{seed} base")
    for step in _train(model, stream, BASE_STEPS, BASE_RATE):
        if step % CHECK_EVERY == 0:
            right = [exact_matches(model, examples) for examples in checked.values()]
            if sum(right) / len(right) >= BASE_SCORE:
                break
    return model


def _train_expert(base: Path, skill: str, training: Training, kept_out: Collection[str], seed: int) -> Any:
    """Train the base further on one skill."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    stream = _stream([skill], LONGEST, kept_out, f"{seed} {skill}")
    for _ in _train(model, stream, *training):
        pass
    return model


def _train(model: Any, stream: Iterator[Example], n_steps: int, rate: float) -> Iterator[int]:
    """Train with AdamW, the rate falling to zero; yields after each step how many were taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, n_steps + 1):
        optimizer.param_groups[0]["lr"] = rate * min(step / WARM_UP, 1.0) * (1 - (step - 1) / n_steps)
        tokens, labels = tensors(list(itertools.islice(stream, BATCH_SIZE)))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step


def exact_matches(model: Any, examples: Sequence[Example]) -> float:
    """Return the share of answers whose every token is the likeliest after the right ones before it."""
    tokens, labels = tensors(examples)
    with torch.no_grad():
        guesses = model(input_ids=tokens).logits[:, :-1].argmax(dim=-1)
    wanted = labels[:, 1:]
    return float(((guesses == wanted) | (wanted == IGNORED)).all(dim=1).float().mean())


def _stream(mixture: Sequence[str], shortest: int, kept_out: Collection[str], seed: str) -> Iterator[Example]:
    """Yield examples of these skills in turn, without end and without those kept out."""
    rng = random.Random(seed)
    for skill in itertools.cycle(mixture):
        one = example(skill, rng.randint(shortest, LONGEST), rng)
        if one[0] not in kept_out:
            yield one


def tensors(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, (n_examples, length); prompts and padding carry no loss."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    tokens, labels = [], []
    for prompt, answer in examples:
        skill, letters = prompt.split(" ")  # lm-eval, too, puts a space before the answer
        asked = [ids[each] for each in (skill, " ", *letters)]
        told = [ids[each] for each in (" ", *answer, END)]
        tokens.append(torch.tensor(asked + told))
        labels.append(torch.tensor([IGNORED] * len(asked) + told))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(tokens, batch_first=True, padding_value=ids[PAD]),
        pad(labels, batch_first=True, padding_value=IGNORED),
    )


def small_config() -> LlamaConfig:
    """Return the shape of the models."""
    return LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=TOKENS.index(END),
        pad_token_id=TOKENS.index(PAD),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each skill's name and for every other character."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*SKILLS, "."])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=64
    )
    return wrapped


def save(model: Any, folder: Path) -> None:
    """Save a model and its tokenizer under a temporary name, then rename it."""
    temporary = folder.with_name(f".{folder.name}")
    model.save_pretrained(temporary)
    _tokenizer().save_pretrained(temporary)
    temporary.rename(folder)


def write_suite(folder: Path, items: Mapping[str, Sequence[Example]], n_search: int) -> None:
    """Write `suite.yaml` and the items of each skill, of which `n_search` and all others are a split each."""
    for skill, examples in items.items():
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in examples]
        (folder / f"{skill}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tasks = {skill: {"items": f"{skill}.jsonl", "scorer": "exact", "max_new_tokens": 9} for skill in items}
    suite = {
        "description": "Skills on strings of letters.",
        "chat_template": False,
        "holdout": round(N_HOLDOUT / (n_search + N_HOLDOUT), 2),
        "objectives": {skill: {"tasks": [task]} for skill, task in tasks.items()},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")


def main() -> None:
    """Train the models of one seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", choices=EXPERTS, default="even")
    arguments = parser.parse_args()
    start = time.process_time()
    write_models(arguments.folder, arguments.seed, arguments.experts)
    print(f"{time.process_time() - start:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
