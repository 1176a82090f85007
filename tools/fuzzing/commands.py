"""Command lines: every option of every command, with good, odd and hostile values."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import click
import numpy as np
from corpus import base_file, sample, samples

from fuzzing import bases
from fuzzing.damage import NAMES, special
from fuzzing.inputs import Content, Input
from fuzzing.oracle import array, pack, unpack
from fuzzing.programs import _adapter, _good

_COMMANDS = (
    "inspect",
    "convert",
    "verify",
    "merge",
    "unmerge",
    "combine",
    "resize",
    "extract",
    "rewrite",
)
_ODD = (
    "", "-", "--", "-1", "0", "0.4", "1e3", "nan", "inf", "1e400", str(2**31), str(2**63), str(2**64), "x",
    "é", "\x1b[31m", "a\nb", "=", "a=b", "=1", "/", ".", "..", "~nosuchuser/x", "~", "org/name", "org/name@main",
    "org/name@/etc:x", "org/name@..:x", "org/name:../../x", "org/name@:", "x" * 300, "x" * 5000, "{room}", "in",
    "*", "%s", "\ud800", "1GB", "1kB", "0.4", "1e-3MB", "sd15", "flux", "true", "None", "{room}/in", "\x00",
)  # fmt: skip
_OUTS = (
    "out/x", "out/x", "out/x.safetensors", "out/x.safetensors", "out/x.pt2", "out/" + "x" * 235,
    "out/" + "x" * 245, "out/" + "x" * 260, "out/no/x", "out/new/", "out/é", "out/-x", "out/x\ny", "/dev/null", "/dev/full",
)  # fmt: skip

_WRITTEN = ("--output", "--onnx", "--report")


@cache
def _files() -> dict[str, Content]:
    """Good inputs of every kind, small."""
    files: dict[str, Content] = {"base.safetensors": base_file(), "tuned.safetensors": _tuned()}
    files |= bases._whole(random.Random(0))
    for name in ("peft-lora", "peft-hra"):
        files |= {f"{name}/{k}": v for k, v in sample(name).files.items()}
    for one in samples():
        if one.name in ("kohya-lora", "lycoris-lokr"):
            files[f"{one.name}.safetensors"] = one.files[one.path]
    return {**files, "model.pt2": _good(), "for-model.safetensors": _adapter()}


def _tuned() -> bytes:
    """The base with small changes in every matrix."""
    n = np.random.default_rng(9)
    tensors, _ = unpack(base_file())
    changed = {k: array(t) + 0.01 * n.standard_normal(t.shape) for k, t in tensors.items()}
    return pack({k: v.astype("f4") for k, v in changed.items()})


_INPUTS = (
    "in/base.safetensors", "in/tuned.safetensors", "in/m", "in/m/model.safetensors.index.json", "in/peft-lora",
    "in/peft-hra", "in/kohya-lora.safetensors", "in/lycoris-lokr.safetensors", "in/model.pt2", "in/for-model.safetensors",
    "in/peft-lora/adapter_config.json", "in/peft-lora/adapter_model.safetensors", "in/m/config.json",
    "in/m/model-00001-of-00002.safetensors", "in/odd", "in/missing",
)  # fmt: skip
_ADAPTERS = (
    "in/peft-lora",
    "in/peft-hra",
    "in/kohya-lora.safetensors",
    "in/lycoris-lokr.safetensors",
)
# What a command takes in its place where it is to succeed.
_GOOD: dict[str, list[tuple[str, ...]]] = {
    "inspect": [_ADAPTERS],
    "convert": [_ADAPTERS],
    "verify": [_ADAPTERS, _ADAPTERS],
    "merge": [("in/base.safetensors", "in/m"), _ADAPTERS],
    "unmerge": [("in/base.safetensors", "in/m"), ("in/peft-lora", "in/kohya-lora.safetensors")],
    "combine": [_ADAPTERS, ("in/peft-lora", "in/kohya-lora.safetensors")],
    "resize": [_ADAPTERS],
    "extract": [("in/base.safetensors",), ("in/tuned.safetensors",)],
    "rewrite": [("in/model.pt2",)],
}
_NEEDED: dict[str, tuple[str, ...]] = {
    "convert": ("--to kohya", "--to peft", "--to lycoris"), "resize": ("--rank 1", "--rank 2", "--energy 0.9"),
    "extract": ("--rank 2", "--budget 2000", "--max-error 0.5"),
    "rewrite": ("--adapter in/for-model.safetensors", "--table", "--config in/peft-lora/adapter_config.json"),
}  # fmt: skip


def make(r: random.Random, seed: int) -> Input:
    """A command line that mostly has what it needs, a few options more, and odd surroundings."""
    name = r.choice(_COMMANDS)
    args = [name]
    for choices in _GOOD[name]:
        args.append(r.choice(choices) if r.random() < 0.85 else r.choice((*_INPUTS, *_ODD)))
    args += r.choice(_NEEDED.get(name, ("",))).split() if r.random() < 0.9 else []
    if name not in ("inspect", "verify"):
        args += ["-o", _out(r, args)] if r.random() < 0.9 else []
        args += ["--overwrite"] if r.random() < 0.5 else []
        if name != "rewrite" and r.random() < 0.8:
            args += ["--base", "in/base.safetensors"] if "--base" in _options(name) else []
    for _ in range(r.choice((0, 0, 1, 1, 2, 3))):
        args += _option(r, name, args)
    if r.random() < 0.05:
        args.insert(
            r.randrange(1, len(args) + 1), r.choice((*_ODD, *NAMES, "--nonsense", "-h", "--json"))
        )
    files = {**_used(args), "odd": special(r)} if any("in/odd" in a for a in args) else _used(args)
    args = [a.replace("\x00", "") for a in args]
    return Input("commands", seed, files, "command", {"args": args}, _surroundings(r), name)


def _used(args: list[str]) -> dict[str, Content]:
    """The files that a command line names, and no more: laying them out takes most of the time."""
    text = " ".join(args)
    names = {n: c for n, c in _files().items() if f"in/{n.split('/')[0]}" in text}
    return names if "{room}" not in text else _files()


def _out(r: random.Random, args: list[str]) -> str:
    """A new name, or that of an input, of a file in one, or of a shard beside an index."""
    read = [a for a in args if a in _INPUTS]
    for arg in list(read):
        folder = arg.removesuffix("/model.safetensors.index.json").removeprefix("in/")
        read += [f"in/{name}" for name in _files() if name.startswith(f"{folder}/")]
    return r.choice(_OUTS) if r.random() < 0.7 or not read else r.choice(read)


def _surroundings(r: random.Random) -> dict[str, Any]:
    if r.random() < 0.9:
        return {}
    return r.choice((
        {"stderr": "closed"}, {"stdout": "closed"}, {"stderr": "full"}, {"cwd": "gone"}, {"fsize": 0},
        {"fsize": 700}, {"fsize": 5000}, {"stdout": "full"},
    ))  # fmt: skip


@cache
def _options(name: str) -> dict[str, click.Option]:
    """A command's options by their long names, as click has them."""
    from adaptsurgery.cli.app import group

    command = group.get_command(click.Context(group), name)
    assert command is not None
    return {p.opts[-1]: p for p in command.params if isinstance(p, click.Option)}


