"""Calls the command line, each time in a process of its own, forked from this one.

What takes a new process seconds to import of other packages is imported here, once; `mergetune` itself is
imported by each call, in the order in which a user's process does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

PACKAGES = (
    *("altair", "datasets", "jinja2", "jsonschema", "moocore", "optuna.importance", "pandas", "pydantic"),
    *("pyarrow.parquet", "scipy.optimize", "scipy.stats", "sklearn.ensemble", "statsmodels.stats.power"),
    *("torch", "typer", "vl_convert"),
    *("lm_eval.api.task", "lm_eval.tasks", "lm_eval.models.utils", "rouge_score.rouge_scorer"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
)


def serve() -> dict[str, Any]:
    """Read calls from stdin and print their exit codes; returns a call in the process that shall make it."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            call: dict[str, Any] = json.loads(line)
            return call
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def become(call: dict[str, Any]) -> None:
    """Take on a call's arguments, folder, environment and files for what is printed."""
    sys.argv = ["mergetune", *call["arguments"]]
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(call[name], os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)


def run() -> NoReturn:
    """Run the command line, and end as it does.

    Of Python's end all is left out but what was asked for: with all that was imported it takes a second.
    """
    from mergetune.cli import main

    try:
        main()
    except SystemExit as ended:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended.code or 0))
    raise AssertionError("it always exits")


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # as the command line does, before anything is imported
    for package in PACKAGES:
        import_module(package)
    gc.freeze()
    become(serve())
    run()
