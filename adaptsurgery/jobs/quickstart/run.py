"""The main job, end to end: a model, four adapters of it, around the layouts and back, compared.

The work is the list STEPS; what comes later joins it there. Every conversion is the public
function's, and is told as the command that would do the same.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.jobs.adapter import Adapter, load
from adaptsurgery.jobs.convert import convert
from adaptsurgery.jobs.loading import CONFIG, WEIGHTS, read_config
from adaptsurgery.jobs.quickstart import extracting, given, graphs, making, tiny
from adaptsurgery.jobs.quickstart.making import Made
from adaptsurgery.jobs.report import Report, Row
from adaptsurgery.jobs.verify import verify
from adaptsurgery_formats.errors import FileError, SurgeryError
from adaptsurgery_formats.tensors import same_bytes
from adaptsurgery_formats.traits import named, title_of

AGREE = 1e-4  # of the adapter's own effect on the output, up to which two forms of it agree
MODEL = "model.safetensors"
TUNED = "tuned.safetensors"
BASE_STEPS, ADAPTER_STEPS, TUNING_STEPS = 240, 40, 60
Tell = Callable[[str], object]


@dataclass
class Work:
    """What the steps share: ``files`` is where they write, ``base`` the user's model if any."""

    files: Path
    base: str | None
    seed: int
    tell: Tell
    trained: tiny.TinyModel | None = None
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
        """``adaptsurgery.convert``, told as the command."""
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
    seed: int = 0,
    tell: Tell = lambda _: None,
) -> Report:
    """Train a small model and adapters of it, convert them around, extract others, and compare.

    The files stay in ``folder``, which must be new or empty; without one they are removed. With a
    ``base`` adapters are made for some layers of that model. ``tell`` gets each line of text as
    the work goes on. What does not agree is in ``facts["failed"]``. Raises FileError
    ("output-exists") for a folder that holds something, and SurgeryError for a base that cannot be
    used.
    """
    with _place(folder) as files, _one_thread():
        work = Work(files, None if base is None else os.fspath(base), seed, tell)
        for step in STEPS:
            step(work)
        return _report(work, folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small products: more threads only wait for each other."""
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
    """A model and four adapters of it, written as PEFT folders."""
    if work.base is None:
        _adapters_of_tiny(work)
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
        work.tell(f"  {made.name + '/':<6} {_said(made)}")
        better = made.before is None or (made.after or 0) < made.before
        work.expect(better, f"{made.name}: the loss did not fall")


def _said(made: Made) -> str:
    size = f"{made.numbers:,} numbers on {len(made.updates)} layers, rank {made.recipe.rank}"
    size += f", alpha {made.recipe.alpha:g}" if made.recipe.alpha is not None else ""
    size += f"; ‖ΔW‖ = {made.moved:.1%} of ‖W‖"
    if made.before is None or made.after is None:
        return size
    return f"{size}; {made.before:.2f} → {made.after:.2f} bits per byte"


def _adapters_of_tiny(work: Work) -> None:
    work.title("Train a small language model on English: the docstrings of Python's library")
    model = tiny.trained(BASE_STEPS, work.seed)
    extracting.save(model, work.files / MODEL)
    work.trained = model
    numbers = sum(p.numel() for p in model.parameters())
    english, code = (tiny.measured(model, t, {}) for t in (tiny.prose(), tiny.unseen_code()))
    work.tell(
        f"  {MODEL}: {numbers:,} numbers, {BASE_STEPS} steps; a byte of English takes it "
        f"{english:.2f} bits, of Python code {code:.2f}"
    )
    work.facts["model"] = {
        "where": MODEL, "numbers": numbers, "loss_english": english, "loss_code": code
    }  # fmt: skip
    work.title("Teach it code with adapters (the library's code; measured on modules not taught)")
    for number, recipe in enumerate(making.RECIPES):
        work.adapters.append(making.train(model, recipe, ADAPTER_STEPS, work.seed + number))


def _adapters_of_given(work: Work, base: str) -> None:
    work.title(f"Look at MODEL, {base}")
    found = given.look_at(base)
    work.tell(f"  {len(found.weights)} of its {found.layers} layers: {', '.join(found.weights)}")
    work.facts["model"] = {"where": found.where, "layers": list(found.weights)}
    work.title("Make adapters for them: random directions, not trained, of a few per cent of ‖W‖")
    for number, recipe in enumerate(making.RECIPES):
        work.adapters.append(making.make(recipe, found.weights, work.seed + number))


def around(work: Work) -> None:
    """PEFT → kohya → LyCORIS → PEFT, for every adapter that kohya's layout can hold."""
    for made in work.adapters:
        if made.name != "hra":
            work.title(f"{_title(made)}: PEFT → kohya → LyCORIS → PEFT")
            _around(work, made, made.name)


def refusal(work: Work) -> None:
    """What cannot be said is refused, and leaves nothing behind."""
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
    """LoHa, LoKr and HRA as a LoRA each, exactly; HRA's then goes around."""
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


def extraction(work: Work) -> None:
    """The same code taught to the whole model; each kind of adapter out of the two checkpoints."""
    model = work.trained
    if model is None:
        return
    work.title("Teach the code to all of the model's weights, and get adapters out of that")
    tuned = extracting.tuned(model, TUNING_STEPS, work.seed)
    extracting.save(tuned, work.files / TUNED)
    losses = [tiny.measured(m, tiny.unseen_code(), {}) for m in (model, tuned)]
    work.tell(f"  {TUNED}: {losses[0]:.2f} → {losses[1]:.2f} bits per byte")
    found = []
    for algorithm in named(lambda row: row.extracts):
        out = f"extracted-{algorithm}"
        words = ["extract", MODEL, TUNED, "-o", out, "--algorithm", algorithm]
        words += ["--budget", str(extracting.BUDGET)]
        work.tell(f"$ adaptsurgery {shlex.join(words)}")
        base, fine = work.files / MODEL, work.files / TUNED
        told = extracting.extracted(base, fine, work.files / out, algorithm)
        work.tell(_extracted(told))
        off = abs(told["error_merged"] - told["error"])
        work.expect(off <= extracting.TOLD * told["error"], f"{out}: merged it has another error")
        work.expect(told["loss"] < losses[0], f"{out}: it has nothing of the fine-tune")
        found.append(told)
    work.facts["extracted"] = {"before": losses[0], "after": losses[1], "adapters": found}


def _extracted(told: dict[str, Any]) -> str:
    return (
        f"  {told['parameters']:,} parameters on {told['layers']} layers, {told['layers_error']:.2f} of "
        f"their change lost; merged back: weights off by {told['error_merged']:.2f} of the change, "
        f"outputs by {told['output_error']:.2f}, {told['loss']:.2f} bits per byte"
    )


def exported(work: Work) -> None:
    """An adapter put into the exported model, which then needs no source."""
    if work.trained is None:
        return
    work.title("Export the model by torch.export, and put the LoKr into the program")
    made = next(made for made in work.adapters if made.name == "lokr")
    found = graphs.exported(work.trained, made, work.files, work.seed, work.tell)
    work.facts["programs"] = found
    for name, off in found.items():
        work.expect(off <= AGREE, f"{name}: its outputs are off by {off:.2g}")
        work.tell(f"  {name}: outputs differ by {off:.1g} of the adapter's effect")


STEPS: tuple[Callable[[Work], None], ...] = (
    adapters, around, refusal, as_lora, extraction, exported
)  # fmt: skip


# -- Comparing -------------------------------------------------------------------------------------


def _around(work: Work, made: Made, source: str) -> None:
    """An adapter around the layouts, verified at each hop, with its bytes and its outputs."""
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
        and all(same_bytes(t, theirs[key]) and t.shape == theirs[key].shape for key, t in mine.items())
        and read_config(first / CONFIG) == read_config(second / CONFIG)
    )  # fmt: skip


def _compare_outputs(work: Work, made: Made, name: str) -> float:
    """How far outputs with a converted adapter are from those with the one in memory.

    Of the difference that the adapter makes at all.
    """
    adapter = load(work.path(name), base=work.model)
    updates = {m.label: adapter[path] for path in adapter for m in adapter.modules(path)}
    found = made.probe({label: updates[label] for label in made.updates})
    wanted = made.probe(made.updates)
    plain = made.probe(_no_updates(made))
    effect = max(float((w - p).abs().max()) for w, p in zip(wanted, plain))
    off = max(float((f - w).abs().max()) for f, w in zip(found, wanted)) / effect
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
