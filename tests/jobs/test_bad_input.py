"""Bad input by name: each kind of damage has its error code, leaves nothing behind, touches nothing.

Every case goes through the library and through the command.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import (
    CONFIG,
    PREFIX,
    SHAPES,
    WEIGHTS,
    Raw,
    base_file,
    cut,
    joined,
    pack,
    peft_folder,
    raw,
    sample,
    unpack,
    write,
)
from unix import needs

import adaptsurgery
from adaptsurgery import SurgeryError
from adaptsurgery.cli import run
from adaptsurgery_formats import patterns

Tensors = dict[str, Any]
FLAT = "lora_unet_blk_0_fc_a"
DOWN, UP, ALPHA = (f"{FLAT}.{s}" for s in ("lora_down.weight", "lora_up.weight", "alpha"))


def ones(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def good() -> Tensors:
    """One module of kohya's, rank 2 on a (12, 8) weight."""
    return {DOWN: ones(2, 8), UP: ones(12, 2), ALPHA: np.float32(1)}


@dataclass
class Desk:
    """A place to work at: a base, an input folder and an empty output folder."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __post_init__(self) -> None:
        for name in ("in", "out"):
            (self.folder / name).mkdir()
        self.base = self.folder / "base.safetensors"
        self.base.write_bytes(base_file())

    @property
    def input(self) -> Path:
        return self.folder / "in"

    @property
    def out(self) -> Path:
        return self.folder / "out" / "result.safetensors"

    def file(self, data: bytes, name: str = "adapter.safetensors") -> Path:
        path = self.input / name
        path.write_bytes(data)
        return path

    def folder_of(self, files: Mapping[str, bytes]) -> Path:
        return write(files, self.input)

    def refused(
        self, code: str, source: Path, to: str = "kohya", out: Path | None = None, **options: Any
    ) -> SurgeryError:
        """The error of a conversion that is refused with just this code, both ways of asking."""
        out = out or self.out
        options = {"base": self.base, **options}
        before = self.seen()
        with pytest.raises(SurgeryError) as caught:
            adaptsurgery.convert(source, out, to, **options)
        assert caught.value.code == code, str(caught.value)
        assert shown(str(caught.value)), repr(str(caught.value))
        told = self.command("convert", source, "-o", out, "--to", to, *arguments(options))
        assert f"error[{code}]" in told
        assert self.seen() == before, "something was left behind, or changed"
        return caught.value

    def command(self, *args: object) -> str:
        """What a failing command says on stderr."""
        self.capsys.readouterr()
        assert run([os.fspath(a) if isinstance(a, Path) else str(a) for a in args]) == 1
        _, told = self.capsys.readouterr()
        assert "Traceback" not in told and shown(told), told
        return told

    def converted(self, source: Path, to: str = "kohya", **options: Any) -> Any:
        return adaptsurgery.convert(source, self.out, to, **{"base": self.base, **options})

    def seen(self) -> dict[str, tuple[int, int]]:
        """Every file below the folder: when it was written, and how long it is."""
        paths = [p for p in sorted(self.folder.rglob("*")) if not p.is_dir()]
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in paths}


def arguments(options: Mapping[str, Any]) -> list[str]:
    names = {"algorithm": "--as", "layout": "--from"}
    said: list[str] = []
    for name, value in options.items():
        flag = names.get(name, "--" + name.replace("_", "-"))
        if value is True:
            said.append(flag)
        elif value not in (None, False):
            said += [flag, str(value)]
    return said


def shown(text: str) -> bool:
    """Whether a terminal can be shown this: nothing but lines of printable characters."""
    return all(c == "\n" or c.isprintable() for c in text) and len(text) < 8000


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def test_what_is_damaged_below_is_good_before(desk: Desk) -> None:
    desk.converted(desk.file(pack(good())))
    assert desk.out.exists()


# --- the file -----------------------------------------------------------------------------------

_E = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(entries: Any, data: int = 8) -> bytes:
    return joined(json.dumps(entries), bytes(data))


def entry(**changes: Any) -> bytes:
    return header({DOWN: {**_E, **changes}})


FILES: dict[str, tuple[str, bytes]] = {
    "empty file": ("truncated-file", b""),
    "seven bytes": ("truncated-file", b"\x10" + bytes(6)),
    "cut in the header": ("truncated-file", pack(good())[:40]),
    "cut in the data": ("truncated-file", pack(good())[:-1]),
    "header length 0": ("bad-header", bytes(8)),
    "header length 2^64-1": ("absurd-size", b"\xff" * 8 + b"{}"),
    "header length 2^63": ("absurd-size", (2**63).to_bytes(8, "little") + b"{}"),
    "header longer than the file": ("truncated-file", (500).to_bytes(8, "little") + b"{}"),
    "a web page": ("absurd-size", b"<!DOCTYPE html><html>"),
    "a Git LFS pointer": ("absurd-size", b"version https://git-lfs.github.com/spec/v1\n"),
    "header not JSON": ("bad-header", joined("{not json", b"")),
    "header not UTF-8": ("bad-header", joined(b'{"\xff": 1}', b"")),
    "header a list": ("bad-header", joined("[]", b"")),
    "header nested deeply": ("bad-header", joined('{"a":' * 9000 + "1" + "}" * 9000, b"")),
    "header with a huge integer": ("bad-header", joined('{"a":' + "9" * 9000 + "}", b"")),
    "half a surrogate pair": ("bad-header", joined('{"\\ud800": 1}', b"")),
    "no tensors": ("empty-adapter", joined("{}", b"")),
    "overlapping offsets": (
        "overlapping-tensors",
        header({DOWN: _E, UP: {**_E, "data_offsets": [4, 12]}}, 12),
    ),
    "a gap": ("gap-in-data", header({DOWN: {**_E, "data_offsets": [8, 16]}}, 16)),
    "trailing bytes": ("trailing-bytes", pack(good()) + b"\0"),
    "bytes that no tensor owns": ("trailing-bytes", joined("{}", b"12345678")),
    "one key twice": (
        "duplicate-key",
        joined('{"a": %s, "a": %s}' % ((json.dumps(_E),) * 2), bytes(8)),
    ),
    "an entry without dtype": ("bad-header", header({DOWN: {"shape": [2], "data_offsets": [0, 8]}})),
    "an entry with more": ("bad-header", entry(strides=[1])),
    "unknown dtype": ("bad-header", entry(dtype="F33")),
    "negative dimension": ("bad-header", entry(shape=[-2])),
    "2^63 rows": ("bad-header", entry(shape=[2**63])),
    "2^64 rows": ("bad-header", entry(shape=[2**64])),
    "a product that overflows to 0": ("bad-header", entry(shape=[2**32, 2**32])),
    "zero times absurd": ("absurd-size", header({DOWN: {**_E, "shape": [0, 2**62],
                                                         "data_offsets": [0, 0]}}, 0)),
    "float dimension": ("bad-header", entry(shape=[2.0])),
    "bool dimension": ("bad-header", entry(shape=[True, 2])),
    "offsets reversed": ("bad-header", entry(data_offsets=[8, 0])),
    "offsets past the end": ("truncated-file", header({DOWN: {**_E, "data_offsets": [0, 8]}}, 4)),
    "metadata not text": ("bad-header", header({"__metadata__": {"a": 1}, DOWN: _E})),
    "an empty key": ("bad-header", header({"": _E})),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_safetensors_file(desk: Desk, name: str) -> None:
    code, data = FILES[name]
    desk.refused(code, desk.file(data))


@pytest.mark.parametrize("name", [n for n in FILES if FILES[n][0] != "empty-adapter"])
def test_the_same_files_as_a_base(desk: Desk, name: str) -> None:
    code, data = FILES[name]
    desk.base.write_bytes(data)
    desk.refused(code, desk.file(pack(good())))


# --- keys ---------------------------------------------------------------------------------------


def without(*keys: str) -> Tensors:
    return {k: v for k, v in good().items() if k not in keys}


def plus(**more: Any) -> Tensors:
    return good() | {k.replace("__", "."): v for k, v in more.items()}


LOHA = {
    f"{FLAT}.hada_w{h}_{s}": ones(12, 2) if s == "a" else ones(2, 8) for h in "12" for s in "ab"
}
LOKR = {f"{FLAT}.lokr_w1": ones(2, 2), f"{FLAT}.lokr_w2": ones(6, 4)}
LOHA_CORE = {
    f"lora_unet_blk_0_conv_in.hada_{s}": t
    for s, t in {"t1": ones(2, 2, 3, 3), "t2": ones(2, 2, 3, 3), "w1_a": ones(2, 8),
                 "w2_a": ones(2, 8), "w1_b": ones(2, 4), "w2_b": ones(2, 4)}.items()
}  # fmt: skip


def dropped(tensors: Tensors, ending: str) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.endswith(ending)}


KEYS: dict[str, tuple[str, Tensors]] = {
    "unknown key": ("unknown-key", good() | {"lora_unet_x.novel": ones(2)}),
    "a model's own weight": ("unknown-layout", {"blk_0.fc_a.weight": ones(12, 8)}),
    "layouts mixed": ("mixed-layouts", good() | {"lycoris_blk_0_fc_b.diff": ones(8, 12)}),
    "algorithms mixed": ("mixed-algorithms", good() | LOKR),
    "up without down": ("incomplete-module", without(DOWN)),
    "down without up": ("incomplete-module", without(UP)),
    "alpha alone": ("incomplete-module", without(DOWN, UP)),
    "w1_a without w1_b": ("incomplete-module", dropped(LOHA, "w1_b")),
    "t1 without t2": ("incomplete-module", dropped(LOHA_CORE, "_t2")),
    "lokr_w1 alone": ("incomplete-module", dropped(LOKR, "_w2")),
    "dora_scale alone": ("incomplete-module", {f"{FLAT}.dora_scale": ones(12, 1)}),
    "an OFT": ("unsupported-algorithm", {f"{FLAT}.oft_blocks": ones(2, 4, 4)}),
    "no such module": ("unknown-module", {k.replace("fc_a", "fc_z"): v for k, v in good().items()}),
    "a very long name": ("unknown-module", {f"lora_unet_x{'é' * 100_000}.lora_up.weight": ones(12, 2),
                         f"lora_unet_x{'é' * 100_000}.lora_down.weight": ones(2, 8)}),
    "newlines and escapes in a name": ("unknown-module", {
        k.replace("fc_a", "\n\x1b[2J\x9b\u202e\x00fc"): v for k, v in good().items()}),
    "escapes in an unknown key": ("unknown-key", {"lora_unet_x\x1b]0;x\x07.novel": ones(2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_make_no_adapter(desk: Desk, name: str) -> None:
    code, tensors = KEYS[name]
    desk.refused(code, desk.file(pack(tensors)))


def test_a_component_that_the_model_does_not_have(desk: Desk) -> None:
    third = {k.replace("unet", "te3"): v for k, v in good().items()}
    desk.refused("unknown-prefix", desk.file(pack(third)), base="sdxl")


def test_two_modules_that_flatten_alike(desk: Desk) -> None:
    desk.base.write_bytes(pack({"a.b.weight": ones(4, 4), "a_b.weight": ones(4, 4)}))
    both = {f"{PREFIX}{p}.lora_{s}.weight": ones(4, 4) for p in ("a.b", "a_b") for s in "AB"}
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["a.b", "a_b"]}
    folder = desk.folder_of(peft_folder(both, config))
    desk.refused("colliding-names", folder, "kohya")
    desk.refused("colliding-names", folder, "lycoris")
    flat = desk.file(pack({f"lycoris_a_b.lora_{s}.weight": ones(4, 4) for s in ("up", "down")}))
    desk.refused("ambiguous-module", flat)


def test_a_module_adapted_under_two_names(desk: Desk) -> None:
    """SDXL's UNet in LDM's names and in diffusers' within one file."""
    names = (
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    )
    both = {f"lora_unet_{n}.lora_{s}.weight": ones(*shape, dtype="float16")
            for n in names for s, shape in (("up", (640, 1)), ("down", (1, 640)))}  # fmt: skip
    desk.refused("duplicate-module", desk.file(pack(both)), base="sdxl")


