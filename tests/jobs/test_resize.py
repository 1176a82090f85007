"""resize: the nearest adapter of a lower rank, against dense singular values."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_by_hand import KINDS, PATHS, ByHand, dtypes, gap
from corpus import SHAPES, base_file, pack, sample, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_delta import changes

from adaptsurgery import SurgeryError
from adaptsurgery.jobs.resize import resize

ROUNDING = {"float64": 1e-7, "float32": 1e-6, "float16": 3e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    path.write_bytes(base_file())
    return path


@st.composite
def adapters(draw: st.DrawFn) -> ByHand:
    return ByHand(
        kind=draw(st.sampled_from([k for k in KINDS if k != "full"])),
        layout=draw(st.sampled_from(["lycoris", "kohya"])),
        seed=draw(st.integers(0, 99)),
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([0.5, 1.0, 3.0])),
        dtype=draw(st.sampled_from(list(ROUNDING))),
        paths=PATHS[: draw(st.integers(1, 4))],
    )


def of_layer(change: np.ndarray[Any, Any], path: str) -> np.ndarray[Any, Any]:
    return change.reshape(SHAPES[path][0], -1)


def singular(change: np.ndarray[Any, Any], path: str) -> np.ndarray[Any, Any]:
    s: np.ndarray[Any, Any] = np.linalg.svd(of_layer(change, path), compute_uv=False)
    return s


@settings(max_examples=40)
@given(adapters(), st.integers(1, 6))
def test_a_rank_is_kept_optimally(base: Path, adapter: ByHand, rank: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, out = adapter.write(Path(name) / "in"), Path(name) / "out.safetensors"
        report = resize(source, out, rank=rank, base=base)
        before, after = changes(source), changes(out)
        assert before.keys() == after.keys()
        assert all(row.algorithm == "lora" for row in report.rows)
        for row in report.rows:
            flat = row.module.replace(".", "_")
            total, s = before[flat], singular(before[flat], row.module)
            error = float(np.linalg.norm(total - after[flat]) / np.linalg.norm(total))
            least = float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))
            assert error == pytest.approx(least, abs=ROUNDING[adapter.dtype])
            assert row.error == pytest.approx(error, abs=1e-7), "that of what is written"
        unchanged = adapter.kind == "lora" and rank >= adapter.rank
        same = unpack(source.read_bytes())[0] == unpack(out.read_bytes())[0]
        assert same or not unchanged


@settings(max_examples=40)
@given(adapters(), st.floats(0.05, 1.0))
def test_energy_keeps_the_smallest_rank(base: Path, adapter: ByHand, energy: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, out = adapter.write(Path(name) / "in"), Path(name) / "out.safetensors"
        resize(source, out, energy=energy, base=base)
        before = changes(source)
        tensors, _ = unpack(out.read_bytes())
        for path in adapter.paths:
            flat = path.replace(".", "_")
            down = next(t for k, t in tensors.items() if f"{flat}.lora_down" in k)
            k, s = down.shape[0], singular(before[flat], path)
            share = (s**2).cumsum() / (s**2).sum()
            assert share[k - 1] >= energy - 1e-9
            if k > 1 and k < _stored_rank(source, flat):
                assert share[k - 2] < energy + 1e-9, "one rank fewer would have done"


def _stored_rank(path: Path, flat: str) -> int:
    tensors, _ = unpack(path.read_bytes())
    found = [t for k, t in tensors.items() if f"{flat}.lora_down" in k]
    return int(found[0].shape[0]) if found else 1 << 30


def spectrum(tmp_path: Path, values: list[float], alpha: float = 2.0) -> Path:
    """A LoRA of just these singular values."""
    random, r = np.random.default_rng(0), len(values)
    u = np.linalg.qr(random.standard_normal((20, r)))[0]
    v = np.linalg.qr(random.standard_normal((16, r)))[0]
    tensors = {
        "lora_unet_fc.lora_up.weight": (u * values).astype("f4"),
        "lora_unet_fc.lora_down.weight": v.T.astype("f4").copy(),
        "lora_unet_fc.alpha": np.float32(alpha),
    }
    path = tmp_path / "in.safetensors"
    path.write_bytes(pack(tensors, {"ss_network_dim": str(r), "ss_network_alpha": str(alpha)}))
    return path


def test_energy_by_hand(tmp_path: Path) -> None:
    """σ = 4, 2, 1: shares of Σσ² = 21 are 16/21, 20/21, 1. kohya's tool keeps one more each time."""
    source = spectrum(tmp_path, [4.0, 2.0, 1.0])
    for energy, rank in ((0.5, 1), (0.76, 1), (0.77, 2), (0.95, 2), (0.96, 3), (1.0, 3)):
        out = tmp_path / f"{energy}.safetensors"
        report = resize(source, out, energy=energy)
        tensors, metadata = unpack(out.read_bytes())
        assert tensors["lora_unet_fc.lora_down.weight"].shape == (rank, 16)
        assert metadata["ss_network_dim"] == str(rank)
        alpha = float(np.frombuffer(tensors["lora_unet_fc.alpha"].data, "<f4")[0])
        assert alpha / rank == pytest.approx(2 / 3), "the scale stays"
        assert report.rows[0].error == pytest.approx(
            [np.sqrt(5 / 21), np.sqrt(1 / 21), 0][rank - 1], abs=1e-6
        )


