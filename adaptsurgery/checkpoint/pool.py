"""A few threads that take jobs from one list until it is done, or one of them fails."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from adaptsurgery_formats.errors import SurgeryError

Desk = TypeVar("Desk")
_MOST = 1024  # threads; more have no core to run on anywhere


def run(jobs: Iterable[Callable[[Desk], object]], desk: Callable[[], Desk], workers: int) -> None:
    """Call every job, in about their order, on ``workers`` threads.

    A worker calls its jobs with what ``desk`` made for it: its own scratch memory. Jobs are taken
    one at a time, so that a generator makes them as they are needed. The first error ends all work
    and is raised here; a return means that every job was done. Inside, torch computes on one thread
    a worker.
    """
    line = _Line(iter(jobs))
    with _one_thread_each():
        if workers <= 1:
            line.work(desk)
        else:
            _in_threads(line, desk, workers)
    if line.errors:
        raise line.errors[0]
    if not line.finished:
        raise RuntimeError(f"a worker ended without a word; {line.done} of {line.taken} jobs done")


def _in_threads(line: _Line[Desk], desk: Callable[[], Desk], workers: int) -> None:
    threads: list[threading.Thread] = []
    try:
        _start(threads, line, desk, workers)
        if not threads:
            line.work(desk)
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C too ends the work before the files are closed
        line.ended = True
        for thread in threads:
            with suppress(RuntimeError):  # one that never started
                thread.join()


def _start(
    threads: list[threading.Thread], line: _Line[Desk], desk: Callable[[], Desk], workers: int
) -> None:
    """Start threads while there is work, fewer where memory or a limit of processes leaves fewer."""
    for _ in range(min(workers, _MOST)):
        if line.empty or line.errors:
            return
        thread = threading.Thread(target=line.work, args=(desk,))
        threads.append(thread)  # before it starts: an interrupt may come right after
        try:
            thread.start()
        except RuntimeError:
            threads.pop()
            return


class _Line(Generic[Desk]):
    """The jobs still to do, and what went wrong."""

    def __init__(self, jobs: Iterator[Callable[[Desk], object]]) -> None:
        self.jobs, self.lock = jobs, threading.Lock()
        self.errors: list[BaseException] = []
        self.taken = self.done = 0
        self.empty = self.ended = False

    @property
    def finished(self) -> bool:
        """Whether all jobs were taken, and all that were taken are done."""
        return self.empty and self.done == self.taken

    def work(self, desk: Callable[[], Desk]) -> None:
        try:
            _alone()
            mine = desk()
            while (job := self._next()) is not None:
                job(mine)
                with self.lock:
                    self.done += 1
        except BaseException as error:
            self.errors.append(error)
            self.ended = True

    def _next(self) -> Callable[[Desk], object] | None:
        with self.lock:
            job = None if self.ended else next(self.jobs, None)
            self.taken += job is not None
            self.empty |= job is None and not self.ended
            return job


def _alone() -> None:
    """Keep torch's own threads out of this one: they would spin beside the other workers."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch is not None else 0
    try:
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(before)


@contextmanager
def about(key: str) -> Iterator[None]:
    """Name a tensor in the errors of the work on it."""
    try:
        yield
    except SurgeryError as error:
        if f"`{key}" not in error.what:
            error.what = f"`{key}`: {error.what}"
        raise
    except Exception as error:
        error.add_note(f"in the work on `{key}`")
        raise
