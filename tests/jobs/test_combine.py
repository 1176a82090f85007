"""combine: the weighted sum of whole adapters, against sums of plain numpy."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_by_hand import KINDS, PATHS, ByHand, dtypes, gap, weighted_sum
from corpus import SHAPES, base_file, pack, sample, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_delta import changes

from adaptsurgery import SurgeryError, convert, verify
from adaptsurgery.jobs.combining.combine import combine

TARGETS = ("peft", "lycoris", "kohya")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    path.write_bytes(base_file())
    return path


def place(folder: Path, to: str) -> Path:
    return folder / ("out" if to == "peft" else "out.safetensors")


@st.composite
def adapters(draw: st.DrawFn) -> ByHand:
    layout = draw(st.sampled_from(["peft", "lycoris", "kohya", "comfyui"]))
    held = [k for k in KINDS if layout != "peft" or k in ("lora", "loha")]
    return ByHand(
        kind=draw(st.sampled_from(held)),
        layout=layout,
        seed=draw(st.integers(0, 50)),
        rank=draw(st.integers(1, 3)),
        alpha=draw(st.sampled_from([0.5, 1.0, 1.5, 3.0, 7.0])),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16", "float64"])),
        paths=tuple(p for p in PATHS if draw(st.booleans())) or PATHS[:1],
        bias=draw(st.booleans()) and layout in ("lycoris", "kohya"),
    )


weights = st.sampled_from([1.0, 0.5, -1.0, 0.7, 2.0, -0.3, 0.0])


@settings(max_examples=60)
@given(st.lists(st.tuples(adapters(), weights), min_size=1, max_size=3), st.sampled_from(TARGETS))
def test_the_sum_law(base: Path, parts: list[tuple[ByHand, float]], to: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [(a.write(folder / str(n)), w) for n, (a, w) in enumerate(parts)]
        out = place(folder, to)
        try:
            report = combine(sources, out, to=to, base=base)
        except SurgeryError as error:
            assert not out.exists()
            assert error.code in {"no-full", "zero-sum"}, error
            if error.code == "zero-sum":
                assert all(
                    np.allclose(c, 0, atol=1e-12) for c in weighted_sum(live(sources)).values()
                )
            return
        wanted = weighted_sum(live(sources))
        found = changes(out)
        gone = {k for k in wanted.keys() - found.keys() if np.allclose(wanted[k], 0, atol=1e-12)}
        wanted = {k: v for k, v in wanted.items() if k not in gone}
        assert gap(wanted, found) < 2e-6
        assert report.max_error <= 1e-6
        assert len(report.rows) == len(found)


def live(sources: list[tuple[Path, float]]) -> list[tuple[Path, float]]:
    """The adapters that have a weight: the others leave no module behind."""
    return [(path, weight) for path, weight in sources if weight]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", ["peft-lora", "peft-loha-core", "kohya-lora", "lycoris-lokr"])
def test_one_adapter_is_itself(tmp_path: Path, base: Path, name: str, to: str) -> None:
    source = sample(name).write(tmp_path / "in")
    straight = tmp_path / ("straight" if to == "peft" else "straight.safetensors")
    out = place(tmp_path, to)
    try:
        convert(source, straight, to, base=base)
    except SurgeryError as error:
        if error.code != "lokr-factor":
            with pytest.raises(SurgeryError, match=error.code):
                combine([source], out, to=to, base=base)
        return
    combine([source], out, to=to, base=base)
    verify(straight, out, base=base)
    assert tensors_of(out) == tensors_of(straight)


def tensors_of(path: Path) -> Any:
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    return unpack(file.read_bytes())[0]


def kohya(tmp_path: Path, name: str, **options: Any) -> Path:
    return ByHand("lora", "kohya", **options).write(tmp_path / name)


def test_an_unknown_model_needs_no_base_in_its_own_layout(tmp_path: Path) -> None:
    """Flat names stand for themselves, under two prefixes too."""
    a, b = kohya(tmp_path, "a", seed=1), kohya(tmp_path, "b", seed=2)
    tensors, _ = unpack(b.read_bytes())
    more = {k.replace("lora_unet_", "lora_te1_"): t for k, t in tensors.items()}
    b.write_bytes(pack(tensors | more))
    report = combine([a, f"{b}=0.5"], tmp_path / "out.safetensors")
    written = tensors_of(tmp_path / "out.safetensors")
    assert len(report.rows) == 4 and report.max_error <= 1e-7
    assert (
        written["lora_te1_blk_0_fc_a.lora_down.weight"]
        == more["lora_te1_blk_0_fc_a.lora_down.weight"]
    )
    with pytest.raises(SurgeryError, match="base-needed"):
        combine([a, b], tmp_path / "peft", to="peft")


def test_ranks_stand_side_by_side_with_one_alpha(tmp_path: Path) -> None:
    a = kohya(tmp_path, "a", seed=1, rank=2, alpha=1.0, dtype="float16")
    b = kohya(tmp_path, "b", seed=2, rank=3, alpha=6.0, dtype="float16")
    out = tmp_path / "out.safetensors"
    report = combine([a, b], out)  # scales 0.5 and 2: a power of two apart
    up = tensors_of(out)["lora_unet_blk_0_fc_a.lora_up.weight"]
    assert up.shape == (12, 5) and dtypes(out) == {"F16"}, "exact in the files' own dtype"
    assert report.max_error == 0.0
    assert report.rows[0].detail == "rank 2 + 3 → 5"
    assert gap(weighted_sum([(a, 1), (b, 1)]), changes(out)) < 1e-15
    combine([a, (b, 0.7)], tmp_path / "other.safetensors")
    assert dtypes(tmp_path / "other.safetensors") == {"F32"}


def test_equal_factors_stay_small(tmp_path: Path, base: Path) -> None:
    for kind in ("lora", "loha", "lokr-low", "lokr-full"):
        a = ByHand(kind, "lycoris", 3).write(tmp_path / kind)
        out = tmp_path / f"{kind}.safetensors"
        combine([a, f"{a}=0.5", (a, -0.25)], out, base=base)
        assert gap(weighted_sum([(a, 1.25)]), changes(out)) < 1e-7
        shapes = {k: t.shape for k, t in tensors_of(out).items()}
        assert shapes == {k: t.shape for k, t in tensors_of(a).items()}


def test_notes_are_told_once_for_all_modules(tmp_path: Path) -> None:
    parts = [ByHand("loha", "lycoris", n, paths=PATHS[:2]).write(tmp_path / str(n)) for n in (1, 2)]
    report = combine([*parts, (parts[0], 0.5)], tmp_path / "out.safetensors")
    assert [n.code for n in report.notes] == ["same-adapter", "kernel-unknown"]
    assert report.notes[0].where == str(parts[0])
    assert report.notes[1].where == "blk_0_fc_a, blk_0_fc_b"


def test_no_rank_beyond_the_matrix(tmp_path: Path, base: Path) -> None:
    parts = [ByHand("loha", "lycoris", n, rank=3).write(tmp_path / str(n)) for n in range(3)]
    out = tmp_path / "out.safetensors"
    combine(parts, out, base=base)
    assert tensors_of(out)["lycoris_blk_0_fc_a.lora_down.weight"].shape == (8, 8)
    assert gap(weighted_sum([(p, 1) for p in parts]), changes(out)) < 1e-6


def test_what_cancels_is_said(tmp_path: Path) -> None:
    a = kohya(tmp_path, "a", seed=1)
    b = kohya(tmp_path, "b", seed=2, paths=("blk_0.fc_b",))
    out = tmp_path / "out.safetensors"
    with pytest.raises(SurgeryError, match="zero-sum"):
        combine([a, (a, -1)], out)
    with pytest.raises(SurgeryError, match="zero-sum"):
        combine([(a, 0)], out)
    assert not out.exists()
    combine([a, (a, -1)], out, allow_zero=True)
    assert not any(c.any() for c in changes(out).values())
    report = combine([a, (a, -1), b], out, overwrite=True)
    assert [n.code for n in report.notes if n.code == "cancelled"] == ["cancelled"]
    assert changes(out).keys() == {"blk_0_fc_b"}


def test_a_dense_difference_takes_the_others_up(tmp_path: Path, base: Path) -> None:
    a = ByHand("full", "lycoris", 1, bias=True).write(tmp_path / "a")
    b = ByHand("lokr-both", "lycoris", 2, bias=True).write(tmp_path / "b")
    out = tmp_path / "out.safetensors"
    report = combine([a, (b, 0.7)], out, base=base)
    assert {r.algorithm for r in report.rows} == {"full"}
    assert gap(weighted_sum([(a, 1), (b, 0.7)]), changes(out)) < 1e-6
    with pytest.raises(SurgeryError, match="no-full"):
        combine([a, b], tmp_path / "peft", to="peft", base=base)


def truncated(change: np.ndarray[Any, Any], rows: int, rank: int) -> float:
    """The least relative error of a rank, from the dense singular values."""
    s = np.linalg.svd(change.reshape(rows, -1), compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


@settings(max_examples=15)
@given(st.tuples(adapters(), adapters()), weights.filter(bool), st.integers(1, 4))
def test_truncation_is_optimal(
    base: Path, parts: tuple[ByHand, ByHand], weight: float, rank: int
) -> None:
    """The error is Eckart and Young's of the dense sum, and is what the report says."""
    a, b = (
        ByHand("loha" if "loha" in p.kind else "lora", "kohya", p.seed, p.rank, p.alpha, p.dtype)
        for p in parts
    )
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out.safetensors"
        sources = [(a.write(folder / "a"), 1.0), (b.write(folder / "b"), weight)]
        try:
            report = combine(sources, out, base=base, rank=rank, allow_lossy=True)
        except SurgeryError as error:
            assert error.code == "zero-sum"
            return
        wanted, found = weighted_sum(sources), changes(out)
        for row in report.rows:
            if row.algorithm != "lora":
                continue
            flat = row.module.replace(".", "_")
            total = wanted[flat]
            apart = np.linalg.norm(total - found[flat]) / np.linalg.norm(total)
            assert apart == pytest.approx(truncated(total, SHAPES[row.module][0], rank), abs=1e-6)
            assert row.error == pytest.approx(float(apart), abs=1e-6)