# --- shapes and numbers -------------------------------------------------------------------------

SHAPES_WRONG: dict[str, tuple[str, Tensors]] = {
    "rank of up and down": ("bad-shape", plus() | {UP: ones(12, 3)}),
    "not the base's inputs": ("bad-shape", plus() | {DOWN: ones(2, 7)}),
    "not the base's outputs": ("bad-shape", plus() | {UP: ones(13, 2)}),
    "a kernel on a linear": ("bad-shape", plus() | {DOWN: ones(2, 8, 3, 3), UP: ones(12, 2, 1, 1)}),
    "six dimensions": ("bad-shape", plus() | {DOWN: ones(2, 8, 1, 1, 1, 1)}),
    "a scalar for a matrix": ("bad-shape", plus() | {DOWN: np.float32(1)}),
    "an alpha of two": ("bad-shape", plus() | {ALPHA: ones(2)}),
    "nothing in a tensor": ("bad-shape", plus() | {DOWN: ones(0, 8), UP: ones(12, 0)}),
    "an empty alpha": ("bad-shape", plus() | {ALPHA: ones(0)}),
    "dora_scale of another size": ("bad-shape", plus() | {f"{FLAT}.dora_scale": ones(5, 1)}),
    "dora_scale a matrix": ("bad-shape", plus() | {f"{FLAT}.dora_scale": ones(12, 8)}),
    "loha halves apart": ("bad-shape", LOHA | {f"{FLAT}.hada_w2_a": ones(12, 3)}),
    "lokr not the base's": ("bad-shape", LOKR | {f"{FLAT}.lokr_w2": ones(6, 5)}),
    "core not square": ("bad-shape", LOHA_CORE | {"lora_unet_blk_0_conv_in.hada_t1": ones(2, 3, 3, 3)}),
    "core of another kernel": ("bad-shape", LOHA_CORE | {
        f"lora_unet_blk_0_conv_in.hada_t{h}": ones(2, 2, 5, 5) for h in "12"}),
    "an I8 factor": ("bad-dtype", plus() | {DOWN: ones(2, 8, dtype="int8")}),
    "a BOOL factor": ("bad-dtype", plus() | {DOWN: ones(2, 8, dtype="bool")}),
    "an F8 factor": ("bad-dtype", plus() | {DOWN: Raw("F8_E4M3", (2, 8), bytes(16))}),
    "a C64 factor": ("bad-dtype", plus() | {DOWN: Raw("C64", (2, 8), bytes(128))}),
    "an F8 alpha": ("bad-value", plus() | {ALPHA: Raw("F8_E4M3", (), bytes(1))}),
    "a NaN alpha": ("non-finite", plus() | {ALPHA: np.float32("nan")}),
    "an infinite alpha": ("non-finite", plus() | {ALPHA: np.float16("inf")}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES_WRONG)
def test_shapes_and_dtypes(desk: Desk, name: str) -> None:
    code, tensors = SHAPES_WRONG[name]
    desk.refused(code, desk.file(pack(tensors)))


@pytest.mark.parametrize("shape", [(), (8,), (0, 8), (12, 8, 3)])
def test_a_base_whose_weight_is_no_matrix(desk: Desk, shape: tuple[int, ...]) -> None:
    desk.base.write_bytes(pack({"blk_0.fc_a.weight": ones(*shape)}))
    desk.refused("bad-shape", desk.file(pack(good())))
    desk.refused("bad-shape", desk.file(pack(LOKR)))


def test_a_magnitude_that_only_the_base_shows_to_be_wrong(desk: Desk) -> None:
    """Flat LoHa factors hide where the inputs end: a magnitude per input may be any divisor."""
    desk.refused("bad-shape", desk.file(pack(LOHA | {f"{FLAT}.dora_scale": ones(1, 4)})))


NAN = {
    "F64": (b"\0" * 6 + b"\xf8\x7f", b"\0" * 6 + b"\xf0\xff"),
    "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\xff"),
    "F16": (b"\0\x7e", b"\0\xfc"),
    "BF16": (b"\xc0\x7f", b"\x80\xff"),
}


