"""The cache: where it is, and what becomes of one that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import mergetune
from mergetune.errors import MergetuneError
from mergetune.files.library import cache_folder, in_cache, use_cache
from studies import write_suite


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's cache is in an empty folder, and nothing else was chosen."""
    for variable in ("MERGETUNE_CACHE", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that what is set is taken back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "mergetune"


@pytest.fixture
def read_only(tmp_path: Path, own_cache: Path) -> Path:
    """A cache that cannot be made, whoever asks: there is a file in its way."""
    (tmp_path / "home").write_text("")
    return own_cache


def test_this_users_cache_is_taken_without_a_word(own_cache: Path) -> None:
    said: list[str] = []
    use_cache(None, said.append)
    assert (cache_folder(), said) == (own_cache, [])
    assert "MERGETUNE_CACHE" not in os.environ


def test_a_cache_that_was_named_is_taken_in_other_processes_too(tmp_path: Path, own_cache: Path) -> None:
    use_cache(tmp_path / "given", print)
    assert cache_folder() == tmp_path / "given"
    assert os.environ["MERGETUNE_CACHE"] == str(tmp_path / "given")
    assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path / "given" / "vllm")


def test_a_temporary_folder_takes_the_place_of_a_cache_that_cannot_be_written(read_only: Path) -> None:
    said: list[str] = []
    use_cache(None, said.append)
    assert cache_folder() != read_only
    assert cache_folder().is_dir()
    (warning,) = said
    assert warning.startswith(f"warning: {read_only} cannot be written")
    assert warning.endswith("Name another folder with --cache DIR.")


def test_a_cache_that_was_named_and_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MergetuneError, match=r"given: must be a folder that can be written .*--cache DIR"):
        use_cache(tmp_path / "file" / "given", print)


def test_what_this_users_cache_has_is_found_though_another_is_written(
    tmp_path: Path, own_cache: Path
) -> None:
    (own_cache / "model").mkdir(parents=True)
    use_cache(tmp_path / "given", print)
    assert in_cache("model") == own_cache / "model"
    assert in_cache("kernel.so") == tmp_path / "given" / "kernel.so"


def test_a_check_ends_well_without_a_cache(tmp_path: Path, read_only: Path, tiny_base: Path) -> None:
    write_suite(tmp_path, ["a", "b", "c"])
    check = ["check", tiny_base, "--baseline", tiny_base, "--suite", tmp_path / "suite.yaml"]
    check += ["--engine", "transformers"]
    done = mergetune(*check)
    assert done.returncode in (0, 2), done.stderr
    assert done.stderr.count("warning: ") == 1
    assert "--cache DIR" in done.stderr
    kept = mergetune(*check, "--cache", tmp_path / "kept")
    assert "warning: " not in kept.stderr
    assert list((tmp_path / "kept" / "replies").glob("*.parquet"))
    again = mergetune(*check, "--store", tmp_path / "kept" / "replies")
    assert "0 items measured, 3 known before" in again.stderr


def test_a_store_that_cannot_be_written_is_an_error_before_any_work(tmp_path: Path, tiny_base: Path) -> None:
    write_suite(tmp_path, ["a", "b", "c"])
    (tmp_path / "file").write_text("")
    check = ["check", tiny_base, "--baseline", tiny_base, "--suite", tmp_path / "suite.yaml"]
    done = mergetune(*check, "--engine", "transformers", "--store", tmp_path / "file" / "store")
    assert done.returncode == 3
    assert "measured" not in done.stderr
    assert "store: must be a folder that can be written (Not a directory)" in done.stderr
    assert "Traceback" not in done.stderr
