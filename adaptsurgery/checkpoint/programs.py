"""Exported programs (.pt2), looked through before torch reads them.

``torch.export.load`` unpickles what a program's records say, evaluates its formulas, makes Python
source of its names and loads compiled code that lies beside it. So an archive is read here first:
its list of records by ``archives``, its JSON by ``descriptions``, the pickle of its sample inputs by
an unpickler that makes nothing. What then is more than tensors, names, numbers and arithmetic is
refused. Nothing here imports torch.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

from adaptsurgery.checkpoint.archives import Archive, BadArchive, Record, read_archive
from adaptsurgery.checkpoint.descriptions import (
    PROGRAM,
    TENSOR_META,
    Description,
    Fields,
    Misplaced,
    Named,
    check,
    read_description,
)
from adaptsurgery.checkpoint.expressions import Unsafe
from adaptsurgery.checkpoint.failures import as_file_error, missing_file
from adaptsurgery.checkpoint.opcodes import Overweight, weigh
from adaptsurgery.checkpoint.system import open_input, read_at
from adaptsurgery_formats.errors import FileError

SCHEMA = 8  # the major version of torch's schema that ``descriptions`` knows
_DESCRIPTION = 256 << 20  # bytes of a graph's description, more than any model's
_UNPACKED = 16 << 20  # bytes that an archive may unpack to beside four times its own
_WIDE = 16 << 20  # bytes of a description in letters that take Python four bytes each
_PICKLE = 512 << 10  # bytes of a pickle of sample inputs: the tensors' bytes lie beside it
_EMPTY = 256 << 20  # bytes of tensors whose record is smaller: expanded, or without numbers

_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_CONFIGS = {
    _WEIGHTS: f"{_WEIGHTS}model_weights_config.json",
    _CONSTANTS: f"{_CONSTANTS}model_constants_config.json",
}
_PLAIN_RECORDS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/weight_\d+"
    r"|data/constants/tensor_\d+|data/weights/model_weights_config\.json"
    r"|data/constants/model_constants_config\.json|archive_format|archive_version|byteorder"
    r"|\.data/version|version|\.data/serialization_id|extra/[^\x00-\x1f\\]+"
)
_PICKLED_RECORDS = re.compile(
    r".*/data/?\d*|.*/(data\.pkl|\.?format_version|\.storage_alignment|byteorder|version|\.data/\w+)"
)
_OWN = "rewrite(…, trust=True), or --trust, if the file is your own"
_AGAIN = f"ask for a program that torch.export.save of a current torch wrote; {_OWN}"

# Bytes of one element, by the numbers of torch's schema.
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2,
          28: 2, 29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8}  # fmt: skip

# What a pickle of tensors and of containers of them names; each is made as a thing without effect.
_INERT = frozenset(
    """torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor torch._utils._rebuild_parameter
    torch._utils._rebuild_parameter_with_state torch._tensor._rebuild_from_type_v2 torch.Tensor torch.nn.parameter.Parameter torch.Size
    torch.device torch.storage.UntypedStorage torch.storage.TypedStorage torch.serialization._get_layout
    collections.OrderedDict collections.defaultdict collections.Counter collections.deque
    __builtin__.set __builtin__.frozenset __builtin__.list __builtin__.dict __builtin__.tuple
    __builtin__.int __builtin__.float __builtin__.bool __builtin__.str __builtin__.complex
    __builtin__.slice __builtin__.bytearray builtins.set builtins.frozenset builtins.list builtins.dict
    builtins.tuple builtins.int builtins.float builtins.bool builtins.str builtins.complex
    builtins.slice builtins.bytearray _codecs.encode""".split()
)
_TORCH_TYPE = re.compile(
    r"torch\.(\w+Storage|u?int\d+|float\d+\w*|bfloat16|complex\d+|bool|half|float|double|long|short|"
    r"int|q?u?int8|strided|contiguous_format|channels_last(_3d)?|preserve_format)"
)


def check_program(
    path: str | os.PathLike[str], *, newest: int = SCHEMA, trust: bool = False
) -> Description:
    """What the program of a .pt2 says of itself, once nothing in the file can run code.

    ``newest`` is the major version of the schema that torch here reads. With ``trust`` neither names
    nor formulas nor pickles are looked at, and torch runs what they say.

    Raises FileError: ``unsafe-pickle`` for what torch would unpickle, ``unsafe-program`` for names,
    operators and formulas that are more than that, and for compiled code, ``ambiguous-archive`` where
    two readers may see two programs, ``absurd-size``, ``not-a-program``, ``truncated``,
    ``newer-schema``, ``no-such-file``, ``not-a-file``.
    """
    where = os.fspath(path)
    try:
        fd = open_input(path)
    except FileNotFoundError:
        raise missing_file(where) from None
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    try:
        return _Program(fd, where, newest, trust).check()
    except OSError as error:
        raise as_file_error(error, where, writing=False) from error
    finally:
        os.close(fd)


class _Program:
    """One .pt2 as it is looked through."""

    def __init__(self, fd: int, where: str, newest: int, trust: bool) -> None:
        self.fd = fd
        self.where = where
        self.newest = newest
        self.trust = trust
        self.length = os.fstat(fd).st_size
        self.empty = 0  # bytes of tensors beyond their records

    def check(self) -> Description:
        _check_begin(read_at(self.fd, 16, 0), self.where)
        try:
            self.archive = read_archive(lambda at, n: read_at(self.fd, n, at), self.length)
        except BadArchive as error:
            raise self.truncated(str(error)) from error
        self.records = self.by_name()
        self.check_sizes()
        try:
            if not self.trust:
                self.check_names()
            description = self.described()
            if not self.trust:
                self.check_payloads()
                self.check_samples()
        except Unsafe as error:
            raise self.unsafe(str(error)) from error
        except (Misplaced, BadArchive, UnicodeDecodeError) as error:
            raise self.damaged(str(error)) from error
        return description

    def by_name(self) -> dict[str, Record]:
        """The records by their names below the archive's own; one of each, in any case of letters."""
        names = [record.name for record in self.archive.records]
        root = names[0].partition("/")[0] + "/" if names else ""
        records, seen = {}, set()
        for record in self.archive.records:
            if not record.name.startswith(root) or re.search(r"[\x00-\x1f\\]", record.name):
                raise self.ambiguous("it has records of two archives", record.name)
            if record.name.lower() in seen:
                raise self.ambiguous("it has one record twice", record.name)
            seen.add(record.name.lower())
            records[record.name[len(root) :]] = record
        models = [name for name in records if name.startswith("models/") and name.endswith(".json")]
        if not models:
            raise self.no_program(names)
        others = [name for name in models if name != _MODEL]
        if others and not self.trust:
            raise self.ambiguous("it has a program beside the one that is read", others[0])
        if _MODEL not in records:
            raise self.no_program(names)
        return records

    def check_sizes(self) -> None:
        """What is packed may not become much more than it is: torch packs nothing."""
        if self.records[_MODEL].size > _DESCRIPTION:
            raise self.absurd(f"a description of {self.records[_MODEL].size} bytes")
        if not self.archive.stored and self.archive.size > _UNPACKED + 4 * self.length:
            raise self.absurd(f"{self.length} bytes that unpack to {self.archive.size}")

    def check_names(self) -> None:
        """Only records that a program of today has, and none that is pickled or compiled."""
        for name, record in self.records.items():
            if _PLAIN_RECORDS.fullmatch(name):
                continue
            if name.startswith("data/aotinductor/"):
                raise self.unsafe(f"compiled code: `{record.name}`")
            if name.startswith((_WEIGHTS, _CONSTANTS, "data/sample_inputs/")):
                raise self.pickled(f"`{record.name}`")
            raise self.unsafe(f"a record that no program has: `{record.name}`")

    def described(self) -> Description:
        data = self.archive.bytes_of(self.records[_MODEL])
        if len(data) > _WIDE and not data.isascii():
            raise Misplaced("its description is not in ASCII, which torch writes")
        text = data.decode()
        self.check_version(text)
        if self.trust:
            return _as_it_says(text)
        description = read_description(text, PROGRAM)
        if description.major is None:
            raise Misplaced("its description has no schema_version")
        return description

    def check_version(self, text: str) -> None:
        """A program of a newer torch is named as one, whatever else it holds."""
        versions = re.findall(
            r'"schema_version"\s*:\s*\{\s*"major"\s*:\s*(\d{1,9})\s*,\s*"minor"\s*:\s*(\d{1,9})',
            text[-(1 << 20) :],
        )
        if not versions or int(versions[-1][0]) <= self.newest:
            return
        made = re.findall(r'"torch_version"\s*:\s*"([\w.+-]{1,60})"', text[-(1 << 20) :])
        raise FileError(
            "this program is of a newer torch",
            where=self.where,
            seen=f"schema {'.'.join(versions[-1])} of torch {made[-1] if made else '?'}; "
            f"this torch reads {self.newest}",
            next="a newer torch",
            code="newer-schema",
        )

    def check_payloads(self) -> None:
        """Weights and constants are plain bytes, and tensors no larger than those."""
        for folder, config in _CONFIGS.items():
            if config not in self.records:
                raise Misplaced(f"`{config}` is missing")
            if self.records[config].size > _DESCRIPTION:
                raise self.absurd(f"`{config}` of {self.records[config].size} bytes")
            rule = Fields({"config": Named(_fqn, lambda d, v, f=folder: self.payload(f, d, v))})
            read_description(self.archive.bytes_of(self.records[config]).decode(), rule)

    def payload(self, folder: str, description: Description, value: Any) -> None:
        """One tensor's record and its shape."""
        if not isinstance(value, dict):
            raise Misplaced(f"{str(value)[:60]!r} where a tensor belongs")
        path, record = value.get("path_name"), None
        if isinstance(path, str):
            record = self.records.get(folder + path)
        if (
            value.get("use_pickle") is not False
            or not isinstance(path, str)
            or not path.startswith(("weight_", "tensor_"))
        ):
            raise self.pickled(f"`{folder}{str(path)[:100]}`")
        meta = value.get("tensor_meta")
        if record is None or not isinstance(meta, dict) or type(value.get("is_param")) is not bool:
            raise Misplaced(f"no record `{folder}{path[:100]}`, or it is not described")
        check(description, TENSOR_META, meta)
        self.check_shape(record, meta)

    def check_shape(self, record: Record, meta: Mapping[str, Any]) -> None:
        sizes = [size.get("as_int") for size in meta.get("sizes") or [] if size]
        if len(sizes) != len(meta.get("sizes") or []) or any(type(s) is not int for s in sizes):
            raise Misplaced(f"`{record.name}` has a shape of other things than numbers")
        if meta.get("dtype") not in _BYTES or any(size < 0 for size in sizes):
            raise Misplaced(f"`{record.name}` has no dtype or shape that torch knows")
        needed = math.prod(sizes) * _BYTES[meta["dtype"]]
        self.empty += needed if needed > record.size else 0
        if self.empty > _EMPTY:
            raise self.absurd(f"`{record.name}`: {record.size} bytes as a tensor of {needed}")

    def check_samples(self) -> None:
        """The sample inputs, which torch unpickles with all that they name where it must."""
        record = self.records.get(_SAMPLES)
        if record is None:
            raise Misplaced("its sample inputs are missing")
        data = self.archive.bytes_of(record)
        if not data:
            return
        try:
            samples = read_archive(lambda at, n: data[at : at + n], len(data))
        except BadArchive as error:
            raise self.pickled(f"`{record.name}`: {error}") from error
        self.check_pickle(samples, record)

    def check_pickle(self, samples: Archive, record: Record) -> None:
        names = [inner.name for inner in samples.records]
        strange = [name for name in names if not _PICKLED_RECORDS.fullmatch(name)]
        pickles = [inner for inner in samples.records if inner.name.endswith("/data.pkl")]
        twice = len({name.lower() for name in names}) != len(names)
        if strange or len(pickles) != 1 or twice or len({n.partition("/")[0] for n in names}) != 1:
            raise self.pickled(f"`{record.name}` holds {(strange or names)[:3]}")
        if not samples.stored and samples.size > _UNPACKED + 4 * record.size:
            raise self.absurd(f"`{record.name}` unpacks to {samples.size} bytes")
        if pickles[0].size > _PICKLE:
            raise self.absurd(f"`{record.name}`: a pickle of {pickles[0].size} bytes")
        data = samples.bytes_of(pickles[0])
        try:
            weigh(data)
            _Inspector(io.BytesIO(data)).load()
        except Overweight as error:
            raise self.absurd(f"`{record.name}`: {error}") from error
        except _Alien as error:
            raise self.pickled(f"`{record.name}`: {error}") from error
        except (Exception, RecursionError) as error:
            raise self.pickled(f"`{record.name}`: damaged: {type(error).__name__}") from error

    # -- Refusals

    def pickled(self, seen: str) -> FileError:
        return FileError(
            "the program holds more than plain tensors, and torch would run what it unpickles",
            where=self.where,
            seen=seen[:300],
            next=_AGAIN,
            code="unsafe-pickle",
        )

    def unsafe(self, seen: str) -> FileError:
        return FileError(
            "the program holds what torch would run or look up as it loads it",
            where=self.where,
            seen=seen[:300],
            next=_AGAIN,
            code="unsafe-program",
        )

    def ambiguous(self, what: str, name: str) -> FileError:
        return FileError(
            what, where=self.where, seen=f"`{name[:200]}`", next=_AGAIN, code="ambiguous-archive"
        )

    def absurd(self, seen: str) -> FileError:
        return FileError(
            "the archive says of itself that it is larger than a program of its size can be",
            where=self.where,
            seen=seen[:300],
            next="a file that torch.export.save wrote, as it wrote it: without compression",
            code="absurd-size",
        )

    def damaged(self, seen: str) -> FileError:
        return FileError(
            "this is no program that torch can load",
            where=self.where,
            seen=seen[:300],
            next="export it again, by torch.export.save",
            code="not-a-program",
        )

    def no_program(self, names: list[str]) -> FileError:
        return FileError(
            "this is no exported program",
            where=self.where,
            seen=_kind(names),
            next="a file that torch.export.save wrote",
            code="not-a-program",
        )

    def truncated(self, seen: str) -> FileError:
        return FileError(
            "this is no whole .pt2 archive",
            where=self.where,
            seen=f"{self.length} bytes: {seen}"[:300],
            next="copy or export it again",
            code="truncated",
        )


