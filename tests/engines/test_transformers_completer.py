"""What the transformers engine replies and scores: against lm-eval's own model, and by the suite alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

from helpers import build_llama, build_tokenizer, fine_tune
from mergetune.engines.completions import CompletionsLM, Generation
from mergetune.engines.engine import EngineConfig
from mergetune.engines.model_text import ModelText
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.slopes.continuation import Closing, continued, replied

PROMPTS = ("What is the capital of France?", "One two three four", "The quick", "Call the tool", "Yes")
GREEDY = {"until": [], "max_gen_toks": 12, "do_sample": False}
# A value of each setting of generation_config.json that could alter greedy replies, or break generation.
ALTERING: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[token] for token in range(60, 160)],
    "begin_suppress_tokens": list(range(40, 300)),
    "cache_config": {"backend": "quanto"},
    "cache_implementation": "static",
    "constraints": ["x"],
    "decoder_start_token_id": 5,
    "diversity_penalty": 1.0,
    "do_sample": True,
    "dola_layers": "low",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 9.0,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "exponential_decay_length_penalty": [1, 3.0],
    "force_words_ids": [[70]],
    "forced_bos_token_id": 70,
    "forced_eos_token_id": 2,
    "guidance_scale": 3.0,
    "is_assistant": True,
    "length_penalty": 5.0,
    "low_memory": True,
    "max_cache_len": 4,
    "max_length": 3,
    "max_matching_ngram_size": 1,
    "max_new_tokens": 2,
    "max_time": 1e-9,
    "min_length": 100,
    "min_new_tokens": 100,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_assistant_tokens": 2,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 5.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[70], 100.0]],
    "speculation_type": "dflash",
    "stop_strings": ["e", "a"],
    "suppress_tokens": list(range(40, 200)),
    "target_lookbehind": 3,
    "temperature": 2.0,
    "token_healing": True,
    "top_h": 0.5,
    "top_k": 2,
    "top_p": 0.3,
    "typical_p": 0.2,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": {"bias": 20.0, "greenlist_ratio": 0.1},
}
# The model's own tokens, what says how a reply is computed and not what, and where the file is from.
HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("transformers_version", "_from_model_config"),
}


def requests(kind: str, arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def replies(lm: Any, **settings: Any) -> list[str]:
    asked = requests("generate_until", [(prompt, GREEDY | settings) for prompt in PROMPTS])
    found: list[str] = lm.generate_until(asked)
    return found


def started(folder: Path, **options: Any) -> TransformersEngine:
    return TransformersEngine(EngineConfig(kind="transformers", device="cpu", **options), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says something else to every prompt."""
    folder = tmp_path_factory.mktemp("models")
    return fine_tune(build_llama(folder / "base"), folder / "model", seed=3, std=0.3)


@pytest.fixture(scope="module")
def lm(model: Path) -> Iterator[Any]:
    engine = started(model, batch_size=2)
    yield engine.lm
    engine.close()


@pytest.fixture(scope="module")
def reference(model: Path) -> HFLM:
    """lm-eval's own, on the same weights."""
    auto: Any = AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(model)
    return HFLM(pretrained=auto.from_pretrained(model), tokenizer=tokenizer, batch_size=2)