def test_a_rank_that_loses_needs_the_switch(tmp_path: Path) -> None:
    a, b = (kohya(tmp_path, str(n), seed=n, rank=2) for n in (1, 2))
    out = tmp_path / "out.safetensors"
    with pytest.raises(SurgeryError, match="lossy"):
        combine([a, b], out, rank=3)
    assert not out.exists()
    report = combine([a, b], out, rank=4)
    assert report.max_error <= 1e-6
    twin = kohya(tmp_path, "twin", seed=1, rank=2, dtype="float64")
    report = combine([a, twin], out, rank=2, overwrite=True)  # rank 4 as stored, 2 in truth
    assert report.max_error <= 1e-6 and report.rows[0].detail == "rank 2 + 2 → 2"


def hra(tmp_path: Path, name: str, seed: int, r: int = 2, **extra: Any) -> Path:
    config = {"peft_type": "HRA", "r": r, "apply_GS": False, "task_type": None, **extra}
    paths = extra.pop("paths", ("blk_0.fc_a", "blk_0.fc_b"))
    config |= {"target_modules": sorted(paths)}
    config.pop("paths", None)
    random = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.{p}.hra_u": random.standard_normal((SHAPES[p][1], r)).astype("float32")
        for p in paths
    }
    folder = tmp_path / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(pack(tensors))
    return folder


