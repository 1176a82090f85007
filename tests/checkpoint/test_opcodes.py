"""Pickles that would build without end are refused before any of it is built."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from adaptsurgery.checkpoint.opcodes import Overweight, weigh
from adaptsurgery.checkpoint.pickles import read_pickle
from adaptsurgery_formats.errors import FileError


def nested(levels: int, width: int) -> bytes:
    """A pickle of a dictionary whose key is a tuple, ``width`` times another, ``levels`` deep."""
    steps = [b"\x80\x02)q\x00"]
    for n in range(levels):
        steps += [b"(" + b"h%c" % n * width + b"t", b"q%c" % (n + 1)]
    return b"".join([*steps, b"}h%cK\x01s." % levels])


def called(name: bytes, size: int) -> bytes:
    """A pickle of a dictionary whose value is a class called with a number."""
    number = b"\x8a\x08" + size.to_bytes(8, "little")
    return b"\x80\x02}X\x01\x00\x00\x00ac" + name + number + b"\x85Rs."


BOMBS = {
    "pairs": nested(60, 2),
    "wide": nested(4, 200),
    "bytearray": called(b"builtins\nbytearray\n", 1 << 40),
    "storage": called(b"torch.storage\nUntypedStorage\n", 1 << 40),
    "tensor": called(b"torch\nFloatTensor\n", 1 << 40),
    "place": b"\x80\x02}r\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("archive", [True, False])
def test_a_small_pickle_builds_no_more_than_it_holds(
    kind: str, archive: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    if archive:
        with zipfile.ZipFile(path, "w") as held:
            held.writestr("archive/data.pkl", BOMBS[kind])
            held.writestr("archive/version", "3\n")
    else:
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
                         + pickle.dumps({"little_endian": True}, 2) + BOMBS[kind])  # fmt: skip
    with pytest.raises(FileError) as refused:
        read_pickle(path)
    assert refused.value.code == "absurd-size"


@pytest.mark.parametrize("new", [True, False])
def test_state_dicts_of_either_format_are_read(new: bool, tmp_path: Path) -> None:
    state = {f"layers.{n}.weight": torch.full((2, 3), float(n)) for n in range(30)}
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=new)
    read = read_pickle(tmp_path / "a.bin")
    assert {k: t.read() for k, t in read.items()} == {
        k: t.numpy().tobytes() for k, t in state.items()
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_light_in_every_protocol(protocol: int) -> None:
    value = {"a": [1, (2, 3)] * 500, (1, "b"): {4, 5}, "c": bytearray(9), "d": 1 << 70, "e": 1j}
    stream = io.BytesIO(pickle.dumps(value, protocol) * 2)
    weigh(stream)
    weigh(stream)
    assert stream.read() == b""


def test_what_is_shared_a_little_is_no_bomb() -> None:
    weigh(nested(12, 2))
    with pytest.raises(Overweight):
        weigh(nested(26, 2))
