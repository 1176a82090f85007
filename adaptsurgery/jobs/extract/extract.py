"""The call that users make: two checkpoints in, an adapter out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptsurgery.adapters.loading import Loaded
from adaptsurgery.adapters.report import Report
from adaptsurgery.adapters.writing import CARD, check_paths, writable, write_adapter
from adaptsurgery.checkpoint import atomic, locks, privacy, system
from adaptsurgery.checkpoint.apart import keep_apart
from adaptsurgery.checkpoint.atomic import check_output
from adaptsurgery.checkpoint.base import Base
from adaptsurgery.checkpoint.watched import check_watched, watching
from adaptsurgery.jobs.extract import summary
from adaptsurgery.jobs.extract.pairs import pair_up
from adaptsurgery.jobs.extract.plan import ExtractPlan, plan_extraction
from adaptsurgery.jobs.extract.recipe import ExtractRecipe, check_options
from adaptsurgery.jobs.extract.run import (
    PartialExtract,
    Progress,
    Runner,
    check_models,
    is_made,
    results,
)
from adaptsurgery.jobs.inputs import check_part, open_base, refuse_pickles
from adaptsurgery.jobs.options import carried, check_numbers, collected
from adaptsurgery.jobs.options.extraction import GOALS, ExtractOptions
from adaptsurgery.jobs.partial import GoneError
from adaptsurgery.jobs.values import check_whole
from adaptsurgery_formats import Note
from adaptsurgery_formats.errors import FileError, SurgeryError, ValueRefused
from adaptsurgery_formats.names import names_of_base
from adaptsurgery_formats.resolve import find_modules

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
    allow_nonfinite: bool = False,
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
    heads are kept dense as ``to`` can hold them, unless ``dense`` is False; ``allow_nonfinite`` keeps
    those that are not finite too, to which no layer's factors can come near. ``compare`` measures
    the other algorithms at the same number of parameters. ``report`` is an .html or .json file.

    Both models are read tensor by tensor; the same seed gives the same bytes, whatever the workers
    or parts. A run that was killed is taken up where it stopped. Raises SurgeryError.
    """
    options = collected(ExtractOptions, locals())
    goal, value = _goal({name: getattr(options, name) for name in GOALS})
    _check_numbers(options)
    page = _report_path(report)
    recipe = carried(
        ExtractRecipe,
        options,
        goal=goal,
        value=value,
        include=tuple(include),
        exclude=tuple(exclude),
        ranks=dict(rank_pattern or {}),
        curves=page is not None,
    )
    check_options(recipe)
    part = check_part(shard_index, num_shards)
    return _run(os.fspath(base), os.fspath(tuned), Path(out), recipe, options, page, part, progress)


def _check_numbers(options: ExtractOptions) -> None:
    """Raise ValueRefused ("bad-number") for a number that says nothing."""
    check_numbers(options, "workers")
    check_whole("seed", options.seed, None)
    if options.factor is not None:
        check_whole("factor", options.factor, 1 if options.factor == 0 else -1)
    check_numbers(options, "conv_rank")
    for name, rank in (options.rank_pattern or {}).items():
        check_whole(f"rank_pattern of `{name}`", rank)


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


def _report_path(report: Named | None) -> Path | None:
    """Where the report goes, once it is known that it can be made."""
    if report is None:
        return None
    from adaptsurgery.jobs.extract.page import check_form

    return check_form(Path(report))


def _run(
    base_name: str,
    tuned_name: str,
    out: Path,
    recipe: ExtractRecipe,
    options: ExtractOptions,
    page: Path | None,
    part: tuple[int, int],
    progress: Progress | None,
) -> Report:
    dry_run, overwrite, workers = options.dry_run, options.overwrite, options.workers
    with watching() as watched:
        base, tuned = (open_base(name, headers=dry_run) for name in (base_name, tuned_name))
    refuse_pickles(base)
    refuse_pickles(tuned)
    keep_apart([base.where, tuned.where], [out, page])
    plan = plan_extraction(base, tuned, pair_up(base, tuned), recipe)
    place = PartialExtract(plan, out)
    ended = place.landed(out) or (part[1] > 1 and is_made(plan, out))
    if dry_run or not ended:
        target = writable(recipe.to)
        check_paths([base.where, tuned.where], out, target, overwrite)
        if page is not None:
            check_output(page, overwrite=overwrite)
    report = summary.dry_report(plan, workers)
    report.notes += (left := _abandoned(place))
    if dry_run:
        return report
    if not ended:
        check_models(plan)
    runner = Runner(plan, place, base, tuned, progress, watched)
    return _worked(runner, out, page, overwrite, left, part, workers)