@pytest.mark.parametrize("dtype", NAN)
@pytest.mark.parametrize("which", (0, 1), ids=("nan", "inf"))
@pytest.mark.parametrize("key", (DOWN, UP, f"{FLAT}.dora_scale"))
@pytest.mark.parametrize("computed", (False, True), ids=("copied", "computed"))
def test_nan_and_infinity(desk: Desk, dtype: str, which: int, key: str, computed: bool) -> None:
    """What is only copied is written and told; what is computed of such numbers is refused."""
    shapes = {DOWN: (2, 8), UP: (12, 2), f"{FLAT}.dora_scale": (12, 1)}
    width = len(NAN[dtype][0])
    tensors = {k: Raw(dtype, s, b"\0" * (s[0] * s[1] * width)) for k, s in shapes.items()}
    data = tensors[key].data
    tensors[key] = Raw(dtype, shapes[key], data[width:] + NAN[dtype][which])
    source = desk.file(pack(tensors))
    if computed:
        desk.refused("non-finite", source, algorithm="lora", rank=1, allow_lossy=True)
        return
    notes = [n for n in desk.converted(source).notes if n.code == "nonfinite-copied"]
    assert len(notes) == 1 and key in notes[0].text and notes[0].text.startswith("1 number")
    assert unpack(desk.out.read_bytes())[0][key].data == tensors[key].data


