"""Safetensors files written as the library writes them, without the numbers passing through torch.

The header comes first and fixes every offset. Runs of bytes that lie in files already are moved
block by block (or by the kernel where nothing is scanned); whatever is computed is read one part
at a time, so that memory holds one tensor at most.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from queue import Queue
from threading import Thread

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.failures import as_file_error
from adaptsurgery.checkpoint.finite import (
    BLOCK,
    Nonfinite,
    cut,
    marks_of,
    scanned,
    whole_numbers,
    width_of,
)
from adaptsurgery.checkpoint.safetensors import Span, cut_short
from adaptsurgery_formats.errors import FileError, ShapeError, ValueRefused
from adaptsurgery_formats.tensors import DTYPE_BITS, Part, Tensor, total_bytes

# The library sorts by dtype, then by name.
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
_COPY = 1 << 26  # bytes that the kernel copies between two tellings

Progress = Callable[[int], object]


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys in the order in which their data lie in the file."""
    return sorted(tensors, key=lambda key: (_RANK[tensors[key].dtype], key))


def layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of the file, length and padding included, byte for byte as the library writes it.

    Metadata keep their own order; none are written where there are none.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key in order(tensors):
        t = tensors[key]
        end = at + t.nbytes
        entries[key] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """The number of bytes that ``write_safetensors`` will write."""
    return len(layout(tensors, metadata)) + sum(t.nbytes for t in tensors.values())


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    check_finite: bool = True,
    nonfinite: Nonfinite | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a new safetensors file; ``progress`` is called with each count of bytes written.

    The file must not exist yet: ``atomic.output`` gives the path to write to, and takes it away
    again on an error. Raises ValueRefused ``non-finite`` for a NaN or an infinity, or counts it in
    ``nonfinite`` by the rule there; ShapeError if
    a tensor's parts do not make up its shape, FileError
    ``output-exists``, ``no-space``, ``not-writable``, and what the parts' sources raise.
    """
    where = os.fspath(path)
    _check_parts(tensors)
    tell = progress or (lambda _: None)
    try:
        fd = system.open_new(where)
    except FileExistsError:
        raise FileError("it exists already", where=where, code="output-exists") from None
    except OSError as error:
        raise as_file_error(error, where, writing=True) from error
    try:
        with _Sources() as sources, _Behind(fd, where) as behind:
            head = layout(tensors, metadata)
            behind.write(head)
            finite = _Finite(tensors, where, nonfinite)
            for run in _runs(tensors, check_finite):
                _write_run(behind, run, sources, finite, tell)
        _check_size(fd, len(head) + total_bytes(tensors.values()), where)
    finally:
        os.close(fd)


def _check_size(fd: int, meant: int, where: str) -> None:
    size = os.fstat(fd).st_size
    if size != meant:
        raise FileError(f"{size} bytes are on disk, {meant} were written", where=where)


def _check_parts(tensors: Mapping[str, Tensor]) -> None:
    for key, t in tensors.items():
        held = sum(part.nbytes for part in t.parts)
        if held != t.nbytes:
            raise ShapeError(
                f"`{key}`: {t.dtype} {list(t.shape)} needs {t.nbytes} bytes, not {held}"
            )


@dataclass(slots=True)
class _Run:
    """Bytes that are written in one go: a part, or adjacent spans of one file and one dtype."""

    dtype: str  # what to scan them as; "" for bytes that are not scanned
    part: Part
    at: int  # where in the data of the output it begins


def _runs(tensors: Mapping[str, Tensor], check_finite: bool) -> Iterator[_Run]:
    """The whole output in order, adjacent spans merged."""
    held: _Run | None = None
    at = 0
    for key in order(tensors):
        t = tensors[key]
        dtype = t.dtype if check_finite and scanned(t.dtype) else ""
        for part in whole_numbers(t):
            joined = _join(held, dtype, part)
            if joined and held:
                held.part = joined
            else:
                if held:
                    yield held
                held = _Run(dtype, part, at)
            at += part.nbytes
    if held:
        yield held


def _join(held: _Run | None, dtype: str, part: Part) -> Span | None:
    """One span for a held run and the part after it, or None where they do not touch."""
    if held is None or held.dtype != dtype or not isinstance(part, Span):
        return None
    a = held.part
    if not isinstance(a, Span) or a.path != part.path or a.offset + a.nbytes != part.offset:
        return None
    return Span(a.path, a.offset, a.nbytes + part.nbytes)


def _write_run(
    behind: _Behind,
    run: _Run,
    sources: _Sources,
    finite: _Finite,
    tell: Progress,
) -> None:
    if isinstance(run.part, Span):
        blocks = _span_blocks(behind, run, sources, tell)
    else:
        blocks = cut(run.part)
    at = run.at
    for block in blocks:
        marks = marks_of(run.dtype, block) if run.dtype else None
        if marks is not None:
            finite.take(run, at, marks)
        behind.write(block)
        at += len(block)
        tell(len(block))


def _span_blocks(
    behind: _Behind, run: _Run, sources: _Sources, tell: Progress
) -> Iterator[bytes | bytearray]:
    """The bytes of a span in reused buffers; nothing where the kernel could move them itself."""
    span = run.part
    assert isinstance(span, Span)
    source = sources.open(span.path)
    at, end = span.offset, span.offset + span.nbytes
    if not run.dtype:
        at += behind.take(source, span, tell)
    while at < end:
        buffer = behind.buffer(min(BLOCK, end - at))
        _fill(source, buffer, at, span)
        yield buffer
        at += len(buffer)


def _fill(source: int, buffer: bytearray, at: int, span: Span) -> None:
    """Read a full buffer from the offset ``at``."""
    left = memoryview(buffer)
    try:
        while left:
            got = system.read_into(source, left, at)
            if not got:
                raise cut_short(span.path, span.offset + span.nbytes, at)
            at, left = at + got, left[got:]
    except OSError as error:
        raise as_file_error(error, span.path, writing=False) from error


class _Behind:
    """Writes blocks in the order they come, in a thread of its own, while the next is read.

    An error of the thread is raised by the next call, and on leaving. A block that came from
    ``buffer`` is used again once it is written.
    """

    depth = 4

    def __init__(self, fd: int, where: str) -> None:
        self.fd, self.where = fd, where
        self.error: BaseException | None = None
        self.waiting: Queue[bytes | bytearray | None] = Queue(self.depth)
        self.free: list[bytearray] = []
        self.thread = Thread(target=self._work)

    def __enter__(self) -> _Behind:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.waiting.put(None)
        self.thread.join()
        if kind is None:
            self._check()

    def buffer(self, size: int) -> bytearray:
        while self.free:
            block = self.free.pop()
            if len(block) == size:
                return block
        return bytearray(size)

    def write(self, block: bytes | bytearray) -> None:
        self._check()
        self.waiting.put(block)

    def finish(self) -> None:
        """Wait until all that was handed over is written."""
        self.waiting.join()
        self._check()

    def take(self, source: int, span: Span, tell: Progress) -> int:
        """Let the kernel copy a span, once all before it is written; returns how many bytes it took."""
        self.finish()
        at, done = os.lseek(self.fd, 0, os.SEEK_CUR), 0
        try:
            while done < span.nbytes:
                count = min(span.nbytes - done, _COPY)
                moved = system.kernel_copy(source, self.fd, count, span.offset + done, at + done)
                if not moved:  # the end of the file, or nothing that moves here: reading will tell
                    break
                done += moved
                tell(moved)
            os.lseek(self.fd, at + done, os.SEEK_SET)
        except OSError as error:
            raise as_file_error(error, self.where, writing=True) from error
        return done

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        while (block := self.waiting.get()) is not None:
            try:
                if self.error is None:
                    self._write(block)
            except BaseException as error:
                self.error = error
            if isinstance(block, bytearray):
                self.free.append(block)
            self.waiting.task_done()

    def _write(self, block: bytes | bytearray) -> None:
        left = memoryview(block)
        try:
            while left:
                left = left[os.write(self.fd, left) :]
        except OSError as error:
            raise as_file_error(error, self.where, writing=True) from error


class _Finite:
    """NaN and infinity on their way into a file: counted by the tensor, or refused."""

    def __init__(
        self, tensors: Mapping[str, Tensor], where: str, nonfinite: Nonfinite | None
    ) -> None:
        self.tensors, self.where, self.nonfinite = tensors, where, nonfinite
        self.keys: list[str] = []
        self.ends: list[int] = []  # of each tensor's bytes in the data, once there is a need

    def take(self, run: _Run, at: int, marks: bytes) -> None:
        """The ``marks`` of a block that begins ``at`` bytes into the output's data."""
        width = width_of(run.dtype)
        if self.nonfinite is None or not (self.nonfinite.allowed or _is_copied(run.part)):
            raise self._error(at + marks.find(1) * width)
        counts = self.nonfinite.copied if _is_copied(run.part) else self.nonfinite.computed
        start = 0
        while (start := marks.find(1, start)) >= 0:
            key, end = self._tensor_at(at + start * width)
            stop = (end - at) // width
            counts[key] += marks[start:stop].count(1)
            start = stop

    def _tensor_at(self, position: int) -> tuple[str, int]:
        """The tensor that a byte of the data belongs to, and where its bytes end."""
        if not self.keys:
            self.keys = order(self.tensors)
            self.ends = list(accumulate(self.tensors[key].nbytes for key in self.keys))
        number = bisect_right(self.ends, position)
        return self.keys[number], self.ends[number]

    def _error(self, position: int) -> ValueRefused:
        """The error for a NaN or an infinity at a byte position in the data of the output."""
        key, end = self._tensor_at(position)
        tensor = self.tensors[key]
        index = (position - end + tensor.nbytes) * tensor.numel // tensor.nbytes
        return non_finite_error(key, tensor, index, self.where)


