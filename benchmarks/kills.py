"""Kill a study with SIGKILL at random moments until it has ended, and look for what that lost.

    python benchmarks/kills.py --kills 100

A small study (random tiny Llamas, with warm start and holdout) is run by the command line in a process of its
own. It is killed after a random time, up to 6 s by default, and run again, until it was killed so often; then
it runs to its end. After each kill every measurement that was there before must be there still, byte for
byte, and no process be left that it started; at the end no candidate may be failed, none be counted twice,
and no shared memory or half-written file be left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import yaml
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import build_llama, fine_tune
from mergetune.results.run_dir import RunDir
from mergetune.study.search import CANDIDATE, journal

_COMPLETE = TrialState.COMPLETE
_SHARED_MEMORY = Path("/dev/shm")


def write_study(folder: Path, engine: str, trials: int) -> Path:
    """Write models, suite and study; returns the study file."""
    base = build_llama(folder / "base", head_dim=32)
    experts = {
        name: fine_tune(base, folder / name, seed, std=0.05) for seed, name in enumerate("ab", start=1)
    }
    items = "\n".join(f'{{"prompt": "Say {i}.", "answer": "{"aeiou"[i % 5]}"}}' for i in range(40))
    (folder / "items.jsonl").write_text(items)
    task = {"items": "items.jsonl", "scorer": "contains", "max_new_tokens": 8}
    suite = {
        "description": "x",
        "chat_template": True,
        "holdout": 0.3,
        "objectives": {"say": {"tasks": [task]}},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    space = {
        "description": "x",
        "method": "task_arithmetic",
        "lambda": {"low": 0.0, "high": 1.5},
        "groups": [{"name": "all"}],
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    study = {
        "base": str(base),
        "experts": {name: str(path) for name, path in experts.items()},
        "search_space": "space.yaml",
        "suite": "suite.yaml",
        "engine": {"kind": engine, **({"kv_cache_gib": 0.05, "max_length": 128} if engine == "vllm" else {})},
        "budget": {"trials": trials},
        "allow_flat_objectives": True,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def start(study: Path, out: Path) -> subprocess.Popen[bytes]:
    """Run the study in a process group of its own."""
    command = [sys.executable, "-m", "mergetune.cli", "run", str(study), "--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def measured(out: Path) -> dict[str, bytes]:
    """Return the measurements that are whole: those whose candidate was written, too."""
    found = (out / "candidates").glob("*.search.parquet")
    return {
        path.name: path.read_bytes()
        for path in found
        if path.with_name(path.name.replace(".search.parquet", ".json")).is_file()
    }


def check_lost(before: dict[str, bytes], out: Path) -> None:
    """Raise `AssertionError` if a measurement is gone or another one."""
    now = measured(out)
    changed = [name for name, content in before.items() if now.get(name) != content]
    assert not changed, f"lost or changed: {changed}"


def wait_until_gone(processes: list[psutil.Process], seconds: float = 20) -> None:
    """Raise `AssertionError` if one of these is alive after some time."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    left = [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"left running: {left}"


def main() -> None:
    """Kill so often, then check what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds before a kill, at most")
    parser.add_argument("--trials", type=int, default=1000, help="more than can be done between the kills")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place), Path(place) / "run"
        study = write_study(folder, arguments.engine, arguments.trials)
        shared = set(_SHARED_MEMORY.iterdir()) if _SHARED_MEMORY.is_dir() else set()
        n_kills, n_starting = 0, 0
        while n_kills < arguments.kills:
            before = measured(out)
            process = start(study, out)
            if n_kills % 3:  # past the start, which takes longest
                while not (out / "lock").exists() or not _is_at_work(out, process):
                    assert process.poll() is None, process.communicate()[1].decode()[-2000:]
                    time.sleep(0.05)
            else:
                n_starting += 1
            time.sleep(draw.uniform(0, arguments.longest))
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            wait_until_gone(family)
            check_lost(before, out)
            n_kills += 1
            print(f"\rkilled {n_kills} times, {len(measured(out))} candidates measured", end="", flush=True)
        print()
        n_known = sum(name.startswith("trial-") for name in measured(out))
        known = yaml.safe_load(study.read_text())
        study.write_text(yaml.safe_dump({**known, "budget": {"trials": n_known + 3}}))
        before = measured(out)
        last = start(study, out)
        _, said = last.communicate()
        assert last.returncode == 0, said.decode()[-2000:]
        check_lost(before, out)
        candidates = RunDir(out).candidates()
        search = optuna.load_study(study_name="mergetune", storage=journal(out / "study.journal"))
        told = Counter(each.user_attrs.get(CANDIDATE) for each in search.get_trials(states=[_COMPLETE]))
        failed = [c.name for c in candidates if c.state == "failed"]
        numbers = [c.number for c in candidates]
        assert len(set(numbers)) == len(numbers), "two candidates have one number"
        assert not failed, f"failed: {failed}"
        left = set(_SHARED_MEMORY.iterdir()) - shared if _SHARED_MEMORY.is_dir() else set()
        assert not left, f"shared memory left: {left}"
        assert (out / "best" / "config.json").is_file()
        assert not [p for p in out.iterdir() if p.name.startswith(".best.") or p.suffix == ".tmp"]
        assert set(told) == {c.name for c in candidates if c.params is not None}, "told what is not on disk"
        assert max(told.values()) == 1, f"told twice: {told.most_common(3)}"
        print(
            f"{n_kills} kills ({n_starting} while starting): {len(candidates)} candidates, none lost, failed "
            "or counted twice, no process and no shared memory left"
        )


def _is_at_work(out: Path, process: subprocess.Popen[bytes]) -> bool:
    """Say whether this process has begun to measure or has ended."""
    log = out / "run.log"
    began = psutil.Process(process.pid).create_time()
    return log.is_file() and log.stat().st_mtime > began


if __name__ == "__main__":
    main()
