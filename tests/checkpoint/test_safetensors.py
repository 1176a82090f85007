"""The reader and the writer against the safetensors library, byte for byte and refusal for refusal."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from unix import needs

from adaptsurgery.checkpoint.bridge import dtype_name
from adaptsurgery.checkpoint.safetensors import MAX_HEADER, Span, read_safetensors
from adaptsurgery.checkpoint.writer import file_size, layout, order, write_safetensors
from adaptsurgery_formats.errors import FileError, ValueRefused
from adaptsurgery_formats.tensors import Literal, Tensor, concat_rows, scalar

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64, torch.uint64, torch.uint32,
    torch.uint16,
]  # fmt: skip


def every_dtype() -> dict[str, torch.Tensor]:
    return {
        f"{name}.{i}": torch.arange(6).reshape(2, 3).to(dtype)
        for i, name in enumerate(("b", "a", 'é"\\\n\x01\u2028😀'))
        for dtype in DTYPES
        for name in (f"{name}.{dtype}",)
    }


def file_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(*shape: int, at: int = 0, dtype: str = "F32", size: int = 4) -> dict[str, object]:
    n = size * int(np.prod(shape, dtype=object))
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n]}


# -- Writing as the library writes -------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"é\t": "ü\x07"}])
def test_every_dtype_is_written_as_the_library_writes_it(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    theirs = save(every_dtype(), metadata=metadata)
    (tmp_path / "a.safetensors").write_bytes(theirs)
    file = read_safetensors(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", file.tensors, file.metadata)
    assert (tmp_path / "b.safetensors").read_bytes() == theirs
    assert file_size(file.tensors, file.metadata) == len(theirs) == file.size


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        names.filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=8,
    ),
    st.dictionaries(names, names, max_size=1),
)
def test_the_header_is_the_librarys(
    specs: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    torch_tensors = {k: torch.zeros(s, dtype=d) for k, (d, s) in specs.items()}
    ours = {k: Tensor(dtype_name(d), tuple(s), ()) for k, (d, s) in specs.items()}
    theirs = save(torch_tensors, metadata=metadata or None)
    assert theirs.startswith(layout(ours, metadata))


def test_a_rewritten_file_keeps_the_order_of_its_metadata(tmp_path: Path) -> None:
    metadata = {f"ss_{i}": str(i) for i in range(12)}  # the library itself shuffles them
    save_file({"a": torch.ones(3)}, tmp_path / "a", metadata=metadata)
    file = read_safetensors(tmp_path / "a")
    write_safetensors(tmp_path / "b", file.tensors, file.metadata)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_parts_of_all_kinds_make_one_file(tmp_path: Path) -> None:
    data = {"a": torch.randn(6, 4), "b": torch.randn(8, 4), "n": torch.arange(5)}
    save_file(data, tmp_path / "a")
    t = read_safetensors(tmp_path / "a").tensors
    seen: list[int] = []
    made = {
        "cut": t["b"].rows(2, 5),
        "stacked": concat_rows([t["a"].rows(3, 6), t["b"], t["a"].rows(0, 1)]),
        "alpha": scalar(0.5, "BF16"),
        "odd": Tensor("F32", (2,), (Literal(b"\0\0\x80"), Literal(b"?\0\0\0@"))),
        "n": t["n"],
    }
    write_safetensors(tmp_path / "b", made, progress=seen.append)
    with safe_open(tmp_path / "b", "pt") as f:
        assert torch.equal(f.get_tensor("cut"), data["b"][2:5])
        stacked = torch.cat([data["a"][3:], data["b"], data["a"][:1]])
        assert torch.equal(f.get_tensor("stacked"), stacked)
        assert f.get_tensor("alpha").item() == 0.5
        assert f.get_tensor("odd").tolist() == [1.0, 2.0]
        assert torch.equal(f.get_tensor("n"), data["n"])
    assert sum(seen) == sum(x.nbytes for x in made.values())


@needs("os.copy_file_range")
@pytest.mark.parametrize("errno_name", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_without_the_kernels_copy_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errno_name: str
) -> None:
    import errno
    import os

    def refuse(*_: object) -> int:
        raise OSError(getattr(errno, errno_name), errno_name)

    save_file({"a": torch.randn(300, 400), "i": torch.arange(99_999)}, tmp_path / "a")
    file = read_safetensors(tmp_path / "a")
    write_safetensors(tmp_path / "b", file.tensors, check_finite=False)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    write_safetensors(tmp_path / "c", file.tensors, check_finite=False)
    whole = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == whole


def test_many_sources_stay_within_a_few_open_files(tmp_path: Path) -> None:
    made = {}
    for i in range(40):
        save_file({"w": torch.full((3,), float(i))}, tmp_path / f"s{i}")
        made[f"w{i:02}"] = read_safetensors(tmp_path / f"s{i}").tensors["w"]
    write_safetensors(tmp_path / "out", made)
    with safe_open(tmp_path / "out", "pt") as f:
        assert [f.get_tensor(k)[0].item() for k in order(made)] == list(range(40))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"precious")
    with pytest.raises(FileError) as e:
        write_safetensors(tmp_path / "a", {"x": scalar(1.0)})
    assert e.value.code == "output-exists"
    assert (tmp_path / "a").read_bytes() == b"precious"


def test_a_source_that_shrank_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.randn(300, 400), "i": torch.arange(99)}, tmp_path / "a")
    file = read_safetensors(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as f:
        f.truncate(file.data_offset + 100)
    for check in (True, False):
        with pytest.raises(FileError) as e:
            write_safetensors(tmp_path / f"b{check}", file.tensors, check_finite=check)
        assert e.value.code == "truncated-file"
    with pytest.raises(FileError):
        file.tensors["a"].read()
    (tmp_path / "a").unlink()
    with pytest.raises(FileError) as e:
        file.tensors["a"].read()
    assert e.value.code == "no-such-file"


def test_a_non_finite_number_is_named_by_tensor_and_index(tmp_path: Path) -> None:
    w = torch.randn(50, 70)
    w[31, 5] = float("inf")
    save_file({"a": torch.randn(9), "m.weight": w, "z": torch.randn(9)}, tmp_path / "a")
    file = read_safetensors(tmp_path / "a")
    with pytest.raises(ValueRefused) as e:
        write_safetensors(tmp_path / "b", file.tensors)
    assert e.value.code == "non-finite"
    assert "m.weight" in e.value.what and "[31, 5]" in e.value.seen
    write_safetensors(tmp_path / "c", file.tensors, check_finite=False)


# -- Reading strictly ---------------------------------------------------------------------------


REFUSED: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{]      ", b"", "bad-header"),
    "not UTF-8": (b'{"\xff": 1}', b"", "bad-header"),
    "a BOM": (b'\xef\xbb\xbf{}', b"", "bad-header"),
    "UTF-16": ("{}".encode("utf-16-le"), b"", "bad-header"),
    "a list": ([], b"", "bad-header"),
    "leading space": (b" {}", b"", "bad-header"),
    "deep": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "bad-header"),
    "twice": (b'{"a":1,"a":2}', b"", "duplicate-key"),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", "duplicate-key"),
    "no object": ({"a": 3}, b"", "bad-header"),
    "a field missing": ({"a": {"dtype": "F32", "shape": []}}, b"", "bad-header"),
    "a field more": ({"a": {**entry(1), "x": 1}}, bytes(4), "bad-header"),
    "empty key": ({"": entry(1)}, bytes(4), "bad-header"),
    "unknown dtype": ({"a": entry(1, dtype="F13")}, bytes(4), "bad-header"),
    "dtype no text": ({"a": {**entry(1), "dtype": ["F32"]}}, bytes(4), "bad-header"),
    "negative": ({"a": {**entry(1), "shape": [-1, -1]}}, bytes(4), "bad-header"),
    "minus zero": (
        b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", "bad-header"),
    "a bool": ({"a": {**entry(1), "shape": [True]}}, bytes(4), "bad-header"),
    "a float": ({"a": {**entry(1), "shape": [1.0]}}, bytes(4), "bad-header"),
    "NaN": ({"a": {**entry(1), "shape": [float("nan")]}}, bytes(4), "bad-header"),
    "huge": ({"a": {**entry(1), "shape": [1 << 70]}}, bytes(4), "bad-header"),
    "overflow": ({"a": {**entry(1), "shape": [1 << 62, 4]}}, bytes(4), "bad-header"),
    "huge and empty": ({"a": {**entry(0), "shape": [1 << 62, 0]}}, b"", "absurd-size"),
    "ten thousand digits": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,4]}}',
        bytes(4), "bad-header"),
    "three offsets": ({"a": {**entry(1), "data_offsets": [0, 4, 8]}}, bytes(4), "bad-header"),
    "backwards": ({"a": {**entry(1), "data_offsets": [4, 0]}}, bytes(4), "bad-header"),
    "wrong length": ({"a": {**entry(1), "data_offsets": [0, 8]}}, bytes(8), "bad-header"),
    "overlap": ({"a": entry(2), "b": entry(2, at=4)}, bytes(12), "overlapping-tensors"),
    "the same bytes twice": ({"a": entry(2), "b": entry(2)}, bytes(8), "overlapping-tensors"),
    "gap": ({"a": entry(1), "b": entry(1, at=8)}, bytes(12), "gap-in-data"),
    "gap at the start": ({"a": entry(1, at=4)}, bytes(8), "gap-in-data"),
    "trailing": ({"a": entry(1)}, bytes(5), "trailing-bytes"),
    "trailing, no tensors": ({}, bytes(5), "trailing-bytes"),
    "cut": ({"a": entry(2)}, bytes(7), "truncated-file"),
    "metadata no object": ({"__metadata__": ["a"]}, b"", "bad-header"),
    "metadata no text": ({"__metadata__": {"a": 1}}, b"", "bad-header"),
    "metadata null": ({"__metadata__": None}, b"", "bad-header"),
    "half a surrogate pair": (b'{"__metadata__":{"a":"\\ud800"}}', b"", "bad-header"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    header, data, code = REFUSED[name]
    path = file_of(tmp_path / "a.safetensors", header, data)
    with pytest.raises(FileError) as e:
        read_safetensors(path)
    assert e.value.code == code
    assert e.value.where == str(path)
    assert len(str(e.value)) < 1500


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "truncated-file"),
        (b"\2\0\0", "truncated-file"),
        (bytes(8), "bad-header"),
        (b"\x10" + bytes(7) + b"{}", "truncated-file"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "absurd-size"),
        (b"PK\x03\x04\0\0\x08\x08" + bytes(20), "absurd-size"),
        (b"version https://git-lfs.github.com/spec/v1\n", "absurd-size"),
        (b"<!DOCTYPE html><html>", "absurd-size"),
    ],
)
def test_files_that_are_none(tmp_path: Path, raw: bytes, code: str) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(FileError) as e:
        read_safetensors(tmp_path / "a")
    assert e.value.code == code


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    for name, code in [("adaptor.safetensors", "no-such-file"), ("", "is-directory")]:
        with pytest.raises(FileError) as e:
            read_safetensors(tmp_path / name)
        assert e.value.code == code
        assert bool(name) == ("`adapter.safetensors`" in e.value.next)
    with pytest.raises(FileError) as e:
        read_safetensors(tmp_path / "no" / "such")
    assert e.value.code == "no-such-file"


def test_empty_tensors_and_empty_files_are_read(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(0, 3), "b": torch.zeros(()), "c": torch.zeros(2, 0)}, tmp_path / "a"
    )
    tensors = read_safetensors(tmp_path / "a").tensors
    assert {k: t.shape for k, t in tensors.items()} == {"a": (0, 3), "b": (), "c": (2, 0)}
    save_file({}, tmp_path / "b")
    assert read_safetensors(tmp_path / "b").tensors == {}


def sample() -> bytes:
    torch.manual_seed(0)
    return save(
        {"a.w": torch.randn(3, 4), "a.b": torch.randn(4).half(), "n": torch.arange(3), "e": torch.zeros(0, 2)},
        metadata={"format": "pt", "ü": "\u0007"},
    )  # fmt: skip


SAMPLE = sample()
SNIPPETS = [
    b"0", b"-", b"-0", b"9" * 20, b"1e2", b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true",
    b'"a.w"', b"\\ud83d", b"\\", b"\xff", b" ", b"\n", b"\0", b"F16", b"[]", b"{}", b'"n":{},',
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The sample with a few bytes of its header changed, inserted or cut, and the length mended."""
    n = int.from_bytes(SAMPLE[:8], "little")
    header = bytearray(SAMPLE[8 : 8 + n])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(header)))
        end = min(len(header), at + draw(st.integers(0, 6)))
        snippet = draw(
            st.sampled_from(SNIPPETS)
            | st.binary(max_size=3)
            | st.just(b"%d" % draw(st.integers(0, 80)))
        )
        header[at:end] = snippet
    length = draw(st.just(len(header)) | st.integers(0, 2 * len(header)))
    return length.to_bytes(8, "little") + bytes(header) + SAMPLE[8 + n :]