@pytest.mark.parametrize("key", ("head.weight", "head.bias"))
def test_nan_in_a_replaced_parameter(desk: Desk, key: str) -> None:
    files = dict(sample("peft-lora").files)
    tensors, metadata = unpack(files[WEIGHTS])
    t = tensors[PREFIX + key]
    tensors[PREFIX + key] = Raw(t.dtype, t.shape, NAN["F32"][0] + t.data[4:])
    folder = desk.folder_of(files | {WEIGHTS: pack(tensors, metadata)})
    report = adaptsurgery.convert(folder, desk.folder / "out" / "folder", "peft", base=desk.base)
    assert [PREFIX + key in n.text for n in report.notes if n.code == "nonfinite-copied"] == [True]


@pytest.mark.parametrize("value", (1e-45, -0.0, 3e38))
def test_alphas_at_the_edge_keep_their_scale(desk: Desk, value: float) -> None:
    source = desk.file(pack(plus() | {ALPHA: np.float32(value)}))
    if value == -0.0:
        assert adaptsurgery.load(source, desk.base).modules("blk_0.fc_a")[0].scale == 1.0
    desk.converted(source, "lycoris")
    assert adaptsurgery.verify(source, desk.out, base=desk.base)


# --- PEFT's config ------------------------------------------------------------------------------

PEFT = {f"{PREFIX}blk_0.fc_a.lora_A.weight": ones(2, 8),
        f"{PREFIX}blk_0.fc_a.lora_B.weight": ones(12, 2)}  # fmt: skip
