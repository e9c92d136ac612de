"""Slopes against central differences of the loss in float64, for every method that has them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig

from helpers import build_llama, build_tokenizer, fine_tune, train_adapter
from mergetune.engines.completions import Scoring
from mergetune.engines.engine import EngineConfig
from mergetune.engines.stored_weights import StoredWeights
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.weight_gradients import each_gradient
from mergetune.errors import MergetuneError, TrialError
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.slopes import gradients
from mergetune.slopes.gradients import Slopes, has_slopes, slopes
from mergetune.slopes.losses import batches, item_losses, mean_losses
from mergetune.slopes.references import Reference, References
from mergetune.space.method_table import METHODS, MethodName
from mergetune.space.recipe import LayerGroup, MergeRecipe

# Coefficients of every method, away from where an elected sign or a clipped entry would change.
LAMBDA = {"a": 0.6, "b": 0.8}
OTHERS: dict[str, Any] = {
    "density": {"a": 0.6, "b": 0.8},
    "epsilon": {"a": 0.1, "b": 0.1},
    "gamma": {"a": 0.05, "b": 0.05},
    "scale": 1.05,
}
CASES: list[tuple[MethodName, dict[str, str]]] = [
    (name, {option.name: choice})
    for name, method in METHODS.items()
    if has_slopes(name)
    for option in method.options
    for choice in option.choices
] + [(name, {}) for name, method in METHODS.items() if has_slopes(name) and not method.options]


SIZES = (("a", 0.02), ("b", 0.002))


@contextmanager
def engine_of(inputs: Inputs, dtype: Any = "auto") -> Iterator[TransformersEngine]:
    engine = TransformersEngine(EngineConfig(device="cpu", dtype=dtype), inputs.base.folder, inputs.merger)
    use_exact_norms(engine.model)
    engine.model.eval()
    yield engine
    engine.close()


def use_exact_norms(model: Any) -> None:
    """Llama and its kin compute norms in float32, which would drown differences in float64: take torch's."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if hasattr(child, "variance_epsilon"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


def far_from_ties(base: Path, folder: Path, seed: int, size: float) -> Path:
    """Save `base` with changes of random signs whose magnitudes lie in [1, 1.5] or [2.5, 3.75] × size."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            sign, magnitude, step = (
                torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) for _ in range(3)
            )
            parameter.add_((sign - 0.5).sign() * (1 + magnitude / 2) * (1 + 1.5 * (step > 0.5)) * size)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def open_models(folder: Path, is_tied: bool) -> Inputs:
    start = build_llama(folder / "start", tie_word_embeddings=is_tied)
    base = fine_tune(start, folder / "base", seed=0, std=0.05, dtype=torch.float64)
    experts = {name: far_from_ties(base, folder / name, i, size) for i, (name, size) in enumerate(SIZES, 1)}
    return open_inputs(base, experts)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Models in float64 whose head is their embedding matrix."""
    return open_models(tmp_path_factory.mktemp("tied"), is_tied=True)


@pytest.fixture(scope="module")
def engine(inputs: Inputs) -> Iterator[TransformersEngine]:
    with engine_of(inputs) as engine:
        assert engine.model.dtype == torch.float64
        yield engine


