"""Measurements kept by content: what was asked of which model is never asked again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock

from optimizer.library import cache_folder
from optimizer.run_dir import readable, write_parquet


def no_answers() -> pd.DataFrame:
    """Return a table of answers without any: key, score, response."""
    return pd.DataFrame({"key": [], "score": [], "response": []}).astype({"key": str, "response": str})


def default_store() -> MeasurementStore:
    """Return the store in this user's cache."""
    return MeasurementStore(cache_folder() / "measurements")


@dataclass(frozen=True)
class MeasurementStore:
    """A folder with a file per model: the score and the response to each item, by the item's key.

    A model's name here is a digest of all that its answers depend on; an item's key is one of what is
    asked and how it is scored (`Evaluator.keys`). A file is replaced as a whole, so that a process that
    is killed leaves what was there before.
    """

    folder: Path

    def read(self, model: str) -> pd.DataFrame:
        """Return what is known of a model: key, score, response."""
        file = self._file(model)
        with readable(file):
            return pd.read_parquet(file) if file.is_file() else no_answers()

    def add(self, model: str, answers: pd.DataFrame) -> None:
        """Keep further answers of a model: key, score, response."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{model}.lock"):
            both = pd.concat([self.read(model), answers], join="inner")
            write_parquet(self._file(model), both.drop_duplicates("key", keep="first"))

    def _file(self, model: str) -> Path:
        return self.folder / f"{model}.parquet"