def test_ranks_that_differ_are_dynamic(tmp_path: Path, base: Path) -> None:
    source = ByHand("lora", "kohya", 5, rank=4, paths=PATHS).write(tmp_path / "in")
    tensors, _ = unpack(source.read_bytes())
    source.write_bytes(pack(tensors, {"ss_network_dim": "4", "ss_network_alpha": "1.5"}))
    out = tmp_path / "out.safetensors"
    report = resize(source, out, energy=0.75)
    _, metadata = unpack(out.read_bytes())
    ranks = {row.detail.rpartition(" ")[2] for row in report.rows}
    assert len(ranks) > 1 and metadata["ss_network_dim"] == "Dynamic"
    assert report.facts["ranks"]["before"] == {"4": 4}
    assert 0 < report.facts["relative_error"] <= 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_dtype_stays(tmp_path: Path, dtype: str) -> None:
    source = ByHand("lora", "kohya", 5, rank=4, dtype=dtype).write(tmp_path / "in")
    report = resize(source, tmp_path / "out.safetensors", rank=2)
    assert dtypes(tmp_path / "out.safetensors") == dtypes(source)
    measured = gap(changes(source), changes(tmp_path / "out.safetensors"))
    assert report.max_error == pytest.approx(measured, abs=1e-7)


def test_numbers_too_large_for_half(tmp_path: Path) -> None:
    """A product in range whose balanced factors are not: float32 then."""
    tensors = {
        "lora_unet_fc.lora_up.weight": np.full((8, 2), 6e4, "f2"),
        "lora_unet_fc.lora_down.weight": np.full((2, 8), 6e4, "f2"),
    }
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    path.write_bytes(pack(tensors))
    report = resize(path, out, rank=1)
    assert report.max_error < 1e-6 and gap(changes(path), changes(out)) < 1e-6


def test_what_has_no_rank_stays(tmp_path: Path, base: Path) -> None:
    for name in ("lycoris-full", "peft-hra"):
        source = sample(name).write(tmp_path / name)
        out = tmp_path / (f"{name}-out" if "peft" in name else f"{name}.safetensors")
        report = resize(source, out, rank=1, base=base)
        assert {row.change for row in report.rows} == {"identical"}
        assert "not-cut" in {note.code for note in report.notes}


def test_a_dora_keeps_its_magnitude(tmp_path: Path, base: Path) -> None:
    source = sample("lycoris-dora").write(tmp_path / "in")
    report = resize(source, tmp_path / "out.safetensors", rank=1, base=base)
    before, after = (unpack(p.read_bytes())[0] for p in (source, tmp_path / "out.safetensors"))
    marks = [k for k in before if k.endswith("dora_scale")]
    assert marks and all(before[k] == after[k] for k in marks)
    assert "dora-error" in {note.code for note in report.notes}


@pytest.mark.parametrize("name", ["peft-lora", "peft-loha", "peft-lokr", "peft-rslora"])
def test_peft_folders(tmp_path: Path, base: Path, name: str) -> None:
    source = sample(name).write(tmp_path / "in")
    report = resize(source, tmp_path / "out", rank=1, base=base)
    before, after = changes(source), changes(tmp_path / "out")
    assert gap(before, after) == pytest.approx(report.max_error, abs=1e-6)
    exact = resize(source, tmp_path / "same", rank=64, base=base)
    assert gap(before, changes(tmp_path / "same")) < 1e-6 and exact.max_error < 1e-6


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "rank-or-energy"),
        ({"rank": 2, "energy": 0.5}, "rank-or-energy"),
        ({"rank": 0}, "bad-shape"),
        ({"energy": 0.0}, "bad-energy"),
        ({"energy": 1.01}, "bad-energy"),
        ({"energy": float("nan")}, "bad-energy"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], code: str) -> None:
    source = ByHand("lora", "kohya", 5).write(tmp_path / "in")
    with pytest.raises(SurgeryError, match=code):
        resize(source, tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_zeros_and_noise(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_a.lora_up.weight": np.zeros((8, 4), "f4"),
        "lora_unet_a.lora_down.weight": np.ones((4, 8), "f4"),
    }
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    path.write_bytes(pack(tensors))
    assert resize(path, out, energy=0.9).max_error == 0.0
    assert unpack(out.read_bytes())[0]["lora_unet_a.lora_up.weight"].shape == (8, 1)
    tensors["lora_unet_a.lora_up.weight"][0, 0] = np.nan
    path.write_bytes(pack(tensors))
    with pytest.raises(SurgeryError, match="non-finite"):
        resize(path, out, rank=1, overwrite=True)


def test_a_kernel_that_nothing_shows_is_told(tmp_path: Path, base: Path) -> None:
    source = ByHand("loha", "lycoris", 1, paths=("blk_0.fc_a", "blk_0.pw")).write(tmp_path / "in")
    told = resize(source, tmp_path / "out.safetensors", rank=2).notes
    (note,) = [n for n in told if n.code == "kernel-unknown"]
    assert note.where == "blk_0_fc_a, blk_0_pw"
    told = resize(source, tmp_path / "based.safetensors", rank=2, base=base).notes
    assert "kernel-unknown" not in [n.code for n in told]
