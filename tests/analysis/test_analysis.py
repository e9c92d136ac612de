"""Merge or retrain: figures against direct formulas, and the verdict's every branch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy import integrate, stats
from torch import Tensor

from helpers import build_llama, mergetune
from mergetune.analysis.advice import CONFLICT, OPPOSED, SMALLEST_SHARE, Advice, advise, as_data
from mergetune.analysis.chart import check_chart_path, draw, pair_frame, vector_frame, write_chart
from mergetune.analysis.tables import inspection_tables, verdict_sections
from mergetune.analysis.task_vectors import (
    GAUSSIAN_OVERLAP,
    GAUSSIAN_REDUNDANCY,
    PairStatistics,
    PartStatistics,
    TaskVectorStatistics,
    VectorStatistics,
    task_vector_statistics,
    top_square,
)
from mergetune.errors import MergetuneError
from mergetune.files.library import find
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.space.recipe import LayerGroup

GROUPS = (
    LayerGroup(name="outside", match=r"^(?!(.*\.)?\d+\.)"),
    LayerGroup(name="attention", roles=("attention",), layers=(0, 1)),
    LayerGroup(name="mlp", roles=("mlp",), layers=(0, 1)),
    LayerGroup(name="norms", roles=("norms",), layers=(0, 1)),
)


def change(base: Path, folder: Path, task_vector: Callable[[str, Tensor], Tensor]) -> Path:
    """Save the base plus a task vector, without a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    changed = {name: tensor + task_vector(name, tensor) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def noise(seed: int, scale: float = 0.002) -> Callable[[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda name, tensor: scale * torch.randn(tensor.shape, generator=generator)


def statistics_of(base: Path, experts: Mapping[str, Path]) -> TaskVectorStatistics:
    return task_vector_statistics(open_inputs(base, experts), GROUPS)


def concatenated(inputs: Inputs, index: int, group: LayerGroup | None) -> list[Tensor]:
    """Return one expert's task vector in a group, or all of it, tensor by tensor."""
    names = [name for name in inputs.base.names if group is None or group.takes(name)]
    bases = [inputs.base.tensor(name) for name in names]
    found = [inputs.experts[index].task_vector(name, base) for name, base in zip(names, bases, strict=True)]
    return [
        torch.zeros(base.numel()).double() if v is None else v.flatten().double()
        for v, base in zip(found, bases, strict=True)
    ]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_figures_are_what_the_formulas_give_on_whole_vectors(
    tiny_base: Path, tiny_experts: dict[str, Path], tiny_adapter: Path, kind: str
) -> None:
    second = tiny_experts["b"] if kind == "full" else tiny_adapter
    inputs = open_inputs(tiny_base, {"a": tiny_experts["a"], "b": second})
    found = task_vector_statistics(inputs, GROUPS)
    for group, part in zip((*GROUPS, None), (*found.groups, found.whole), strict=True):
        a, b = (torch.cat(concatenated(inputs, i, group)) for i in range(2))
        assert part.n_parameters == a.numel()
        for i, vector in enumerate(part.experts.values()):
            flat = torch.cat(concatenated(inputs, i, group))
            assert vector.norm == pytest.approx(float(flat.norm()), rel=1e-6)
            if not vector.norm:
                assert vector.redundancy is None
                continue
            largest = [
                v.abs().sort(descending=True).values[: max(1, len(v) // 5)]
                for v in concatenated(inputs, i, group)
            ]
            share = sum(float(top.square().sum()) for top in largest) / float(flat.square().sum())
            assert vector.redundancy == pytest.approx(share, rel=1e-6)
        (pair,) = part.pairs
        if not float(b.norm()):
            assert (pair.cosine, pair.overlap, pair.sign_conflict, pair.weighted_conflict) == (None,) * 4
            continue
        products, norms = a * b, float(a.norm() * b.norm())
        assert pair.cosine == pytest.approx(float(products.sum()) / norms, abs=1e-6)
        assert pair.overlap == pytest.approx(float(products.abs().sum()) / norms, rel=1e-6)
        both = int((products != 0).sum())
        assert pair.sign_conflict == pytest.approx(int((products < 0).sum()) / both)
        weighted = float(-products.clamp(max=0).sum() / products.abs().sum())
        assert pair.weighted_conflict == pytest.approx(weighted, rel=1e-6)
        assert pair.overlap is not None
        assert pair.weighted_conflict is not None
        assert pair.cosine == pytest.approx(pair.overlap * (1 - 2 * pair.weighted_conflict), abs=1e-9)
        assert pair.norm_ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-6)


def test_lengths_are_relative_to_the_matrices_as_in_the_check_before_a_merge(
    tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    found = statistics_of(tiny_base, tiny_experts)
    tensors = load_file(tiny_base / "model.safetensors")
    matrices = torch.cat([tensor.flatten().double() for tensor in tensors.values() if tensor.ndim > 1])
    whole, norms = found.whole.experts["a"], found.groups[-1]
    assert whole.relative_norm == pytest.approx(whole.norm / float(matrices.norm()), rel=1e-6)
    gains = torch.cat([tensors[name] for name in tensors if GROUPS[-1].takes(name)])
    assert norms.experts["a"].relative_norm == pytest.approx(norms.experts["a"].norm / float(gains.norm()))


def test_independent_gaussian_vectors_have_the_yardsticks_and_are_complementary(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=256)
    experts = {name: change(base, tmp_path / name, noise(seed)) for seed, name in enumerate("ab")}
    found = statistics_of(base, experts)
    (pair,) = found.whole.pairs
    assert pair.cosine == pytest.approx(0, abs=0.01)
    assert pair.sign_conflict == pytest.approx(0.5, abs=0.01)
    assert pair.weighted_conflict == pytest.approx(0.5, abs=0.01)
    assert pair.overlap == pytest.approx(GAUSSIAN_OVERLAP, abs=0.01)
    assert found.whole.experts["a"].redundancy == pytest.approx(GAUSSIAN_REDUNDANCY, abs=0.01)
    assert advise(found).kind == "complementary"


def test_the_gaussian_yardsticks_are_the_integrals() -> None:
    cut = stats.norm.ppf(0.9)
    top, _ = integrate.quad(lambda z: z * z * stats.norm.pdf(z), cut, math.inf)
    assert pytest.approx(2 * top) == GAUSSIAN_REDUNDANCY
    assert pytest.approx(stats.halfnorm.mean() ** 2) == GAUSSIAN_OVERLAP


def test_exactly_a_fifth_of_the_entries_counts_even_among_equals() -> None:
    assert top_square(torch.ones(10, 10)) == pytest.approx(20)
    assert top_square(torch.tensor([3.0, -4.0, 0.0])) == pytest.approx(16)  # at least one


@pytest.mark.parametrize(
    ("sign", "cosine", "conflict", "kind"), [(1, 1, 0, "complementary"), (-1, -1, 1, "conflict")]
)
def test_an_identical_expert_agrees_and_a_negated_one_conflicts(
    tiny_base: Path, tmp_path: Path, sign: int, cosine: float, conflict: float, kind: str
) -> None:
    power = 2.0**-12  # base ± τ is then exact to float32's last bits
    vector = noise(3, 8.0)
    drawn = {
        name: vector(name, t).round() * power
        for name, t in load_file(tiny_base / "model.safetensors").items()
    }
    experts = {
        "a": change(tiny_base, tmp_path / "a", lambda name, _: drawn[name]),
        "b": change(tiny_base, tmp_path / "b", lambda name, _: sign * drawn[name]),
    }
    found = statistics_of(tiny_base, experts)
    (pair,) = found.whole.pairs
    assert pair.cosine == pytest.approx(cosine, abs=1e-6)
    assert (pair.sign_conflict, pair.weighted_conflict) == pytest.approx((conflict, conflict), abs=1e-3)
    assert advise(found).kind == kind


def test_an_expert_that_equals_the_base_has_no_figures_and_stops_nothing(
    tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    inputs = open_inputs(tiny_base, {"a": tiny_experts["a"], "same": tiny_base})
    found = task_vector_statistics(inputs, GROUPS)
    verdict = advise(found)
    assert verdict.kind is None
    assert "`same` adds nothing" in verdict.pairs[0].reasons[0]
    assert "`same` equals the base" in inputs.warnings[0]
    json.dumps(as_data(found, verdict, inputs.warnings), allow_nan=False)
    assert "nothing to compare" in printed(found, verdict)
    draw(found, verdict).to_dict()


def test_a_model_of_another_base_lies_outside_as_the_warning_says(tiny_base: Path, tmp_path: Path) -> None:
    other = build_llama(tmp_path / "other", seed=7)
    inputs = open_inputs(tiny_base, {"other": other})
    verdict = advise(task_vector_statistics(inputs, GROUPS))
    assert verdict.kind == "outside one basin"
    (figure,) = re.findall(r"is (\d\.\d\d) times as long as the base's", verdict.summary)
    assert any(f"is {figure} times as long as the base's" in warning for warning in inputs.warnings)
    assert verdict.next_steps[0].startswith("Retrain")


def part(
    name: str,
    cosines: tuple[float, ...],
    norms: tuple[float, ...] = (1.0, 1.0),
    overlap: float = 0.6,
    redundancy: float = 0.7,
    relative: float = 0.01,
) -> PartStatistics:
    """Return made-up figures of experts a, b, c… whose pairs have these cosines."""
    experts = dict(zip("abcdef", norms, strict=False))
    names = [(one, two) for one in experts for two in experts if one < two]
    pairs = [
        PairStatistics(one, two, c, overlap, 0.5, (1 - c / overlap) / 2, experts[one] / experts[two])
        for (one, two), c in zip(names, cosines, strict=True)
    ]
    vectors = {key: VectorStatistics(norm, relative * norm, redundancy) for key, norm in experts.items()}
    return PartStatistics(name, 100, vectors, tuple(pairs))


def judged(*groups: PartStatistics, whole: PartStatistics) -> Advice:
    return advise(TaskVectorStatistics(groups, whole))


def test_a_clearly_negative_cosine_is_a_conflict_with_what_the_sum_keeps() -> None:
    verdict = judged(part("all", (-0.6,)), whole=part("whole", (-0.6,)))
    assert verdict.kind == "conflict"
    assert "cosine -0.60" in verdict.summary
    assert "keeps 40% of `a` and 40% of `b`" in verdict.pairs[0].reasons[1]
    assert verdict.next_steps[0].startswith("Retrain")
    assert "leave one" not in verdict.next_steps[0]


@pytest.mark.parametrize(
    ("cosines", "kind"),
    [
        ((CONFLICT, CONFLICT), "conflict"),
        ((CONFLICT + 0.01, CONFLICT + 0.01), "partial conflict"),
        ((OPPOSED, OPPOSED), "partial conflict"),
        ((OPPOSED + 0.01, OPPOSED + 0.01), "complementary"),
        ((-0.4, 0.2), "partial conflict"),  # opposed in half of the model only
        ((0.0, 0.0), "complementary"),
        ((0.9, 0.9), "complementary"),
    ],
)
def test_the_kind_follows_the_cosines(cosines: tuple[float, float], kind: str) -> None:
    groups = [part(name, (cosine,)) for name, cosine in zip(("early", "late"), cosines, strict=True)]
    assert judged(*groups, whole=part("whole", (sum(cosines) / 2,))).kind == kind


def test_a_partial_conflict_names_the_groups_in_which_it_lies() -> None:
    groups = part("early", (0.1,)), part("late", (-0.4,))
    (pair,) = judged(*groups, whole=part("whole", (-0.15,))).pairs
    assert pair.opposed_groups == ("late",)
    assert "`late` (cosine -0.40), 50% of what both change; elsewhere the cosine is 0.10" in pair.reasons[0]


def test_opposed_groups_that_hold_little_do_not_count() -> None:
    small = math.sqrt(SMALLEST_SHARE / 2)
    groups = part("early", (0.1,)), part("late", (-0.4,), norms=(small, small))
    assert judged(*groups, whole=part("whole", (0.08,))).kind == "complementary"


def test_complementary_pairs_are_told_apart() -> None:
    def reason(cosine: float, overlap: float) -> str:
        figures = part("all", (cosine,), overlap=overlap)
        return judged(figures, whole=figures).pairs[0].reasons[0]

    assert "Neither undoes the other: cosine 0.02" in reason(0.02, 0.6)
    assert "different entries (overlap 5%" in reason(0.02, 0.05)
    assert "start near lambda 0.62 each" in reason(0.6, 0.8)


def test_asymmetry_is_named_with_its_ratio_whichever_is_longer() -> None:
    for norms, longer, shorter in (((3.0, 1.0), "a", "b"), ((1.0, 3.0), "b", "a")):
        figures = part("all", (0.0,), norms=norms)
        reasons = judged(figures, whole=figures).pairs[0].reasons
        assert f"`{longer}` is 3.0 times as long as `{shorter}`" in reasons[1]
    even = part("all", (0.0,), norms=(1.5, 1.0))
    assert len(judged(even, whole=even).pairs[0].reasons) == 1


@pytest.mark.parametrize(
    ("redundancy", "preset"), [(0.9, "`ties_layer_groups`"), (0.65, "`dare_ties_layer_groups`")]
)
def test_redundancy_decides_how_signs_are_elected(redundancy: float, preset: str) -> None:
    figures = part("all", (-0.2,), redundancy=redundancy)
    verdict = judged(figures, whole=figures)
    assert preset in verdict.next_steps[0]
    assert f"`a` {redundancy:.0%}, `b` {redundancy:.0%}" in verdict.notes[0]


def test_the_worst_pair_decides_and_is_named() -> None:
    figures = part("all", (0.0, -0.5, 0.0), norms=(1.0, 1.0, 1.0))
    verdict = judged(figures, whole=figures)
    assert [pair.kind for pair in verdict.pairs] == ["complementary", "conflict", "complementary"]
    assert verdict.summary == "Conflict: `a` and `c` (cosine -0.50) oppose each other."
    assert "leave one of the two out" in verdict.next_steps[0]


def test_an_outsider_taints_only_its_own_pairs() -> None:
    figures = part("all", (0.0, 0.0, 0.0), norms=(1.0, 1.0, 90.0))
    verdict = judged(figures, whole=figures)
    assert [pair.kind for pair in verdict.pairs] == ["complementary", *["outside one basin"] * 2]
    assert verdict.kind == "outside one basin"
    assert "`c` is 0.90 times" in verdict.summary


def test_a_single_expert_has_no_pairs() -> None:
    figures = part("all", (), norms=(1.0,))
    statistics = TaskVectorStatistics((figures,), figures)
    verdict = advise(statistics)
    assert (verdict.kind, verdict.pairs) == (None, ())
    assert "all" in printed(statistics, verdict)
    assert len(draw(statistics, verdict).to_dict()["concat"]) == 1


def test_every_preset_that_advice_names_exists() -> None:
    for cosine in (-0.5, -0.2, 0.0, 0.5):
        for redundancy in (0.6, 0.9):
            figures = part("all", (cosine,), redundancy=redundancy)
            verdict = judged(figures, whole=figures)
            text = " ".join([*verdict.next_steps, *verdict.notes])
            for name in re.findall(r"`(\w+_groups)`", text):
                assert find("search_spaces", name, Path()).exists()


def printed(statistics: TaskVectorStatistics, verdict: Advice, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        for table in inspection_tables(statistics, verdict):
            console.print(table)
        for title, sentences in verdict_sections(verdict):
            console.print(title, *sentences, sep="\n", soft_wrap=True, markup=False)
    return capture.get()


def test_tables_of_many_experts_keep_every_figure_at_80_columns() -> None:
    norms = tuple(1.0 + i for i in range(6))
    figures = part("all", tuple(i / 100 for i in range(-1, 14)), norms=norms)
    statistics = TaskVectorStatistics((figures,), figures)
    text = printed(statistics, advise(statistics))
    assert "…" not in text
    for norm in norms:
        assert f"{norm / 100:.4f}  70%" in text
    for i in range(-1, 14):
        assert f"{i / 100:.3f}" in text


def test_the_charts_rows_are_the_figures(tiny_base: Path, tiny_experts: dict[str, Path]) -> None:
    found = statistics_of(tiny_base, tiny_experts)
    parts = (*found.groups, found.whole)
    lengths, pairs = vector_frame(parts), pair_frame(parts)
    assert list(lengths["part"].unique()) == [*(group.name for group in GROUPS), "whole model"]
    assert lengths["length"].iloc[-1] == found.whole.experts["b"].relative_norm
    assert pairs["cosine"].iloc[-1] == found.whole.pairs[0].cosine
    assert pairs["conflict"].iloc[0] == found.groups[0].pairs[0].weighted_conflict


@pytest.mark.parametrize(
    ("suffix", "start"), [("svg", b"<svg"), ("PNG", b"\x89PNG"), ("html", b"<!DOCTYPE html")]
)
def test_charts_are_written_by_suffix(tmp_path: Path, suffix: str, start: bytes) -> None:
    figures = part("all", (-0.2,))
    statistics = TaskVectorStatistics((figures,), figures)
    path = tmp_path / f"chart.{suffix}"
    write_chart(statistics, advise(statistics), path)
    content = path.read_bytes()
    assert content.lstrip().startswith(start)
    assert b"cdn.jsdelivr.net" not in content  # the page opens offline


def test_a_chart_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match=r"\.svg, \.png or \.html, but got `chart.pdf`.*`chart.svg`"):
        check_chart_path(tmp_path / "chart.pdf")
    with pytest.raises(MergetuneError, match="folder must exist"):
        check_chart_path(tmp_path / "absent" / "chart.svg")


def test_inspect_prints_json_and_draws(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    chart = tmp_path / "chart.svg"
    experts, space = tiny_experts.values(), ("--search-space", "task_arithmetic")
    done = mergetune("inspect", tiny_base, *experts, *space, "--json", "--chart", chart)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["verdict"]["kind"] == "complementary"
    a, b = (data["experts"][path.name] for path in experts)
    assert b["relative_norm"] == pytest.approx(2 * a["relative_norm"], rel=0.05)
    (pair,) = data["pairs"]
    assert pair["kind"] == "complementary"
    assert [group["name"] for group in data["groups"]] == ["all"]
    assert "Complementary" in chart.read_text()


def test_inspect_prints_tables_and_the_verdict(tiny_base: Path, tiny_experts: dict[str, Path]) -> None:
    done = mergetune("inspect", tiny_base, *tiny_experts.values())
    assert done.returncode == 0, done.stderr
    for text in ("whole model", "weighted", "Complementary: ", "What to do", "mergetune run"):
        assert text in done.stdout
    refused = mergetune("inspect", tiny_base, *tiny_experts.values(), "--chart", "chart.pdf")
    assert (refused.returncode, ".svg, .png or .html" in refused.stderr) == (3, True)
