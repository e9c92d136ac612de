"""Batches that share a beginning, and replies that end one by one: the same as each prompt alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from helpers import build_tokenizer
from mergetune.engines.completions import Choosing, Generation, Scoring
from mergetune.engines.key_value_cache import cache_of_beginning
from mergetune.engines.transformers_completer import TransformersCompleter

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "grouped heads": (LlamaConfig, GROUPED),
    "a head for each": (LlamaConfig, GROUPED | {"num_key_value_heads": 4}),
    "a window": (
        Gemma3TextConfig,
        GROUPED | {"head_dim": 8, "sliding_window": 16, "tie_word_embeddings": False},
    ),
    "learned positions": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "positions by the mask": (OPTConfig, SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "slopes over distance": (FalconConfig, SIZES | {"alibi": True, "new_decoder_architecture": False}),
    "states": (MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "states and heads": (
        BambaConfig,
        GROUPED | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    ),
}
N_NEW = 20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module", params=list(FAMILIES.values()), ids=list(FAMILIES))
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A model whose replies are not all alike."""
    kind, settings = request.param
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    made = auto.from_config(kind(vocab_size=len(tokenizer), **settings)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.4)
    return made


def texts(n_vocabulary: int) -> list[tuple[int, ...]]:
    """Return texts of many lengths: of 12 the first 40 tokens are alike, of 4 others 24; 3 stand alone."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return draw.choices(range(5, n_vocabulary), k=count)

    beginnings = [tokens(40)] * 12 + [tokens(24)] * 4 + [[]] * 3
    return [tuple([*beginning, *tokens(draw.randint(2, 30))]) for beginning in beginnings]


@torch.no_grad()
def alone(model: Any, tokens: tuple[int, ...], stop_tokens: tuple[int, ...]) -> list[int]:
    """Decode greedily without a cache, a token at a time."""
    found = list(tokens)
    for _ in range(N_NEW):
        found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
        if found[-1] in stop_tokens:
            return found[len(tokens) : -1]
    return found[len(tokens) :]


def test_replies_are_those_of_each_prompt_alone(model: Any, tokenizer: Any) -> None:
    prompts = texts(len(tokenizer))
    whole = [alone(model, prompt, ()) for prompt in prompts]
    stop_tokens = tuple({reply[place] for reply, place in zip(whole[::4], (3, 7, 11), strict=False)})
    wanted = [alone(model, prompt, stop_tokens) for prompt in prompts]
    assert len({len(reply) for reply in wanted}) > 2  # they end one by one
    completer = TransformersCompleter(model, tokenizer, batch_size=16)
    asked = [Generation(prompt, N_NEW, stop_tokens=stop_tokens) for prompt in prompts]
    assert completer.generate(asked) == [
        tokenizer.decode(reply, skip_special_tokens=True) for reply in wanted
    ]


@torch.no_grad()
def test_scores_are_those_of_each_text_alone(model: Any, tokenizer: Any) -> None:
    own = texts(len(tokenizer))
    logprobs = [model(torch.tensor([text])).logits[0].log_softmax(dim=-1) for text in own]
    completer = TransformersCompleter(model, tokenizer, batch_size=16)
    for n_last in (1, 10):
        scored = completer.score([Scoring(text, max(len(text) - n_last, 1)) for text in own])
        for text, logprob, found in zip(own, logprobs, scored, strict=True):
            start = max(len(text) - n_last, 1)
            wanted = [float(logprob[place - 1, text[place]]) for place in range(start, len(text))]
            assert found.logprobs == pytest.approx(wanted, abs=1e-4)
    candidates = (7, 70, 170)
    chosen = completer.choose([Choosing(text, candidates) for text in own])
    for logprob, found in zip(logprobs, chosen, strict=True):
        assert found.logprobs == pytest.approx(logprob[-1, list(candidates)].tolist(), abs=1e-4)


def test_a_beginning_is_shared_where_each_token_has_a_key_of_its_own(model: Any, tokenizer: Any) -> None:
    cache, n_shared = cache_of_beginning(model, texts(len(tokenizer))[:12], most=100)
    if isinstance(model.config, (Gemma3TextConfig, MambaConfig, BambaConfig)):
        assert (cache, n_shared) == (None, 0)
    else:
        assert cache is not None
        layer: Any = cache.layers[0]
        assert (n_shared, cache.get_seq_length(), len(layer.keys)) == (40, 40, 12)
