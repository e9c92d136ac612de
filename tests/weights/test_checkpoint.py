from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergetune.errors import MergetuneError
from mergetune.weights.checkpoint import Checkpoint, FullExpert
from mergetune.weights.writer import layout_of, write_model


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_base` that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def shard(model: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="30KB")
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, **changes: Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


def test_reads_what_transformers_reads(tiny_base: Path) -> None:
    checkpoint = Checkpoint(tiny_base)
    expected = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    assert set(checkpoint.names) == set(expected)
    for name in checkpoint.names:
        assert torch.equal(checkpoint.tensor(name), expected[name])
        assert checkpoint.shape(name) == tuple(expected[name].shape)
        assert checkpoint.dtype(name) == torch.float32


def test_a_tensor_is_fresh(tiny_base: Path) -> None:
    checkpoint = Checkpoint(tiny_base)
    name = checkpoint.names[0]
    checkpoint.tensor(name).zero_()
    assert checkpoint.tensor(name).any()


def test_sharding_changes_neither_tensors_nor_digest(tiny_base: Path, tmp_path: Path) -> None:
    whole, sharded = Checkpoint(tiny_base), Checkpoint(shard(tiny_base, tmp_path / "sharded"))
    assert len(list(sharded.folder.glob("model-*.safetensors"))) > 2
    assert sharded.digest == whole.digest
    layout = dict(reversed(layout_of(whole).items()))
    tensors = ((name, whole.tensor(name)) for name in whole.names)
    write_model(tmp_path / "reversed", tensors, whole, layout=layout, max_shard_bytes=30_000)
    assert Checkpoint(tmp_path / "reversed").names != whole.names
    assert Checkpoint(tmp_path / "reversed").digest == whole.digest
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.names)


def test_digest_changes_with_one_bit(copied: Path, tiny_base: Path) -> None:
    norm = torch.ones(32)
    norm[7] = torch.nextafter(norm[7], torch.tensor(2.0))
    edit_tensors(copied, **{"model.norm.weight": norm})
    assert Checkpoint(copied).digest != Checkpoint(tiny_base).digest


def test_digest_changes_with_the_dtype(tiny_base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).dtype("lm_head.weight") == torch.bfloat16
    assert Checkpoint(tmp_path).digest != Checkpoint(tiny_base).digest


def test_tied_head_is_hidden_even_if_stored(tiny_tied_base: Path, tmp_path: Path) -> None:
    tied = Checkpoint(tiny_tied_base)
    assert tied.is_tied
    assert "lm_head.weight" not in tied.names
    copy = Path(shutil.copytree(tiny_tied_base, tmp_path / "copy"))
    embeddings = tied.tensor("model.embed_tokens.weight")
    edit_tensors(copy, **{"lm_head.weight": embeddings})
    assert Checkpoint(copy).names == tied.names
    assert Checkpoint(copy).digest == tied.digest
    edit_tensors(copy, **{"lm_head.weight": embeddings + 1})
    with pytest.raises(MergetuneError, match="set `tie_word_embeddings: false`"):
        Checkpoint(copy)


def test_where_the_config_is_silent_the_files_say_whether_the_head_is_tied(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["tie_word_embeddings"]
    (copied / "config.json").write_text(json.dumps(config))
    assert not Checkpoint(copied).is_tied
    embeddings = load_file(copied / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(copied, **{"lm_head.weight": embeddings.clone()})
    assert Checkpoint(copied).is_tied


def test_buffers_of_old_versions_are_hidden_but_learned_biases_are_not(copied: Path) -> None:
    edit_tensors(
        copied,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            "h.0.attn.masked_bias": torch.tensor(-1e4),
            "h.1.attn.bias": torch.ones(8),
        },
    )
    names = Checkpoint(copied).names
    assert "h.1.attn.bias" in names
    assert len(names) == 22


def test_full_expert_adds_up_to_its_weights(tiny_base: Path, tiny_experts: dict[str, Path]) -> None:
    base, expert = Checkpoint(tiny_base), FullExpert("a", Checkpoint(tiny_experts["a"]))
    for name in base.names:
        vector = expert.task_vector(name, base.tensor(name))
        assert vector is not None
        assert vector.dtype == torch.float32
        assert torch.equal(vector, expert.checkpoint.tensor(name) - base.tensor(name))
        in_bfloat16 = base.tensor(name).bfloat16()
        vector = expert.task_vector(name, in_bfloat16)
        assert vector is not None
        assert torch.equal(vector, expert.checkpoint.tensor(name) - in_bfloat16.float())


class TestBadInput:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(MergetuneError, match=r"nowhere: is no directory.*hf download"):
            Checkpoint(tmp_path / "nowhere")

    def test_missing_config(self, copied: Path) -> None:
        (copied / "config.json").unlink()
        with pytest.raises(MergetuneError, match=r"config\.json: cannot be read.*Copy it"):
            Checkpoint(copied)

    @pytest.mark.parametrize(("text", "reason"), [("{", "valid JSON"), ("[]", "holds a list")])
    def test_config_that_is_no_object(self, copied: Path, text: str, reason: str) -> None:
        (copied / "config.json").write_text(text)
        with pytest.raises(MergetuneError, match=rf"config\.json: .*{reason}.*Download"):
            Checkpoint(copied)

    def test_pickles_only(self, copied: Path) -> None:
        torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
        (copied / "model.safetensors").unlink()
        with pytest.raises(MergetuneError, match=r"pytorch_model\.bin.*execute.*save_pretrained"):
            Checkpoint(copied)

    def test_gguf_only(self, copied: Path) -> None:
        (copied / "model.safetensors").rename(copied / "model-q4.gguf")
        with pytest.raises(MergetuneError, match=r"model-q4\.gguf.*Give the safetensors"):
            Checkpoint(copied)

    def test_no_weights(self, copied: Path) -> None:
        (copied / "model.safetensors").unlink()
        with pytest.raises(MergetuneError, match=r"no weights: model\.safetensors is missing"):
            Checkpoint(copied)

    def test_weights_under_another_name(self, copied: Path) -> None:
        (copied / "model.safetensors").rename(copied / "consolidated.safetensors")
        with pytest.raises(MergetuneError, match=r"but consolidated\.safetensors. Rename"):
            Checkpoint(copied)

    def test_missing_shard(self, tiny_base: Path, tmp_path: Path) -> None:
        gone = sorted(shard(tiny_base, tmp_path).glob("model-*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(MergetuneError, match=rf"index\.json: names .* not there: {gone.name}\."):
            Checkpoint(tmp_path)

    def test_tensor_missing_from_its_shard(self, tiny_base: Path, tmp_path: Path) -> None:
        path = sorted(shard(tiny_base, tmp_path).glob("model-*.safetensors"))[1]
        tensors = load_file(path)
        name, _ = tensors.popitem()
        save_file(tensors, path)
        with pytest.raises(MergetuneError, match=rf"index\.json: names .* not there: {name}\."):
            Checkpoint(tmp_path)

    def test_index_without_a_map(self, tiny_base: Path, tmp_path: Path) -> None:
        (shard(tiny_base, tmp_path) / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(MergetuneError, match=r"index\.json: must hold a `weight_map`"):
            Checkpoint(tmp_path)

    def test_truncated_file(self, copied: Path) -> None:
        path = copied / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-100])
        sizes = f"{len(whole) - 100} bytes of {len(whole)}"
        with pytest.raises(MergetuneError, match=rf"model\.safetensors: .*{sizes}.*again"):
            Checkpoint(copied)

    @pytest.mark.parametrize("content", [b"", b"\x10", b"not safetensors at all" * 9])
    def test_corrupt_file(self, copied: Path, content: bytes) -> None:
        (copied / "model.safetensors").write_bytes(content)
        with pytest.raises(MergetuneError, match=rf"damaged.* {len(content)} bytes .*again"):
            Checkpoint(copied)

    def test_git_lfs_pointer(self, copied: Path) -> None:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"
        (copied / "model.safetensors").write_text(pointer)
        with pytest.raises(MergetuneError, match="git lfs pull"):
            Checkpoint(copied)

    def test_quantized_by_config(self, copied: Path) -> None:
        edit_config(copied, quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(MergetuneError, match=r"quantization_config.*before, in bfloat16"):
            Checkpoint(copied)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("model.layers.0.mlp.up_proj.qweight", torch.int32),  # GPTQ, AWQ
            ("model.layers.0.mlp.up_proj.weight", torch.uint8),  # bitsandbytes
            ("model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn),
            ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.uint8),
        ],
    )
    def test_quantized_by_tensors(self, copied: Path, name: str, dtype: torch.dtype) -> None:
        edit_tensors(copied, **{name: torch.ones(8, 8).to(dtype)})
        with pytest.raises(MergetuneError, match=f"tensor `{name}`.*quantize the merged model"):
            Checkpoint(copied)