def texts(seed: int, *lengths: tuple[int, int]) -> tuple[Scoring, ...]:
    """Random tokens, of each the prompt's length and the whole one's."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        Scoring(tuple(torch.randint(3, 300, (end,), generator=generator).tolist()), start)
        for start, end in lengths
    )


REFERENCES = References(
    (
        Reference("reply", "one", "r1", texts(1, (4, 11))),
        Reference("reply", "one", "r2", texts(2, (9, 12))),
        Reference("reply", "two", "r3", texts(3, (3, 30))),
        Reference("choice", "three", "c1", texts(4, (6, 8), (6, 9), (6, 8)), (1,), (1.2, 0.8, 1.0)),
        Reference("choice", "three", "c2", texts(5, (5, 6), (5, 7)), (0, 1), (1.0, 1.0)),
        Reference("choice", "three", "c3", texts(6, (5, 6), (4, 7)), (0,), (1.0, 1.0)),
    )
)


def recipe_of(
    inputs: Inputs, method: MethodName, options: Mapping[str, str] | None = None, **values: Any
) -> MergeRecipe:
    """A recipe in two layer groups; `values` take the place of those above."""
    experts = dict(list(inputs.expert_sources.items())[: METHODS[method].max_experts])
    given = {"lambda": LAMBDA, "t": 0.04 if method == "nearswap" else 0.4, **OTHERS, **values}
    given |= {"epsilon": 1e-3, "r": 0.5, "alpha": 0.4} if method in ("ram", "ramplus_tl", "svc") else {}
    chosen = {}
    for parameter in METHODS[method].parameters:
        value = given[parameter.name]
        chosen[parameter.name] = {e: value[e] for e in experts} if parameter.is_per_expert else value
    groups = [
        {"name": "first", "match": r"layers\.0\.", **chosen},
        {"name": "rest", "match": r"^(?!.*layers\.0\.)", **chosen},
    ]
    return MergeRecipe.model_validate(
        {
            "method": method,
            "base": inputs.base_source,
            "experts": experts,
            "groups": groups,
            "options": dict(options or {}),
        }
    )


def moved(recipe: MergeRecipe, group: str, parameter: str, expert: str, step: float) -> MergeRecipe:
    data = recipe.model_dump(by_alias=True)
    (own,) = (each for each in data["groups"] if each["name"] == group)
    if expert:
        own[parameter] = {**own[parameter], expert: own[parameter][expert] + step}
    else:
        own[parameter] += step
    return MergeRecipe.model_validate(data)


def central_difference(losses_at: Callable[[float], Mapping[str, float]], step: float) -> dict[str, float]:
    """The derivative of each loss, with an error of the fourth order of the step."""
    near, far = ({s: losses_at(s * k * step) for s in (-1, 1)} for k in (1, 2))
    return {
        name: (8 * (near[1][name] - near[-1][name]) - (far[1][name] - far[-1][name])) / (12 * step)
        for name in near[1]
    }


def check_against_differences(
    engine: TransformersEngine, recipe: MergeRecipe, found: Slopes, references: References = REFERENCES
) -> None:
    step = 1e-4 if recipe.method == "nearswap" else 2e-3  # its t is in units of weights
    table = found.by_group(recipe.groups)
    own = table.set_index(["group", "parameter", "expert"]).sort_index()
    for key in own.index.unique():

        def losses_at(step: float, key: Any = key) -> Mapping[str, float]:
            group, parameter, expert = key
            engine.load(moved(recipe, group, parameter, expert, step))
            return mean_losses(engine.model, references)

        expected = central_difference(losses_at, step)
        assert min(map(abs, expected.values())) > 1e-6  # else there is nothing to compare
        assert dict(own.loc[[key]].to_numpy().tolist()) == pytest.approx(expected, rel=1e-5), key


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_slopes_agree_with_central_differences(
    inputs: Inputs, engine: TransformersEngine, method: MethodName, options: dict[str, str]
) -> None:
    recipe = recipe_of(inputs, method, options)
    found = slopes(engine, inputs.merger, recipe, REFERENCES)
    assert found.losses == pytest.approx(mean_losses(engine.model, REFERENCES), rel=1e-9)
    check_against_differences(engine, recipe, found)


@pytest.fixture(scope="module")
def unwanted(inputs: Inputs, engine: TransformersEngine) -> References:
    """What the base itself would say, of one to three tokens; it is to become less likely."""
    engine.load(recipe_of(inputs, "task_arithmetic", {}, **{"lambda": {"a": 0.0, "b": 0.0}}))
    items = []
    for length, prompt in enumerate(texts(7, (2, 4), (2, 5), (2, 6)), start=1):
        said = list(prompt.tokens)
        for _ in range(length):
            with torch.no_grad():
                said.append(int(engine.model(torch.tensor([said])).logits[0, -1].argmax()))
        scored = Scoring(said, len(prompt.tokens))
        items.append(Reference("unwanted", "one", f"u{length}", (scored,), is_unwanted=True))
    return References(tuple(items))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp"])
def test_slopes_of_unwanted_texts_agree_with_central_differences(
    inputs: Inputs, engine: TransformersEngine, unwanted: References, method: MethodName
) -> None:
    recipe = recipe_of(inputs, method)
    check_against_differences(engine, recipe, slopes(engine, inputs.merger, recipe, unwanted), unwanted)


def test_the_slope_of_an_unwanted_text_is_opposite_and_fades_as_it_becomes_unlikely(
    inputs: Inputs, engine: TransformersEngine, unwanted: References
) -> None:
    """With c = −log p̄, the derivative of −log(1 − p̄) is −1 / (exp(c) − 1) times that of c."""
    recipe = recipe_of(inputs, "task_arithmetic")
    for each in unwanted.items:
        less, more = (
            slopes(engine, inputs.merger, recipe, References((replace(each, is_unwanted=one),)))
            for one in (True, False)
        )
        paid = more.losses["unwanted"]
        assert less.losses["unwanted"] == pytest.approx(-math.log(1 - math.exp(-paid)), abs=2e-6)
        assert less.table["slope"].to_numpy() == pytest.approx(
            -more.table["slope"].to_numpy() / math.expm1(paid), rel=2e-3
        )


def test_a_share_of_choices_and_that_of_the_others_have_opposite_slopes(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    """Where a score gets better without the right choices: −log q and −log(1 − q)."""
    recipe = recipe_of(inputs, "task_arithmetic")
    (choice,) = (each for each in REFERENCES.items if each.item == "c1")
    right, others = (
        slopes(engine, inputs.merger, recipe, References((replace(choice, wanted=wanted),)))
        for wanted in ((1,), (0, 2))
    )
    share = math.exp(-right.losses["choice"])
    assert others.losses["choice"] == pytest.approx(-math.log(1 - share))
    assert others.table["slope"].to_numpy() == pytest.approx(
        -right.table["slope"].to_numpy() * share / (1 - share)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unwanted_text_that_a_model_is_sure_of_has_a_finite_loss(
    tiny_base: Path, dtype: torch.dtype
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype)
    prompt = [5, 17, 40]
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        said = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    sure = Reference("unwanted", "one", "u", (Scoring((*prompt, said), 3),), is_unwanted=True)
    (loss,) = item_losses(model, [sure])
    assert float(loss.detach()) == pytest.approx(math.log(1 + 1e6), rel=1e-5)
    loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


@pytest.fixture(scope="module")
def partly_balanced(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The models above, but one tensor is changed by neither expert, one by one alone, one oppositely."""
    folder = tmp_path_factory.mktemp("balanced")
    base = load_file(inputs.base.folder / "model.safetensors")
    changed = {name: load_file(inputs.merger.experts[name].folder / "model.safetensors") for name in "ab"}
    layer = "model.layers.0.mlp.{}_proj.weight".format
    for own in changed.values():
        own[layer("gate")] = base[layer("gate")]
    changed["b"][layer("up")] = base[layer("up")]
    changed["b"][layer("down")] = 2 * base[layer("down")] - changed["a"][layer("down")]
    for name, own in changed.items():
        shutil.copytree(inputs.base.folder, folder / name)
        save_file(own, folder / name / "model.safetensors", metadata={"format": "pt"})
    return open_inputs(inputs.base.folder, {name: folder / name for name in changed})


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_tensors_where_task_vectors_are_zero_or_opposite_have_finite_slopes(
    partly_balanced: Inputs, method: MethodName, options: dict[str, str]
) -> None:
    with engine_of(partly_balanced) as engine:
        recipe = recipe_of(partly_balanced, method, options, **{"lambda": {"a": 0.5, "b": 0.5}})
        found = slopes(engine, partly_balanced.merger, recipe, REFERENCES)
    assert np.isfinite(found.table["slope"]).all()
    assert found.table["slope"].abs().sum() > 0


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "slerp"])
def test_slopes_of_models_with_a_head_of_their_own_agree(tmp_path: Path, method: MethodName) -> None:
    inputs = open_models(tmp_path, is_tied=False)
    recipe = recipe_of(inputs, method)
    with engine_of(inputs) as engine:
        found = slopes(engine, inputs.merger, recipe, REFERENCES)
        assert found.table["tensor"].str.contains("lm_head").any()
        check_against_differences(engine, recipe, found)