def test_rotations_follow_one_another(tmp_path: Path, base: Path) -> None:
    a, b = hra(tmp_path, "a", 1), hra(tmp_path, "b", 2, apply_GS=True)
    c = hra(tmp_path, "c", 3, paths=("blk_0.fc_a",))
    report = combine([a, b, c], tmp_path / "out", to="peft")
    rotations = [changes(p) for p in (a, b, c)]
    found = changes(tmp_path / "out")
    wanted = rotations[0]["blk_0_fc_a"].reshape(8, 8)
    for other in rotations[1:]:
        wanted = wanted @ other["blk_0_fc_a"].reshape(8, 8)
    assert np.allclose(found["blk_0_fc_a"].reshape(8, 8), wanted, atol=1e-6)
    assert report.max_error <= 1e-6
    two = rotations[0]["blk_0_fc_b"].reshape(12, 12) @ rotations[1]["blk_0_fc_b"].reshape(12, 12)
    assert np.allclose(found["blk_0_fc_b"].reshape(12, 12), two, atol=1e-6), "padded by pairs"


def test_a_rotation_takes_no_weight_and_no_delta_beside_it(tmp_path: Path, base: Path) -> None:
    a, b = hra(tmp_path, "a", 1), ByHand("lora", "peft", 2).write(tmp_path / "b")
    out = tmp_path / "out"
    with pytest.raises(SurgeryError, match="no-weight"):
        combine([(a, 0.5), b], out)
    with pytest.raises(SurgeryError, match="hra-sum"):
        combine([a, b], out)
    combine([a, (b, 0.5)], out, base=base)
    wanted = {k: v + 0.5 * changes(b)[k] for k, v in changes(a, folded=True).items()}
    assert gap(wanted, changes(out)) < 1e-6
    combine([a, hra(tmp_path, "c", 4)], tmp_path / "lora.safetensors", to="kohya", base=base)