def _is_copied(part: Part) -> bool:
    """Whether a part's numbers are a file's own, and were not computed."""
    return isinstance(part, Span) or bool(getattr(part, "source", ""))


def non_finite_error(key: str, tensor: Tensor, index: int, where: str = "") -> ValueRefused:
    """The ValueRefused for a NaN or an infinity at a flat index of a tensor."""
    place: list[int] = []
    rest = index
    for size in reversed(tensor.shape):
        rest, i = divmod(rest, size)
        place.insert(0, i)
    return ValueRefused(
        f"`{key}` holds NaN or infinity",
        where=where,
        seen=f"the first at index {place} of {tensor.dtype} {list(tensor.shape)}",
        next="it comes from a run that diverged or overflowed, and no surgery mends it; "
        "commands that write take --allow-nonfinite",
        code="non-finite",
    )


class _Sources:
    """Open files that spans point into; at most a few at once."""

    limit = 16

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.files.values():
            os.close(fd)

    def open(self, path: str) -> int:
        if path in self.files:
            return self.files[path]
        if len(self.files) >= self.limit:
            os.close(self.files.pop(next(iter(self.files))))
        try:
            fd = system.open_input(path)
        except OSError as error:
            raise as_file_error(error, path, writing=False) from error
        self.files[path] = fd
        return fd
