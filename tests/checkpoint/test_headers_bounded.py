"""What a safetensors header costs: memory in proportion to its bytes, time in proportion too.

Measured in a process of its own, by the largest size that it ever had.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save

from adaptsurgery.checkpoint.safetensors import parse_header, read_safetensors
from adaptsurgery.checkpoint.writer import order, write_safetensors
from adaptsurgery_formats.errors import FileError, ShapeError
from adaptsurgery_formats.tensors import DTYPE_BITS, Literal, Tensor

SIZE = 9_000_000
_CHILD = """
import sys
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.checkpoint.system import peak_memory
from adaptsurgery_formats.errors import FileError
before = peak_memory()
try:
    read_safetensors(sys.argv[1])
    code = ""
except FileError as error:
    code = error.code
print(peak_memory() - before, code)
"""


def repeated(before: str, piece: str, after: str) -> Callable[[], bytes]:
    return lambda: (before + piece * (SIZE // len(piece.encode())) + after).encode()


def entry(dtype: str = "U8", shape: str = "0", end: int = 0) -> str:
    return f'{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[0,{end}]}}'


def numbered(
    piece: str, before: str = "{", after: str = "}", size: int = SIZE
) -> Callable[[], bytes]:
    count = size // (len(piece) + 5)
    return lambda: (before + ",".join(piece % i for i in range(count)) + after).encode()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "lists": repeated('{"a":[', "[],", "0]}"),
    "objects": repeated('{"a":[', "{},", "0]}"),
    "lists in a shape": repeated('{"a":{"dtype":"U8","shape":[', "[],", '0],"data_offsets":[0,0]}}'),
    "texts": repeated('{"a":{"dtype":[', '"ab",', '""]}}'),
    "fractions": repeated('{"a":{"shape":[', "1.5,", "0]}}"),
    "dimensions": repeated('{"a":{"dtype":"U8","shape":[', "300,", '0],"data_offsets":[0,0]}}'),
    "digits": repeated('{"a":{"dtype":"U8","shape":[', "9", '],"data_offsets":[0,0]}}'),
    "depth": repeated("", '{"a":', "1"),
    "spaces": repeated("{", " ", "]"),
    "one name": repeated('{"', "k", '\U0001f600":1}'),
    "escapes": repeated('{"__metadata__":{"a":"', '\\"', '"},"b":1}'),
    "spelled out": repeated('{"__metadata__":{"a":"', "\\ud83d\\ude00", '"},"b":1}'),
    "numbers for tensors": numbered('"%x":1'),
    "fields": numbered('"%x":""', '{"a":{', "}}"),
    "metadata, then damage": numbered('"%x":""', '{"__metadata__":{', '},"b":1}'),
    "as much as is read in one go": numbered('"%x":""', '{"__metadata__":{', '},"b":1}', 6_800_000),
    "tensors, then damage": numbered(f'"%x":{entry()}', "{", ',"b":1}'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_is_none_costs_little_more_than_its_bytes(tmp_path: Path, name: str) -> None:
    header = HOSTILE[name]()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True
    )
    cost, code = done.stdout.split()
    assert code == "bad-header"
    assert int(cost) <= 5 * len(header) + 50_000_000


def test_a_name_that_comes_twice_is_found_in_one_pass() -> None:
    for where, value in (("", entry()), ('"__metadata__":{', '""')):
        names = ",".join(f'"{i:x}":{value}' for i in range(30_000))
        raw = f'{{{where}{names},"zz":{value},"zz":{value}}}{"}" if where else ""}'.encode()
        started = time.process_time()
        with pytest.raises(FileError) as error:
            parse_header(raw, "x", 8 + len(raw))
        assert error.value.code == "duplicate-key" and "`zz`" in error.value.what
        assert time.process_time() - started < 3


# -- The same headers as the library reads


ws = st.sampled_from(["", " ", "\n\t", "\r"])


@st.composite
def spelled(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header with any white space, order of fields, escapes and numbers, and its data's size."""
    at, members = 0, []
    names = draw(st.lists(st.text(min_size=1, max_size=5), max_size=4, unique=True))
    for name in names:
        dtype = draw(st.sampled_from([*DTYPE_BITS, "F13"]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8]), max_size=11))
        end = at + -(-int(np.prod(shape, dtype=object)) * DTYPE_BITS.get(dtype, 8) // 8)
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        pairs = draw(st.permutations([(k, json.dumps(v)) for k, v in fields.items()]))
        body = ",".join(f'{draw(ws)}"{k}"{draw(ws)}:{draw(ws)}{v}{draw(ws)}' for k, v in pairs)
        key = json.dumps(name, ensure_ascii=draw(st.booleans()))
        members.append(f"{draw(ws)}{key}{draw(ws)}:{draw(ws)}{{{body}}}{draw(ws)}")
        at = end
    if draw(st.booleans()):
        text = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=9), max_size=3))
        members.insert(0, f'"__metadata__":{json.dumps(text)}')
    raw = f"{{{','.join(members)}}}{draw(ws)}".encode("utf-8", "surrogatepass")
    if draw(st.booleans()) and raw:  # one byte goes, or becomes another
        spot = draw(st.integers(0, len(raw) - 1))
        raw = (
            raw[:spot]
            + draw(st.sampled_from([b"", b"0", b"-", b"}", b",", b'"']))
            + raw[spot + 1 :]
        )
    return raw, at


