"""The storages of a torch pickle, as its own pickle names them: which record, and how many bytes.

torch holds a record against its storage only where it reads it. Where it maps the file a record of
another size would lend its neighbour's bytes, so the names are gone through once more, by an unpickler
to which no name means anything.
"""

from __future__ import annotations

import pickle
from functools import cache
from io import BytesIO
from typing import Any

from adaptsurgery.checkpoint.archives import Archive
from adaptsurgery.checkpoint.system import open_file

_PICKLE = "data.pkl"
# Bytes of an element, by the storage's name; what torch has no older name for is untyped.
_WIDTHS = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1,
}  # fmt: skip


def sizes_agree(archive: Archive, where: str) -> bool:
    """Whether each storage in the archive at ``where`` is as long as its record; False if unknown.

    Raises OSError where the file is gone.
    """
    try:
        with open_file(where) as file:
            named = next(r for r in archive.records if r.name.endswith("/" + _PICKLE))
            file.seek(named.start)
            storages = _Storages(BytesIO(file.read(named.packed)))
        storages.load()
        folder = named.name.removesuffix(_PICKLE)
        return all(
            storages.sizes.get(record.name.removeprefix(f"{folder}data/"), record.size)
            == record.size
            for record in archive.records
            if record.name.startswith(f"{folder}data/")
        )
    except OSError:
        raise
    except Exception:  # whatever a pickle of another make does to an unpickler
        return False


class _Nothing:
    """What stands for whatever a pickle makes: it takes all, and does none of it."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


@cache
def _named(name: str) -> type[_Nothing]:
    return type(name, (_Nothing,), {})


class _Storages(pickle.Unpickler):
    """Notes each storage's bytes by its record; makes nothing of what a pickle names."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> type[_Nothing]:
        return _named(name)

    def persistent_load(self, pid: Any) -> None:
        _, kind, record, _, count = pid
        self.sizes.setdefault(record, count * _WIDTHS[kind.__name__.removesuffix("Storage")])
