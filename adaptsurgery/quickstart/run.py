"""The main job, end to end: a model, four adapters of it, around the layouts and back, compared.

The work is the list STEPS; what comes later joins it there. Every conversion is the public
function's, and is shown as the command that would do the same.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptsurgery.adapters.adapter import Adapter, load
from adaptsurgery.adapters.loading import CONFIG, WEIGHTS, read_config
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.jobs.convert import convert
from adaptsurgery.jobs.verify import verify
from adaptsurgery.quickstart import extracting, given, graphs, making, minilm, tiny
from adaptsurgery.quickstart.making import Made
from adaptsurgery.quickstart.students import Student
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.paths import check_text
from adaptsurgery_formats.tensors import same_bytes
from adaptsurgery_formats.traits import named, title_of

RESTORED = 1e-6  # of ‖W‖, up to which an adapter comes out of a float32 checkpoint again
AGREE = 1e-4  # of the adapter's own effect on the output, up to which two forms of it agree
MODEL = "model.safetensors"
TUNED = "tuned.safetensors"
BASE_STEPS = 240  # of the small model's own training
Tell = Callable[[str], object]


@dataclass
class Work:
    """What the steps share: ``files`` is where they write, ``base`` the user's model if any.

    ``real`` is the folder of the installed MiniLM, None where the small made model stands in.
    """

    files: Path
    base: str | None
    seed: int
    tell: Tell
    real: Path | None = None
    student: Student | None = None
    adapters: list[Made] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def title(self, text: str) -> None:
        self.tell(f"\n[{time.monotonic() - self.started:4.1f} s] {text}")

    def expect(self, fine: bool, what: str) -> None:
        """Note what did not agree; the work goes on, and the verdict says so."""
        if not fine:
            self.failed.append(what)
            self.tell(f"  DOES NOT AGREE: {what}")

    def path(self, name: str) -> str:
        """A file of the quickstart's, where it really is."""
        return str(self.files / name)

    @property
    def model(self) -> str:
        return self.path(MODEL) if self.base is None else self.base

    def convert(self, source: str, to: str, out: str, *, as_lora: bool = False) -> Report:
        """Call ``adaptsurgery.convert``, and show it as the command."""
        shown = MODEL if self.base is None else "MODEL"
        words = ["convert", source, "--to", to, "-o", out, "--base", shown]
        words += ["--as", "lora"] if as_lora else []
        self.tell(f"$ adaptsurgery {shlex.join(words)}")
        algorithm = "lora" if as_lora else None
        report = convert(
            self.path(source), self.path(out), to, base=self.model, algorithm=algorithm
        )
        self.tell(f"  {report.verdict}")
        return report

    def verify(self, first: str, second: str) -> float:
        """The largest relative difference in ΔW; not equal is noted, not raised."""
        try:
            return verify(self.path(first), self.path(second), base=self.model).max_error
        except SurgeryError as error:
            self.expect(False, f"{first} and {second}: {error.what} ({error.seen})")
            return float("inf")


