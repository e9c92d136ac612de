"""Train the two LoRA experts of the TaskMaster example on a CPU.

`python train_experts.py --base DIR --out DIR` writes `tools` and `persona` under the output
directory, in peft's format. Both adapters start from the same base and touch every linear layer. The tool
caller is trained longer and with twice the rank, so that its task vector is the larger one, as happens
between teams. A quarter of every batch are ordinary dialogues that the base answered itself.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HERE = Path(__file__).resolve().parent
EVALS = HERE.parents[1] / "evals" / "taskmaster"
BASE_NAME = "smollm2-demo"
BATCH_SIZE = 8
N_ORDINARY = 2  # of the examples of a batch, so many are ordinary dialogues
ORDINARY_TOKENS = 32  # length of the base's answers to ordinary prompts
PAD_TO = 32  # few distinct lengths: the first bf16 pass at a new shape takes seconds on a CPU
IGNORED = -100  # label of the tokens that carry no loss

Example = tuple[list[int], list[int]]  # token ids of the whole dialogue; the same, IGNORED where no loss is
Message = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Say how one expert is trained."""

    skill: str  # name of the training file and of the adapter's directory
    rank: int
    steps: int
    peak_rate: float


PLANS = (
    Plan("tools", rank=8, steps=120, peak_rate=1.4e-3),
    Plan("persona", rank=4, steps=80, peak_rate=6e-4),
)


def read_items(path: Path) -> list[dict[str, Any]]:
    """Read a file of items."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def example(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None) -> Example:
    """Tokenize a conversation as the suite asks for it; the replies carry loss, each with what ends it."""
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = written_as(tokenizer, messages[:place], tools, begin_reply=True)
        reply = written_as(tokenizer, messages[: place + 1], tools).removeprefix(asked).removesuffix("\n")
        for text, carries_loss in ((asked.removeprefix(written), False), (reply, True)):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if carries_loss else [IGNORED] * len(tokens)
        written = asked + reply
    return ids, labels


def written_as(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None,
    *,
    begin_reply: bool = False,
) -> str:
    """Write a conversation by the chat template."""
    return str(
        tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=begin_reply
        )
    )


def skill_examples(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Load the training dialogues of one skill, with the tools that the suite has for it."""
    tools = read_items(EVALS / "tool_calls.jsonl")[0]["tools"] if plan.skill == "tools" else None
    items = read_items(HERE / "train" / f"{plan.skill}.jsonl")
    return [example(tokenizer, item["messages"], tools) for item in items]


def ordinary_examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Let the base answer ordinary prompts, greedily and briefly.

    An expert that learns these answers stays itself outside its skill.
    """
    texts = []
    for item in read_items(HERE / "train" / "ordinary.jsonl"):
        system = [{"role": "system", "content": item["system"]}] if item["system"] else []
        asked = [*system, {"role": "user", "content": item["prompt"]}]
        texts.append(written_as(tokenizer, asked, None, begin_reply=True))
    inputs = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    outputs = model.generate(**inputs, max_new_tokens=ORDINARY_TOKENS, do_sample=False)  # type: ignore[operator]
    answers = outputs[:, inputs["input_ids"].shape[1] :]  # (n_items, ORDINARY_TOKENS)
    examples = []
    for text, answer in zip(texts, answers.tolist(), strict=True):
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id in answer:  # what follows the end is padding
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        examples.append((prompt_ids + answer, [IGNORED] * len(prompt_ids) + answer))
    return examples


def shuffled_forever(examples: list[Example], rng: random.Random) -> Iterator[Example]:
    """Yield the examples in random order, again and again."""
    while True:
        yield from rng.sample(examples, len(examples))


def batches(skill: list[Example], ordinary: list[Example], steps: int, seed: int) -> Iterator[list[Example]]:
    """Yield `steps` batches of both kinds of dialogues."""
    rng = random.Random(seed)
    new, old = shuffled_forever(skill, rng), shuffled_forever(ordinary, rng)
    for _ in range(steps):
        batch = [next(new) for _ in range(BATCH_SIZE - N_ORDINARY)]
        yield batch + [next(old) for _ in range(N_ORDINARY)]


def collate(batch: list[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad a batch on the right."""
    longest = max(len(ids) for ids, _ in batch)
    width = -(-longest // PAD_TO) * PAD_TO
    ids = torch.full((len(batch), width), pad_id)  # (batch, width)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, wanted) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.tensor(wanted)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learning_rate(step: int, plan: Plan) -> float:
    """Warm up over a tenth of the steps, then fall linearly to a tenth of the peak."""
    warmup = max(1, plan.steps // 10)
    if step < warmup:
        return plan.peak_rate * (step + 1) / warmup
    return plan.peak_rate * (1 - 0.9 * (step - warmup) / (plan.steps - warmup))


def train(base: Path, plan: Plan, seed: int) -> PeftModel:
    """Train one adapter with AdamW on the replies of its skill."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (EVALS / "chat_template.jinja").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    skill, ordinary = skill_examples(plan, tokenizer), ordinary_examples(model, tokenizer)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    expert = get_peft_model(model, config)
    expert.train()
    weights = [p for p in expert.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    started = time.perf_counter()
    for step, batch in enumerate(batches(skill, ordinary, plan.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        loss = expert(**collate(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == plan.steps - 1:
            seconds = time.perf_counter() - started
            print(f"{plan.skill} step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    return expert


def save(expert: PeftModel, folder: Path) -> None:
    """Write the adapter's two files, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(expert)
    tensors = {name: weight.to(torch.bfloat16).contiguous() for name, weight in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = cast(LoraConfig, expert.peft_config["default"])
    config.base_model_name_or_path = BASE_NAME
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules or [])  # a set: its order differs by run
    config.save_pretrained(str(folder))


def main() -> None:
    """Train and save both experts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--out", type=Path, default=HERE / "experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for plan in PLANS:
        save(train(args.base, plan, args.seed), args.out / plan.skill)


if __name__ == "__main__":
    main()
