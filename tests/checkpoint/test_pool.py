"""Workers: every job is done, or an error says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from adaptsurgery.checkpoint import pool
from adaptsurgery.checkpoint.pool import run


def jobs(done: list[int], count: int = 50) -> Iterator[Callable[[object], None]]:
    for n in range(count):
        yield lambda _, n=n: done.append(n)  # type: ignore[misc]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_every_job_is_done_once(workers: int) -> None:
    done: list[int] = []
    run(jobs(done), dict, workers)
    assert sorted(done) == list(range(50))
    run(iter(()), dict, workers)


def _boom(*_: object) -> None:
    raise OSError("no thread for you")


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("where", ["desk", "_alone", "job", "jobs", "exit"])
def test_whatever_fails_in_a_worker_is_raised(
    where: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[Callable[[object], None]]:
        yield from jobs([], 3)
        raise OSError("no more jobs")

    def gone(_: object) -> None:
        raise SystemExit

    if where == "_alone":
        monkeypatch.setattr(pool, "_alone", _boom)
    work = {"job": iter([_boom]), "jobs": broken(), "exit": iter([gone])}.get(where, jobs([]))
    with pytest.raises((OSError, SystemExit)):
        run(work, _boom if where == "desk" else dict, workers)


def test_a_worker_that_ends_without_a_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool._Line, "work", lambda self, desk: self._next())
    with pytest.raises(RuntimeError, match="0 of 2 jobs done"):
        run(jobs([]), dict, 2)


@pytest.mark.parametrize("startable", [0, 1, 3])
def test_threads_that_cannot_be_started_are_done_without(
    startable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = pool.threading.Thread.start, []

    def start(thread: pool.threading.Thread) -> None:
        if len(started) == startable:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(pool.threading.Thread, "start", start)
    done: list[int] = []
    run(jobs(done), dict, 8)
    assert sorted(done) == list(range(50)) and len(started) <= startable


def test_more_workers_than_there_is_work_are_not_made() -> None:
    done: list[int] = []
    run(jobs(done), dict, 1 << 64)
    assert sorted(done) == list(range(50))