SAID = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc_a"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "another rank": ("config-disagrees", {"r": 4}),
    "another rank by pattern": ("config-disagrees", {"rank_pattern": {"fc_a": 3}}),
    "modules not targeted": ("config-disagrees", {"target_modules": ["fc_b"]}),
    "modules excluded": ("config-disagrees", {"exclude_modules": ["fc_a"]}),
    "layers not transformed": ("config-disagrees", {"layers_to_transform": [7]}),
    "use_dora without magnitudes": ("config-disagrees", {"use_dora": True}),
    "another peft_type": ("config-disagrees", {"peft_type": "LOKR"}),
    "peft_type not carried": ("unsupported-algorithm", {"peft_type": "OFT"}),
    "peft_type a number": ("unsupported-algorithm", {"peft_type": 7}),
    "no peft_type": ("unsupported-algorithm", {"peft_type": None}),
    "r text": ("bad-config", {"r": "2"}),
    "r null": ("bad-config", {"r": None}),
    "r zero": ("bad-config", {"r": 0}),
    "r a bool": ("bad-config", {"r": True}),
    "r 10^12": ("bad-config", {"r": 10**12}),
    "r beyond float": ("bad-config", {"r": 10**400}),
    "alpha beyond float": ("bad-config", {"lora_alpha": 10**400}),
    "alpha text": ("bad-config", {"lora_alpha": "8"}),
    "rank_pattern a list": ("bad-config", {"rank_pattern": ["fc_a"]}),
    "rank_pattern of text": ("bad-config", {"rank_pattern": {"fc_a": "2"}}),
    "target_modules numbers": ("bad-config", {"target_modules": [1]}),
    "layers_to_transform text": ("bad-config", {"layers_to_transform": ["1"]}),
    "layers_pattern a number": ("bad-config", {"layers_pattern": 5}),
    "modules_to_save text": ("bad-config", {"modules_to_save": "head"}),
    "use_dora text": ("bad-config", {"use_dora": "yes"}),
    "trainable tokens": ("unsupported-option", {"trainable_token_indices": [1, 2]}),
    "PiSSA": ("unsupported-option", {"init_lora_weights": "pissa"}),
    "invalid rank_pattern": ("bad-pattern", {"rank_pattern": {"fc_(": 2}}),
    "invalid target_modules": ("bad-pattern", {"target_modules": "*fc_a"}),
    "a repetition beyond counting": ("bad-pattern", {"target_modules": "a{99999999999}"}),
    "a pattern of two megabytes": ("bad-pattern", {"target_modules": "a|" * (1 << 20)}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_honoured(desk: Desk, name: str) -> None:
    code, changes = CONFIGS[name]
    desk.refused(code, desk.folder_of(peft_folder(PEFT, SAID | changes)))


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"1",
    "not UTF-8": b'{"peft_type": "\xff"}',
    "nested deeply": b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}",
    "NaN": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "1e400": b'{"peft_type": "LORA", "lora_dropout": 1e400}',
    "a huge integer": b'{"peft_type": "LORA", "r": ' + b"9" * 9000 + b"}",
    "65 MB": b" " * (65 << 20),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_is_no_json_object(desk: Desk, name: str) -> None:
    desk.refused("bad-config", desk.folder_of(peft_folder(PEFT, SAID) | {CONFIG: TEXTS[name]}))


# Each would run for minutes or years over a name of some thirty characters.
EXPLOSIVE = {
    "nested": r"(a+)+$",
    "alternatives": r"(a|a)*$",
    "many groups without a repetition": "(a|a)" * 40 + "$",
    "many optional": "a?" * 40 + "a" * 40,
    "optional groups": "(?:a|aa)?" * 30 + "$",
    "many dots": r".*.*.*.*.*.*.*.*b",
    "hidden by verbose mode": r"(?x) (a +) +$",
    "hidden by a scoped flag": r"(?x:(a+) +)$",
    "hidden by a comment": r"(a+)(?#)+$",
    "back-reference": r"(?P<x>(a+)+)(?P=x)b",
    "look-ahead": r"(?=(a+)+$)b",
}


@pytest.mark.parametrize(
    "field", ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
)
@pytest.mark.parametrize("name", EXPLOSIVE)
def test_a_pattern_that_would_run_for_minutes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str, field: str
) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_SECONDS", 0.4)
    module = "a" * 60 + "!"
    tensors = {k.replace("blk_0.fc_a", module): v for k, v in PEFT.items()}
    value: Any = EXPLOSIVE[name]
    if name == "hidden by verbose mode" and field.endswith("pattern"):
        pytest.skip("a flag in the middle of a pattern is no regex: bad-pattern")
    if field.endswith("pattern"):
        value = {value.removesuffix("$"): 2}
    said = SAID | {"target_modules": [module], field: value}
    start = time.monotonic()
    desk.refused("slow-pattern", desk.folder_of(peft_folder(tensors, said)), base=None)
    assert time.monotonic() - start < 8


def test_many_patterns_share_one_time_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_SECONDS", 1.0)
    ranks = {f"(a+)+{i}": 2 for i in range(2000)}
    start = time.monotonic()
    folder = desk.folder_of(peft_folder(PEFT, SAID | {"rank_pattern": ranks}))
    desk.refused("slow-pattern", folder)
    assert time.monotonic() - start < 8


