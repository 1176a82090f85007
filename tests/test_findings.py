"""What fuzzing found, tried again: each input ends as its file says, and breaks no promise.

A file is an input as ``tools/fuzzing/inputs.py`` has it, with "ends" ("done", or "refused: <code>" or the
beginning of it) and "story". Those with "open" are not mended yet, and are listed in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

from fuzzing import inputs, kinds, workers  # noqa: E402

FINDINGS = sorted((ROOT / "tests" / "corpus_findings").glob("*.json"))


def _marked(path: Path) -> Any:
    still = json.loads(path.read_text("utf-8")).get("open")
    marks = [pytest.mark.xfail(reason=still, run=False)] if still else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", map(_marked, FINDINGS))
def test_a_finding_is_no_fault_any_more(path: Path) -> None:
    data = json.loads(path.read_text("utf-8"))
    outcome = workers.apart(inputs.Input.from_json(data))
    assert outcome.faults == []
    assert outcome.ended.startswith(data["ends"])


def test_an_input_goes_through_json() -> None:
    """What is kept is what was tried, of every kind."""
    for kind in kinds.KINDS:
        for seed in range(3):
            given = workers.input_of(kind, seed)
            again = inputs.Input.from_json(json.loads(given.to_json()))
            assert again.files == given.files
            assert json.dumps(again.options) == json.dumps(given.options)
            assert workers.input_of(kind, seed).files == given.files, "not by its seed alone"


def _tried(**changed: Any) -> list[str]:
    """The faults of a conversion that is right, with something changed in it."""
    from corpus import base_file, sample

    files: dict[str, Any] = {"base.safetensors": base_file()}
    files |= {f"a/{k}": v for k, v in sample("peft-lora").files.items()}
    options = {"source": "in/a", "out": "out/x", "to": "peft", "base": "in/base.safetensors"}
    given = inputs.Input("adapters", 0, files, "convert", {**options, "check": True}, **changed)
    return workers.apart(given).faults


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another job in the place of a conversion."""
    from fuzzing import jobs

    return lambda function: monkeypatch.setitem(jobs.JOBS, "convert", function)


def test_a_right_result_is_no_fault() -> None:
    assert _tried() == []


@pytest.mark.parametrize("breach", [
    "wrong", "input", "escaped", "left", "internal", "error", "control", "traceback", "died", "memory",
    "descriptor", "exit",
])  # fmt: skip
def test_every_breach_of_a_promise_is_seen(job: Any, breach: str) -> None:
    """The trial can fail, in each of its ways."""
    job(lambda place, options: _BREACHES[breach](place.room, options))
    assert _tried() != []


def _scaled(room: Path, options: Any) -> None:
    """A conversion whose numbers are half as large as they should be."""
    from fuzzing import jobs

    config = room / "in" / "a" / "adapter_config.json"
    whole = config.read_bytes()
    config.write_bytes(whole.replace(b'"lora_alpha": 4', b'"lora_alpha": 2'))
    try:
        jobs.convert(jobs.Place(room), {**options, "check": False})
    finally:
        config.write_bytes(whole)
    jobs.oracle.same_changes(str(room / "in/a"), str(room / "out/x"), 0.0, False, None)


def _raise(error: BaseException) -> Any:
    raise error


def _refused(code: str, left: Path | None = None, what: str = "no") -> None:
    from adaptsurgery import SurgeryError

    if left:
        left.write_bytes(b"")
    error = SurgeryError(what, code=code)
    error.args = (what,)
    raise error


def _kept(open_files: list[Any]) -> None:
    open_files.append(open("/dev/null"))


_held: list[Any] = []
_BREACHES: dict[str, Any] = {
    "wrong": _scaled,
    "input": lambda room, _: (room / "in" / "base.safetensors").write_bytes(b"x") and None,
    "escaped": lambda room, _: (room / "escaped").mkdir(),
    "left": lambda room, _: _refused("bad-file", room / "out" / "x"),
    "internal": lambda room, _: _refused("internal-error"),
    "error": lambda room, _: _raise(TypeError("of no kind of ours")),
    "control": lambda room, _: print("\x1b[31m", file=sys.stderr),
    "traceback": lambda room, _: print("Traceback (most recent call last)", file=sys.stderr),
    "died": lambda room, _: os.kill(os.getpid(), signal.SIGKILL),
    "memory": lambda room, _: bytearray(200 << 20) and None,
    "descriptor": lambda room, _: _kept(_held),
    "exit": lambda room, _: sys.stdout.write("\x00") and None,
}  # fmt: skip
