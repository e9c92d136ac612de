"""Model directories written whole or not at all: each tensor goes to its place as it arrives."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.files.atomic_files import sync
from mergetune.weights.adapter import CONFIG as ADAPTER_CONFIG
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.tensor_files import INDEX

Entry = tuple[torch.dtype, tuple[int, ...]]  # a tensor's dtype and shape
Layout = Mapping[str, Entry]  # of all tensors of a model, by name

# A merged model takes from the base what belongs to its configuration, tokenizer, processors, templates and
# licence, whatever the names: files of these kinds, but for what training and earlier merges left there.
_KINDS = {".json", ".jinja", ".model", ".tiktoken", ".txt", ".vocab", ".py"}
_LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)(\..*)?", re.IGNORECASE)
_NOT_TAKEN = re.compile(
    r".*\.index\.json|(adapter|trainer|training|optimizer|scheduler|rng|all_results|train_results|eval_results)"
    r".*|mergetune.*|requirements.*\.txt"
)
_TEMPLATES = "additional_chat_templates"
# The format's names of the dtypes, the widest first: so safetensors orders a file, for alignment.
_CODES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(_CODES)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RESERVING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_MAX_WAITING = 2


def write_model(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    like: Checkpoint,
    notes: Mapping[str, str] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model directory: `tensors` in any order, with the config and the tokenizer of `like`.

    `notes` holds further text files by name, such as a model card; they take the place of files of
    `like`. `config` holds the keys of config.json that differ from `like`'s, `layout` all dtypes and
    shapes where any do. A tensor may be on any device and may not change once it is given; a
    generator that is not used up is closed.

    A thread writes while the next tensors are computed: beyond the page cache, this takes the memory
    of three tensors. The files grow in a hidden sibling folder that takes the place of `folder` at
    the very end: after any failure nothing is left behind and an existing `folder` is as it was.

    Raises:
        MergetuneError: `folder` is `like` itself or holds something that is no model, or the disk
            is too small.
        ValueError: the tensors are not those of the layout.
    """
    folder = folder.resolve()
    layout = layout_of(like) if layout is None else layout
    needed = sum(_nbytes(*entry) for entry in layout.values())
    if like.folder.resolve().is_relative_to(folder):
        raise MergetuneError(
            f"{folder}: is the base of the merge, or holds it. Give another output directory."
        )
    with replacing_folder(folder, needed) as temporary:
        write_companions(temporary, like, config or {}, notes or {})
        places = _lay_out(temporary, layout, max_shard_bytes)
        _write_tensors(tensors, layout, places)


@contextmanager
def replacing_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Yield a folder to write so many bytes of weights to, which then takes the place of `folder`.

    After any failure nothing is left behind, and `folder` is as it was.

    Raises:
        MergetuneError: `folder` holds something else, or the disk is too small.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(folder.parent, needed)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _disk_full_explained(folder.parent, needed):
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)  # before the folder gets its name, lest a power cut empties the files
        temporary.chmod(0o755)  # mkdtemp makes it private
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def layout_of(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Return the dtype and the shape of every tensor, in the checkpoint's order."""
    return {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint.names}


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def check_replaceable(folder: Path) -> None:
    """Raise `MergetuneError` if a model cannot be written to `folder`, since it holds something else."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        raise MergetuneError(
            f"{folder}: exists and is no model directory, so it is not replaced. Give another "
            "output directory or remove this one."
        )


def _check_space(disk: Path, needed: int) -> None:
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise MergetuneError(
            f"{disk}: the model needs {needed} bytes, but {free} are free. Free "
            f"{needed - free} bytes or give an output directory on another disk."
        )


@contextmanager
def _disk_full_explained(disk: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise MergetuneError(
            f"{disk}: no room for the model ({error}). It needs about {needed} bytes, and "
            f"{shutil.disk_usage(disk).free} were free when writing failed. Nothing is left "
            "behind. Free some space, raise the quota or give an output directory on another disk."
        ) from error


def write_companions(
    folder: Path, like: Checkpoint, config: Mapping[str, Any], notes: Mapping[str, str]
) -> None:
    """Write what stands beside the weights: see `write_model`."""
    for path in like.folder.iterdir():
        is_kind = path.suffix in _KINDS and not path.name.startswith(".")
        if path.is_file() and (
            _LICENCES.fullmatch(path.name) or (is_kind and not _NOT_TAKEN.fullmatch(path.name))
        ):
            shutil.copyfile(path, folder / path.name)
    if (like.folder / _TEMPLATES).is_dir():
        shutil.copytree(like.folder / _TEMPLATES, folder / _TEMPLATES)
    if config:
        text = json.dumps({**like.config, **config}, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for name, text in notes.items():
        (folder / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor go."""

    path: Path
    offset: int


def _lay_out(folder: Path, layout: Layout, max_shard_bytes: int) -> dict[str, _Place]:
    """Create the files of the weights, and the index of several; return where each tensor goes."""
    split = split_state_dict_into_shards_factory(
        dict(layout),
        get_storage_size=lambda entry: _nbytes(*entry),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    places: dict[str, _Place] = {}
    for file, names in split.filename_to_tensors.items():
        places |= _create_file(folder / file, {name: layout[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def _create_file(path: Path, layout: Layout) -> dict[str, _Place]:
    """Write a safetensors file up to the tensors, and reserve the room that they will take.

    The format: 8 bytes with the length of the header, little-endian; the header, JSON padded with
    spaces to a multiple of 8; the tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(layout, key=lambda name: (_ORDER.index(layout[name][0]), name)):
        dtype, shape = layout[name]
        start, end = end, end + _nbytes(dtype, shape)
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        _reserve(file.fileno(), file.tell() + end)
        return {name: _Place(path, file.tell() + header[name]["data_offsets"][0]) for name in layout}


def _reserve(file: int, nbytes: int) -> None:
    """Have the disk keep room for the whole file, where it can: a full one shows at once."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except AttributeError:  # macOS
        return
    except OSError as error:
        if error.errno not in _NO_RESERVING:
            raise


def _write_tensors(
    tensors: Iterable[tuple[str, Tensor]], layout: Layout, places: Mapping[str, _Place]
) -> None:
    """Write every tensor while the next ones are computed, in one thread beside this one."""
    missing = dict(layout)
    writes: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(1) as writer:
            for name, tensor in tensors:
                _check_fit(name, tensor, missing.pop(name, None))
                writes.append(writer.submit(_write, places[name], tensor.detach().cpu()))
                del tensor  # the writer lets it go before the next one is there
                while writes and (writes[0].done() or len(writes) > _MAX_WAITING):
                    writes.popleft().result()
            for write in writes:
                write.result()
    finally:
        if isinstance(tensors, Generator):
            tensors.close()
    if missing:
        raise ValueError(f"Every tensor of the layout must come, but {', '.join(missing)} did not.")


def _check_fit(name: str, tensor: Tensor, wanted: Entry | None) -> None:
    if wanted is None:
        raise ValueError(f"Every tensor of the layout must come once, but `{name}` is none or came twice.")
    if (tensor.dtype, tuple(tensor.shape)) != wanted:
        raise ValueError(
            f"`{name}` must be {wanted[0]} of shape {wanted[1]}, as in the layout, but it is "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}."
        )


def _write(place: _Place, tensor: Tensor) -> None:
    with place.path.open("r+b") as file:
        file.seek(place.offset)
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _move_into_place(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; if that fails, `folder` is as it was."""
    old = new.with_name(f"{new.name}.old")
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
