"""One safetensors file written from others as a stream: bytes moved, weights edited on the way.

The header fixes every offset, so the file is sized at once and its pieces may be written in any
order: a few workers each take the next piece, read it, change it in cache, round it once, and write
it to its place. Bytes that only move are moved by the kernel.

Memory is a few MB a worker whatever the tensors' sizes, but for an edit that needs all rows
together (``BlockEdit.whole``), which holds its tensor in the compute dtype.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.bridge import torch_device, torch_dtype
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.finite import Nonfinite
from adaptsurgery.checkpoint.pool import about, run
from adaptsurgery.checkpoint.safetensors import Span, cut_short
from adaptsurgery.checkpoint.writer import Progress, layout, order
from adaptsurgery_formats.errors import FileError, ShapeError, ValueRefused
from adaptsurgery_formats.tensors import FLOAT_DTYPES, Part, Tensor

if TYPE_CHECKING:
    import torch

    from adaptsurgery.core.blocks import BlockEdit, Norms

Buffer = system.Buffer
COPY = 16 << 20  # bytes that the kernel moves in one job
PIECE = 1 << 20  # bytes read, changed and written in one job


@dataclass(frozen=True)
class Entry:
    """A tensor of the output: the one it comes from, and what becomes of it.

    With neither ``edit`` nor another ``dtype`` its bytes, from wherever they lie. ``edit`` is
    called with the compute dtype when the tensor's turn comes, so that the factors of a few tensors
    are alive at a time. ``quantised``: the edit begins with the source's scale, so that other than
    floats may be read; the norms of such are not measured. ``dtype`` (a safetensors name) is the stored one, by default the source's.
    """

    tensor: Tensor
    edit: Callable[[torch.dtype], BlockEdit] | None = None
    dtype: str | None = None
    quantised: bool = False

    @property
    def out(self) -> Tensor:
        """The output's dtype and shape, without its bytes."""
        return Tensor(self.dtype or self.tensor.dtype, self.tensor.shape, ())

    @property
    def copied(self) -> bool:
        return self.edit is None and self.out.dtype == self.tensor.dtype


def write_stream(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str] | None = None,
    *,
    workers: int = 2,
    compute: str = "F32",
    progress: Progress | None = None,
    norms: bool = False,
    sync: bool = True,
    device: str = "cpu",
    nonfinite: Nonfinite | None = None,
) -> dict[str, Norms]:
    """Write a new safetensors file; returns the norms of every edited tensor where ``norms``.

    ``device`` is where numbers are changed; edits have to be made for it. ``compute`` is "F32" or
    "F64"; a float64 weight is edited in float64 in any case. ``progress``
    gets counts of bytes written, one call at a time, from the workers. An error in one worker stops
    all and names the tensor; the file is left unfinished, for ``atomic.output`` to remove.

    Raises ValueRefused ("quantised-weight" for an edit or a cast of a dtype that is not F64, F32,
    F16 or BF16, "non-finite" for an edit or a cast whose result is not finite, unless ``nonfinite``
    allows and counts it; bytes that only move are not looked at),
    ShapeError where parts or an edit do not make up the shape, FileError ("output-exists",
    "no-space", "not-writable"), and what sources and edits raise.
    """
    where = os.fspath(path)
    for key, entry in entries.items():
        _check(key, entry)
    outputs = {key: entry.out for key, entry in entries.items()}
    head = layout(outputs, metadata)
    size = len(head) + sum(t.nbytes for t in outputs.values())
    where_changed = torch_device(device) if device != "cpu" else None
    with _Target(where, size, progress) as target, _Sources() as sources:
        target.write(head, 0)
        allowed = nonfinite is not None and nonfinite.allowed
        plan = _Plan(target, sources, compute, norms, where_changed, allowed)
        jobs = plan.jobs({key: entries[key] for key in order(outputs)}, len(head))
        run(jobs, partial(_Desk, where_changed), workers)
        if sync:
            target.sync()
    if nonfinite is not None:
        for key, count in plan.nonfinite:
            nonfinite.computed[key] += count
    return plan.norms()