def test_replies_are_those_of_lm_eval(lm: Any, reference: HFLM) -> None:
    whole = replies(lm)
    assert whole == replies(reference)
    assert len(set(whole)) == len(PROMPTS)
    middle = whole[0][len(whole[0]) // 2]
    stopped = replies(lm, until=[middle])
    assert stopped == replies(reference, until=[middle])
    assert stopped[0] == whole[0].split(middle)[0]


def test_log_likelihoods_are_those_of_lm_eval(lm: Any, reference: HFLM) -> None:
    pairs = [(prompt, text) for prompt in PROMPTS for text in (" yes", "a", "b", " no one else")]
    pairs += [("", "One two three")]
    pairs += [(prompt, reply) for prompt, reply in zip(PROMPTS, replies(lm), strict=True) if reply.isascii()]
    asked = requests("loglikelihood", pairs)
    ours, theirs = lm.loglikelihood(asked), reference.loglikelihood(asked, disable_tqdm=True)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    texts = requests("loglikelihood_rolling", [(prompt,) for prompt in PROMPTS])
    assert lm.loglikelihood_rolling(texts) == pytest.approx(
        reference.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4
    )


def test_sampling_obeys_its_settings_and_repeats(lm: Any) -> None:
    hot = replies(lm, do_sample=True, temperature=1.9)
    assert hot == replies(lm, do_sample=True, temperature=1.9) != replies(lm)
    assert replies(lm, do_sample=True, temperature=1.0, top_k=1) == replies(lm)
    with pytest.raises(MergetuneError, match="does not take these generation settings: warmth"):
        replies(lm, warmth=2)


def test_a_draw_depends_on_its_seed_and_not_on_the_batch(lm: Any) -> None:
    settings = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_p": 0.95}
    asked = requests(
        "generate_until", [(prompt, {**settings, "seed": n}) for n, prompt in enumerate(PROMPTS)]
    )
    together = lm.generate_until(asked)
    assert together == [reply for one in asked for reply in lm.generate_until([one])]
    other = requests("generate_until", [(PROMPTS[0], {**settings, "seed": n}) for n in range(8)])
    assert len(set(lm.generate_until(other))) > 4


def test_draws_follow_the_models_probabilities(model: Path) -> None:
    """Held against the softmax of its logits, by a chi-squared test."""
    engine = started(model, batch_size=250)
    tokens = engine.lm.tok_encode(PROMPTS[0])
    how = {"temperature": 0.7, "top_k": 6}
    drawn = engine.lm._completer.generate(
        [Generation(tokens, 1, sampling={**how, "seed": seed}) for seed in range(2000)]
    )
    with torch.no_grad():
        logits = engine.model(torch.tensor([tokens])).logits[0, -1].float()
    likeliest = logits.topk(6)
    expected = (likeliest.values.double() / 0.7).softmax(dim=0) * 2000
    texts = [engine.lm.tokenizer.decode([token]) for token in likeliest.indices.tolist()]
    assert len(set(texts)) == 6
    counts = [drawn.count(text) for text in texts]
    assert sum(counts) == 2000
    assert chisquare(counts, expected.numpy()).pvalue > 0.001
    engine.close()


def test_special_tokens_that_say_something_stay_in_replies(model: Path, tmp_path: Path) -> None:
    """As Mistral's, whose calls and thoughts begin with special tokens; those that say nothing go."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    plain = started(folder)
    (reply, *_) = replies(plain.lm)
    tokens = plain.lm.tok_encode(reply, add_special_tokens=False)
    words = [plain.lm.tokenizer.convert_ids_to_tokens(tokens[i]) for i in (1, 3)]
    plain.close()
    file = folder / "tokenizer.json"  # two tokens of the reply become special ones
    text = file.read_text()
    for word, name in zip(words, ("[TOOL_CALLS]", "<|nothing|>"), strict=True):
        text = text.replace(json.dumps(word), json.dumps(name))
    data = json.loads(text)
    vocabulary = data["model"]["vocab"]
    data["model"]["merges"] = [each for each in data["model"]["merges"] if "".join(each) in vocabulary]
    file.write_text(json.dumps(data))
    engine = started(folder)
    engine.lm.tokenizer.add_special_tokens({"extra_special_tokens": ["[TOOL_CALLS]", "<|nothing|>"]})
    lm = CompletionsLM(engine.lm._completer, engine.lm.tokenizer, engine.lm.max_length)
    (kept, *_) = replies(lm)
    assert "[TOOL_CALLS]" in kept
    assert "<|nothing|>" not in kept
    engine.close()


def test_every_setting_of_generation_is_known() -> None:
    kind: Any = GenerationConfig
    assert kind().to_dict().keys() | {"_from_model_config"} <= ALTERING.keys() | HARMLESS


def test_some_settings_would_alter_replies(model: Path, lm: Any) -> None:
    """The table is of use: given to transformers, these settings do change what the model replies."""
    engine = started(model)
    tokens: Any = AutoTokenizer.from_pretrained(model)(PROMPTS[0], return_tensors="pt")
    plain = engine.model.generate(**tokens, max_new_tokens=12, do_sample=False)
    for name in ("suppress_tokens", "bad_words_ids", "forced_eos_token_id", "num_beams"):
        other = engine.model.generate(**tokens, max_new_tokens=12, do_sample=False, **{name: ALTERING[name]})
        assert other.tolist() != plain.tolist(), name


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_replies_depend_on_no_setting_of_the_model(place: str, model: Path, lm: Any, tmp_path: Path) -> None:
    expected = replies(lm)
    altering = [*ALTERING.items(), ("an_unknown_one", 1)]
    for start in range(0, len(altering), 8):
        some = dict(altering[start : start + 8])
        folder = Path(shutil.copytree(model, tmp_path / str(start)))
        if place == "config.json":
            (folder / "generation_config.json").unlink()
        settings = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps(settings | some))
        engine = started(folder)
        assert replies(engine.lm) == expected, list(some)
        engine.close()
        shutil.rmtree(folder)


def test_each_end_that_the_model_names_ends_a_reply(model: Path, lm: Any, tmp_path: Path) -> None:
    said = lm.tokenizer.encode(replies(lm)[0])
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    settings = json.loads((folder / "generation_config.json").read_text())
    ends = [settings["eos_token_id"], said[4]]
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    found = replies(started(folder).lm)
    assert found[0] == lm.tokenizer.decode(said[: said.index(said[4])])
    assert found != replies(lm)


# Lengths


LONG = ("One two three. " * 60).rstrip()


def generation(prompt: str, max_gen_toks: int) -> Instance:
    return Instance("generate_until", {}, (prompt, GREEDY | {"max_gen_toks": max_gen_toks}), 0)


def test_a_request_that_does_not_fit_is_refused_with_its_figures(model: Path) -> None:
    lm: Any = started(model, max_length=64).lm
    n_tokens = len(lm.tok_encode(LONG))
    asked = {
        "generate_until": (generation(LONG, 12), n_tokens + 12 - 64),
        "loglikelihood": (Instance("loglikelihood", {}, (LONG, " yes"), 0), None),
    }
    for kind, (request, excess) in asked.items():
        assert lm.excess_tokens(request) == (excess or lm.excess_tokens(request)) > 0
        with pytest.raises(MergetuneError, match=rf"length of 64 tokens, but the prompt has {n_tokens}"):
            getattr(lm, kind)([request])
    rolling = Instance("loglikelihood_rolling", {}, (LONG,), 0)
    assert lm.excess_tokens(rolling) == 0
    assert lm.loglikelihood_rolling([rolling])[0] < 0


def test_what_just_fits_is_taken_and_one_token_more_is_not(model: Path) -> None:
    lm: Any = started(model, max_length=64).lm
    text = lm.tokenizer.decode(lm.tok_encode(LONG)[:52])
    assert len(lm.tok_encode(text)) == 52
    assert lm.excess_tokens(generation(text, 12)) == 0
    assert lm.excess_tokens(generation(text, 13)) == 1
    lm.generate_until([generation(text, 12)])
    with pytest.raises(MergetuneError, match="room for 51"):
        lm.generate_until([generation(text, 13)])


def test_left_cuts_the_beginning_off(model: Path) -> None:
    lm: Any = started(model, max_length=64).lm
    lm.truncate = "left"
    kept = lm.tokenizer.decode(lm.tok_encode(LONG)[-52:])
    assert lm.tok_encode(kept) == lm.tok_encode(LONG)[-52:]
    assert lm.generate_until([generation(LONG, 12)]) == lm.generate_until([generation(kept, 12)])
    before, after = lm.split(LONG, " yes")
    scored = lm.fitted(before, after)
    assert scored == [*before, *after][-63:]


@pytest.mark.parametrize("truncate", ["refuse", "left"])
def test_there_must_be_room_for_a_prompt(truncate: str, model: Path) -> None:
    lm: Any = started(model, max_length=64).lm
    lm.truncate = truncate
    for request in (generation("One", 64), generation("One", 1024)):
        with pytest.raises(MergetuneError, match=r"must be room for a prompt.*length is 64"):
            lm.generate_until([request])
    with pytest.raises(MergetuneError, match="must be room for a prompt"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("One", LONG), 0)])
    with pytest.raises(MergetuneError, match="must have a token of its own"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("One", ""), 0)])


def test_references_are_cut_as_what_is_measured(model: Path) -> None:
    lm: CompletionsLM = started(model, max_length=64).lm
    lm.truncate = "left"
    assert len(continued(lm, LONG, " yes").tokens) == 63
    shown = replied(lm, LONG, GREEDY, " yes", Closing("", [2]))
    assert shown.start == 52
    lm.truncate = "refuse"
    with pytest.raises(MergetuneError, match="must fit"):
        continued(lm, LONG, " yes")


def length_of(folder: Path, given: int | None = None, **names: Any) -> int:
    """Return the length of a model whose config and tokenizer name these."""
    build_tokenizer().save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = names.pop("tokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = {"model_type": "llama", "eos_token_id": 2} | names
    (folder / "config.json").write_text(json.dumps(config))
    return ModelText.read(folder, given).max_length


def test_the_length_is_the_smaller_of_what_config_and_tokenizer_name(tmp_path: Path) -> None:
    assert length_of(tmp_path, tokenizer=10**30, max_position_embeddings=4096) == 4096
    assert length_of(tmp_path, tokenizer=512, max_position_embeddings=4096) == 512
    assert length_of(tmp_path, 1024, tokenizer=512, max_position_embeddings=4096) == 1024
    assert length_of(tmp_path, tokenizer=10**30, model_type="mamba") == 2048
    assert length_of(tmp_path, 9000, tokenizer=10**30, model_type="mamba") == 9000
    positions: dict[str, Any] = {
        "model_type": "gpt2",
        "n_positions": 300,
        "vocab_size": 320,
        "n_embd": 32,
        "n_head": 4,
    }
    assert GPT2Config(**positions).max_position_embeddings == 300
    assert length_of(tmp_path, tokenizer=10**12, **positions) == 300
    with pytest.raises(MergetuneError, match="at most the positions that the model has, but is 301"):
        length_of(tmp_path, 301, tokenizer=10**12, **positions)


def test_stretched_positions_may_be_asked_for(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    names: dict[str, Any] = {"tokenizer": 10**30, "max_position_embeddings": 1024, "rope_parameters": rope}
    assert length_of(tmp_path, **names) == 1024
    assert length_of(tmp_path, 4096, **names) == 4096
    with pytest.raises(MergetuneError, match=r"at most the positions.*has 4096"):
        length_of(tmp_path, 4097, **names)


def test_a_tokenizer_without_an_end_of_text_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(MergetuneError, match="has no `eos_token`"):
        started(folder)
