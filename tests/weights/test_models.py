"""Model references, and the demo's real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import COMMIT, cache_model
from mergetune.errors import MergetuneError
from mergetune.files.library import cache_folder
from mergetune.weights.models import (
    DEMO_MODEL,
    check_reference,
    find_model,
    model_name,
    reference_to,
    short_name,
)


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


def test_a_name_that_the_hub_forbids_is_refused(hub_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match="cannot be fetched"):
        find_model("owner/na--me", tmp_path)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_hub_id_leads_to_the_cache_and_back_to_its_commit(
    hub_cache: Path, tmp_path: Path, tiny_base: Path, revision: str
) -> None:
    snapshot = cache_model(hub_cache, "acme/tiny-base", tiny_base)
    folder = find_model(f"acme/tiny-base{revision}", tmp_path)
    assert folder == snapshot
    assert reference_to(folder) == f"acme/tiny-base@{COMMIT}"
    assert find_model(reference_to(folder), tmp_path) == folder
    assert find_model(str(folder), tmp_path) == folder


def test_a_cache_behind_a_link_is_the_same_cache(
    hub_cache: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache_model(hub_cache, "acme/tiny-base", tiny_base)
    (tmp_path / "link").symlink_to(hub_cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "link"))
    assert reference_to(find_model(str(snapshot), tmp_path)) == f"acme/tiny-base@{COMMIT}"
    assert reference_to(find_model("acme/tiny-base", tmp_path)) == f"acme/tiny-base@{COMMIT}"


@pytest.mark.parametrize(
    "place",
    [
        "hub/models--gpt2/snapshots/0123",  # not `owner/name`
        "hub/models--acme--base/snapshots/0123/checkpoint-10",
        "hub/datasets--acme--base/snapshots/0123",
        "other/models--acme--base/snapshots/0123",  # `find_model` does not look there
        "models/base",
    ],
)
def test_any_other_directory_is_named_by_its_path(hub_cache: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(parents=True)
    assert reference_to(find_model(place, tmp_path)) == str((tmp_path / place).resolve())


def test_the_demo_model_is_named_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache_folder() / DEMO_MODEL).mkdir(parents=True)
    assert reference_to(find_model(DEMO_MODEL, tmp_path)) == DEMO_MODEL


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (f"acme/tiny-base@{COMMIT}", "acme/tiny-base"),
        ("acme/tiny-base", "acme/tiny-base"),
        ("/models/tiny-base", "tiny-base"),
        (DEMO_MODEL, DEMO_MODEL),
    ],
)
def test_a_short_name_is_a_hub_id_or_the_last_part(reference: str, name: str) -> None:
    assert short_name(reference) == name


def test_a_hub_id_goes_before_what_the_config_says(hub_cache: Path, tmp_path: Path, tiny_base: Path) -> None:
    config = {"_name_or_path": "/home/trainer/step-100"}
    assert model_name(cache_model(hub_cache, "acme/tiny-base", tiny_base), config) == "acme/tiny-base"
    assert model_name(tmp_path / "copy", config) == "step-100"
    assert model_name(tmp_path / "copy", {}) == "copy"


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
