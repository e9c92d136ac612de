"""A merge as an adapter, served by vLLM beside another adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import build_llama, merge_at, train_adapter
from mergetune.merging.inputs import open_inputs
from mergetune.space.recipe import MergeRecipe
from mergetune.study.export import write_merged_adapter
from mergetune.weights.adapter_writer import served_rank

vllm = pytest.importorskip("vllm")

PROMPT = list(range(3, 19))


def logprobs(base: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return those of each next token, by transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    return found


@pytest.mark.parametrize("rank", [None, 4], ids=["exact", "of a rank"])
def test_vllm_serves_it_beside_others(
    tmp_path: Path, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    base = build_llama(tmp_path / "base", head_dim=32)  # vLLM's attention takes heads of 32 on a CPU
    modules = {"a": ["q_proj", "v_proj", "down_proj"], "b": ["q_proj", "up_proj"]}
    experts = {
        name: train_adapter(base, tmp_path / name, seed, r=3 + 4 * seed, lora_alpha=128, target_modules=own)
        for seed, (name, own) in enumerate(modules.items())
    }
    inputs = open_inputs(base, experts)
    lambdas = {"a": 0.7, "b": -0.4}
    sources = inputs.base_source, inputs.expert_sources
    recipe = MergeRecipe.of_one_group("task_arithmetic", *sources, {"lambda": lambdas})
    found = write_merged_adapter(tmp_path / "merge", recipe, inputs, rank)
    whole = open_inputs(base, {"merge": tmp_path / "merge"})
    wanted = {
        "a": logprobs(base, merge_at(inputs, a=1.0, b=0.0)),
        "merge": logprobs(base, merge_at(whole, merge=1.0)),
        "base": logprobs(base, {}),
    }
    if rank is None:
        full = logprobs(base, merge_at(inputs, **lambdas))
        torch.testing.assert_close(wanted["merge"], full, rtol=1e-4, atol=1e-4)
    llm = vllm.LLM(
        str(base),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=max(served_rank(found.rank) or 0, 8),
        max_loras=2,
        max_logprobs=-1,
        max_model_len=64,
        enforce_eager=True,
    )
    request = vllm.lora.request.LoRARequest
    both = [request("a", 1, str(experts["a"])), request("merge", 2, str(tmp_path / "merge"))]
    how = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    prompts = [{"prompt_token_ids": PROMPT}] * 2
    replies = llm.generate(prompts, how, lora_request=both, use_tqdm=False)
    replies += llm.generate(prompts[:1], how, use_tqdm=False)  # beside others vLLM on a CPU errs on the base
    llm.llm_engine.engine_core.shutdown()
    for (name, expected), reply in zip(wanted.items(), replies, strict=True):
        (served,) = reply.outputs[0].logprobs
        ours = torch.tensor([served[token].logprob for token in range(len(expected))])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3, msg=name)
    assert float((wanted["merge"] - wanted["a"]).abs().max()) > 0.1
    assert float((wanted["merge"] - wanted["base"]).abs().max()) > 0.1
