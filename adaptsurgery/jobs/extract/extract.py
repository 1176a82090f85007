"""The call that users make: two checkpoints in, an adapter out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint.atomic import sync_folder
from adaptsurgery.checkpoint.base import Base
from adaptsurgery.jobs.apart import keep_apart
from adaptsurgery.jobs.convert import CARD, check_paths, writable, write_adapter
from adaptsurgery.jobs.extract import summary
from adaptsurgery.jobs.extract.options import Options, check_options
from adaptsurgery.jobs.extract.pairs import pair_up
from adaptsurgery.jobs.extract.plan import ExtractPlan, build_plan
from adaptsurgery.jobs.extract.run import Place, Progress, Results, Runner, check, made, results
from adaptsurgery.jobs.inputs import check_part, open_base, refuse_pickles
from adaptsurgery.jobs.loading import Loaded
from adaptsurgery.jobs.partial import GoneError
from adaptsurgery.jobs.report import Report
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import SurgeryError, ValueRefused
from adaptsurgery_formats.names import names_of_base
from adaptsurgery_formats.resolve import resolve

Named = str | os.PathLike[str]


def extract(
    base: Named,
    tuned: Named,
    out: Named,
    *,
    algorithm: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: int | None = None,
    to: str = "peft",
    factor: int | None = None,
    decompose_both: bool = False,
    conv_rank: int | None = None,
    tucker: bool = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    dtype: str = "fp32",
    seed: int = 0,
    dense: bool = True,
    compare: bool = False,
    report: Named | None = None,
    allow_empty: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int = 2,
    shard_index: int = 0,
    num_shards: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Write the adapter that comes nearest to what fine-tuning made of ``base``: D = W1 − W0.

    ``algorithm`` is "lora", "loha", "lokr", "hra" or "auto", which takes each layer's best, or for
    PEFT the one that is best over all. One goal: ``rank``; ``energy``, the share of ‖D‖² that each
    layer keeps; ``max_error``, ‖D − D̂‖/‖D‖ of each layer; ``budget``, parameters in all. Layers are
    Linear and convolutions, chosen by PEFT's rules from ``include`` and ``exclude``; ``conv_rank``
    is for kernels other than 1, ``rank_pattern`` overrules by PEFT's. Biases, norms, embeddings and
    heads are kept dense as ``to`` can hold them, unless ``dense`` is False. ``compare`` measures
    the other algorithms at the same number of parameters. ``report`` is an .html or .json file.

    Both models are read tensor by tensor; the same seed gives the same bytes, whatever the workers
    or parts. A run that was killed is taken up where it stopped. Raises SurgeryError.
    """
    goals = {"rank": rank, "energy": energy, "max_error": max_error, "budget": budget}
    goal, value = _goal(goals)
    page = _report_path(report, overwrite)
    options = Options(
        algorithm, goal, value, to, factor, decompose_both, conv_rank, tucker, tuple(include),
        tuple(exclude), dict(rank_pattern or {}), dtype, seed, dense, compare,
        page is not None, allow_empty,
    )  # fmt: skip
    check_options(options)
    part = check_part(shard_index, num_shards)
    return _run(
        os.fspath(base), os.fspath(tuned), Path(out), options, page, overwrite, dry_run, workers,
        part, progress,
    )  # fmt: skip