def _worked(
    runner: Runner,
    out: Path,
    page: Path | None,
    overwrite: bool,
    left: list[Note],
    part: tuple[int, int],
    workers: int,
) -> Report:
    """The part's jobs done, and the adapter put in place by whoever does the last of all."""
    plan, place = runner.plan, runner.place
    try:
        with place.entered(alone=part[1] == 1):
            if place.landed(out) or (part[1] > 1 and is_made(plan, out)):
                return _closed(plan, place, out, page, overwrite, workers)
            place.check_files(place.known())
            runner.work(part, workers)
            check_models(plan)
            report = _finish(runner, out, page, overwrite, left, workers)
            if report is None and part[1] == 1:  # all jobs were done: a twin has put it in place
                raise GoneError
            return report or _part_done(plan, out, left, workers)
    except GoneError:
        if is_made(plan, out):
            return _made_already(plan, out, workers)
        raise place.vanished() from None
    except FileError as error:
        taken = error.code == "output-exists" and error.where == str(out)
        gone = error.code == "no-such-file" and error.where.startswith(str(place.root))
        if (taken or gone) and is_made(
            plan, out
        ):  # a twin has landed, and removed the partial output
            return _made_already(plan, out, workers)
        error.where = error.where.replace(str(place.root / "work"), str(out))
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_made(plan, out):
            return _made_already(plan, out, workers)
        raise place.said(error, out) from error
    except SurgeryError as error:
        error.where = error.where.replace(str(place.root / "work"), str(out))
        raise


def _part_done(plan: ExtractPlan, out: Path, left: list[Note], workers: int) -> Report:
    report = summary.dry_report(plan, workers)
    report.facts["complete"] = False
    text = "this part is done; the adapter appears when the others are"
    report.notes += [*left, Note("part-done", str(out), text)]
    return report


def _closed(
    plan: ExtractPlan,
    place: PartialExtract,
    out: Path,
    page: Path | None,
    overwrite: bool,
    workers: int,
) -> Report:
    """What a killed run has left to do once its adapter had landed: its report, and the rest removed."""
    report = _made_already(plan, out, workers)
    with locks.unbroken():
        if page is not None and place.landed(out) and place.report.exists():
            with locks.alone(page):
                atomic.put(place.report, page, overwrite)
            report.outputs.append(str(page))
        if place.landed(out) or not place.busy():
            place.remove()
    return report


def _made_already(plan: ExtractPlan, out: Path, workers: int) -> Report:
    report = summary.dry_report(plan, workers)
    report.outputs = [str(out)]
    report.facts["complete"] = True
    text = "made by another run of the same extraction, whose report has the figures"
    report.notes.append(Note("already-there", str(out), text))
    return report


def _abandoned(place: PartialExtract) -> list[Note]:
    text = "left by other work that was killed; it goes on where it stopped, or remove this"
    return [Note("abandoned", str(root), text) for root in place.abandoned()]


def _finish(
    runner: Runner,
    out: Path,
    page: Path | None,
    overwrite: bool,
    left: list[Note],
    workers: int,
) -> Report | None:
    """The adapter and the reports, all of them whole, and the partial output removed.

    None where other parts have work to do still, or a twin has put all in place.
    """
    from adaptsurgery.jobs.extract.choose import chosen_state, outcomes

    plan, place = runner.plan, runner.place
    with ExitStack() as held:
        held.enter_context(place.lock("finish"))
        measured = results(plan, place)
        if measured is None or place.landed(out):
            return None
        layers = outcomes(plan, measured)
        state = chosen_state(plan, place, runner, layers, measured)
        report = summary.report_of(plan, layers, measured, workers)
        written = _write(state, runner, place, out)
        report.notes += [n for n in [*left, *written.notes] if n not in report.notes]
        report.outputs = written.outputs
        report.facts |= {"bytes": written.facts["bytes"], "complete": True}
        if page is not None:
            _write_page(report, place, page, runner)
            report.outputs = [*report.outputs, str(page)]
        with locks.alone(out), locks.unbroken():
            place.land(out, overwrite)
            if page is not None:
                with locks.alone(page):
                    atomic.put(place.report, page, overwrite)
            atomic.sync_folder(out.parent)
            held.close()  # nothing that is open may lie in what is removed
            place.remove()
    return report


def _write(state: Any, runner: Runner, place: PartialExtract, out: Path) -> Report:
    """The adapter within the partial output, on disk: one rename makes it OUT."""
    shutil.rmtree(place.beside, ignore_errors=True)
    place.beside.mkdir()
    loaded = _loaded(state, runner.models["base"])
    written = write_adapter(
        loaded,
        place.content,
        runner.plan.options.to,
        allow_nonfinite=runner.plan.options.allow_nonfinite,
        hashes=False,
    )
    for card in out.glob(f"**/{CARD}") if out.is_dir() else ():  # a model card stays
        system.copy_file(card, place.content / card.relative_to(out))
    old = privacy.below(out) if os.path.lexists(out) else ()
    privacy.narrow(place.content, [*runner.inputs, *old])
    atomic.sync(place.content)
    check_models(runner.plan)
    check_watched(runner.watched)
    parts = [Path(path).relative_to(place.content) for path in written.outputs]
    written.outputs = [str(out / path) if path.name else str(out) for path in parts]
    return written


def _write_page(report: Report, place: PartialExtract, page: Path, runner: Runner) -> None:
    """The report within the partial output, so that the run that ends a killed one has it too."""
    from adaptsurgery.jobs.extract.page import text_of

    shown = replace(report, outputs=[*report.outputs, str(page)])
    system.write_text(place.report, text_of(shown, page.suffix))
    old = [page] if page.exists() else []
    privacy.narrow(place.report, [*runner.inputs, *old])
    atomic.sync(place.report)


def _loaded(state: Any, base: Base) -> Loaded:
    names = names_of_base(base.components, base.where)
    adapter = find_modules(state, names)
    if "" in adapter.saved and adapter.components != [""]:
        adapter = replace(adapter, saved={adapter.components[0]: adapter.saved[""]})
    return Loaded(adapter, [], names, base)