def _as_it_says(text: str) -> Description:
    """The classes of a trusted program's containers, found in its text without a look at the rest."""
    kinds = re.findall(r'\\"type\\": \\"([^"\\]{1,200})\\"', text)
    return Description(major=SCHEMA, classes=set(kinds))


def _fqn(_: Description, value: Any) -> None:
    if not isinstance(value, str) or re.search(r"[\x00-\x1f\x7f\"'\\]", value):
        raise Unsafe(f"a name that would be code: {str(value)[:200]}")


class _Alien(pickle.UnpicklingError):
    """A pickle names something else than tensors and containers."""


class _Thing:
    """What an unpickler is given in a tensor's or a container's place."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Thing:
        return _Thing()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass


class _Inspector(pickle.Unpickler):
    """An unpickler that looks nothing up and makes nothing but plain data."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _INERT or _TORCH_TYPE.fullmatch(full):
            return _Thing
        raise _Alien(f"it names {full[:200]}")

    def persistent_load(self, _: Any) -> Any:
        return _Thing()


# -- What a file is that is no program


def _check_begin(first: bytes, where: str) -> None:
    """A .pt2 is a zip archive, and what begins otherwise is no part of one either."""
    if not first.startswith(b"PK"):
        raise FileError(
            "this is no .pt2, which is a zip archive",
            where=where,
            seen=_seen(first),
            next="a file that torch.export.save wrote",
            code="not-a-program",
        )


def _seen(first: bytes) -> str:
    """What a file is by its first bytes."""
    if not first:
        return "an empty file"
    if first[8:9] == b"{":
        return "a safetensors file"
    if first[0] == 0x80 and first[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # its protocol
        return "a pickle"
    if first[0] == 0x08 and first[2:3] in (b"\x12", b"\x1a", b"\x3a"):
        return "an ONNX file"
    if first[:1] in (b"{", b"["):
        return "JSON"
    return f"a file that begins with {first!r}"


def _kind(names: list[str]) -> str:
    """What an archive is by the names in it."""
    if any("/aotinductor/" in name for name in names):
        return "a package of AOTInductor, whose graph is compiled away"
    if any("/code/" in name for name in names):
        return "TorchScript"
    if any(name.endswith("/data.pkl") for name in names):
        return "a checkpoint of torch.save"
    return f"an archive of {len(names)} files, such as {names[:1]}"