def _option(r: random.Random, name: str, args: list[str]) -> list[str]:
    flag, option = r.choice(sorted(_options(name).items()))
    if option.is_flag:
        return [flag]
    if isinstance(option.type, click.Choice) and r.random() < 0.8:
        value = str(r.choice(list(option.type.choices)))
    elif r.random() < 0.5:
        value = _plausible(r, flag, option, args)
    elif flag in _WRITTEN:
        value = r.choice((*_ODD, *NAMES))
    else:
        value = r.choice((*_ODD, *_INPUTS, *NAMES))
    return [f"{flag}={value}"] if r.random() < 0.2 else [flag, value]


def _plausible(r: random.Random, flag: str, option: click.Option, args: list[str]) -> str:
    if flag in _WRITTEN:
        return _out(r, args)
    kind = option.type.name
    if "size" in flag:
        return r.choice(("1", "0.4", "1000", "300", "1kB", "0", "-1", "10GB"))
    if kind.startswith("integer"):
        return str(r.choice((0, 1, 2, 3, 8, -1, 10**6, 2**64)))
    if kind.startswith("float"):
        return str(r.choice((0, 0.5, 1, 1e-9, -1, "nan", 2)))
    return r.choice(_INPUTS) if r.random() < 0.6 else r.choice(_OUTS)