def test_dora_stays_alone(tmp_path: Path, base: Path) -> None:
    dora = sample("lycoris-dora").write(tmp_path / "dora")
    conv = ByHand("lora", "lycoris", 1, paths=("blk_0.conv_in",)).write(tmp_path / "conv")
    same = ByHand("lora", "lycoris", 1).write(tmp_path / "same")
    out = tmp_path / "out.safetensors"
    with pytest.raises(SurgeryError, match="dora-sum"):
        combine([dora, same], out, base=base)
    with pytest.raises(SurgeryError, match="no-weight"):
        combine([(dora, 0.5), conv], out, base=base)
    combine([dora, (conv, 0.5)], out, base=base)
    written = tensors_of(out)
    assert all(written[k] == t for k, t in tensors_of(dora).items())
    report = combine([dora, conv], out, base=base, rank=1, allow_lossy=True, overwrite=True)
    (note,) = [n for n in report.notes if n.code == "not-cut"]
    assert "dora" in note.text
    loha = ByHand("loha", "lycoris", 1, paths=("blk_0.conv_in",)).write(tmp_path / "loha")
    with pytest.raises(SurgeryError, match="convert --as lora"):
        combine([dora, loha], tmp_path / "peft", to="peft", base=base)
    assert all(tensors_of(out)[k] == t for k, t in tensors_of(dora).items())


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_weights_are_numbers(tmp_path: Path, weight: str) -> None:
    a = kohya(tmp_path, "a", seed=1)
    with pytest.raises(SurgeryError, match="bad-weight"):
        combine([(a, float(weight))], tmp_path / "out.safetensors")
    with pytest.raises(SurgeryError, match="no-adapter"):
        combine([], tmp_path / "out.safetensors")


def test_replaced_parameters(tmp_path: Path, base: Path) -> None:
    a = sample("peft-lora").write(tmp_path / "a")
    b = ByHand("loha", "peft", 3).write(tmp_path / "b")
    combine([b, a], tmp_path / "out", base=base)
    kept = tensors_of(tmp_path / "out")["base_model.model.head.weight"]
    assert kept == tensors_of(a)["base_model.model.head.weight"]
    with pytest.raises(SurgeryError, match="no-weight"):
        combine([b, (a, 0.5)], tmp_path / "other", base=base)


