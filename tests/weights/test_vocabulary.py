"""Experts that added tokens: rows matched by token, a base with their tokens, whole studies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from helpers import CHATML, build_llama, build_tokenizer, fine_tune, merge_at
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.measuring.model_under_test import LocalModel, open_model
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.results.config import read_study
from mergetune.results.run_dir import RunDir
from mergetune.space.recipe import MergeRecipe
from mergetune.study.export import merge_recipe, write_merged
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.tokenizer_files import VocabularyRule
from mergetune.weights.vocabulary import MatchedExpert
from studies import run, write_study

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
X, Y, Z = "<|x|>", "<|y|>", "<|z|>"


def add_tokens(
    base: Path, folder: Path, *tokens: str, seed: int = 0, multiple: int | None = None, **attributes: bool
) -> Path:
    """Save a fine-tune of `base` that added tokens, with rows of their own, in this order."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(token, **attributes) for token in tokens])
    model.resize_token_embeddings(
        max(len(tokenizer), model.vocab_size), pad_to_multiple_of=multiple, mean_resizing=False
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two experts that share the token Y, at another row in each."""
    folder = tmp_path_factory.mktemp("adding")
    return {
        "a": add_tokens(tiny_base, folder / "a", X, Y, seed=1),
        "b": add_tokens(tiny_base, folder / "b", Y, Z, seed=2),
    }


@pytest.fixture
def mean(tiny_base: Path, experts: dict[str, Path], tmp_path: Path) -> Inputs:
    return open_inputs(tiny_base, experts, "mean", tmp_path / "extended")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestRefuse:
    def test_added_tokens_are_refused_with_the_key_that_allows_them(
        self, tiny_base: Path, experts: dict[str, Path]
    ) -> None:
        with pytest.raises(MergetuneError) as caught:
            open_inputs(tiny_base, experts)
        message = str(caught.value)
        assert "2 tokens differ from the base's tokenizer: '<|x|>' (320, not None)" in message
        assert message.count("set `vocabulary: base` or `vocabulary: mean` in the study file") == 2

    @pytest.mark.parametrize("rule", ["base", "mean"])
    def test_other_pieces_of_text_are_refused_by_every_rule(
        self, tiny_base: Path, tmp_path: Path, rule: VocabularyRule
    ) -> None:
        expert = fine_tune(tiny_base, tmp_path / "expert", seed=1, std=0.002)
        build_tokenizer((X,)).save_pretrained(expert)  # X among the pieces: all others move
        with pytest.raises(MergetuneError, match=r"\d+ tokens differ.*base's tokenizer\.$"):
            open_inputs(tiny_base, {"a": expert}, rule, tmp_path / "extended")

    def test_fewer_or_more_rows_with_the_same_tokens_are_accepted(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        """A base padded to a multiple, and a fine-tune trimmed to its tokenizer, or the reverse."""
        padded = add_tokens(tiny_base, tmp_path / "padded", multiple=64)
        for base, expert in ((padded, tiny_base), (tiny_base, padded)):
            tuned = fine_tune(expert, tmp_path / f"of-{expert.name}", seed=1, std=0.002)
            inputs = open_inputs(base, {"a": tuned})
            merged, ours, theirs = merge_at(inputs, a=1.0), weights(base), weights(tuned)
            n_tokens = min(len(ours[EMBEDDINGS]), len(theirs[EMBEDDINGS]))
            assert merged[EMBEDDINGS].shape == ours[EMBEDDINGS].shape
            close(merged[EMBEDDINGS][:320], theirs[EMBEDDINGS][:320])
            assert n_tokens == 320


class TestBase:
    def test_rows_are_matched_by_token_and_others_left_out(
        self, tiny_base: Path, experts: dict[str, Path]
    ) -> None:
        inputs = open_inputs(tiny_base, experts, "base")
        assert inputs.base.folder == tiny_base
        assert sum("leaves out 2 tokens" in warning for warning in inputs.warnings) == 2
        merged, tuned = merge_at(inputs, a=1.0, b=0.0), weights(experts["a"])
        for name, tensor in merged.items():
            close(tensor, tuned[name][:320] if name in (EMBEDDINGS, HEAD) else tuned[name])

    def test_tokens_of_the_base_that_stand_elsewhere_in_the_expert(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        base = add_tokens(tiny_base, tmp_path / "base", X, Y, Z)
        expert = add_tokens(tiny_base, tmp_path / "expert", Y, X, multiple=64)  # (384, 32)
        inputs = open_inputs(base, {"a": expert}, "base")
        merged, ours, theirs = merge_at(inputs, a=1.0), weights(base), weights(expert)
        for name in (EMBEDDINGS, HEAD):
            close(merged[name][:320], theirs[name][:320])
            close(merged[name][320], theirs[name][321])
            close(merged[name][321], theirs[name][320])
            assert torch.equal(merged[name][322], ours[name][322])  # Z, which the expert lacks

    def test_a_padded_expert_with_the_same_tokens_fits(self, tiny_base: Path, tmp_path: Path) -> None:
        expert = add_tokens(tiny_base, tmp_path / "expert", multiple=128)
        merged = merge_at(open_inputs(tiny_base, {"a": expert}, "base"), a=1.0)
        close(merged[HEAD], weights(expert)[HEAD][:320])

    def test_nothing_changes_where_no_token_was_added(
        self, tiny_base: Path, tiny_experts: dict[str, Path], tiny_adapter: Path, tmp_path: Path
    ) -> None:
        folders = {**tiny_experts, "lora": tiny_adapter}
        plain = open_inputs(tiny_base, folders)
        for rule in ("base", "mean"):
            inputs = open_inputs(tiny_base, folders, rule, tmp_path / "extended")
            assert inputs.expert_sources == plain.expert_sources
            assert inputs.base_source == plain.base_source
            assert not any(isinstance(expert, MatchedExpert) for expert in inputs.experts)
        assert not (tmp_path / "extended").exists()

    def test_the_digest_depends_on_the_rows(self, experts: dict[str, Path], tiny_base: Path) -> None:
        inputs = open_inputs(tiny_base, experts, "base")
        assert inputs.expert_sources["a"].digest != Checkpoint(experts["a"]).digest
        again = open_inputs(tiny_base, experts, "base")
        assert again.expert_sources == inputs.expert_sources

    def test_an_expert_in_a_narrower_dtype_leaves_unmatched_rows_alone(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        base = add_tokens(tiny_base, tmp_path / "base", X)
        full = add_tokens(tiny_base, tmp_path / "full", Y)
        expert = fine_tune(full, tmp_path / "half", seed=3, std=0.0, dtype=torch.bfloat16)
        inputs = open_inputs(base, {"a": expert}, "base")
        merged = merge_at(inputs, a=1.0)
        assert torch.equal(merged[HEAD][320], weights(base)[HEAD][320])
        close(merged[HEAD][:320], weights(expert)[HEAD][:320].float())


class TestMean:
    def test_an_added_row_is_the_mean_whatever_the_coefficients(
        self, mean: Inputs, tiny_base: Path, experts: dict[str, Path]
    ) -> None:
        ours, a, b = (weights(folder) for folder in (tiny_base, experts["a"], experts["b"]))
        assert mean.given == tiny_base
        for lambdas in ({"a": 1.0, "b": 0.0}, {"a": 0.3, "b": 1.7}):
            merged = merge_at(mean, **lambdas)
            for name in (EMBEDDINGS, HEAD):
                assert merged[name].shape == (323, 32)
                assert torch.equal(merged[name][320], a[name][320])
                assert torch.equal(merged[name][321], (a[name][321] + b[name][320]) / 2)
                assert torch.equal(merged[name][322], b[name][321])
                expected = ours[name] + sum(
                    lambdas[key] * (tuned[name][:320] - ours[name]) for key, tuned in (("a", a), ("b", b))
                )
                close(merged[name][:320], expected)

    def test_the_extended_base_is_an_ordinary_model(self, mean: Inputs, experts: dict[str, Path]) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(mean.base.folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(mean.base.folder)
        assert model.config.vocab_size == len(tokenizer) == 323
        assert tokenizer.convert_tokens_to_ids([X, Y, Z]) == [320, 321, 322]
        assert tokenizer.encode(f"Paris{Y}") == [*tokenizer.encode("Paris"), 321]
        engine = TransformersEngine(EngineConfig(device="cpu"), mean.base.folder)
        engine.replace(merge_at(mean, a=0.5, b=0.5).items())

    def test_added_tokens_keep_how_they_are_matched(self, tiny_base: Path, tmp_path: Path) -> None:
        plain = add_tokens(tiny_base, tmp_path / "a", X, lstrip=True, normalized=False)
        special = add_tokens(tiny_base, tmp_path / "b", Y, special=True, single_word=True)
        inputs = open_inputs(tiny_base, {"a": plain, "b": special}, "mean", tmp_path / "extended")
        for token, expert in ((X, plain), (Y, special)):
            known = [
                next(entry for entry in found["added_tokens"] if entry["content"] == token)
                for folder in (inputs.base.folder, expert)
                if (found := json.loads((folder / "tokenizer.json").read_text()))
            ]
            assert known[0] | {"id": 0} == known[1] | {"id": 0}

    def test_spare_rows_are_used_first(self, tiny_base: Path, tmp_path: Path) -> None:
        base = add_tokens(tiny_base, tmp_path / "base", multiple=128)  # 384 rows for 320 tokens
        expert = add_tokens(base, tmp_path / "expert", X, Y, seed=1)
        inputs = open_inputs(base, {"a": expert}, "mean", tmp_path / "extended")
        merged = merge_at(inputs, a=0.7)
        assert inputs.base.shape(HEAD) == (384, 32)
        assert inputs.base.config["vocab_size"] == 384
        assert torch.equal(merged[HEAD][320:322], weights(expert)[HEAD][320:322])
        assert torch.equal(merged[HEAD][322:], weights(base)[HEAD][322:])  # padding stays as it is

    def test_a_tied_head_stays_tied(self, tiny_tied_base: Path, tmp_path: Path) -> None:
        expert = add_tokens(tiny_tied_base, tmp_path / "expert", X)
        inputs = open_inputs(tiny_tied_base, {"a": expert}, "mean", tmp_path / "extended")
        assert inputs.base.is_tied
        close(merge_at(inputs, a=1.0)[EMBEDDINGS], weights(expert)[EMBEDDINGS])

    def test_the_bias_of_a_head_has_a_row_for_each_token_too(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer()
        ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        auto.from_config(PhiConfig(vocab_size=320, num_attention_heads=4, **sizes, **ids)).save_pretrained(
            tmp_path / "phi"
        )
        tokenizer.save_pretrained(tmp_path / "phi")
        expert = add_tokens(tmp_path / "phi", tmp_path / "expert", X)
        inputs = open_inputs(tmp_path / "phi", {"a": expert}, "mean", tmp_path / "extended")
        close(merge_at(inputs, a=1.0)["lm_head.bias"], weights(expert)["lm_head.bias"])

    def test_a_base_without_a_template_takes_the_first_and_its_end(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
        (base / "chat_template.jinja").unlink()
        for name in ("config.json", "generation_config.json"):
            edit_json(base / name, eos_token_id=0)
        edit_json(base / "tokenizer_config.json", eos_token="<|endoftext|>")
        expert = add_tokens(tiny_base, tmp_path / "expert", X, special=True)
        edit_json(expert / "tokenizer_config.json", eos_token=X)
        inputs = open_inputs(base, {"a": expert}, "mean", tmp_path / "extended")
        (warning,) = (warning for warning in inputs.warnings if "task vector" not in warning)
        assert "takes that of `a`, and the token that ends its messages" in warning
        recipe = MergeRecipe.of_one_group(
            "task_arithmetic", inputs.base_source, inputs.expert_sources, {"lambda": {"a": 1.0}}
        )
        write_merged(tmp_path / "best", recipe, inputs)
        tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "best")
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
        assert tokenizer.chat_template == CHATML
        assert tokenizer.eos_token_id == 320
        # what the expert declares, what the template writes, and what ended a text before
        assert model.generation_config.eos_token_id == [320, tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]

    def test_a_folder_made_of_the_same_is_used_again(
        self, mean: Inputs, tiny_base: Path, experts: dict[str, Path]
    ) -> None:
        file = mean.base.folder / "model.safetensors"
        before = file.stat().st_mtime_ns
        again = open_inputs(tiny_base, experts, "mean", mean.base.folder)
        assert file.stat().st_mtime_ns == before
        assert again.base_source == mean.base_source
        assert again.expert_sources == mean.expert_sources

    def test_a_folder_made_of_other_models_is_refused(
        self, mean: Inputs, tiny_base: Path, experts: dict[str, Path]
    ) -> None:
        with pytest.raises(MergetuneError, match=r"extended: .* was made of other models.*--out"):
            open_inputs(tiny_base, {"a": experts["b"], "b": experts["a"]}, "mean", mean.base.folder)

    def test_an_extended_base_keeps_the_rows_that_its_experts_share(
        self, mean: Inputs, experts: dict[str, Path]
    ) -> None:
        again = open_inputs(mean.base.folder, experts, "base")
        assert again.expert_sources == mean.expert_sources
        assert torch.equal(merge_at(again, a=1.0, b=1.0)[HEAD], merge_at(mean, a=1.0, b=1.0)[HEAD])


class TestAdapters:
    def adapter(self, base: Path, folder: Path, *tokens: str, **config: Any) -> Path:
        """Train LoRA on a base that was resized for these tokens."""
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(list(tokens))
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        adapter: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **config))
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        adapter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
            {"target_modules": ["q_proj"]},  # peft saves embeddings that were resized
        ],
        ids=["modules_to_save", "lora_on_embeddings", "resized_only"],
    )
    @pytest.mark.parametrize("rule", ["base", "mean"])
    def test_rows_are_those_that_peft_merges(
        self, tiny_base: Path, tmp_path: Path, config: dict[str, Any], rule: VocabularyRule
    ) -> None:
        adapter = self.adapter(tiny_base, tmp_path / "adapter", X, Y, **config)
        inputs = open_inputs(tiny_base, {"lora": adapter}, rule, tmp_path / "extended")
        merged = merge_at(inputs, lora=1.0)
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
        model.resize_token_embeddings(322, mean_resizing=False)
        theirs = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
        for name, tensor in merged.items():
            close(tensor, theirs[name][: len(tensor)])
        assert len(merged[HEAD]) == (320 if rule == "base" else 322)

    def test_rows_that_the_adapter_did_not_save_are_missed(self, tiny_base: Path, tmp_path: Path) -> None:
        adapter = self.adapter(tiny_base, tmp_path / "adapter", X, target_modules=["q_proj"])
        path = adapter / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "lora" in name}, path)
        for rule in ("refuse", "base", "mean"):  # as a padding token that no text has
            inputs = open_inputs(tiny_base, {"lora": adapter}, rule, tmp_path / "extended")
            assert any("1 tokens of its tokenizer have no row" in warning for warning in inputs.warnings)
            assert inputs.base.folder == tiny_base
        template = adapter / "chat_template.jinja"
        template.write_text(template.read_text() + X)
        with pytest.raises(
            MergetuneError, match=r"every token of its chat template must have a row.*'<\|x\|>'"
        ):
            open_inputs(tiny_base, {"lora": adapter}, "mean", tmp_path / "extended")

    def test_without_a_tokenizer_rows_cannot_be_matched(self, tiny_base: Path, tmp_path: Path) -> None:
        adapter = self.adapter(tiny_base, tmp_path / "adapter", X, target_modules=["q_proj"])
        for path in adapter.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(MergetuneError, match=r"321 rows for tokens, not the base's 320.*tokenizer there"):
            open_inputs(tiny_base, {"lora": adapter}, "base")


def test_an_adapter_with_tokens_is_scored_by_itself(tiny_base: Path, tmp_path: Path) -> None:
    """As `eval` and `check` do, by their option --vocabulary."""
    adapter = TestAdapters().adapter(tiny_base, tmp_path / "adapter", X, target_modules=["q_proj"])
    with pytest.raises(MergetuneError, match=r"1 tokens differ .* or --vocabulary"):
        open_model(str(adapter), str(tiny_base))
    n_tokens = {}
    for rule in ("base", "mean"):
        model = open_model(str(adapter), str(tiny_base), vocabulary=rule)
        assert isinstance(model, LocalModel)
        n_tokens[rule] = len(AutoTokenizer.from_pretrained(model.folder))
    assert n_tokens["mean"] == n_tokens["base"] + 1


class TestStudy:
    @pytest.fixture(scope="class")
    def files(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        """A study whose experts added ChatML's tokens to a base that has neither them nor a template."""
        folder = tmp_path_factory.mktemp("study")
        base = build_llama(folder / "plain")
        tokens = ("<|turn|>", "<|end|>")
        experts = {
            "a": add_tokens(base, folder / "a", *tokens, seed=1, special=True),
            "b": add_tokens(base, folder / "b", *tokens[::-1], "<|tool|>", seed=2, special=True),
        }
        for expert in experts.values():
            text = CHATML.replace("im_start", "turn").replace("im_end", "end")
            (expert / "chat_template.jinja").write_text(text)
            edit_json(expert / "tokenizer_config.json", eos_token="<|end|>")
        (base / "chat_template.jinja").unlink()
        study = write_study(folder / "files", base, experts, vocabulary="mean", budget={"trials": 2})
        run(study, folder / "run")
        return study, folder / "run"

    def test_the_merged_model_knows_the_tokens(self, files: tuple[Path, Path]) -> None:
        best: Any = AutoTokenizer.from_pretrained(files[1] / "best")
        assert best.convert_tokens_to_ids(["<|turn|>", "<|end|>", "<|tool|>"]) == [320, 321, 322]
        assert best.eos_token == "<|end|>"
        message = best.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
        assert message[0] == 320
        a, b = (weights(files[1].parent / name) for name in "ab")
        merged = Checkpoint(files[1] / "best").tensor(HEAD)
        assert torch.equal(merged[321], (a[HEAD][321] + b[HEAD][320]) / 2)

    def test_the_study_goes_on(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        study, out = files
        longer = yaml.safe_load(study.read_text()) | {"budget": {"trials": 3}}
        (study.parent / "longer.yaml").write_text(yaml.safe_dump(longer))
        moved = Path(shutil.copytree(out, tmp_path / "moved"))
        printed = run(study.parent / "longer.yaml", moved)
        assert "trial-0003" in printed
        assert "trial-0002  " not in printed
        assert read_study(moved / "study.yaml").base == str(out.parent / "plain")
        assert "trial-0004" not in run(moved / "study.yaml", moved)

    def test_the_recipe_gives_the_same_bits(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        best = files[1] / "best"
        merge_recipe(best / "recipe.yaml", tmp_path / "again")
        assert Checkpoint(tmp_path / "again").digest == Checkpoint(best).digest
        assert not (best / "mergekit.yaml").exists()  # mergekit treats added tokens otherwise

    def test_the_base_rule_runs_a_study_in_the_shapes_of_the_base(
        self, tiny_base: Path, experts: dict[str, Path], tmp_path: Path
    ) -> None:
        changes = {"vocabulary": "base", "budget": {"trials": 1}}
        run(write_study(tmp_path / "files", tiny_base, experts, **changes), tmp_path / "run")
        assert Checkpoint(tmp_path / "run" / "best").shape(HEAD) == (320, 32)
        assert not (tmp_path / "run" / "base").exists()
        merge_recipe(tmp_path / "run" / "best" / "recipe.yaml", tmp_path / "again")
        again, best = Checkpoint(tmp_path / "again"), Checkpoint(tmp_path / "run" / "best")
        assert again.digest == best.digest

    def test_a_directory_of_something_else_is_left_alone(
        self, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(MergetuneError, match="holds other files"):
            run(files[0], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_run_that_was_killed_while_the_base_was_written_starts_anew(
        self, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        shutil.copytree(files[1] / "base", tmp_path / "run" / ".base.half")
        RunDir(tmp_path / "run").check_own()

    def test_a_misspelt_rule_is_refused(self, files: tuple[Path, Path]) -> None:
        wrong = yaml.safe_load(files[0].read_text()) | {"vocabulary": "union"}
        (files[0].parent / "wrong.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(MergetuneError, match=r"vocabulary.*'refuse', 'base' or 'mean'"):
            read_study(files[0].parent / "wrong.yaml")
