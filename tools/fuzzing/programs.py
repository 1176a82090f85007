"""Exported programs (.pt2): zip archives whose entries, JSON and pickles are damaged or hostile."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import zipfile
from functools import cache
from typing import Any

import torch

from fuzzing.damage import NAMES, cut_or_grown, flipped, json_damaged, json_text
from fuzzing.inputs import Input
from fuzzing.oracle import pack
from fuzzing.pickles import Runs

Entries = dict[str, bytes]


class Net(torch.nn.Module):
    """Two layers, a buffer and a free size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 6) → (n, 4)."""
        y: torch.Tensor = self.b(torch.relu(self.a(x)) - self.mean)
        return y


@cache
def _good() -> bytes:
    torch.manual_seed(0)
    sizes = {"x": {0: torch.export.Dim("n")}}
    program = torch.export.export(Net().eval(), (torch.randn(2, 6),), dynamic_shapes=sizes)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


@cache
def _adapter() -> bytes:
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 6, generator=generator), torch.randn(8, 2, generator=generator)
    return pack(
        {"lora_unet_a.lora_down.weight": down.numpy(), "lora_unet_a.lora_up.weight": up.numpy()}
    )


def make(r: random.Random, seed: int) -> Input:
    """A small program, damaged in one or two ways, and listed or given an adapter."""
    entries = _entries(_good())
    story, blob, method = [], None, zipfile.ZIP_STORED
    for _ in range(r.choice((0, 1, 1, 1, 2))):
        damage = r.choice(_DAMAGES)
        made = damage(r, entries)
        blob = made if isinstance(made, bytes) else None
        story.append(damage.__name__.strip("_"))
    if r.random() < 0.05:
        method = zipfile.ZIP_DEFLATED
    blob = blob if blob is not None else _zipped(entries, method)
    options: dict[str, Any] = {"source": "in/model.pt2"}
    if r.random() < 0.5:
        options |= (
            {"adapter": "in/lora.safetensors"}
            if r.random() < 0.7
            else {"config": "in/adapter_config.json"}
        )
        options |= r.choice(
            ({"dry_run": True}, {"out": "out/x.pt2"}, {"out": "out/x.pt2", "merge": True})
        )
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["a"]}
    files = {
        "model.pt2": blob,
        "lora.safetensors": _adapter(),
        "adapter_config.json": json.dumps(config).encode(),
    }
    surroundings = {"fsize": r.choice((0, 2000, 9000))} if r.random() < 0.03 else {}
    return Input("programs", seed, files, "rewrite", options, surroundings, " ".join(story))


def _entries(blob: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(entries: Entries, method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _ending(entries: Entries, ending: str) -> str:
    return next((n for n in entries if n.endswith(ending)), "archive/" + ending)


def _json_of(entries: Entries, name: str) -> Any:
    try:
        return json.loads(entries[name])
    except (ValueError, KeyError, RecursionError):
        return {}


# -- Damage


def _values(r: random.Random, entries: Entries) -> None:
    names = [n for n in entries if n.endswith(".json")]
    name = r.choice([n for n in names if "models/" in n] * 3 + names) if names else "x.json"
    read = _json_of(entries, name)
    entries[name] = json_text(r, json_damaged(r, read, r.choice((1, 1, 2, 5))))


def _top(r: random.Random, entries: Entries) -> None:
    """The outermost fields of the graph's description, of any JSON kind."""
    from fuzzing.damage import ODD

    name = _ending(entries, "models/model.json")
    read = _json_of(entries, name)
    holder = read
    for _ in range(r.choice((0, 1, 2, 3))):
        inner = (
            [v for v in holder.values() if isinstance(v, dict)] if isinstance(holder, dict) else []
        )
        holder = r.choice(inner) if inner else holder
    if isinstance(holder, dict) and holder:
        holder[r.choice(list(holder))] = r.choice(ODD)
    entries[name] = json.dumps(r.choice((read, read, read, r.choice(ODD)))).encode(
        "utf-8", "surrogatepass"
    )


