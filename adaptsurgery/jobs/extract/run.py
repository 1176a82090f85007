"""A plan carried out: layer by layer into a partial output, from which the adapter is written.

See ``jobs.partial``: ``files/`` holds each finished layer's candidates, ``norms/`` what was
measured on it. Whoever finishes the last of all jobs writes the adapter, which appears whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from adaptsurgery.checkpoint import atomic
from adaptsurgery.checkpoint.base import Base
from adaptsurgery.checkpoint.pool import about, run
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.watched import Watched
from adaptsurgery.checkpoint.writer import write_safetensors
from adaptsurgery.jobs.extract.pairs import Pair
from adaptsurgery.jobs.extract.plan import ExtractPlan, LayerJob
from adaptsurgery.jobs.extract.selection import Dense
from adaptsurgery.jobs.inputs import check_inputs
from adaptsurgery.jobs.partial import Partial
from adaptsurgery_formats.errors import FileError
from adaptsurgery_formats.tensors import Tensor, bytes_of

Progress = Callable[[int, int], object]
Results = list[dict[str, Any]]
METADATA = "adaptsurgery_extract"  # in the adapter's own metadata: the plan's identity


class PartialExtract(Partial):
    """The partial output of an extraction."""

    def __init__(self, plan: ExtractPlan, out: Path) -> None:
        super().__init__(plan.digest, out)
        self.jobs = len(plan.jobs)
        self.beside = self.root / "adapter"  # the finished adapter, under OUT's name
        self.content = self.beside / out.name
        self.report = self.root / "report"

    def tensors(self, number: int) -> Path:
        return self.files / f"{number}.safetensors"

    def result(self, number: int) -> dict[str, Any] | None:
        """What was measured in a job; None where it is not done, or its tensors are not as they were."""
        file = self.tensors(number)
        measured = self.recorded(number, file if file.exists() else None)
        return measured if isinstance(measured, dict) else None

    def done(self, number: int) -> bool:
        """Whether a job's result is there; it comes after its tensors, which are then whole."""
        return self.result(number) is not None

    def known(self) -> set[str]:
        """The names of all that may lie in ``files``."""
        return {self.tensors(number).name for number in range(self.jobs)}


def is_made(plan: ExtractPlan, out: Path) -> bool:
    """Whether the output says that it is this plan's."""
    from adaptsurgery.adapters.loading import WEIGHTS

    files = [out] if out.is_file() else sorted(out.glob(f"**/{WEIGHTS}"))
    try:
        identities = [read_safetensors(file).metadata.get(METADATA) for file in files]
    except FileError:
        return False
    return bool(identities) and set(identities) == {plan.identity}


class Runner:
    """The jobs of a plan, each by one of a few workers."""

    def __init__(
        self,
        plan: ExtractPlan,
        place: PartialExtract,
        base: Base,
        tuned: Base,
        progress: Progress | None,
        watched: Watched,
    ) -> None:
        self.watched = watched
        self.plan, self.place, self.progress = plan, place, progress
        self.models = {"base": base, "tuned": tuned}
        self.jobs = plan.jobs
        self.told = 0

    def work(self, part: tuple[int, int], workers: int) -> None:
        """Every n-th job from the i-th on, (i, n) = ``part``; the largest first."""
        import torch  # noqa: F401  before the workers start, who would all import it at once

        import adaptsurgery.jobs.extract.fitting  # noqa: F401

        index, count = part
        mine = sorted(range(index, len(self.jobs), count), key=lambda n: -_nbytes(self.jobs[n]))
        run((partial(self._job, number) for number in mine), object, workers)

    def _job(self, number: int, _: object) -> None:
        """One job, unless it is done; its result comes under its name when its tensors are on disk."""
        job = self.jobs[number]
        with self.place.lock(str(number)):
            if not self.place.done(number):
                file = self.place.tensors(number)
                result = self._layer(number, job) if isinstance(job, LayerJob) else self._dense(job)
                self.place.record(number, result, file if file.exists() else None)
        self.told += _nbytes(job)
        if self.progress:
            self.progress(self.told, self.plan.nbytes)

    @property
    def inputs(self) -> list[Path]:
        """The files of both models, and their folders where those were named."""
        return [path for model in self.models.values() for path in model.inputs]

    def read(self, side: str, pair: Pair) -> Tensor:
        at = pair.base if side == "base" else pair.tuned
        return self.models[side].files[at.file].tensors[at.key]

    def _layer(self, number: int, layer: LayerJob) -> dict[str, Any]:
        from adaptsurgery.jobs.extract.fitting import fit_layer

        with about(layer.label):
            measured, tensors = fit_layer(layer, self.read, self.plan.options)
        if tensors:
            work = self.place.root / "work" / str(number)
            work.unlink(missing_ok=True)
            try:
                write_safetensors(work, tensors)
                atomic.sync(work)
                os.replace(work, self.place.tensors(number))
            except BaseException:
                work.unlink(missing_ok=True)
                raise
        else:
            self.place.tensors(number).unlink(missing_ok=True)
        return measured.as_dict()

    def _dense(self, group: tuple[Dense, ...]) -> dict[str, Any]:
        from adaptsurgery.jobs.extract.fitting import dense_norms

        options = self.plan.options
        norms = partial(dense_norms, dtype=options.dtype, allowed=options.allow_nonfinite)
        return {d.pair.label: norms(d.pair, d.slot, self.read) for d in group}


def _nbytes(job: LayerJob | tuple[Dense, ...]) -> int:
    pairs = [job.pair] if isinstance(job, LayerJob) else [d.pair for d in job]
    sides = [side for pair in pairs for side in (pair.base, pair.tuned)]
    return sum(bytes_of(s.dtype, s.shape) for s in sides)


def results(plan: ExtractPlan, place: PartialExtract) -> Results | None:
    """Every job's result in order, or None while some are missing."""
    measured = [place.result(number) for number in range(len(plan.jobs))]
    done = [result for result in measured if result is not None]
    return done if len(done) == len(measured) else None


def check_models(plan: ExtractPlan) -> None:
    """Both models as they were when the plan was made."""
    check_inputs([*plan.base_files, *plan.tuned_files])