def test_what_is_beside_the_factors_outlives_their_config(tmp_path: Path) -> None:
    """No config of two with other ranks holds for both: there remains what shapes nothing."""
    said = {"modules_to_save": ["head"], "task_type": "CAUSAL_LM"}
    a = ByHand("loha", "peft", 1, rank=2, paths=PATHS[:1], extra=said).write(tmp_path / "a")
    b = ByHand("loha", "peft", 2, rank=3, paths=PATHS[1:2]).write(tmp_path / "b")
    head = {"base_model.model.head.weight": np.ones((1, 2), "f4")}
    file = a / "adapter_model.safetensors"
    file.write_bytes(pack(tensors_of(a) | head))
    combine([a, (b, 0.5)], tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert {key: config[key] for key in said} == said
    assert gap(weighted_sum([(a, 1), (b, 0.5)]), changes(tmp_path / "out")) < 1e-6
    kept = tensors_of(tmp_path / "out")["base_model.model.head.weight"]
    assert kept == tensors_of(a)["base_model.model.head.weight"]


def test_shapes_of_another_model(tmp_path: Path) -> None:
    a = kohya(tmp_path, "a", seed=1)
    name = "lora_unet_blk_0_fc_a"
    other = {
        f"{name}.lora_up.weight": np.ones((7, 2), "f4"),
        f"{name}.lora_down.weight": np.ones((2, 8), "f4"),
    }
    (tmp_path / "b.safetensors").write_bytes(pack(other))
    with pytest.raises(SurgeryError, match="bad-shape"):
        combine([a, tmp_path / "b.safetensors"], tmp_path / "out.safetensors")


def test_outputs_are_whole_or_not_there(tmp_path: Path) -> None:
    a = kohya(tmp_path, "a", seed=1)
    with pytest.raises(SurgeryError, match="output-is-source"):
        combine([a, a], a, overwrite=True)
    report = combine([a, a], tmp_path / "out.safetensors", dry_run=True)
    assert not report.outputs and not (tmp_path / "out.safetensors").exists()
    combine([a, a], tmp_path / "out.safetensors")
    with pytest.raises(SurgeryError):
        combine([a, a], tmp_path / "out.safetensors")


def test_fused_and_split_names_meet(tmp_path: Path) -> None:
    """Flux: kohya's fused qkv, another's to_q and to_v; the sum is the fused one's rank and theirs."""
    h, random = 3072, np.random.default_rng(0)

    def numbers(*shape: int) -> Any:
        return random.standard_normal(shape).astype("float32")

    fused = {"lora_unet_double_blocks_0_img_attn_qkv": (numbers(3 * h, 1), numbers(1, h))}
    split = {f"transformer_blocks.0.attn.to_{n}": (numbers(h, 1), numbers(1, h)) for n in "qv"}
    one = {f"{k}.lora_{s}.weight": t for k, f in fused.items() for s, t in zip(("up", "down"), f)}
    two = {f"transformer.{k}.lora_{s}.weight": t for k, f in split.items() for s, t in zip("BA", f)}
    (tmp_path / "one.safetensors").write_bytes(pack(one))
    (tmp_path / "two.safetensors").write_bytes(pack(two))
    out = tmp_path / "out.safetensors"
    combine([tmp_path / "one.safetensors", (tmp_path / "two.safetensors", 0.5)], out)
    up, down = (
        np.frombuffer(t.data, "<f4").reshape(t.shape).astype("f8")
        for t in (
            tensors_of(out)[f"lora_unet_double_blocks_0_img_attn_qkv.lora_{s}.weight"]
            for s in ("up", "down")
        )
    )
    assert up.shape == (3 * h, 3)
    x = random.standard_normal(h)
    wanted = fused["lora_unet_double_blocks_0_img_attn_qkv"]
    y = wanted[0] @ (wanted[1] @ x)
    for at, n in ((0, "q"), (2, "v")):
        f = split[f"transformer_blocks.0.attn.to_{n}"]
        y[at * h : (at + 1) * h] += 0.5 * f[0] @ (f[1] @ x)
    scale = (
        float(
            np.frombuffer(
                tensors_of(out)["lora_unet_double_blocks_0_img_attn_qkv.alpha"].data, "<f4"
            )[0]
        )
        / 3
    )
    assert np.allclose(scale * up @ (down @ x), y, rtol=1e-5, atol=1e-4)
