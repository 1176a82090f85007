"""Numbers on a command line and in a call: what rounds to nothing, or says nothing, is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import adaptsurgery
from adaptsurgery.cli import merge as merging
from adaptsurgery.cli import run
from adaptsurgery.jobs.resize import resize
from adaptsurgery_formats.errors import SurgeryError

SIZE = 8
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    torch.manual_seed(0)
    save_file({"m.q.weight": torch.randn(SIZE, SIZE)}, tmp_path / "base.safetensors")
    save_file({"m.q.weight": torch.randn(SIZE, SIZE)}, tmp_path / "tuned.safetensors")
    factors = {"lora_down": torch.randn(2, SIZE), "lora_up": torch.randn(SIZE, 2)}
    state = {f"lora_unet_m_q.{name}.weight": t for name, t in factors.items()}
    save_file(state, tmp_path / "lora.safetensors")
    names = ("base", "tuned", "lora", "out")
    return {name: str(tmp_path / f"{name}.safetensors") for name in names}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("number", ["1", "5", "1.5", "0.3333", "12345678901", "0.1", "1.0000001"])
@pytest.mark.parametrize("end", ["", "B"])
def test_sizes_are_read_exactly(unit: str, number: str, end: str) -> None:
    size = int(Fraction(number) * UNITS[unit])
    for text in (f"{number}{unit}{end}", f" {number} {unit.lower()}{end.lower()} "):
        if size:
            assert read_size(text) == size
        else:
            with pytest.raises(merging.click.BadParameter):
                read_size(text)


def read_size(text: str) -> int | None:
    context = merging.click.Context(merging.command)
    option = next(p for p in merging.command.params if p.name == "max_shard_size")
    assert option.callback is not None
    size: int | None = option.callback(context, option, text)
    return size


SIZES = ["0.4", "0", "0B", "0.0GB", "1e-3KB", "1e3", "-5GB", "5PB", "5i", "5iB", "GB", "", "nan",
         "inf", "0x10", "1,5GB", "5GBs", "٥GB", "0.0004KB", "9" * 21, "1" + "." * 2]  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_sizes_that_are_none(files: dict[str, str], text: str) -> None:
    asked = ["merge", files["base"], files["lora"], "-o", files["out"], f"--max-shard-size={text}"]
    assert run(asked) == 2 and not Path(files["out"]).exists()


WEIGHTS = ["", "1e-400", "-1e-400", "1e-320", "5e-324", "0.0e-5x", "nan", "inf", "-inf", "1e400",
           "much", "0x1", "1e-99999999"]  # fmt: skip


@pytest.mark.parametrize("command", ["merge", "unmerge", "combine"])
@pytest.mark.parametrize("text", WEIGHTS)
def test_weights_that_are_none(files: dict[str, str], command: str, text: str) -> None:
    base = [] if command == "combine" else [files["base"]]
    assert run([command, *base, f"{files['lora']}={text}", "-o", files["out"]]) == 1
    assert not Path(files["out"]).exists()
    call = {"merge": adaptsurgery.merge, "unmerge": adaptsurgery.unmerge}.get(command)
    for value in (text, Decimal(text) if text in ("1e-400", "1e400", "5e-324") else text):
        with pytest.raises(SurgeryError) as error:
            if call is None:
                adaptsurgery.combine([(files["lora"], value)], files["out"])  # type: ignore[list-item]
            else:
                call(files["base"], [(files["lora"], value)], files["out"])  # type: ignore[list-item]
        assert error.value.code == "bad-weight"


@pytest.mark.parametrize(
    "text", ["0.8", "-1", "1e-30", "2.5E-3", "1e-300", "+0.5", "0.0", "0e-999"]
)
def test_weights_that_are(files: dict[str, str], text: str) -> None:
    report = adaptsurgery.merge(files["base"], f"{files['lora']}={text}", files["out"])
    assert report.facts["adapters"][0]["weight"] == float(text)


COMMANDS = {
    "convert": lambda f: ["convert", f["lora"], "--to", "lycoris", "--as", "lora"],
    "combine": lambda f: ["combine", f["lora"]],
    "resize": lambda f: ["resize", f["lora"]],
    "extract": lambda f: ["extract", f["base"], f["tuned"], "--to", "kohya"],
    "merge": lambda f: ["merge", f["base"], f["lora"]],
    "unmerge": lambda f: ["unmerge", f["base"], f["lora"]],
}
OPTIONS = {
    "--rank": (["convert", "combine", "resize", "extract"], ["0", "-1", "1.5", "1e1", ""]),
    "--energy": (["resize", "extract"], ["0", "1e-400", "-0.1", "1.01", "nan", "inf", ""]),
    "--max-error": (["extract"], ["0", "1e-400", "1", "0.9999999", "-1", "nan"]),
    "--budget": (["extract"], ["0", "-1", "0.5", "1e3"]),
    "--workers": (["merge", "unmerge", "extract"], ["0", "-1", "0.5"]),
    "--num-shards": (["merge", "unmerge", "extract"], ["0", "-1", "0.5"]),
    "--shard-index": (["merge", "unmerge", "extract"], ["1", "-1", "0.5"]),
    "--seed": (["extract"], ["-1", "0.5", "1e3"]),
    "--factor": (["extract"], ["0", "-2", "0.5"]),
    "--conv-rank": (["extract"], ["0", "-1", "0.5"]),
    "--rank-pattern": (["extract"], ["q=0", "q=", "=4", "q=-1", "q=²", "q=0.5", "q"]),
}
REFUSED = [(c, o, v) for o, (commands, values) in OPTIONS.items() for c in commands for v in values]


@pytest.mark.parametrize(("command", "option", "value"), REFUSED)
def test_options_that_say_nothing(
    files: dict[str, str], command: str, option: str, value: str
) -> None:
    goals = ("--rank", "--energy", "--max-error", "--budget")
    goal = ["--rank", "1"] if command == "extract" and option not in goals else []
    kind = ["--algorithm", "lokr"] if option == "--factor" else []
    asked = [*COMMANDS[command](files), "-o", files["out"], *goal, *kind, f"{option}={value}"]
    assert run(asked) in (1, 2)
    assert not Path(files["out"]).exists()


CALLS: dict[str, tuple[Callable[[dict[str, str], Any], object], list[Any]]] = {
    "max_shard_size": (
        lambda f, v: adaptsurgery.merge(f["base"], f["lora"], f["out"], max_shard_size=v),
        [0, -1, 0.4, 1.5, "5GB", True, math.nan],
    ),
    "unmerge's": (
        lambda f, v: adaptsurgery.unmerge(f["base"], f["lora"], f["out"], max_shard_size=v),
        [0, 0.4],
    ),
    "workers": (
        lambda f, v: adaptsurgery.merge(f["base"], f["lora"], f["out"], workers=v),
        [0, -1, 0.5, None, True],
    ),
    "part": (
        lambda f, v: adaptsurgery.merge(f["base"], f["lora"], f["out"], shard_index=v),
        [1, -1, 0.5, True],
    ),
    "parts": (
        lambda f, v: adaptsurgery.merge(f["base"], f["lora"], f["out"], num_shards=v),
        [0, -1, 1.5, True],
    ),
    "convert's rank": (
        lambda f, v: adaptsurgery.convert(f["lora"], f["out"], "kohya", algorithm="lora", rank=v),
        [0, -1, 1.5, True],
    ),
    "combine's rank": (
        lambda f, v: adaptsurgery.combine([f["lora"]], f["out"], rank=v),
        [0, -1, 1.5, True, math.nan],
    ),
    "resize's rank": (lambda f, v: resize(f["lora"], f["out"], rank=v), [0, 1.5, True, math.nan]),
    "energy": (lambda f, v: resize(f["lora"], f["out"], energy=v), [0.0, 1.5, math.nan]),
    **{
        name: (
            lambda f, v, name=name: adaptsurgery.extract(  # type: ignore[misc]
                f["base"], f["tuned"], f["out"], to="kohya", **{"rank": 1, name: v}
            ),
            values,
        )
        for name, values in {
            "rank": [0, 1.5, True],
            "workers": [0, 0.5],
            "seed": [0.5, True, "1"],
            "conv_rank": [0, 0.5],
            "rank_pattern": [{"q": 0}, {"q": 0.5}, {"q": "4"}],
        }.items()
    },
}


@pytest.mark.parametrize(("call", "value"), [(c, v) for c, (_, vs) in CALLS.items() for v in vs])
def test_calls_that_say_nothing(files: dict[str, str], call: str, value: object) -> None:
    with pytest.raises(SurgeryError):
        CALLS[call][0](files, value)
    assert not Path(files["out"]).exists()


def test_numpys_integers_are_integers(files: dict[str, str]) -> None:
    assert resize(files["lora"], files["out"], rank=np.int64(1)).rows  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1, 0.5, "1"])
def test_seeds_that_no_generator_takes(files: dict[str, str], seed: Any) -> None:
    with pytest.raises(SurgeryError) as error:
        adaptsurgery.rewrite(files["base"], files["out"], config=files["lora"], seed=seed)
    assert error.value.code == "bad-seed"
    asked = ["rewrite", files["base"], "-o", files["out"], "--config", files["lora"]]
    assert run([*asked, f"--seed={seed}"]) in (1, 2)
