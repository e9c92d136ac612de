from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergetune.errors import MergetuneError
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.writer import layout_of, write_model

ROOT = Path(__file__).parents[2]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64),
)


def everything(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    return [(name, checkpoint.tensor(name)) for name in checkpoint.names]


def shape_of(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> Checkpoint:
    return Checkpoint(tiny_base)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_written_model_loads_with_equal_weights(
    base: Checkpoint, tmp_path: Path, max_shard_bytes: int
) -> None:
    write_model(tmp_path / "out", everything(base), base, max_shard_bytes=max_shard_bytes)
    written = Checkpoint(tmp_path / "out")
    assert written.digest == base.digest
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, base.tensor(HEAD))
    files = [path.name for path in (tmp_path / "out").iterdir()]
    assert ("model.safetensors" in files) == (max_shard_bytes == 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tokenizer_and_template_come_along(base: Checkpoint, tmp_path: Path) -> None:
    write_model(tmp_path / "out", everything(base), base)
    messages = [{"role": "user", "content": "Paris?"}]
    before, after = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
        for folder in (base.folder, tmp_path / "out")
    )
    assert before == after
    assert "<|im_start|>user" in after


def test_tied_model_stays_tied(tiny_tied_base: Path, tmp_path: Path) -> None:
    tied = Checkpoint(tiny_tied_base)
    write_model(tmp_path / "out", everything(tied), tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_replaces_an_earlier_model(base: Checkpoint, tmp_path: Path) -> None:
    write_model(tmp_path / "out", everything(base), base, max_shard_bytes=30_000)
    doubled = [(name, 2 * tensor) for name, tensor in everything(base)]
    write_model(tmp_path / "out", doubled, base)
    name, tensor = doubled[0]
    assert torch.equal(Checkpoint(tmp_path / "out").tensor(name), tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_never_replaces_the_base_or_a_folder_of_other_things(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match="is the base of the merge"):
        write_model(base.folder, everything(base), base)
    nested = Checkpoint(shutil.copytree(base.folder, tmp_path / "model" / "base"))
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(MergetuneError, match="or holds it"):
        write_model(tmp_path / "model", everything(nested), nested)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(MergetuneError, match="is no model directory"):
        write_model(tmp_path, everything(base), base)
    assert (tmp_path / "thesis.txt").exists()


def test_the_file_is_the_one_that_safetensors_writes(base: Checkpoint, tmp_path: Path) -> None:
    tensors = {f"b.{dtype}": torch.arange(-3, 12).reshape(3, 5).to(dtype) for dtype in DTYPES}
    tensors |= {f"a.{dtype}": torch.zeros(7).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(0.5), "empty": torch.empty(0, 3), "naïve": torch.ones(1)}
    write_model(tmp_path / "out", tensors.items(), base, layout=shape_of(tensors))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_strided_and_learning_tensors_are_written_as_they_look(base: Checkpoint, tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.randn(5, 3).T,
        "sliced": torch.arange(60.0).bfloat16().reshape(10, 6)[::2, 1:4],
        "expanded": torch.tensor([1.0, 2.0]).expand(4, 2),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }
    write_model(tmp_path / "out", tensors.items(), base, layout=shape_of(tensors))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_shard_gets_its_own(base: Checkpoint, tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 3, "c": 40, "d": 0, "e": 5, "f": 5, "g": 1}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    write_model(tmp_path / "out", tensors.items(), base, layout=shape_of(tensors), max_shard_bytes=40)
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert [sorted(shard) for shard in shards] == [["c"], ["a", "b", "d", "e"], ["f", "g"]]
    assert all(torch.equal(shard[name], tensors[name]) for shard in shards for name in shard)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(sizes.values())
    assert index["weight_map"]["g"] == "model-00003-of-00003.safetensors"


def test_the_order_of_arrival_changes_nothing(base: Checkpoint, tmp_path: Path) -> None:
    for folder, tensors in (("out", everything(base)), ("reversed", everything(base)[::-1])):
        write_model(tmp_path / folder, tensors, base, max_shard_bytes=30_000)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "reversed" / path.name).read_bytes()


def test_what_belongs_to_tokenizer_processors_templates_and_licence_is_taken_over(
    base: Checkpoint, tmp_path: Path
) -> None:
    taken = [
        "tekken.json",
        "video_preprocessor_config.json",
        "qwen.tiktoken",
        "LICENSE.txt",
        "NOTICE",
        "own.py",
    ]
    left = [
        "trainer_state.json",
        "optimizer.pt",
        "README.md",
        "all_results.json",
        "model.bin",
        ".gitattributes",
    ]
    like = Path(shutil.copytree(base.folder, tmp_path / "like"))
    for name in (*taken, *left):
        (like / name).write_text("{}")
    (like / "additional_chat_templates").mkdir()
    (like / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    write_model(tmp_path / "out", everything(base), Checkpoint(like))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {*taken, "tokenizer.json", "config.json", "additional_chat_templates"}
    assert not written & set(left)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


def test_a_model_may_have_more_rows_another_config_and_other_files(base: Checkpoint, tmp_path: Path) -> None:
    layout = layout_of(base) | {name: (torch.bfloat16, (400, 32)) for name in (EMBEDDINGS, HEAD)}
    tensors = dict(everything(base)) | {name: torch.ones(400, 32).bfloat16() for name in (EMBEDDINGS, HEAD)}
    write_model(
        tmp_path / "out",
        tensors.items(),
        base,
        {"chat_template.jinja": "new", "added_tokens.json": "{}"},
        config={"vocab_size": 400},
        layout=layout,
    )
    written = Checkpoint(tmp_path / "out")
    assert written.config == base.config | {"vocab_size": 400}
    assert layout_of(written) == layout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (400, 32)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "new"
    assert (tmp_path / "out" / "added_tokens.json").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b": torch.ones(2)}, "`b` is none or came twice"),
        ({"a": torch.ones(3)}, r"`a` must be torch\.float32 of shape \(2,\).* of shape \(3,\)"),
        ({"a": torch.ones(2).half()}, r"`a` must be torch\.float32 of .* it is torch\.float16"),
        ({}, "must come, but a did not"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_leave_nothing(
    base: Checkpoint, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "out", tensors.items(), base, layout={"a": (torch.float32, (2,))})
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_comes_twice_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none or came twice"):
        write_model(tmp_path / "out", everything(base)[:1] * 2, base)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_failure_leaves_everything_as_it_was(
    base: Checkpoint, tmp_path: Path, failure: type[BaseException]
) -> None:
    write_model(tmp_path / "out", everything(base), base)

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from everything(base)[:12]
        raise failure

    with pytest.raises(failure):
        write_model(tmp_path / "out", broken(), base, max_shard_bytes=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Checkpoint(tmp_path / "out").digest == base.digest


def test_an_error_in_writing_ends_the_computing(base: Checkpoint, tmp_path: Path) -> None:
    asked: list[str] = []
    closed: list[bool] = []

    def removes_the_files_at_the_third() -> Iterator[tuple[str, Tensor]]:
        try:
            for name, tensor in everything(base):
                asked.append(name)
                if len(asked) == 3:
                    for path in tmp_path.glob(".out.*/*.safetensors"):
                        path.unlink()
                yield name, tensor
        finally:
            closed.append(True)

    tensors = removes_the_files_at_the_third()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        write_model(tmp_path / "out", tensors, base)
    assert closed
    assert len(asked) <= 5  # one being written and one waiting when it asks for the next
    assert not list(tmp_path.iterdir())


class TestStreaming:
    """Eight tensors of 8 MB, each made as it is asked for."""

    SIZE = 2**21
    LAYOUT = dict.fromkeys("abcdefgh", (torch.float32, (SIZE,)))

    def test_few_tensors_are_alive_at_a_time(self, base: Checkpoint, tmp_path: Path) -> None:
        living: set[str] = set()
        most = 0

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal most
            for name in self.LAYOUT:
                array = np.ones(self.SIZE, np.float32)
                weakref.finalize(array, living.discard, name)
                living.add(name)
                most = max(most, len(living))
                tensor = torch.from_numpy(array)  # it and its views keep the array alive
                del array
                yield name, tensor
                del tensor

        write_model(tmp_path / "out", tensors(), base, layout=self.LAYOUT)
        assert 1 < most <= 4
        assert not living

    def test_computing_goes_on_while_a_tensor_is_written(self, base: Checkpoint, tmp_path: Path) -> None:
        on_disk: list[bool] = []

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for number, name in enumerate(self.LAYOUT):
                yield name, torch.ones(self.SIZE)
                (path,) = tmp_path.glob(".out.*/model.safetensors")
                with path.open("rb") as file:
                    file.seek((number + 1 - len(self.LAYOUT)) * 4 * self.SIZE - 4, os.SEEK_END)
                    on_disk.append(any(file.read(4)))

        write_model(tmp_path / "out", tensors(), base, layout=self.LAYOUT)
        assert len(on_disk) == 8
        assert not all(on_disk)
        assert all(tensor.all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


# In a process of its own: writes the model of one folder into another, after running the third
# argument and, when the third tensor is asked for, the fourth.
WRITE = """
    import resource, sys
    from pathlib import Path
    from mergetune.errors import MergetuneError
    from mergetune.weights.checkpoint import Checkpoint
    from mergetune.weights.writer import write_model

    base, folder = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2])

    def limit_files(nbytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    def fill_the_disk():
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError as error:
                    return print("filled:", error)

    def tensors():
        for number, name in enumerate(base.names):
            if number == 2:
                exec(sys.argv[4])
            yield name, base.tensor(name)

    exec(sys.argv[3])
    try:
        write_model(folder / "out", tensors(), base, max_shard_bytes=40_000)
    except MergetuneError as error:
        print(error)
    print("left:", sorted(path.name for path in folder.iterdir()))
"""


def run_write(base: Checkpoint, folder: Path, before: str = "", during: str = "", disk_bytes: int = 0) -> str:
    """Run it, on a disk of its own of this size if one is given; return what it printed."""
    script = textwrap.dedent(WRITE)
    command = [sys.executable, "-c", script, str(base.folder), str(folder), before, during]
    if disk_bytes:
        mount = f'mount -t tmpfs -o size={disk_bytes} none {folder} && exec "$0" "$@"'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def can_mount() -> None:
    """Skip where an ordinary user may not mount a disk in a namespace of its own."""
    command = "unshare --user --map-root-user --mount mount -t tmpfs none /mnt"
    if shutil.which("unshare") is None or subprocess.run(command.split()).returncode:
        pytest.skip("this machine does not let a test mount a disk")


@pytest.mark.parametrize(("before", "during"), [("limit_files(20_000)", ""), ("", "limit_files(20_000)")])
def test_reaching_a_size_limit_is_explained_and_leaves_nothing(
    base: Checkpoint, tmp_path: Path, before: str, during: str
) -> None:
    printed = run_write(base, tmp_path, before, during)
    assert "no room for the model" in printed
    assert "left: []" in printed


@pytest.mark.usefixtures("can_mount")
def test_a_full_disk_is_explained_before_computing_and_leaves_nothing(
    base: Checkpoint, tmp_path: Path
) -> None:
    # The tensors have room, but not the tokenizer, too.
    printed = run_write(base, tmp_path, during="print('computed')", disk_bytes=base.nbytes + 8192)
    assert "no room for the model" in printed
    assert "No space left on device" in printed
    assert "computed" not in printed
    assert "left: []" in printed


@pytest.mark.usefixtures("can_mount")
def test_what_fills_the_disk_meanwhile_does_not_hurt(base: Checkpoint, tmp_path: Path) -> None:
    printed = run_write(base, tmp_path, during="fill_the_disk()", disk_bytes=base.nbytes + 500_000)
    assert "filled: [Errno 28]" in printed
    assert "left: ['filler', 'out']" in printed


@pytest.mark.usefixtures("can_mount")
def test_too_small_a_disk_is_refused_before_writing(base: Checkpoint, tmp_path: Path) -> None:
    printed = run_write(base, tmp_path, disk_bytes=65536)
    assert f"the model needs {base.nbytes} bytes, but" in printed
    assert "left: []" in printed
