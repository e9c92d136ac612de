"""Who does the work of a pool: one lane in this thread, or several side by side."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from mergetune.errors import EngineError
from mergetune.measuring.lane import Lane

T = TypeVar("T")


@dataclass(frozen=True)
class Done(Generic[T]):
    """What a lane has done: a piece of work, with the error that ended it.

    Without a piece the lane could not start its engine, and is gone.
    """

    piece: T | None
    error: BaseException | None = None


class Alone(Generic[T]):
    """One lane, which works in the thread that asks for what is done.

    Args:
        lane: the lane.
        work: does a piece in a lane.
    """

    size = 1
    has_lanes = False  # without its only one
    has_done = False  # what is not asked for yet

    def __init__(self, lane: Lane, work: Callable[[Lane, T], None]) -> None:
        self._lane, self._work = lane, work
        self._waiting: deque[T] = deque()

    def submit(self, piece: T) -> None:
        """Take a piece of work."""
        self._waiting.append(piece)

    def next(self) -> Done[T]:
        """Do a piece, or say why the engine cannot be started."""
        try:
            self._lane.living()
        except Exception as error:
            return Done(None, error)
        return _done(self._work, self._lane, self._waiting.popleft())

    def close(self) -> None:
        """End the engine."""
        self._lane.close()


class SideBySide(Generic[T]):
    """Takes pieces of work and gives them back as they are done, in any order.

    A lane takes a piece only when its engine runs, so that one that is still to come (a machine that joins
    late) holds nothing up. It takes one that suits it before others. An engine that breaks is replaced before
    its lane takes another piece.

    Args:
        lanes: the lanes.
        work: does a piece in a lane; called in the lane's thread.
        suits: says whether a lane has ready what a piece needs.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        work: Callable[[Lane, T], None],
        suits: Callable[[Lane, T], bool] = lambda _lane, _piece: False,
    ) -> None:
        self._lanes, self._work, self._suits = lanes, work, suits
        self._waiting: list[T] = []
        self._idle: list[Lane] = []
        self._changed = threading.Condition()
        self._done: SimpleQueue[Done[T]] = SimpleQueue()
        self._is_closed = False
        self._n_living, self._n_gone = 0, 0
        self._threads = [threading.Thread(target=self._run, args=[lane], daemon=True) for lane in lanes]
        for thread in self._threads:
            thread.start()

    @property
    def size(self) -> int:
        """How many lanes have a running engine; one at least, which may be on its way."""
        return max(self._n_living, 1)

    @property
    def has_lanes(self) -> bool:
        """Whether there are lanes that could be started, or may yet be."""
        return self._n_gone < len(self._lanes)

    def submit(self, piece: T) -> None:
        """Take a piece of work."""
        with self._changed:
            self._waiting.append(piece)
            self._changed.notify_all()

    @property
    def has_done(self) -> bool:
        """Whether `next` would return at once."""
        return not self._done.empty()

    def next(self) -> Done[T]:
        """Wait for a piece that is done, or a lane that is gone."""
        return self._done.get()

    def close(self) -> None:
        """Let no lane take another piece; whoever closes the engines ends what is under way."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the threads to end."""
        for thread in self._threads:
            thread.join(seconds)

    def _run(self, lane: Lane) -> None:
        while not self._is_closed:
            try:
                lane.living()
            except Exception as error:
                with self._changed:
                    self._n_gone += 1
                self._done.put(Done(None, error))
                return
            with self._changed:
                self._n_living += 1
            try:
                while (piece := self._take(lane)) is not None:
                    done = _done(self._work, lane, piece)
                    self._done.put(done)
                    if isinstance(done.error, EngineError):
                        break
            finally:
                with self._changed:
                    self._n_living -= 1

    def _take(self, lane: Lane) -> T | None:
        """Wait for a piece to do; None where the crew is closed."""
        with self._changed:
            self._idle.append(lane)
            self._changed.wait_for(lambda: self._is_closed or self._best(lane) is not None)
            self._idle.remove(lane)
            piece = None if self._is_closed else self._best(lane)
            if piece is not None:
                self._waiting.remove(piece)
            return piece

    def _best(self, lane: Lane) -> T | None:
        """Return the piece that a lane should take: one that suits it, else one that suits no idle lane."""
        others = [each for each in self._idle if each is not lane]
        own = (piece for piece in self._waiting if self._suits(lane, piece))
        free = (p for p in self._waiting if not any(self._suits(other, p) for other in others))
        return next(own, None) or next(free, None)


def _done(work: Callable[[Lane, T], None], lane: Lane, piece: T) -> Done[T]:
    """Do a piece of work; an engine that broke is ended."""
    try:
        work(lane, piece)
    except EngineError as error:
        lane.close()
        return Done(piece, error)
    except BaseException as error:
        return Done(piece, error)
    return Done(piece)
