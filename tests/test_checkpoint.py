from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimizer.errors import MergetuneError
from optimizer.merging.checkpoint import Checkpoint, FullExpert, write_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_base` that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def shard(model: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="30KB")
    return folder


def everything(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    return [(name, checkpoint.tensor(name)) for name in checkpoint.names]


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
    write_model(tmp_path / "reversed", reversed(everything(whole)), whole, max_shard_bytes=30_000)
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
        assert vector.dtype == torch.float32
        assert torch.equal(vector, expert.checkpoint.tensor(name) - base.tensor(name))
        in_bfloat16 = base.tensor(name).bfloat16()
        vector = expert.task_vector(name, in_bfloat16)
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


class TestWriteModel:
    @pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
    def test_written_model_loads_with_equal_weights(
        self, tiny_base: Path, tmp_path: Path, max_shard_bytes: int
    ) -> None:
        base = Checkpoint(tiny_base)
        write_model(tmp_path / "out", everything(base), base, max_shard_bytes=max_shard_bytes)
        written = Checkpoint(tmp_path / "out")
        assert written.digest == base.digest
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(model.lm_head.weight, base.tensor("lm_head.weight"))
        files = [path.name for path in (tmp_path / "out").iterdir()]
        assert ("model.safetensors" in files) == (max_shard_bytes == 10**9)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_tokenizer_and_template_come_along(self, tiny_base: Path, tmp_path: Path) -> None:
        base = Checkpoint(tiny_base)
        write_model(tmp_path / "out", everything(base), base)
        messages = [{"role": "user", "content": "Paris?"}]
        before, after = (
            AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
            for folder in (tiny_base, tmp_path / "out")
        )
        assert before == after
        assert "<|im_start|>user" in after

    def test_tied_model_stays_tied(self, tiny_tied_base: Path, tmp_path: Path) -> None:
        base = Checkpoint(tiny_tied_base)
        write_model(tmp_path / "out", everything(base), base)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_replaces_an_earlier_model(self, tiny_base: Path, tmp_path: Path) -> None:
        base = Checkpoint(tiny_base)
        write_model(tmp_path / "out", everything(base), base, max_shard_bytes=30_000)
        doubled = [(name, 2 * tensor) for name, tensor in everything(base)]
        write_model(tmp_path / "out", doubled, base)
        name, tensor = doubled[0]
        assert torch.equal(Checkpoint(tmp_path / "out").tensor(name), tensor)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
    def test_failure_leaves_everything_as_it_was(
        self, tiny_base: Path, tmp_path: Path, failure: type[BaseException]
    ) -> None:
        base = Checkpoint(tiny_base)
        write_model(tmp_path / "out", everything(base), base)

        def broken() -> Iterator[tuple[str, Tensor]]:
            yield from everything(base)[:12]
            raise failure

        with pytest.raises(failure):
            write_model(tmp_path / "out", broken(), base, max_shard_bytes=10_000)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert Checkpoint(tmp_path / "out").digest == base.digest

    def test_never_replaces_the_base_or_a_folder_of_other_things(
        self, tiny_base: Path, tmp_path: Path
    ) -> None:
        base = Checkpoint(tiny_base)
        with pytest.raises(MergetuneError, match="is the base of the merge"):
            write_model(tiny_base, everything(base), base)
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(MergetuneError, match="is no model directory"):
            write_model(tmp_path, everything(base), base)
        assert (tmp_path / "thesis.txt").exists()


# In a process of its own: writes the model with float64 tensors, twice the size that `like` has.
WRITE_DOUBLED = """
    import resource, sys
    from pathlib import Path
    from optimizer.errors import MergetuneError
    from optimizer.merging.checkpoint import Checkpoint, write_model

    base = Checkpoint(Path(sys.argv[1]))
    folder = Path(sys.argv[2])
    if len(sys.argv) > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    tensors = ((name, base.tensor(name).double()) for name in base.names)
    try:
        write_model(folder / "out", tensors, base, max_shard_bytes=40_000)
    except MergetuneError as error:
        print(error)
    print("left:", [path.name for path in folder.iterdir()])
"""


def run_write(*arguments: object, disk_bytes: int = 0) -> str:
    """Run it, on a disk of its own of this size if one is given; return what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(WRITE_DOUBLED), *map(str, arguments)]
    if disk_bytes:
        mount = f'mount -t tmpfs -o size={disk_bytes} none {arguments[1]} && exec "$0" "$@"'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def can_mount() -> None:
    """Skip where an ordinary user may not mount a disk in a namespace of its own."""
    command = "unshare --user --map-root-user --mount mount -t tmpfs none /mnt"
    if shutil.which("unshare") is None or subprocess.run(command.split()).returncode:
        pytest.skip("this machine does not let a test mount a disk")


def test_reaching_a_size_limit_is_explained_and_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    printed = run_write(tiny_base, tmp_path, 20_000)
    assert "no room for the model" in printed
    assert "left: []" in printed


@pytest.mark.usefixtures("can_mount")
def test_a_full_disk_is_explained_and_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    room_for_like = Checkpoint(tiny_base).nbytes + 40_000
    printed = run_write(tiny_base, tmp_path, disk_bytes=room_for_like)
    assert "no room for the model" in printed
    assert "No space left on device" in printed
    assert "left: []" in printed


@pytest.mark.usefixtures("can_mount")
def test_too_small_a_disk_is_refused_before_writing(tiny_base: Path, tmp_path: Path) -> None:
    printed = run_write(tiny_base, tmp_path, disk_bytes=65536)
    assert f"the model needs {Checkpoint(tiny_base).nbytes} bytes, but" in printed
    assert "left: []" in printed
