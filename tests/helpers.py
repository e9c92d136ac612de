"""Small real models for tests, built from seeds and saved as any model is."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from mergetune.merging.inputs import Inputs
from mergetune.merging.merger import Merger
from mergetune.space.recipe import MergeRecipe

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen's: Hermes' form of tools, calls and results.
HERMES = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}
{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>
{%- else %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of a model on the Hub
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    'Call the tool {"name": "search", "arguments": {"query": "weather in Oslo"}}.',
    "One two three four five six seven eight nine ten. Yes or no?",
)


def build_tokenizer(extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=512,
    )
    return wrapped


def build_llama(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Save a two-layer Llama with random weights, and its tokenizer, in float32."""
    tokenizer = build_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM  # `from_config` has no types
    auto.from_config(LlamaConfig(**settings | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fine_tune(base: Path, folder: Path, seed: int, std: float, dtype: torch.dtype | None = None) -> Path:
    """Save `base` with Gaussian noise of this standard deviation on every weight."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    model.to(dtype or model.dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def train_adapter(
    base: Path, folder: Path, seed: int = 0, dtype: torch.dtype | None = None, **config: Any
) -> Path:
    """Save a LoRA adapter of `base` whose trainable weights are all noise, as if trained."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    adapter: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapter.to(dtype or model.dtype).save_pretrained(folder)
    return folder


def cache_model(hub_cache: Path, name: str, model: Path, commit: str = COMMIT) -> Path:
    """Put a model directory into the Hub's cache as a download of `name` leaves it; returns the snapshot."""
    place = hub_cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for folder in (snapshot, place / "blobs", place / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    for file in model.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, place / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs", blob))
    return snapshot


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Say whether `first` is at least as good in every objective and better in one."""
    pairs = list(zip(first, second, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def merge_at(inputs: Inputs, **lambdas: float) -> dict[str, torch.Tensor]:
    """Return the base with every task vector added, scaled by its expert's lambda."""
    recipe = MergeRecipe.model_validate(
        {
            "method": "task_arithmetic",
            "base": inputs.base_source,
            "experts": inputs.expert_sources,
            "groups": [{"name": "all", "lambda": lambdas}],
        }
    )
    return dict(Merger(inputs.base, inputs.experts).merge(recipe))


def merge_with_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights of `base` with the adapter merged in by peft itself."""
    model = AutoModelForCausalLM.from_pretrained(base)
    merged: Any = PeftModel.from_pretrained(model, str(adapter))
    return dict(merged.merge_and_unload().state_dict())


def plain_loop(
    model: Any, tokenizer: Any, prompts: Sequence[str], choices: Sequence[str], max_new_tokens: int
) -> tuple[list[str], list[int]]:
    """Return greedy replies and each prompt's likeliest choice, with transformers alone."""
    replies, likeliest = [], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids.shape[1] :]
        replies.append(tokenizer.decode(out, skip_special_tokens=True))
        logprobs = []
        for choice in choices:
            whole = tokenizer(prompt + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                steps = model(whole).logits[0, :-1].float().log_softmax(-1)
            of_each = steps[torch.arange(whole.shape[1] - 1), whole[0, 1:]]
            logprobs.append(float(of_each[ids.shape[1] - 1 :].sum()))
        likeliest.append(logprobs.index(max(logprobs)))
    return replies, likeliest


@functools.cache
def _command_server() -> subprocess.Popen[str]:
    """Start what forks a process for each call of the command line; it ends with this process."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("command_server.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def mergetune(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Call the command line in a process of its own."""
    words, server = [*map(str, arguments)], _command_server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for file in files.values():
            file.touch()
        call = {"arguments": words, "folder": str(cwd or Path.cwd()), "environment": dict(os.environ)}
        print(
            json.dumps(call | {name: str(file) for name, file in files.items()}),
            file=server.stdin,
            flush=True,
        )
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files.values()))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.05)
