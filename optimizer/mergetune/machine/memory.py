"""Memory: whether there is enough, and work in smaller parts where there is not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import psutil

from mergetune.errors import MergetuneError

T = TypeVar("T")

_FEWER_TOKENS = (1024, 256, 1)  # in one batch; the last is a text at a time
_GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory was too small; on a CPU torch raises a plain `RuntimeError` then."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give freed memory back to other processes and libraries.

    What an exception's traceback refers to is not free before that exception was handled.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_smaller_batches(work: Callable[[int], T], say: Callable[[str], object]) -> T:
    """Do some work in batches of so many tokens; where memory is too small, again in smaller ones.

    Raises:
        MergetuneError: not even a text at a time fits.
    """
    for n_tokens in _FEWER_TOKENS:
        try:
            return work(n_tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
        free_memory()
        if n_tokens > 1:
            say(f"memory is too small for batches of {n_tokens} tokens: again with smaller ones")
    raise MergetuneError(
        f"Memory is too small for one text at a time ({reason}). Slopes take the model, its largest gradient "
        "and the activations of one text: take a device with more, or shorter items."
    )


def check_room(what: str, needed: int, device: str) -> None:
    """Raise `MergetuneError` if a device has less free memory than is needed, in bytes."""
    free = free_bytes(device)
    if needed > free:
        raise MergetuneError(
            f"{what}: its weights alone need {needed / _GIB:.1f} GiB of memory, but {free / _GIB:.1f} GiB "
            f"are free on `{device}`. Take another `engine.device`, a smaller `engine.dtype`, or end what "
            "else takes memory there."
        )


def free_bytes(device: str) -> int:
    """Return the free memory of a device; what torch keeps for itself counts as free."""
    import torch

    place = torch.device(device)
    if place.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(place)
    return int(free) + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
