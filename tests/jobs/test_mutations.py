"""Thousands of damaged inputs: each ends in a SurgeryError or in a right result, and cleanly.

Seeds are fixed, so a failure names the one input that shows it: ``mutant(seed)`` makes it again.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import base_file
from mutations import Mutant, mutant
from plain_delta import apart, changes
from unix import there

import adaptsurgery
from adaptsurgery import SurgeryError
from adaptsurgery_formats import patterns

SECONDS = 10  # for one conversion
TOLERANCE = 1e-5


class TooLong(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    if not there("signal.SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Trial:
    """One mutant in a folder of its own: converted, looked at, and swept away."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base

    def run(self, m: Mutant) -> str:
        """ "refused: <code>" or "converted"; raises AssertionError for anything else."""
        source, out = self.lay_out(m)
        before = _seen(self.folder / "in")
        options = dict(m.options)
        if options.get("base") == "base":
            options["base"] = self.base
        outcome = "converted"
        try:
            with limited(SECONDS):
                report = adaptsurgery.convert(source, out, **options)
        except SurgeryError as error:
            outcome = f"refused: {error.code}"
            _check_message(error)
            assert error.code != "not-equal", f"{error}: only a bug gets here"
            assert not os.listdir(out.parent), "something was left behind"
        assert _seen(self.folder / "in") == before, "the source was touched"
        if outcome == "converted":
            _check_right(source, out, report, folded="algorithm" in m.options)
        return outcome

    def lay_out(self, m: Mutant) -> tuple[Path, Path]:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "out").mkdir(parents=True)
        (self.folder / "in").mkdir()
        for name, data in m.files.items():
            (self.folder / "in" / name).write_bytes(data)
        name = "result" if m.options["to"] == "peft" else "result.safetensors"
        return self.folder / "in" / m.sample.path, self.folder / "out" / name


def _seen(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def _check_message(error: SurgeryError) -> None:
    text = str(error)
    assert error.code and error.what
    stray = [c for c in text if c != "\n" and not c.isprintable()]
    assert not stray, f"control characters reach the terminal: {stray[:5]}"
    assert len(text) < 8000, "a message longer than a screen"


def _check_right(source: Path, out: Path, report: Any, folded: bool) -> None:
    """ΔW of both files by the oracle; where the report owns up to a loss, just that loss.

    What is not finite may only have been copied, which the report then tells: the two ΔW have it in
    the same places, and agree in all others.
    """
    finite = all(note.code != "nonfinite-copied" for note in report.notes)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        before, after = (changes(path, folded, finite=finite) for path in (source, out))
        assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())
        allowed = TOLERANCE + 1.01 * report.max_error
        for name, change in before.items():
            if folded and np.linalg.norm(change) < 1e-12:
                continue  # a rotation by nothing: W' − W is float64's rounding of W
            error = apart(*_where_finite(change, after[name]))
            assert error <= allowed, f"{name}: off by {error:.3g}, {allowed:.3g} reported"


def _where_finite(one: Any, other: Any) -> tuple[Any, Any]:
    """Two arrays with zeros where neither is finite, as they are where one alone is not."""
    if one.shape != other.shape or np.isfinite(one).all():
        return one, other
    both = ~np.isfinite(one) & ~np.isfinite(other)
    return np.where(both, 0, one), np.where(both, 0, other)


def run_all(folder: Path, seeds: range) -> tuple[Counter[str], list[str]]:
    """Outcomes counted, and what went wrong by its seed."""
    base = folder / "base.safetensors"
    base.write_bytes(base_file())
    trial = Trial(folder / "trial", base)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in seeds:
        m = mutant(seed)
        try:
            outcomes[trial.run(m)] += 1
        except (Exception, TooLong) as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(at.filename).name}:{at.lineno}"
            outcomes["WRONG"] += 1
            wrong.append(f"{type(error).__name__} at {place}: {str(error)[:200]} ({m.story})")
    return outcomes, wrong


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_SECONDS", 1.0)
    outcomes, wrong = run_all(tmp_path, seeds)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(seeds)}:", *wrong[:20]])
    assert outcomes["converted"] > len(seeds) // 20, outcomes  # else the damage is too coarse
    assert len(outcomes) > 20, outcomes


@pytest.mark.parametrize("block", range(5))
def test_mutants_are_refused_or_converted_rightly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    _run(tmp_path, monkeypatch, range(block * 500, (block + 1) * 500))


def test_inspect_and_verify_refuse_as_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both only read; and no file differs from itself."""
    monkeypatch.setattr(patterns, "TIMEOUT_SECONDS", 1.0)
    trial = Trial(tmp_path / "trial", tmp_path / "base.safetensors")
    trial.base.write_bytes(base_file())
    for seed in range(500_000, 500_400):
        m = mutant(seed)
        source, _ = trial.lay_out(m)
        for job in (adaptsurgery.inspect, partial(adaptsurgery.verify, source)):
            try:
                with limited(SECONDS):
                    job(source, base=trial.base)
            except SurgeryError as error:
                _check_message(error)
                assert error.code != "not-equal", m.story


@pytest.mark.slow
@pytest.mark.parametrize("block", range(5))
def test_many_more_mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    start = 1_000_000 + block * 5000
    _run(tmp_path, monkeypatch, range(start, start + 5000))


if __name__ == "__main__":  # python tests/jobs/test_mutations.py FOLDER START STOP
    found, failures = run_all(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])))
    print(*failures, sep="\n")
    print(*found.most_common(), sep="\n")