def test_a_slow_pattern_over_very_long_names(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two repetitions are quadratic: harmless over a path, not over a name of a megabyte."""
    monkeypatch.setattr(patterns, "TIMEOUT_SECONDS", 0.4)
    module = "a" * (1 << 20)
    tensors = {k.replace("blk_0.fc_a", module): v for k, v in PEFT.items()}
    said = SAID | {"target_modules": ".*a.*b"}
    desk.refused("slow-pattern", desk.folder_of(peft_folder(tensors, said)), base=None)


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        *((p, "config-disagrees") for p in ("", ".*(a+)+", "\\", "a" * 5000)),
        *((p, "bad-pattern") for p in ("(", "[")),
    ],
)
def test_layers_pattern_that_names_no_layer(desk: Desk, pattern: str, code: str) -> None:
    said = SAID | {"layers_to_transform": [0], "layers_pattern": [pattern]}
    desk.refused(code, desk.folder_of(peft_folder(PEFT, said)))


def test_a_layer_number_of_thousands_of_digits(desk: Desk) -> None:
    module = f"blk.{'1' * 5000}.fc_a"
    tensors = {k.replace("blk_0.fc_a", module): v for k, v in PEFT.items()}
    said = SAID | {"layers_to_transform": [0], "layers_pattern": "blk"}
    desk.refused("config-disagrees", desk.folder_of(peft_folder(tensors, said)), base=None)


BAD_PEFT: dict[str, tuple[str, Tensors, dict[str, Any]]] = {
    "lokr_w1 a vector": ("bad-shape", {f"{PREFIX}blk_0.c1d.lokr_w1": ones(2),
                         f"{PREFIX}blk_0.c1d.lokr_w2": ones(3, 4, 3)}, {"peft_type": "LOKR"}),
    "lora_A a scalar": ("bad-shape", {f"{PREFIX}blk_0.pw.lora_A.weight": np.float32(1),
                        f"{PREFIX}blk_0.pw.lora_B.weight": ones(6, 2, 1, 1)}, {}),
    "lora_B without elements": ("bad-shape", {f"{PREFIX}blk_0.pw.lora_A.weight": ones(2, 8, 1, 1),
                        f"{PREFIX}blk_0.pw.lora_B.weight": ones(6, 0, 1, 1)}, {}),
    "a magnitude of no dimension": ("bad-shape", PEFT | {
        f"{PREFIX}blk_0.fc_a.lora_magnitude_vector": np.float32(1)}, {"use_dora": True}),
    "a grouped convolution": ("peft-grouped-conv", {
        f"{PREFIX}blk_0.pw.lora_A.weight": ones(4, 8, 1, 1),
        f"{PREFIX}blk_0.pw.lora_B.weight": ones(6, 2, 1, 1)}, {"r": 4}),
    "a module not to be saved": ("unknown-key", PEFT | {f"{PREFIX}head.weight": ones(4, 12)}, {}),
    "another method's tensor": ("unknown-key", PEFT | {f"{PREFIX}blk_0.fc_a.oft_r": ones(2)}, {}),
    "one module twice": ("config-disagrees", PEFT | {
        f"{PREFIX}blk_0.fc_a.lora_embedding_A": ones(2, 8)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PEFT)
def test_peft_tensors(desk: Desk, name: str) -> None:
    code, tensors, changes = BAD_PEFT[name]
    paths = sorted({k.removeprefix(PREFIX).split(".")[1] for k in tensors})
    said = SAID | {"target_modules": paths} | changes
    desk.refused(code, desk.folder_of(peft_folder(tensors, said)))


# --- metadata -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", '{"": 1}', '{"": {"peft_type": 1}}', "[" * 9000, '{"": {"r": ' + "9" * 9000,
     '{"": {"peft_type": "LORA", "r": "x"}}', '{"": {"peft_type": "LORA", "lora_alpha": NaN}}'],
)  # fmt: skip
@pytest.mark.parametrize("layout", ("kohya", "lycoris"))
def test_a_carried_config_that_was_damaged(desk: Desk, text: str, layout: str) -> None:
    tensors = good()
    if layout == "lycoris":
        tensors = {k.replace("lora_unet_", "lycoris_"): v for k, v in tensors.items()}
    source = desk.file(pack(tensors, {"adaptsurgery.adapter_config": text}))
    desk.refused("bad-config", source, "peft", out=desk.folder / "out" / "folder")


@pytest.mark.parametrize("text", ["not JSON", "[" * 9000, "[1]", "null", "9" * 9000, '{"algo": 5}'])
def test_odd_network_args_are_left_as_they_are(desk: Desk, text: str) -> None:
    source = desk.file(pack(good(), {"ss_network_args": text, "ss_network_dim": "x"}))
    desk.converted(source)
    _, metadata = unpack(desk.out.read_bytes())
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_network_args"] == ("{}" if "algo" in text else text)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"unet": 1}', "[" * 9000, '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}',
     '{"unet.alpha_pattern": [1]}', '{"unet.alpha_pattern": {"(": 1}}', '{"unet.r": 0}'],
)  # fmt: skip
def test_diffusers_metadata(desk: Desk, text: str) -> None:
    source = sample("diffusers-bare").write(desk.input)
    tensors, _ = unpack(source.read_bytes())
    desk.file(pack(tensors, {"lora_adapter_metadata": text}))
    with pytest.raises(SurgeryError) as caught:
        desk.converted(source)
    assert caught.value.code in ("bad-layout", "bad-config", "bad-pattern")
    assert not desk.out.exists()


def test_a_component_that_would_lead_elsewhere(desk: Desk) -> None:
    tensors = {k.replace("lora_unet_", "lycoris_"): v for k, v in good().items()}
    source = desk.file(pack(tensors, {"adaptsurgery.component": "../../away"}))
    desk.refused("bad-name", source, "peft", out=desk.folder / "out" / "folder")
    assert {p.name for p in desk.folder.iterdir()} == {"in", "out", "base.safetensors"}


# --- paths --------------------------------------------------------------------------------------


def test_symlinks_are_read_but_not_written(desk: Desk) -> None:
    real = desk.file(pack(good()))
    link = desk.folder / "link.safetensors"
    link.symlink_to(real)
    desk.converted(link)
    desk.out.unlink()
    desk.out.symlink_to(desk.folder / "elsewhere")
    desk.refused("output-is-symlink", link)
    desk.refused("output-is-symlink", link, overwrite=True)


def test_existing_outputs(desk: Desk) -> None:
    source = desk.file(pack(good()))
    desk.out.write_bytes(b"mine")
    desk.refused("output-exists", source)
    desk.refused("output-exists", source, "peft", out=desk.folder / "out")
    desk.converted(source, overwrite=True)


def test_an_output_that_would_replace_an_input(desk: Desk) -> None:
    source = desk.file(pack(good()))
    link = desk.folder / "link"
    link.symlink_to(desk.input)
    for out in (source, desk.input / "." / source.name, link / source.name):
        desk.refused("output-is-source", source, out=out, overwrite=True)
    desk.refused("output-is-source", source, out=desk.base, overwrite=True)


def test_an_output_within_a_folder_that_is_read(desk: Desk) -> None:
    folder = sample("peft-loha").write(desk.input)
    for out in (folder, folder / "unet", desk.folder):
        desk.refused("output-is-source", folder, "peft", out=out, overwrite=True)
    desk.refused("output-is-source", folder, out=folder / WEIGHTS, overwrite=True)
    deeper = desk.folder_of({f"pair/unet/{n}": d for n, d in sample("peft-loha").files.items()})
    inner = deeper / "pair" / "unet" / WEIGHTS
    desk.refused("output-is-source", inner, "peft", out=deeper / "pair", overwrite=True)


def test_saving_an_adapter_over_its_own_file(desk: Desk) -> None:
    """Its tensors are read lazily: they would be of another file afterwards."""
    adapter = adaptsurgery.load(desk.file(pack(good())), desk.base)
    with pytest.raises(SurgeryError) as caught:
        adapter.save(adapter.paths[0], "lycoris", overwrite=True)
    assert caught.value.code == "output-is-source"


def test_outputs_of_the_wrong_kind(desk: Desk) -> None:
    source = desk.file(pack(good()))
    (desk.folder / "file").write_bytes(b"")
    desk.refused("is-directory", source, out=desk.folder / "out", overwrite=True)
    desk.refused("not-a-directory", source, "peft", out=desk.folder / "file", overwrite=True)
    desk.refused("not-a-directory", source, "peft", out=desk.folder / "out" / "x.safetensors")
    desk.refused("no-such-folder", source, out=desk.folder / "no" / "where.safetensors")
    desk.refused("not-a-directory", source, out=desk.folder / "file" / "x.safetensors")


def test_foreign_files_are_not_overwritten(desk: Desk) -> None:
    source = desk.file(pack(good()))
    folder = desk.folder / "out" / "folder"
    adaptsurgery.convert(source, folder, "peft", base=desk.base)
    (folder / "notes.txt").write_text("mine")
    desk.refused("output-not-ours", source, "peft", out=folder, overwrite=True)
    (folder / "notes.txt").unlink()
    adaptsurgery.convert(source, folder, "peft", base=desk.base, overwrite=True)


def test_a_folder_that_may_not_be_written(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    desk.refused("not-writable", desk.file(pack(good())))


def _fails(number: int) -> Callable[..., int]:
    def write(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "no-space"), (errno.EDQUOT, "no-space"), (errno.EROFS, "not-writable"),
     (errno.EIO, "bad-file")],
)  # fmt: skip
@pytest.mark.parametrize("to", ("kohya", "peft"))
def test_writes_that_fail(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, number: int, code: str, to: str
) -> None:
    source = desk.file(pack(good()))
    with monkeypatch.context() as patch:
        patch.setattr("adaptsurgery.checkpoint.writer.os.write", _fails(number))
        with pytest.raises(SurgeryError) as caught:
            adaptsurgery.convert(source, desk.folder / "out" / "result", to, base=desk.base)
    assert caught.value.code == code
    assert not os.listdir(desk.folder / "out")


def test_inputs_of_the_wrong_kind(desk: Desk) -> None:
    desk.refused("no-adapter", desk.input)
    desk.refused("no-such-file", desk.input / "absent.safetensors")
    (desk.input / "folder.safetensors").mkdir()
    desk.refused("no-adapter", desk.input / "folder.safetensors")
    (desk.input / CONFIG).write_text(json.dumps(SAID))
    desk.refused("no-such-file", desk.input)
    desk.file(pack(PEFT), "loose.safetensors")
    desk.refused("config-missing", desk.input / "loose.safetensors")


@needs("os.mkfifo")
def test_a_pipe_is_not_waited_for(desk: Desk) -> None:
    os.mkfifo(desk.input / "pipe.safetensors")
    os.mkfifo(desk.input / "pipe.bin")
    desk.refused("not-a-file", desk.input / "pipe.safetensors")
    desk.refused("not-a-file", desk.input / "pipe.bin")
    source = desk.file(pack(good()))
    desk.refused("not-a-file", source, base=desk.input / "pipe.safetensors")


def test_a_folder_whose_name_is_no_text(desk: Desk) -> None:
    for name in (b"un\xff", b"un\x1b[31m"):
        odd = os.fsdecode(name)
        desk.folder_of({f"{odd}/{n}": data for n, data in sample("peft-loha").files.items()})
        desk.refused("several-adapters", desk.input, "peft", out=desk.folder / "out" / "folder")
        for file in (desk.input / odd).iterdir():
            file.unlink()
        (desk.input / odd).rmdir()


def test_names_that_no_system_takes(desk: Desk) -> None:
    source = desk.file(pack(good()))
    for path in ("a\0b", "x" * 5000):
        for read, written in ((path, desk.out), (source, path)):
            with pytest.raises(SurgeryError):
                adaptsurgery.convert(read, written, "kohya", base=desk.base)


def test_an_adapter_as_base_and_a_base_as_adapter(desk: Desk) -> None:
    source = desk.file(pack(good()))
    desk.refused("adapter-as-base", source, base=source)
    desk.refused("unknown-layout", desk.base)


def test_an_index_that_leads_out_of_its_folder(desk: Desk) -> None:
    for name in ("../base.safetensors", str(desk.base), "a\0b", ".."):
        index = {"weight_map": {"blk_0.fc_a.weight": name}}
        folder = desk.folder_of({"model/model.safetensors.index.json": json.dumps(index).encode()})
        desk.refused("path-escapes", desk.file(pack(good())), base=folder / "model")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_run",)


def test_a_pickle_that_would_run_code(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.folder)
    torch.save({DOWN: Evil()}, desk.input / "evil.bin")
    desk.refused("unsafe-pickle", desk.input / "evil.bin")
    desk.file(pickle.dumps(Evil(), protocol=2), "plain.pt")
    desk.refused("unsafe-pickle", desk.input / "plain.pt")
    assert not (desk.folder / "was_run").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"garbage" * 9])
def test_a_damaged_pickle(desk: Desk, data: bytes) -> None:
    desk.refused("bad-file", desk.file(data, "adapter.bin"))


def test_a_good_pickle_is_read(desk: Desk) -> None:
    torch.save({k: torch.as_tensor(np.asarray(v)) for k, v in good().items()}, desk.input / "a.bin")
    desk.converted(desk.input / "a.bin")


# --- options ------------------------------------------------------------------------------------


def test_a_layout_that_the_keys_are_not_in(desk: Desk) -> None:
    """Read as another layout's, the scale would be another."""
    source = desk.file(pack(good()))
    for layout in ("lycoris", "peft", "comfyui", "diffusers"):
        desk.refused("layout-disagrees", source, layout=layout)
    folder = desk.folder_of(peft_folder(PEFT, SAID))
    desk.refused("layout-disagrees", folder, layout="comfyui")


def test_a_chosen_layout_for_keys_of_none(desk: Desk) -> None:
    bare = desk.file(pack({"blk_0.fc_a.lora_up.weight": ones(12, 2)}))
    desk.refused("unknown-key", desk.file(pack({"x.novel": ones(2)})), layout="kohya")
    desk.refused(
        "incomplete-module", desk.file(pack({k: ones(12, 2) for k in (UP,)})), layout="kohya"
    )
    bare.write_bytes(pack({f"fc.lora_{s}.weight": ones(2, 2) for s in ("up", "down")}))
    desk.refused("unknown-key", bare, layout="kohya")
    desk.refused("empty-adapter", desk.file(joined("{}", b"")), layout="kohya")


@pytest.mark.parametrize("rank", (0, -1))
def test_ranks_that_are_none(desk: Desk, rank: int) -> None:
    with pytest.raises(SurgeryError):
        desk.converted(desk.file(pack(LOHA)), algorithm="lora", rank=rank, allow_lossy=True)
    assert not desk.out.exists()


def test_the_corpus_needs_its_base(desk: Desk) -> None:
    for name, code in (("kohya-lora", "unknown-model"), ("lycoris-lokr", "unknown-model")):
        desk.refused(code, sample(name).write(desk.input / name), base=None)


def test_numbers_that_float32_cannot_hold(desk: Desk) -> None:
    """w1 times the scale would be rounded to nothing; an alpha would be no float32."""
    tensors = {f"{PREFIX}blk_0.fc_a.lokr_w1": ones(2, 2) * np.float32(1e-45),
               f"{PREFIX}blk_0.fc_a.lokr_w2": ones(6, 4)}  # fmt: skip
    said = {"peft_type": "LOKR", "r": 8, "alpha": 3, "target_modules": ["fc_a"]}
    said |= {"decompose_factor": 2}
    desk.refused("out-of-range", desk.folder_of(peft_folder(tensors, said)))
    for alpha in (1e300, 1e-300):
        folder = desk.folder_of(peft_folder(PEFT, SAID | {"lora_alpha": alpha}))
        desk.refused("bad-value", folder)


def test_shapes_of_the_base_are_the_corpus_own() -> None:
    header, _ = cut(base_file())
    assert all(header[f"{path}.weight"]["shape"] == list(s) for path, s in SHAPES.items())
    assert raw(ones(2)).dtype == "F32"