def _check(key: str, entry: Entry) -> None:
    tensor = entry.tensor
    held = sum(part.nbytes for part in tensor.parts)
    if held != tensor.nbytes:
        raise ShapeError(
            f"`{key}`: {tensor.dtype} {list(tensor.shape)} needs {tensor.nbytes} bytes, not {held}"
        )
    if entry.quantised and entry.out.dtype in FLOAT_DTYPES:
        return
    if not entry.copied and not {tensor.dtype, entry.out.dtype} <= set(FLOAT_DTYPES):
        raise ValueRefused(
            f"`{key}` is {tensor.dtype}: a quantised weight takes no update and no cast",
            next="dequantise the base first",
            code="quantised-weight",
        )


class _Desk:
    """A worker's scratch memory, grown when a job needs more."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device  # None: the CPU
        self.held: dict[str, bytearray] = {}

    def bytes(self, name: str, count: int) -> memoryview:
        """``count`` bytes of what lies under ``name``, as they were left."""
        if len(self.held.get(name, b"")) < count:
            self.held.pop(name, None)
            self.held[name] = bytearray(count)
        return memoryview(self.held[name])[:count]

    def numbers(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The same memory as (rows, columns) of a dtype."""
        import torch

        held = self.bytes(name, rows * columns * dtype.itemsize)
        return torch.frombuffer(held, dtype=dtype).view(rows, columns)

    def wide(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Numbers where they are changed: the CPU's memory, used again, or the device's own."""
        import torch

        if self.device is None:
            return self.numbers(name, rows, columns, dtype)
        return torch.empty((rows, columns), dtype=dtype, device=self.device)


Job = Callable[[_Desk], object]


class _Plan:
    """The output cut into jobs, in the order of its bytes."""

    def __init__(
        self,
        target: _Target,
        sources: _Sources,
        compute: str,
        measured: bool,
        device: torch.device | None,
        allowed: bool = False,
    ) -> None:
        self.target, self.sources = target, sources
        self.compute, self.measured, self.device = compute, measured, device
        self.allowed = allowed
        self.nonfinite: list[tuple[str, int]] = []
        self.pieces: list[tuple[int, str, Norms]] = []

    def norms(self) -> dict[str, Norms]:
        """The norms of every tensor, summed in the order of its bytes: the same in every run."""
        totals: dict[str, Norms] = {}
        for _, key, norms in sorted(self.pieces, key=lambda piece: piece[0]):
            sums = totals.setdefault(key, type(norms)())
            sums += norms
        return totals

    def jobs(self, entries: Mapping[str, Entry], at: int) -> Iterator[Job]:
        """One job a piece; adjacent bytes that only move are one run, whoever they belong to."""
        held: _Copy | None = None
        for key, entry in entries.items():
            if not entry.copied:
                yield from self._edit(key, entry, at)
            for part in entry.tensor.parts if entry.copied else ():
                copy = _Copy(self, key, part, at)
                at += part.nbytes
                joined = held.joined(copy) if held else None
                if held and joined is None:
                    yield from held.cut()
                held = joined or copy
            at += 0 if entry.copied else entry.out.nbytes
        if held:
            yield from held.cut()

    def _edit(self, key: str, entry: Entry, at: int) -> Iterator[Job]:
        if entry.tensor.numel:
            with about(key):
                change = _Change(self, key, entry, at)
            for start in range(0, change.rows, change.step):
                yield change.job(start, min(start + change.step, change.rows))


@dataclass(frozen=True)
class _Copy:
    """Bytes that only move, from a file or from memory, to a place in the output."""

    plan: _Plan
    key: str
    part: Part
    at: int

    def joined(self, after: _Copy) -> _Copy | None:
        """Both as one where they touch, in their file and in the output."""
        a, b = self.part, after.part
        if not isinstance(a, Span) or not isinstance(b, Span):
            return None
        touching = a.path == b.path and a.offset + a.nbytes == b.offset
        if not touching or self.at + a.nbytes != after.at:
            return None
        return _Copy(self.plan, self.key, Span(a.path, a.offset, a.nbytes + b.nbytes), self.at)

    def cut(self) -> Iterator[Job]:
        if not isinstance(self.part, Span):
            yield self.put
            return
        for start in range(0, self.part.nbytes, COPY):
            window = self.part.window(start, min(start + COPY, self.part.nbytes))
            yield _Copy(self.plan, self.key, window, self.at + start).move

    def put(self, desk: _Desk) -> None:
        with about(self.key):
            self.plan.target.write(_lent(self.part), self.at)

    def move(self, desk: _Desk) -> None:
        """By the kernel as far as it goes, then through memory."""
        span = self.part
        assert isinstance(span, Span)
        with about(self.key):
            with self.plan.sources.lent(span.path) as source:
                done = self.plan.target.take(source, span, self.at)
            while done < span.nbytes:
                piece = desk.bytes("raw", min(PIECE, span.nbytes - done))
                self.plan.sources.read(span.window(done, done + len(piece)), piece)
                self.plan.target.write(piece, self.at + done)
                done += len(piece)


class _Change:
    """One tensor whose numbers change: its edit, and how its rows lie in source and target."""

    def __init__(self, plan: _Plan, key: str, entry: Entry, at: int) -> None:
        self.plan, self.key, self.at = plan, key, at
        self.measured = plan.measured and not entry.quantised
        self.stored, self.out = torch_dtype(entry.tensor.dtype), torch_dtype(entry.out.dtype)
        self.edit, self.compute = self._edit(entry)
        shape = entry.tensor.shape or (1,)
        self.rows, self.columns = shape[0], math.prod(shape[1:])
        if self.edit is not None:
            self.rows, self.columns = self.edit.rows, self.edit.columns
        self.tensor = entry.tensor.reshape(self.rows, self.columns)
        self.piece = max(1, PIECE // (self.columns * max(self.stored.itemsize, self.out.itemsize)))
        self.step = self.edit.unit if self.edit and self.edit.whole else self.piece

    def _edit(self, entry: Entry) -> tuple[BlockEdit | None, torch.dtype]:
        """The edit, if there is one, and the dtype that numbers pass through."""
        from adaptsurgery.core.blocks import edit_for
        from adaptsurgery.core.update import wide_for

        asked = torch_dtype(self.plan.compute)
        if entry.edit is None:
            return None, wide_for(self.stored, asked)
        edit = edit_for(entry.edit, self.stored, self.out, asked, self.plan.device)
        return edit, edit.compute

    def job(self, start: int, stop: int) -> Job:
        work = self._together if self.edit and self.edit.whole else self._apart

        def named(desk: _Desk) -> None:
            with about(self.key):
                work(desk, start, stop)

        return named

    def _apart(self, desk: _Desk, start: int, stop: int) -> None:
        """Rows that change by themselves: read, changed in cache, written."""
        from adaptsurgery.core.blocks import change_rows, stride_of

        source = self._read(desk, start, stop)
        target = self._target(desk, source)
        stride = min(stop - start, stride_of(self.columns))
        scratch = desk.wide("block", stride, self.columns, self.compute)
        norms = self._norms()
        allowed = self.plan.allowed
        bad = change_rows(self.edit, source, target, start, scratch, norms, allowed=allowed)
        self._count(bad)
        self._write(target, start, norms)

    def _together(self, desk: _Desk, start: int, stop: int) -> None:
        """Rows that need each other: all widened, changed at once, rounded piece by piece."""
        from adaptsurgery.core.blocks import settle

        assert self.edit is not None
        pieces = [(a, min(a + self.piece, stop)) for a in range(start, stop, self.piece)]
        wide = desk.wide("whole", stop - start, self.columns, self.compute)
        for a, b in pieces:
            wide[a - start : b - start] = self._read(desk, a, b)
        self.edit.apply(wide, start)
        for a, b in pieces:
            block, norms = wide[a - start : b - start], self._norms()
            if norms is not None:
                norms.take(self._read(desk, a, b), block, self.out)
            target = desk.numbers("out", b - a, self.columns, self.out)
            self._count(settle(block, target, a, allowed=self.plan.allowed))
            self._write(target, a, norms)

    def _count(self, bad: int) -> None:
        if bad:
            self.plan.nonfinite.append((self.key, bad))

    def _read(self, desk: _Desk, start: int, stop: int) -> torch.Tensor:
        """Stored rows [start, stop)."""
        rows = self.tensor.rows(start, stop)
        raw, at = desk.bytes("raw", rows.nbytes), 0
        for part in rows.parts:
            here = raw[at : at + part.nbytes]
            if isinstance(part, Span):
                self.plan.sources.read(part, here)
            else:
                here[:] = _lent(part)
            at += part.nbytes
        return desk.numbers("raw", stop - start, self.columns, self.stored)

    def _target(self, desk: _Desk, source: torch.Tensor) -> torch.Tensor:
        """Where rows are rounded into: over the source's own where numbers are as wide."""
        if self.stored.itemsize == self.out.itemsize:
            return source.view(self.out)
        return desk.numbers("out", source.shape[0], self.columns, self.out)

    def _norms(self) -> Norms | None:
        from adaptsurgery.core.blocks import Norms

        return Norms() if self.measured and self.edit else None

    def _write(self, target: torch.Tensor, start: int, norms: Norms | None) -> None:
        import torch

        row = self.columns * self.out.itemsize
        data = memoryview(target.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.plan.target.write(data, self.at + start * row)
        if norms is not None:
            self.plan.pieces.append((self.at + start * row, self.key, norms))


def _lent(part: Part) -> Buffer:
    """The bytes of a part that is in memory, without a copy where it lends them."""
    lend: Callable[[], Buffer] = getattr(part, "buffer", part.read)
    return lend()


class _Target:
    """The output: a file of its final size, written to at offsets."""

    def __init__(self, where: str, size: int, progress: Progress | None) -> None:
        self.where, self.size, self.tell = where, size, progress
        self.lock = Lock()
        self.fd = -1

    def __enter__(self) -> _Target:
        try:
            self.fd = system.open_new(self.where)
            system.resize(self.fd, self.size)
        except FileExistsError:
            raise FileError("it exists already", where=self.where, code="output-exists") from None
        except OSError as error:
            self.__exit__()
            raise as_file_error(error, self.where, writing=True) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def write(self, data: Buffer, at: int) -> None:
        left = memoryview(data)
        try:
            while left:
                done = system.write_at(self.fd, left, at)
                at += done
                left = left[done:]
        except OSError as error:
            raise as_file_error(error, self.where, writing=True) from error
        self._told(len(data))

    def take(self, source: int, span: Span, at: int) -> int:
        """Let the kernel move a span here; the number of bytes until it would not go on."""
        done = 0
        while done < span.nbytes:
            try:
                moved = system.kernel_copy(
                    source, self.fd, span.nbytes - done, span.offset + done, at + done
                )
            except OSError as error:
                raise as_file_error(error, self.where, writing=True) from error
            if not moved:  # the end of the file, or a file system that moves nothing: reading tells
                return done
            done += moved
            self._told(moved)
        return done

    def sync(self) -> None:
        try:
            system.sync(self.fd)
        except OSError as error:
            raise as_file_error(error, self.where, writing=True) from error

    def _told(self, count: int) -> None:
        if self.tell:
            with self.lock:
                self.tell(count)


class _Sources:
    """Files that bytes come from, read at offsets from any worker; at most a few open at once.

    One that is lent out stays open until it is given back.
    """

    limit = 16

    def __init__(self) -> None:
        self.files: dict[str, int] = {}  # the one that was used last comes last
        self.lent_out: Counter[str] = Counter()
        self.lock = Lock()

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.files.values():
            os.close(fd)

    @contextmanager
    def lent(self, path: str) -> Iterator[int]:
        """The descriptor of a file for as long as the block lasts."""
        with self.lock:
            fd = self._open(path)
            self.lent_out[path] += 1
        try:
            yield fd
        finally:
            with self.lock:
                self.lent_out[path] -= 1

    def _open(self, path: str) -> int:
        fd = self.files.pop(path, -1)
        if fd < 0:
            self._make_room()
            try:
                fd = system.open_input(path)
            except OSError as error:
                raise as_file_error(error, path, writing=False) from error
        self.files[path] = fd
        return fd

    def _make_room(self) -> None:
        """Close files that nobody reads now, those first that were not read for the longest time."""
        idle = [path for path in self.files if not self.lent_out[path]]
        for path in idle[: max(0, len(self.files) - self.limit + 1)]:
            os.close(self.files.pop(path))
            del self.lent_out[path]

    def read(self, span: Span, into: memoryview) -> None:
        """Fill ``into`` with a span's bytes. FileError "truncated-file" where the file ends first."""
        done = 0
        try:
            with self.lent(span.path) as fd:
                while done < span.nbytes:
                    got = system.read_into(fd, into[done:], span.offset + done)
                    if not got:
                        end = span.offset + span.nbytes
                        raise cut_short(span.path, end, span.offset + done)
                    done += got
        except OSError as error:
            raise as_file_error(error, span.path, writing=False) from error