def test_slopes_of_lora_experts_agree_with_central_differences(tmp_path: Path) -> None:
    base = fine_tune(build_llama(tmp_path / "start"), tmp_path / "base", 0, std=0.05, dtype=torch.float64)
    names = {"a": ["q_proj", "v_proj", "down_proj"], "b": ["o_proj", "down_proj", "up_proj"]}
    experts = {
        name: train_adapter(base, tmp_path / name, i, torch.float64, r=4, lora_alpha=64, target_modules=own)
        for i, (name, own) in enumerate(names.items())
    }
    inputs = open_inputs(base, experts)
    recipe = recipe_of(inputs, "task_arithmetic")
    with engine_of(inputs) as engine:
        found = slopes(engine, inputs.merger, recipe, REFERENCES)
        assert not found.table["tensor"].str.contains("norm|embed|head|k_proj").any()
        check_against_differences(engine, recipe, found)


def test_slopes_of_any_groups_come_from_one_table(inputs: Inputs, engine: TransformersEngine) -> None:
    recipe = recipe_of(inputs, "task_arithmetic")
    found = slopes(engine, inputs.merger, recipe, REFERENCES)
    finer = [
        LayerGroup(name="attention0", match=r"layers\.0\.self_attn"),
        LayerGroup(name="others0", match=r"layers\.0\.(?!self_attn)"),
        LayerGroup(name="rest", match=r"^(?!.*layers\.0\.)"),
    ]
    fine, coarse = found.by_group(finer), found.by_group(recipe.groups)
    assert len(fine) == 2 * 3 * 2  # score, group, expert
    fine["group"] = fine["group"].replace({"attention0": "first", "others0": "first"})
    keys = ["score_name", "group", "parameter", "expert"]
    pd.testing.assert_frame_equal(
        fine.groupby(keys)[["slope"]].sum().reset_index(), coarse.sort_values(keys).reset_index(drop=True)
    )