@settings(
    max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutated())
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(
    tmp_path: Path, raw: bytes
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    try:
        ours = read_safetensors(path)
    except FileError:
        return
    try:
        with safe_open(path, "np") as theirs:
            assert set(theirs.keys()) == set(ours.tensors)
            assert (theirs.metadata() or {}) == ours.metadata
            for key, t in ours.tensors.items():
                view = theirs.get_slice(key)
                assert (tuple(view.get_shape()), view.get_dtype()) == (t.shape, t.dtype)
                assert theirs.get_tensor(key).tobytes() == t.read()
    except SafetensorError as error:  # pragma: no cover
        raise AssertionError(f"we read what the library refuses: {error}") from error


def test_two_thousand_tensors_are_read_in_milliseconds(tmp_path: Path) -> None:
    tensors = {f"block_{i}_attn_to_q.lora_down.weight": torch.zeros(2, 3) for i in range(2000)}
    save_file(tensors, tmp_path / "a")
    best = min(_seconds(tmp_path / "a") for _ in range(5))
    assert best < 0.06  # 0.008 s on a quiet core


def _seconds(path: Path) -> float:
    start = time.process_time()
    read_safetensors(path)
    return time.process_time() - start


def test_a_span_is_a_window_of_a_file(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(100)
    (tmp_path / "a").write_bytes(data)
    span = Span(str(tmp_path / "a"), 10, 50)
    assert span.read() == data[10:60]
    assert span.window(5, 20).read() == data[15:30]
    assert span.window(0, 0).read() == b""
