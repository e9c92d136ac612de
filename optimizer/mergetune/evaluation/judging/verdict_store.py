"""Verdicts kept by the content of the question: what was judged once is never asked again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mergetune.evaluation.judging.verdicts import Verdict
from mergetune.files.atomic_files import sync
from mergetune.files.library import cache_folder, writable


@dataclass(frozen=True)
class VerdictStore:
    """A folder with a file per judge, to which verdicts are added as they come: JSON, one a line.

    Any number of processes may add. A line stands after its line break, so that one that was cut off, as by
    a power cut, takes no other with it; it is no JSON then, and is left out.
    """

    folder: Path

    def read(self, judge: str) -> dict[str, Verdict]:
        """Return a judge's verdicts by key; of several for one key the first stays."""
        file = self._file(judge)
        found: dict[str, Verdict] = {}
        for line in file.read_bytes().split(b"\n") if file.is_file() else ():
            try:
                row = json.loads(line)
                found.setdefault(row["key"], row["verdict"])
            except (ValueError, TypeError, KeyError):  # empty, cut off, or none of ours
                continue
        return found

    def add(self, judge: str, key: str, verdict: Verdict) -> None:
        """Keep a verdict; the disk holds it when this returns."""
        file, row = self._file(judge), json.dumps({"key": key, "verdict": verdict})
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            is_new = not file.exists()
            with file.open("ab", buffering=0) as lines:
                lines.write(b"\n" + row.encode())
                os.fsync(lines.fileno())
            if is_new:
                sync(self.folder)

    def _file(self, judge: str) -> Path:
        """Return a judge's file, whose name shows the model's."""
        digest = hashlib.sha256(judge.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', judge)[-80:]}-{digest}.jsonl"


def default_store() -> VerdictStore:
    """Return the store in this user's cache; raises `MergetuneError` where it cannot be written."""
    return VerdictStore(writable(cache_folder() / "verdicts", "--cache"))