def test_one_gradient_is_alive_at_a_time_and_none_afterwards(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    alive: list[int] = []
    parameters = list(engine.model.parameters())
    handles = [
        parameter.register_post_accumulate_grad_hook(  # runs before those of `slopes`
            lambda _: alive.append(sum(each.grad is not None for each in parameters))
        )
        for parameter in parameters
    ]
    slopes(engine, inputs.merger, recipe_of(inputs, "ties"), REFERENCES)
    for handle in handles:
        handle.remove()
    assert len(alive) == 2 * len(parameters)  # each once for each score, a tied one too
    assert set(alive) == {1}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)


def test_small_batches_and_recomputed_activations_change_nothing(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    recipe = recipe_of(inputs, "task_arithmetic")
    plain = slopes(engine, inputs.merger, recipe, REFERENCES)
    longest = max(each.n_tokens * len(each.texts) for each in REFERENCES.items)
    for max_tokens, passes in ((longest, 3), (1, 4)):  # the latter has each activation computed twice
        other = slopes(engine, inputs.merger, recipe, REFERENCES, max_tokens=max_tokens)
        n_texts = {"reply": 3, "choice": 3 + 2 + 2}
        assert other.n_passes == {name: count * passes for name, count in n_texts.items()}
        assert other.losses == pytest.approx(plain.losses, rel=1e-9)
        keys = ["score_name", "tensor", "parameter", "expert"]
        first, second = (each.table.set_index(keys)["slope"].sort_index() for each in (plain, other))
        pd.testing.assert_series_equal(first, second, rtol=1e-7, atol=1e-12)
    assert not engine.model.is_gradient_checkpointing
    assert not any(module.training for module in engine.model.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.2)])
def test_slopes_in_lower_precision_are_close(inputs: Inputs, dtype: str, tolerance: float) -> None:
    recipe = recipe_of(inputs, "dare_ties")
    found = []
    for each in ("auto", dtype):
        with engine_of(inputs, each) as engine:
            found.append(slopes(engine, inputs.merger, recipe, REFERENCES).by_group(recipe.groups)["slope"])
    exact, rounded = (torch.tensor(each.to_numpy()) for each in found)
    assert (exact - rounded).norm() < tolerance * exact.norm()


def test_slopes_that_are_not_finite_are_refused(
    inputs: Inputs, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that overflows says so, instead of being left out of a sum or standing in a report."""

    def overflowing(*_: object) -> dict[tuple[str, str], float]:
        return {("lambda", "a"): 1.0, ("lambda", "b"): math.inf}

    monkeypatch.setattr(gradients, "coefficient_slopes", overflowing)
    with pytest.raises(TrialError, match="the slopes of `reply` must be finite, but got inf"):
        slopes(engine, inputs.merger, recipe_of(inputs, "linear"), REFERENCES)


def test_a_method_without_smooth_coefficients_is_refused(inputs: Inputs, engine: TransformersEngine) -> None:
    with pytest.raises(MergetuneError, match="`sce` has no slopes"):
        slopes(engine, inputs.merger, recipe_of(inputs, "sce", select_topk=0.5), REFERENCES)


def test_gradients_of_fused_weights_come_by_their_stored_names(tmp_path: Path) -> None:
    """The experts of a mixture are stored one by one; transformers holds them in one tensor."""
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, experts_implementation="eager").double()
    use_exact_norms(model)
    model.eval()
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight" for i in range(3) for j in (1, 2, 3)]
    gradients: dict[str, Tensor] = {}
    with each_gradient(model, names, lambda name, gradient: gradients.update({name: gradient.clone()})):
        model(torch.arange(3, 23)[None]).logits.square().sum().backward()
    assert sorted(gradients) == sorted(names)
    shapes = {tuple(gradient.shape) for gradient in gradients.values()}
    assert shapes == {(24, 16), (16, 24)}
    stored = StoredWeights(model)
    for name in names:
        direction = torch.randn(gradients[name].shape, dtype=torch.float64)
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                stored[name].add_(direction, alpha=step)
                values.append(float(model(torch.arange(3, 23)[None]).logits.square().sum()))
                stored[name].sub_(direction, alpha=step)
        expected = (values[0] - values[1]) / 2e-3
        assert float((gradients[name] * direction).sum()) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_items_weigh_as_in_the_score() -> None:
    """A score is the mean over its tasks of the mean over their items, and so is its loss."""
    weights = {
        each.item: weight
        for own in REFERENCES.by_score.values()
        for batch, shares in batches(own, max_tokens=20)
        for each, weight in zip(batch, shares, strict=True)
    }
    assert weights == {"r1": 1 / 4, "r2": 1 / 4, "r3": 1 / 2, "c1": 1 / 3, "c2": 1 / 3, "c3": 1 / 3}
