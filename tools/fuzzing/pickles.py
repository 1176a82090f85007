"""Torch's pickles: zip records stored or deflated, old forms, odd tensors, hostile objects."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from typing import Any

import numpy as np
import torch
from corpus import base_file, samples

from fuzzing.damage import NAMES, cut_or_grown, flipped
from fuzzing.inputs import Input
from fuzzing.oracle import array, unpack


class Runs:
    """An object that makes a folder where it is unpickled: the mark that code ran."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return exec, ("import os; os.makedirs(os.environ['FUZZ_MARK'], exist_ok=True)",)


class Nothing:
    """An object of a class that no reader has."""


def make(r: random.Random, seed: int) -> Input:
    """A single-file adapter as torch.save writes it, one of many ways, or damaged."""
    sample = r.choice([s for s in samples() if s.path and s.base == "base"])
    state: dict[str, Any] = {
        k: _tensor(t) for k, t in unpack(sample.files[sample.weights[0]])[0].items()
    }
    content, story = state, [sample.name]
    if r.random() < 0.5:
        change = r.choice(_CONTENTS)
        content = change(r, dict(state))
        story.append(change.__name__.strip("_"))
    blob = _saved(content, legacy=r.random() < 0.15)
    for _ in range(r.choice((0, 0, 1, 1, 2))):
        damage = r.choice(_DAMAGES)
        blob = damage(r, blob)
        story.append(damage.__name__.strip("_"))
    name = "a" + r.choice((".pt", ".bin", ".ckpt", ".pth"))
    to = r.choice(("peft", "lycoris", "kohya"))
    out = "out/result" + ("" if to == "peft" else ".safetensors")
    options = {"source": f"in/{name}", "base": "in/base.safetensors", "to": to, "out": out}
    files = {name: blob, "base.safetensors": base_file()}
    if r.random() < 0.15:
        return Input(
            "pickles", seed, files, "inspect", {"source": f"in/{name}"}, story=" ".join(story)
        )
    return Input("pickles", seed, files, "pickled", options, story=" ".join(story))


def _tensor(raw: Any) -> torch.Tensor:
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    return torch.from_numpy(np.array(array(raw))).to(dtypes.get(raw.dtype, torch.float32))


def _saved(content: Any, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
        except Exception:  # what torch cannot write
            return pickle.dumps({"x": 1})
    return stream.getvalue()


# -- What is saved


def _odd_tensor(r: random.Random, state: dict[str, Any]) -> Any:
    key = r.choice(list(state))
    t = state[key]
    state[key] = r.choice((
        lambda: t.t() if t.ndim == 2 else t, lambda: t.clone().expand(3, *t.shape), lambda: t.reshape(-1)[:1],
        lambda: t.to_sparse(), lambda: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)[:1]]),
        lambda: t.to(torch.complex64), lambda: t.to(torch.int32), lambda: torch.nn.Parameter(t),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), lambda: t.to("meta"),
        lambda: t.float().requires_grad_(), lambda: torch.empty(0), lambda: t.to(torch.float8_e4m3fn),
        lambda: t.conj(), lambda: torch.nn.parameter.Buffer(t), lambda: t.bool(), lambda: t.reshape(-1)[1:],
        lambda: t.as_strided((2, 2), (0, 0)), lambda: t.double(),
    ))()  # fmt: skip
    return state


def _odd_value(r: random.Random, state: dict[str, Any]) -> Any:
    state[r.choice((*NAMES, 5, None, (1, 2), b"x", *state))] = r.choice((
        5, None, "x", [1], {"x": 1}, np.zeros(2), Nothing, range(3), 1 + 2j, torch.float32, {}, set(), b"x",
    ))  # fmt: skip
    return state


def _hostile(r: random.Random, state: dict[str, Any]) -> Any:
    state[r.choice(list(state))] = Runs()
    return r.choice((state, Runs(), [Runs()], {"state_dict": Runs()}, {"state_dict": state}))


def _wrapped(r: random.Random, state: dict[str, Any]) -> Any:
    return r.choice((
        {"state_dict": state}, {"state_dict": state, "epoch": 3}, {"model": state}, [state], (state,),
        {"state_dict": {"state_dict": state}}, {"state_dict": []}, list(state.items()), {}, torch.nn.Linear(2, 2),
        next(iter(state.values())),
    ))  # fmt: skip


def _shared(r: random.Random, state: dict[str, Any]) -> Any:
    """Tensors that are views of one storage, in any order."""
    floats = {k: t for k, t in state.items() if t.dtype == torch.float32}
    whole = torch.cat([torch.zeros(3), *(t.reshape(-1) for t in floats.values())])
    at = 3
    for key, t in floats.items():
        state[key] = whole[at : at + t.numel()].reshape(t.shape)
        at += t.numel()
    return state


_CONTENTS = (_odd_tensor, _odd_tensor, _odd_value, _hostile, _wrapped, _shared)

# -- The bytes


def _rezipped(r: random.Random, blob: bytes) -> bytes:
    """The same records, some or all deflated, in another order, doubled, or renamed."""
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            records = [(n, archive.read(n)) for n in archive.namelist()]
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OSError,
        EOFError,
        struct.error,
        zipfile.zlib.error,
    ):  # type: ignore[attr-defined]
        return flipped(r, blob)
    deflated = r.choice((0.0, 0.3, 1.0))
    if r.random() < 0.2:
        r.shuffle(records)
    if r.random() < 0.1 and records:
        records.append(r.choice(records))
    if r.random() < 0.1 and records:
        at = r.randrange(len(records))
        records[at] = (
            r.choice(("../x", "x/" + records[at][0], records[at][0].upper())),
            records[at][1],
        )
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in records:
            kind = zipfile.ZIP_DEFLATED if r.random() < deflated else zipfile.ZIP_STORED
            archive.writestr(name, data, kind)
    return stream.getvalue()


def _record(r: random.Random, blob: bytes) -> bytes:
    """One record's bytes changed, the archive itself whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            records = {n: archive.read(n) for n in archive.namelist()}
    except Exception:  # damaged before
        return cut_or_grown(r, blob)
    name = r.choice(list(records))
    records[name] = (
        flipped(r, records[name]) if r.random() < 0.6 else cut_or_grown(r, records[name])
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for n, data in records.items():
            archive.writestr(n, data)
    return stream.getvalue()


def _flipped(r: random.Random, blob: bytes) -> bytes:
    return flipped(r, blob)


def _cut(r: random.Random, blob: bytes) -> bytes:
    return cut_or_grown(r, blob)


def _plain(r: random.Random, blob: bytes) -> bytes:
    """A pickle that is not torch's, hostile ones among them."""
    things = ({}, [], {"x": 1}, Runs(), {"x": Runs()}, {"x": [1.0, 2.0]}, os.environ.__class__)
    return pickle.dumps(r.choice(things), r.choice((0, 1, 2, 4)))


_DAMAGES = (_rezipped, _rezipped, _rezipped, _record, _record, _flipped, _cut, _plain)