def _entry_bytes(r: random.Random, entries: Entries) -> None:
    name = r.choice(list(entries))
    entries[name] = (
        flipped(r, entries[name]) if r.random() < 0.6 else cut_or_grown(r, entries[name])
    )


def _entry_gone(r: random.Random, entries: Entries) -> None:
    name = r.choice(list(entries))
    data = entries.pop(name)
    if r.random() < 0.5:
        place = r.choice(
            (
                name.replace("archive/", ""),
                "../../escaped",
                "/escaped",
                name.upper(),
                f"x/{name}",
                r.choice(NAMES),
            )
        )
        entries[place.replace("\x00", "")[:60000] or "x"] = data


def _archive(r: random.Random, entries: Entries) -> bytes:
    blob = _zipped(entries, r.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return flipped(r, blob) if r.random() < 0.6 else cut_or_grown(r, blob)


def _bomb(r: random.Random, entries: Entries) -> bytes | None:
    """A description that is small as a file and large when it is read."""
    if r.random() < 0.9:
        return _archive(r, entries)
    name = _ending(entries, "models/model.json")
    filler = r.choice((b" " * 60_000_000, b'{"x": [' + b"[]," * 10_000_000 + b"[]]}"))
    entries[name] = filler + entries[name] if filler.startswith(b" ") else filler
    return _zipped(entries, zipfile.ZIP_DEFLATED)


def _weight(r: random.Random, entries: Entries) -> None:
    """A weight that is a pickle with code in it."""
    name = _ending(entries, "model_weights_config.json")
    read = _json_of(entries, name)
    for entry in list(read.get("config", {}).values())[:1] if isinstance(read, dict) else ():
        if isinstance(entry, dict):
            entry["use_pickle"] = True
            entries[_ending(entries, f"/{entry.get('path_name')}")] = _hostile()
    entries[name] = json.dumps(read).encode()


def _inputs(r: random.Random, entries: Entries) -> None:
    entries[_ending(entries, "sample_inputs/model.pt")] = _hostile()


def _legacy(r: random.Random, entries: Entries) -> None:
    prefix = _ending(entries, "model_weights_config.json").split("/data/")[0]
    folder = r.choice(("weights", "constants"))
    entries[f"{prefix}/data/{folder}/model.pt"] = _hostile()


def _opaque(r: random.Random, entries: Entries) -> None:
    """A constant that torch unpickles as it is."""
    name = _ending(entries, "model_constants_config.json")
    read = _json_of(entries, name)
    kind = r.choice(("opaque_obj_0", "custom_obj_0", "tensor_9"))
    if isinstance(read, dict):
        meta = {"path_name": kind, "is_param": False, "use_pickle": True, "tensor_meta": None}
        read.setdefault("config", {})["x"] = meta
    entries[name] = json.dumps(read).encode()
    entries[f"{name.rpartition('/')[0]}/{kind}"] = (
        pickle.dumps(Runs()) if "opaque" in kind else _hostile()
    )


def _expression(r: random.Random, entries: Entries) -> None:
    """A size that is a Python expression."""
    name = _ending(entries, "models/model.json")
    text = entries.get(name, b"").decode("utf-8", "replace")
    code = r.choice((
        "__import__('os').mkdir(__import__('os').environ['FUZZ_MARK'])", "s0**s0**s0**9", "9**9**9**9", "1/0",
        "s0 +", "open('x', 'w')", "(" * 500, "x" * 100_000, "factorial(10**7)", "0", "-1", "s0*s1", "True", "Max(s0, 1)",
    ))  # fmt: skip
    entries[name] = re.sub(
        r'("expr_str":\s*)"[^"]*"', lambda m: m[1] + json.dumps(code), text, count=r.choice((1, 0))
    ).encode()


def _hostile() -> bytes:
    stream = io.BytesIO()
    torch.save(Runs(), stream)
    return stream.getvalue()


_DAMAGES = (
    _values, _values, _values, _top, _top, _top, _entry_bytes, _entry_bytes, _entry_gone, _entry_gone,
    _archive, _bomb, _weight, _inputs, _legacy, _opaque, _expression,
)  # fmt: skip