def quickstart(
    folder: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    small: bool = False,
    seed: int = 0,
    tell: Tell = lambda _: None,
) -> Report:
    """Train adapters of a model, convert and merge them around, extract others, and compare.

    The model is MiniLM where it is installed (the extra ``demo``) and ``small`` is False; else a
    small one that is trained on the spot. The files stay in ``folder``, which must be new or empty;
    without one they are removed. With a ``base`` adapters are made for some layers of that model. ``tell`` gets each line of text as
    the work goes on. What does not agree is in ``facts["failed"]``. Raises FileError
    ("output-exists") for a folder that holds something, and SurgeryError for a base that cannot be
    used.
    """
    real = None if small else minilm.folder()
    with _place(folder) as files, nullcontext() if real and base is None else _one_thread():
        work = Work(files, None if base is None else os.fspath(base), seed, tell, real)
        for step in STEPS:
            step(work)
        return _report(work, folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the block on one thread: for its small products more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _place(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder to work in: the user's, emptied again after a failure, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="adaptsurgery-") as name:
            yield Path(name)
        return
    check_text(folder)
    place = Path(folder)
    there = os.path.lexists(place)
    try:
        if there and (not place.is_dir() or any(place.iterdir())):
            raise FileError(
                "this is no empty folder",
                where=str(place),
                next="name a new or an empty one",
                code="output-exists",
            )
        place.mkdir(parents=True, exist_ok=there)
    except OSError as error:
        raise as_file_error(error, str(place), writing=True) from error
    try:
        yield place
    except BaseException:
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not there:
            place.rmdir()
        raise


# -- The steps -------------------------------------------------------------------------------------


def adapters(work: Work) -> None:
    """Write a model and four adapters of it, as PEFT folders."""
    if work.base is None:
        _adapters_of_student(work)
    else:
        _adapters_of_given(work, work.base)
    for made in work.adapters:
        adapter = Adapter.from_updates(made.updates, base=work.model)
        adapter.save(work.path(made.name), "peft")
        work.results[made.name] = {
            "algorithm": made.name,
            "rank": made.recipe.rank,
            "alpha": made.recipe.alpha,
            "modules": len(made.updates),
            "numbers": made.numbers,
            "bytes": (work.files / made.name / WEIGHTS).stat().st_size,
            "loss_before": made.before,
            "loss_after": made.after,
            "moved": made.moved,
            "error": 0.0,
        }
        work.tell(f"  {made.name + '/':<6} {_said(made, work.student)}")
        better = made.before is None or (made.after or 0) < made.before
        work.expect(better, f"{made.name}: the loss did not fall")


def _said(made: Made, student: Student | None) -> str:
    size = f"{made.numbers:,} numbers on {len(made.updates)} layers, rank {made.recipe.rank}"
    size += f", alpha {made.recipe.alpha:g}" if made.recipe.alpha is not None else ""
    size += f"; ‖ΔW‖ = {made.moved:.1%} of ‖W‖"
    if made.before is None or made.after is None or student is None:
        return size
    return f"{size}; {made.before:.2f} → {made.after:.2f} {student.unit}"


def _adapters_of_student(work: Work) -> None:
    student = work.student = _small(work) if work.real is None else _real(work, work.real)
    student.write(work.files / MODEL)
    numbers = sum(p.numel() for p in student.module.parameters())
    before = student.measured({})
    work.tell(
        f"  {MODEL}: {numbers:,} numbers; to {student.task} takes it {before:.2f} {student.unit}"
    )
    work.facts["model"] = {
        "where": MODEL,
        "name": "small" if work.real is None else minilm.NAME,
        "numbers": numbers,
        "loss": before,
        "unit": student.unit,
    }
    work.title(f"Teach it to {student.task}, by adapters; measured on text that is not taught")
    for number, recipe in enumerate(making.RECIPES):
        work.adapters.append(making.train(student, recipe, work.seed + number))


def _real(work: Work, home: Path) -> Student:
    work.title(f"Take {minilm.NAME}, a real model that is installed here")
    return minilm.Student.read(home / minilm.WEIGHTS)


def _small(work: Work) -> Student:
    work.title("Train a small language model on English: the docstrings of Python's library")
    return tiny.Student(tiny.trained(BASE_STEPS, work.seed))


def _adapters_of_given(work: Work, base: str) -> None:
    work.title(f"Look at MODEL, {base}")
    model = given.look_at(base)
    work.tell(f"  {len(model.weights)} of its {model.layers} layers: {', '.join(model.weights)}")
    work.facts["model"] = {"where": model.where, "layers": list(model.weights)}
    work.title("Make adapters for them: random directions, not trained, of a few per cent of ‖W‖")
    for number, recipe in enumerate(making.RECIPES):
        work.adapters.append(making.make(recipe, model.weights, work.seed + number))


def around(work: Work) -> None:
    """Convert PEFT → kohya → LyCORIS → PEFT, for every adapter that kohya's layout can hold."""
    for made in work.adapters:
        if made.name != "hra":
            work.title(f"{_title(made)}: PEFT → kohya → LyCORIS → PEFT")
            _around(work, made, made.name)


def refusal(work: Work) -> None:
    """Show that what a layout has no place for is refused, and leaves nothing behind."""
    work.title("HRA turns W and adds nothing: no other layout has a place for it")
    out = "hra-kohya.safetensors"
    try:
        work.convert("hra", "kohya", out)
        work.expect(False, "hra to kohya was not refused")
    except SurgeryError as error:
        work.tell(f"  error[{error.code}]: {error.what}")
        work.tell(f"  next: {error.next}" if error.next else "")
        work.facts["refused"] = error.code
    work.expect(not os.path.lexists(work.path(out)), "the refused conversion left a file behind")


def as_lora(work: Work) -> None:
    """Write LoHa, LoKr and HRA as a LoRA each, exactly; HRA's then goes around the layouts."""
    work.title("Each as a LoRA, for whatever loads nothing else")
    for made in work.adapters:
        if made.name == "lora":
            continue
        out = f"{made.name}-as-lora"
        report = work.convert(made.name, "peft", out, as_lora=True)
        result = work.results[made.name]
        off = max(report.max_error, work.verify(made.name, out))
        result["lora_ranks"] = sorted({m.rank or 0 for m in _modules(work, out)})
        result["lora_error"] = off
        result["lora_output"] = _compare_outputs(work, made, out)
        if made.name == "hra":
            work.tell("  … which goes around")
            _around(work, made, out)


def merging(work: Work) -> None:
    """Merge every adapter into the checkpoint, and take it out again."""
    student = work.student
    if student is None:
        return
    work.title("Merge each into the checkpoint, and take it out again")
    for made in work.adapters:
        inside, outside = f"{made.name}-in.safetensors", f"{made.name}-out.safetensors"
        work.tell(f"$ adaptsurgery merge {MODEL} {made.name} -o {inside}")
        work.tell(f"$ adaptsurgery unmerge {inside} {made.name} -o {outside}")
        off = extracting.merged(student, made, work.files / MODEL, work.files / made.name)
        work.results[made.name] |= {"merged_output": off["output"], "unmerged": off["back"]}
        work.expect(off["output"] <= AGREE, f"{inside}: its outputs are off by {off['output']:.2g}")
        work.expect(off["back"] <= RESTORED, f"{outside}: off by {off['back']:.2g} of the weights")
        work.tell(
            f"  merged, its outputs differ by {off['output']:.1g} of the adapter's effect; "
            f"taken out, its weights by {off['back']:.1g} of ‖W‖"
        )


def extraction(work: Work) -> None:
    """Teach the model's own weights the same, and extract each kind of adapter from the two."""
    before = work.student
    if before is None:
        return
    work.title("Teach the same to the model's own weights, and get adapters out of that")
    after = before.tuned(work.seed)
    after.write(work.files / TUNED)
    losses = [student.measured({}) for student in (before, after)]
    work.tell(f"  {TUNED}: {losses[0]:.2f} → {losses[1]:.2f} {before.unit}")
    results = []
    for algorithm in named(lambda row: row.extracts):
        out = f"extracted-{algorithm}"
        words = ["extract", MODEL, TUNED, "-o", out, "--algorithm", algorithm]
        words += ["--budget", str(before.budget)]
        work.tell(f"$ adaptsurgery {shlex.join(words)}")
        base, fine = work.files / MODEL, work.files / TUNED
        result = extracting.extracted(before, after, base, fine, work.files / out, algorithm)
        work.tell(_extracted(result, before.unit))
        off = abs(result["error_merged"] - result["error"])
        work.expect(off <= extracting.TOLD * result["error"], f"{out}: merged it has another error")
        work.expect(result["loss"] < losses[0], f"{out}: it has nothing of the fine-tune")
        results.append(result)
    work.facts["extracted"] = {"before": losses[0], "after": losses[1], "adapters": results}


def _extracted(result: dict[str, Any], unit: str) -> str:
    return (
        f"  {result['parameters']:,} parameters on {result['layers']} layers, "
        f"{result['layers_error']:.2f} of their change lost; merged back: weights off by "
        f"{result['error_merged']:.2f} of the change, outputs by {result['output_error']:.2f}, "
        f"{result['loss']:.2f} {unit}"
    )


def exported(work: Work) -> None:
    """Put an adapter into the exported model, which then needs no source."""
    if work.student is None:
        return
    work.title("Export the model by torch.export, and put the LoKr into the program")
    made = next(made for made in work.adapters if made.name == "lokr")
    differences = graphs.exported(work.student, made, work.files, work.tell)
    work.facts["programs"] = differences
    for name, off in differences.items():
        work.expect(off <= AGREE, f"{name}: its outputs are off by {off:.2g}")
        work.tell(f"  {name}: outputs differ by {off:.1g} of the adapter's effect")


STEPS: tuple[Callable[[Work], None], ...] = (
    adapters,
    around,
    refusal,
    as_lora,
    merging,
    extraction,
    exported,
)


# -- Comparing -------------------------------------------------------------------------------------


def _around(work: Work, made: Made, source: str) -> None:
    """Take an adapter around the layouts, and verify each hop, its bytes and its outputs."""
    result = work.results[made.name]
    hops = [
        ("kohya", f"{source}-kohya.safetensors"),
        ("lycoris", f"{source}-lycoris.safetensors"),
        ("peft", f"{source}-back"),
    ]
    at, identical, off = source, True, 0.0
    for layout, out in hops:
        report = work.convert(at, layout, out)
        identical &= all(row.change == "identical" for row in report.rows)
        off = max(off, report.max_error, work.verify(source, out))
        at = out
    back = _same_files(work.files / source, work.files / at)
    result |= {"around": source, "hops_identical": identical, "bytes_back": back}
    result["error"] = off
    result["output"] = _compare_outputs(work, made, at)
    work.expect(identical and back, f"{source}: not the bytes that went out came back")
    if identical and back:
        work.tell(
            f"  {at}/ holds the tensors and the config of {source}/, bit for bit; "
            f"outputs differ by {result['output']:.1g} of the adapter's effect"
        )


def _same_files(first: Path, second: Path) -> bool:
    """Whether two PEFT folders hold the same tensors and the same config."""
    mine, theirs = (read_safetensors(folder / WEIGHTS).tensors for folder in (first, second))
    return (
        mine.keys() == theirs.keys()
        and all(
            same_bytes(t, theirs[key]) and t.shape == theirs[key].shape for key, t in mine.items()
        )
        and read_config(first / CONFIG) == read_config(second / CONFIG)
    )


def _compare_outputs(work: Work, made: Made, name: str) -> float:
    """How far outputs with a converted adapter are from those with the one in memory.

    It is a share of the difference that the adapter makes at all.
    """
    adapter = load(work.path(name), base=work.model)
    updates = {m.label: adapter[path] for path in adapter for m in adapter.modules(path)}
    outputs = made.probe({label: updates[label] for label in made.updates})
    wanted = made.probe(made.updates)
    plain = made.probe(_no_updates(made))
    effect = max(float((w - p).abs().max()) for w, p in zip(wanted, plain))
    off = max(float((f - w).abs().max()) for f, w in zip(outputs, wanted)) / effect
    work.expect(off <= AGREE, f"{name}: its outputs are off by {off:.2g}")
    return off


def _no_updates(made: Made) -> making.Updates:
    """Updates of the same layers that do nothing."""
    return {path: making.nothing(update) for path, update in made.updates.items()}


def _modules(work: Work, name: str) -> list[Any]:
    adapter = load(work.path(name), base=work.model)
    return [module for path in adapter for module in adapter.modules(path)]


def _title(made: Made) -> str:
    return title_of(made.name)


# -- The end ---------------------------------------------------------------------------------------


def _report(work: Work, folder: str | os.PathLike[str] | None) -> Report:
    results = list(work.results.values())
    rows = [
        Row(r["algorithm"], r["algorithm"], "rounded" if r["error"] else "identical", r["error"])
        for r in results
    ]
    seconds = time.monotonic() - work.started
    verdict = f"all {len(results)} adapters agree in every layout that holds them"
    if work.failed:
        verdict = f"{len(work.failed)} things do not agree: {work.failed[0]}"
    outputs = sorted(p.name for p in work.files.iterdir()) if folder is not None else []
    facts = {
        **work.facts,
        "folder": os.fspath(folder) if folder is not None else None,
        "adapters": results,
        "failed": work.failed,
        "seconds": round(seconds, 1),
    }
    return Report("quickstart", verdict, rows, outputs=outputs, facts=facts)