@settings(max_examples=100, deadline=None)
@given(spelled())
def test_what_is_read_is_what_the_library_reads(header: tuple[bytes, int]) -> None:
    raw, size = header
    whole = len(raw).to_bytes(8, "little") + raw + bytes(size)
    try:
        ours = parse_header(raw, "x", len(whole))
    except FileError:
        return  # stricter than the library; that valid ones are read is the next test's
    theirs = {name: (t["dtype"], list(t["shape"])) for name, t in deserialize(whole)}
    assert {k: (t.dtype, list(t.shape)) for k, t in ours.tensors.items()} == theirs


@settings(max_examples=60, deadline=None)
@given(spelled())
def test_what_json_and_the_library_read_is_read(header: tuple[bytes, int]) -> None:
    raw, size = header
    whole = len(raw).to_bytes(8, "little") + raw + bytes(size)
    try:
        pairs = json.loads(raw.decode(), object_pairs_hook=list)
        theirs = deserialize(whole)
    except (SafetensorError, ValueError, RecursionError):
        return
    names = [name for name, _ in pairs]
    doubled = len(set(names)) < len(names) or any(
        len({k for k, _ in inner}) < len(inner) for _, inner in pairs
    )
    if doubled or "" in names or b"-0" in raw or not raw.startswith(b"{"):
        return  # where this reader is stricter
    assert parse_header(raw, "x", len(whole)).tensors.keys() == {name for name, _ in theirs}


# -- Dtypes smaller than a byte


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 8), ("F6_E2M3", 12), ("F6_E3M2", 12)])
def test_packed_numbers_are_read_and_written_by_their_bits(
    tmp_path: Path, dtype: str, nbytes: int
) -> None:
    data = bytes(range(nbytes))
    write_safetensors(tmp_path / "a", {"w": Tensor(dtype, (4, 4), (Literal(data),))})
    with safe_open(tmp_path / "a", "np") as file:
        assert file.get_slice("w").get_dtype() == dtype
        assert file.get_slice("w").get_shape() == [4, 4]
    tensor = read_safetensors(tmp_path / "a").tensors["w"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes, tensor.read()) == (
        dtype,
        (4, 4),
        nbytes,
        data,
    )
    assert tensor.rows(1, 3).read() == data[nbytes // 4 : 3 * nbytes // 4]


def test_packed_numbers_fill_whole_bytes() -> None:
    raw = f'{{"w":{entry("F4", "3", 2)}}}'.encode()
    with pytest.raises(FileError) as error:
        parse_header(raw, "x", 8 + len(raw) + 2)
    assert error.value.code == "bad-header" and "12 bits" in error.value.what
    odd = Tensor("F4", (2, 3), (Literal(bytes(3)),))
    with pytest.raises(ShapeError):
        odd.rows(0, 1)


def test_every_dtype_of_the_library_has_its_bits_and_its_place(tmp_path: Path) -> None:
    """The library's own message names all that it knows; its writer shows their order."""
    with pytest.raises(SafetensorError) as error:
        raw = f'{{"w":{entry("?", "1", 1)}}}'.encode()
        deserialize(len(raw).to_bytes(8, "little") + raw + b"\0")
    named = str(error.value).partition("expected one of ")[2].partition(" at ")[0]
    known = [name.strip(" `") for name in named.split(",")]
    assert list(DTYPE_BITS) == known[::-1]
    for dtype in known:  # a file of eight elements is sound by these bits alone
        raw = f'{{"w":{entry(dtype, "8", DTYPE_BITS[dtype])}}}'.encode()
        deserialize(len(raw).to_bytes(8, "little") + raw + bytes(DTYPE_BITS[dtype]))
    small = {
        "f4": torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "scale": torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "flag": torch.zeros(4, dtype=torch.bool),
        "byte": torch.zeros(4, dtype=torch.uint8),
    }
    theirs = save(small)
    (tmp_path / "a").write_bytes(theirs)
    file = read_safetensors(tmp_path / "a")
    assert order(file.tensors) == ["scale", "byte", "f4", "flag"]
    write_safetensors(tmp_path / "b", file.tensors)
    assert (tmp_path / "b").read_bytes() == theirs