def _goal(goals: Mapping[str, float | None]) -> tuple[str, float]:
    """The one goal; raises ValueRefused as core.fit.Goal, which checks it, without importing torch."""
    given = [(name, value) for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise ValueRefused(
            "an extraction has one goal: rank, energy, max_error or budget",
            seen=", ".join(f"{name} {value}" for name, value in given),
            code="one-goal",
        )
    name, value = given[0]
    whole = name in ("rank", "budget")
    right = value >= 1 if whole else 0 < value <= (1 if name == "energy" else 0.999999)
    if not right or (whole and (isinstance(value, bool) or not isinstance(value, int))):
        wanted = "a whole number of at least 1" if whole else "between 0 and 1"
        raise ValueRefused(
            f"{name} {value} is no goal", next=f"{name} is {wanted}", code="bad-goal"
        )
    return name, value


def _report_path(report: Named | None, overwrite: bool) -> Path | None:
    """Where the report goes, once it is known that it can be made."""
    if report is None:
        return None
    from adaptsurgery.jobs.extract.page import check_report

    return check_report(Path(report), overwrite)


def _run(
    base_name: str,
    tuned_name: str,
    out: Path,
    options: Options,
    page: Path | None,
    overwrite: bool,
    dry_run: bool,
    workers: int,
    part: tuple[int, int],
    progress: Progress | None,
) -> Report:
    base, tuned = (open_base(name, headers=dry_run) for name in (base_name, tuned_name))
    refuse_pickles(base)
    refuse_pickles(tuned)
    keep_apart([base.where, tuned.where], [out, page])
    plan = build_plan(base, tuned, pair_up(base, tuned), options)
    place = Place(plan, out)
    if not dry_run and (part[1] > 1 or place.root.exists()) and made(plan, out):
        place.remove()
        return _made_already(plan, out, workers)
    target = writable(options.to)
    check_paths([base.where, tuned.where], out, target, overwrite)
    report = summary.planned(plan, workers)
    report.notes += (left := _abandoned(place))
    if dry_run:
        return report
    runner = Runner(plan, place, base, tuned, progress)
    found = _work(runner, place, out, part, workers)
    if found is None:
        report.facts["complete"] = False
        text = "this part is done; the adapter appears when the others are"
        report.notes.append(Note("part-done", str(out), text))
        return report
    with place.tidy(alone=part[1] == 1):
        return _finish(runner, place, found, out, page, overwrite, left, workers)


def _made_already(plan: ExtractPlan, out: Path, workers: int) -> Report:
    report = summary.planned(plan, workers)
    report.outputs = [str(out)]
    report.facts["complete"] = True
    text = "made by another run of the same extraction, whose report has the figures"
    report.notes.append(Note("already-there", str(out), text))
    return report


def _abandoned(place: Place) -> list[Note]:
    text = "left by other work that was killed; it goes on where it stopped, or remove this"
    return [Note("abandoned", str(root), text) for root in place.abandoned()]


def _work(
    runner: Runner, place: Place, out: Path, part: tuple[int, int], workers: int
) -> Results | None:
    """The part's jobs done; the results of all, or None while other parts are at work."""
    check(runner.plan)
    try:
        with place.tidy(alone=part[1] == 1):
            place.make(out)
            runner.work(part, workers)
            check(runner.plan)
            return results(runner.plan, place)
    except GoneError:
        raise place.vanished() from None
    except OSError as error:
        raise place.said(error, out) from error
    except SurgeryError as error:
        error.where = error.where.replace(str(place.root / "work"), str(out))
        raise


def _finish(
    runner: Runner,
    place: Place,
    found: Results,
    out: Path,
    page: Path | None,
    overwrite: bool,
    left: list[Note],
    workers: int,
) -> Report:
    """The adapter and the reports, all of them whole, and the partial output removed."""
    from adaptsurgery.jobs.extract.choose import adapter_state, outcomes

    plan = runner.plan
    with place.lock("finish"):
        layers = outcomes(plan, found)
        state = adapter_state(plan, place, runner, layers, found)
        report = summary.told(plan, layers, found, workers)
        written = _write(state, runner, place, out, overwrite)
        report.notes += [n for n in [*left, *written.notes] if n not in report.notes]
        report.outputs = written.outputs
        report.facts |= {"bytes": written.facts["bytes"], "complete": True}
        if page is not None:
            from adaptsurgery.jobs.extract.page import write_report

            write_report(report, page, overwrite)
            report.outputs = [*report.outputs, str(page)]
        place.remove()
    return report


def _write(state: Any, runner: Runner, place: Place, out: Path, overwrite: bool) -> Report:
    """The adapter within the partial output, and in one rename OUT: a kill leaves nothing else."""
    beside = place.root / "adapter"
    beside.mkdir(exist_ok=True)
    place.content = beside / out.name
    loaded = _loaded(state, runner.models["base"])
    try:
        written = write_adapter(
            loaded, place.content, runner.plan.options.to, overwrite=True, hashes=False
        )
        for card in out.glob(f"**/{CARD}") if out.is_dir() else ():  # a model card stays
            shutil.copy2(card, place.content / card.relative_to(out))
        place.land(out, overwrite)
        sync_folder(out.parent)
    except OSError as error:
        raise place.said(error, out) from error
    held = [Path(path).relative_to(place.content) for path in written.outputs]
    written.outputs = [str(out / path) if path.name else str(out) for path in held]
    return written


def _loaded(state: Any, base: Base) -> Loaded:
    names = names_of_base(base.components, base.where)
    found = resolve(state, names)
    if "" in found.saved and found.components != [""]:
        found = replace(found, saved={found.components[0]: found.saved[""]})
    return Loaded(found, [], names, base)
