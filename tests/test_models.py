"""Model references, and the demo's real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimizer.errors import MergetuneError
from optimizer.models import DEMO_MODEL, check_reference, find_model


def test_a_directory_is_taken_relative_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    assert find_model("models/a", tmp_path) == (tmp_path / "models" / "a").resolve()


@pytest.mark.parametrize("reference", ["absent", "./absent", "a/b/c", "two words/x"])
def test_what_can_be_no_model_is_refused_without_a_download(tmp_path: Path, reference: str) -> None:
    with pytest.raises(MergetuneError, match="there is no such model directory"):
        check_reference(reference, tmp_path)


def test_a_hub_id_that_cannot_be_fetched_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MergetuneError, match=r"owner/name@main.*cannot be fetched"):
        find_model("owner/name@main", tmp_path)


def test_the_demo_model_is_real_and_knows_the_capital_of_france(tmp_path: Path) -> None:
    folder = find_model(DEMO_MODEL, tmp_path)
    assert find_model(DEMO_MODEL, tmp_path) == folder  # the second time from the cache
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    reply = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :])
