"""NaN and infinity: what is computed or cast is refused, what is copied is not, and is told.

Commands × (computed, cast, copied) × (NaN, infinity, overflow), beside numpy in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptsurgery
from adaptsurgery.cli import run
from adaptsurgery.jobs.resize import resize
from adaptsurgery_formats.errors import SurgeryError

SIZE = 16
DOWN, UP, ALPHA = (
    f"lora_unet_m_q.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
)
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Desk:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights = {"m.q.weight": numbers(1, SIZE, SIZE), "m.k.weight": numbers(2, SIZE, SIZE)}
        self.lora = {DOWN: numbers(3, 2, SIZE), UP: numbers(4, SIZE, 2), ALPHA: torch.tensor(1.0)}
        self.out = root / "out.safetensors"

    def base(self) -> Path:
        save_file(self.weights, self.root / "base.safetensors")
        return self.root / "base.safetensors"

    def adapter(self, name: str = "adapter") -> Path:
        save_file(self.lora, self.root / f"{name}.safetensors")
        return self.root / f"{name}.safetensors"

    def peft(self, **config: Any) -> Path:
        """The same LoRA as a PEFT folder, with a parameter that is replaced outright."""
        folder = self.root / "peft"
        folder.mkdir()
        state = {
            "base_model.model.m.q.lora_A.weight": self.lora[DOWN],
            "base_model.model.m.q.lora_B.weight": self.lora[UP],
            "base_model.model.m.k.weight": self.weights["m.k.weight"],
        }
        save_file(state, folder / "adapter_model.safetensors")
        words = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q"],
                "modules_to_save": ["k"]}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(words | config))
        return folder

    def refused(self, job: Callable[[], object], code: str = "non-finite") -> None:
        before = sorted(self.root.rglob("*"))
        with pytest.raises(SurgeryError) as error:
            job()
        assert error.value.code == code, error.value
        assert sorted(self.root.rglob("*")) == before

    def merged(self) -> dict[str, torch.Tensor]:
        return load_file(self.out)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def texts_of(report: Any, code: str) -> list[str]:
    return [note.text for note in report.notes if note.code == code]


def oracle(desk: Desk, weight: float = 1.0, sign: int = 1) -> np.ndarray[Any, Any]:
    """W ± w·(alpha/2)·up·down in float64."""
    up, down = (desk.lora[key].double().numpy() for key in (UP, DOWN))
    strength = weight * float(desk.lora[ALPHA].double()) / 2
    with np.errstate(all="ignore"):
        return desk.weights["m.q.weight"].double().numpy() + sign * strength * (up @ down)


# -- merge and unmerge


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("job", [adaptsurgery.merge, adaptsurgery.unmerge])
def test_an_edited_tensor(desk: Desk, bad: str, job: Callable[..., Any]) -> None:
    desk.weights["m.q.weight"][3, 4] = BAD[bad]
    base, adapter = desk.base(), desk.adapter()
    desk.refused(lambda: job(base, adapter, desk.out))
    report = job(base, adapter, desk.out, allow_nonfinite=True)
    (text,) = texts_of(report, "nonfinite-written")
    assert "m.q.weight" in text and text.startswith("1 number")
    got = desk.merged()["m.q.weight"].double().numpy()
    want = oracle(desk, sign=1 if job is adaptsurgery.merge else -1)
    assert np.array_equal(np.isfinite(got), np.isfinite(want)) and (~np.isfinite(got)).sum() == 1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", BAD)
def test_an_adapters_own_factors(desk: Desk, bad: str) -> None:
    desk.lora[UP][5, 1] = BAD[bad]
    base, adapter = desk.base(), desk.adapter()
    desk.refused(lambda: adaptsurgery.merge(base, adapter, desk.out))
    adaptsurgery.merge(base, adapter, desk.out, allow_nonfinite=True)
    got = desk.merged()["m.q.weight"].double().numpy()
    assert np.array_equal(np.isfinite(got), np.isfinite(oracle(desk)))
    report = adaptsurgery.verify_merge(desk.out, base, adapter)
    assert "1 hold NaN or infinity" in report.verdict


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", TORCH)
def test_a_tensor_that_is_only_cast(desk: Desk, bad: str, dtype: str) -> None:
    """With --dtype every number is cast; where nothing is, bytes move and nobody looks."""
    desk.weights["m.k.weight"][0, 7] = BAD[bad]
    base, adapter = desk.base(), desk.adapter()
    if dtype == "fp32":
        report = adaptsurgery.merge(base, adapter, desk.out, dtype=dtype)
        assert not texts_of(report, "nonfinite-written")
    else:
        desk.refused(lambda: adaptsurgery.merge(base, adapter, desk.out, dtype=dtype))
        report = adaptsurgery.merge(base, adapter, desk.out, dtype=dtype, allow_nonfinite=True)
        assert "m.k.weight" in texts_of(report, "nonfinite-written")[0]
    got, want = desk.merged()["m.k.weight"], desk.weights["m.k.weight"].to(TORCH[dtype])
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])
    verdict = adaptsurgery.verify_merge(desk.out, base, adapter)
    assert [row.module for row in verdict.rows if "NaN or infinite" in row.detail] == ["m.k.weight"]


@pytest.mark.parametrize("key", ["m.q.weight", "m.k.weight"])
def test_an_overflow_of_float16(desk: Desk, key: str) -> None:
    desk.weights[key][0, 0] = 7e4
    base, adapter = desk.base(), desk.adapter()
    desk.refused(lambda: adaptsurgery.merge(base, adapter, desk.out, dtype="fp16"))
    adaptsurgery.merge(base, adapter, desk.out, dtype="fp16", allow_nonfinite=True)
    assert desk.merged()[key][0, 0] == math.inf
    assert adaptsurgery.verify_merge(desk.out, base, adapter).rows


def test_what_is_wrong_is_no_less_wrong_for_being_nan(desk: Desk) -> None:
    """A merged checkpoint with NaN where base and adapters give numbers, or the other way."""
    base, adapter = desk.base(), desk.adapter()
    adaptsurgery.merge(base, adapter, desk.out)
    tensors = desk.merged()
    for key in desk.weights:
        held = {k: t.clone() for k, t in tensors.items()}
        held[key][1, 1] = math.nan
        save_file(held, desk.out)
        with pytest.raises(SurgeryError, match="not-equal"):
            adaptsurgery.verify_merge(desk.out, base, adapter)
    desk.weights["m.k.weight"][1, 1] = math.nan
    save_file(tensors, desk.out)
    with pytest.raises(SurgeryError, match="not-equal"):
        adaptsurgery.verify_merge(desk.out, desk.base(), adapter)


# -- Adapter files


JOBS: dict[str, Callable[..., Any]] = {
    "convert": lambda source, out, **more: adaptsurgery.convert(source, out, "lycoris", **more),
    "combine": lambda source, out, **more: adaptsurgery.combine([source], out, **more),
    "resize": lambda source, out, **more: resize(source, out, rank=4, **more),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("job", JOBS)
def test_copied_factors_are_told(desk: Desk, job: str, bad: str) -> None:
    desk.lora[DOWN][1, 2:5] = BAD[bad]
    source, base = desk.adapter(), desk.base()
    report = JOBS[job](source, desk.out, base=base)
    (text,) = texts_of(report, "nonfinite-copied")
    assert text.startswith("3 numbers") and DOWN.split(".")[-2] in text
    assert torch.equal(desk.merged()[_same_key(desk, DOWN)].isnan(), desk.lora[DOWN].isnan())


def _same_key(desk: Desk, key: str) -> str:
    return next(k for k in desk.merged() if k.endswith(key.split(".", 1)[1]))


def test_a_copy_into_peft_and_a_saved_parameter(desk: Desk) -> None:
    desk.weights["m.k.weight"][2, 2] = math.inf
    desk.lora[UP][0, 0] = math.nan
    folder = desk.peft()
    report = adaptsurgery.convert(folder, desk.root / "again", "peft")
    (text,) = texts_of(report, "nonfinite-copied")
    assert text.startswith("2 numbers that are NaN or infinite in 2 tensors")


def test_factors_of_a_pickle_are_copies_too(desk: Desk) -> None:
    desk.lora[UP][0, 0] = math.nan
    torch.save(desk.lora, desk.root / "adapter.pt")
    report = adaptsurgery.convert(desk.root / "adapter.pt", desk.out, "kohya", base=desk.base())
    assert texts_of(report, "nonfinite-copied")


COMPUTED: dict[str, Callable[..., Any]] = {
    "convert": lambda desk, **more: adaptsurgery.convert(
        _loha(desk), desk.out, "kohya", base=desk.base(), algorithm="lora", **more
    ),
    "combine": lambda desk, **more: adaptsurgery.combine(
        [desk.adapter(), _other(desk)], desk.out, base=desk.base(), **more
    ),
}


def _loha(desk: Desk) -> Path:
    pairs = {"hada_w1_a": (SIZE, 2), "hada_w1_b": (2, SIZE), "hada_w2_a": (SIZE, 2),
             "hada_w2_b": (2, SIZE)}  # fmt: skip
    state = {f"lora_unet_m_q.{slot}": numbers(n, *s) for n, (slot, s) in enumerate(pairs.items())}
    state["lora_unet_m_q.hada_w1_a"][0, 0] = math.nan
    save_file(state, desk.root / "loha.safetensors")
    return desk.root / "loha.safetensors"


def _other(desk: Desk) -> Path:
    state = {**desk.lora, UP: numbers(9, SIZE, 2), DOWN: numbers(10, 2, SIZE)}
    state[UP][0, 0] = math.nan
    save_file(state, desk.root / "other.safetensors")
    return desk.root / "other.safetensors"


@pytest.mark.parametrize("job", COMPUTED)
def test_computed_factors_are_refused_unless_allowed(desk: Desk, job: str) -> None:
    _loha(desk), _other(desk), desk.adapter(), desk.base()
    desk.refused(lambda: COMPUTED[job](desk))
    report = COMPUTED[job](desk, allow_nonfinite=True)
    assert texts_of(report, "nonfinite-written")
    assert not all(t.isfinite().all() for t in desk.merged().values())


def test_what_cannot_be_cut_stays_as_it_is(desk: Desk) -> None:
    desk.lora[UP][0, 0] = math.nan
    source = desk.adapter()
    desk.refused(lambda: resize(source, desk.out, rank=1))
    report = resize(source, desk.out, rank=1, allow_nonfinite=True)
    assert texts_of(report, "not-cut") and texts_of(report, "nonfinite-copied")
    assert desk.merged()[UP].shape == (SIZE, 2)


def test_an_extraction_reads_numbers(desk: Desk) -> None:
    base = desk.base()
    desk.weights["m.k.weight"][0, 0] = math.nan
    save_file(desk.weights, desk.root / "tuned.safetensors")
    for allowed in (False, True):  # no factors come near to NaN
        desk.refused(
            lambda allowed=allowed: adaptsurgery.extract(
                base,
                desk.root / "tuned.safetensors",
                desk.root / "out",
                rank=1,
                allow_nonfinite=allowed,
            )
        )


# -- Verdicts


def test_the_same_bytes_are_the_same_update_and_it_is_said_what_they_are(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    base, clean = desk.base(), desk.adapter()
    assert "not numbers" not in adaptsurgery.verify(clean, clean, base=base).verdict
    desk.lora[DOWN][0, :3] = math.nan
    desk.lora[UP][0, 0] = math.inf
    one, two = desk.adapter(), desk.adapter("two")
    words = "identical bytes, of which 4 are not numbers"
    for other in (one, two):
        assert words in adaptsurgery.verify(one, other, base=base).verdict
    assert run(["verify", str(one), str(two), "--base", str(base)]) == 0
    assert words in capsys.readouterr().out
    desk.lora[UP][1, 1] = 5.0
    assert run(["verify", str(one), str(desk.adapter("three")), "--base", str(base)]) == 1


def test_a_zero_beside_nan_is_not_nothing(desk: Desk) -> None:
    """0·NaN is NaN: a module with both is in one file alone, and that is a difference."""
    one, base = desk.adapter(), desk.base()
    extra = {
        UP.replace("_q", "_k"): torch.zeros(SIZE, 2),
        DOWN.replace("_q", "_k"): numbers(5, 2, SIZE),
    }
    save_file({**desk.lora, **extra}, desk.root / "two.safetensors")
    assert adaptsurgery.verify(one, desk.root / "two.safetensors", base=base).rows
    extra[DOWN.replace("_q", "_k")] = torch.full((2, SIZE), math.nan)
    save_file({**desk.lora, **extra}, desk.root / "two.safetensors")
    with pytest.raises(SurgeryError, match="not-equal"):
        adaptsurgery.verify(one, desk.root / "two.safetensors", base=base)


# -- Scales beyond float32


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("alpha", [1e300, 1e39, -1e200, 1e-39, 1e-200, 1e-300])
def test_a_scale_that_float32_does_not_have(desk: Desk, alpha: float, sign: int) -> None:
    """Right to one rounding where float32 holds the result, else refused."""
    size = 10.0 ** (-math.log10(abs(alpha)) / 2)
    desk.lora = {DOWN: desk.lora[DOWN].double() * size, UP: desk.lora[UP].double() * size,
                 ALPHA: torch.tensor(alpha, dtype=torch.float64)}  # fmt: skip
    base, adapter = desk.base(), desk.adapter()
    job = adaptsurgery.merge if sign > 0 else adaptsurgery.unmerge
    job(base, adapter, desk.out)
    got, want = desk.merged()["m.q.weight"].numpy(), oracle(desk, sign=sign)
    assert np.abs(want - desk.weights["m.q.weight"].numpy()).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=2e-7)
    desk.lora[UP] *= 1e100
    desk.lora[UP] *= 1e100
    stronger = desk.adapter("stronger")
    desk.refused(lambda: job(base, stronger, desk.root / "other.safetensors"))


def test_a_live_fold_in_float32(desk: Desk) -> None:
    desk.lora[ALPHA] = torch.tensor(1e39, dtype=torch.float64)
    desk.lora[UP] *= 1e-20
    desk.lora[DOWN] *= 1e-20
    model = torch.nn.ModuleDict({"m": torch.nn.ModuleDict({"q": torch.nn.Linear(SIZE, SIZE)})})
    model["m"]["q"].weight.data.copy_(desk.weights["m.q.weight"])  # type: ignore[index]
    adapter = adaptsurgery.load(desk.adapter(), base=desk.base())
    adaptsurgery.fold(model, adapter)
    got = model["m"]["q"].weight.detach().numpy()  # type: ignore[index]
    np.testing.assert_allclose(got, oracle(desk), rtol=2e-7)
    desk.lora[UP] *= 1e25
    desk.lora[DOWN] *= 1e25
    with pytest.raises(SurgeryError, match="non-finite"):
        adaptsurgery.fold(model, adaptsurgery.load(desk.adapter(), base=desk.base()))


@pytest.mark.parametrize("alpha", [5e-324, 1e-308])
def test_a_scale_that_no_float_has(desk: Desk, alpha: float) -> None:
    desk.lora[ALPHA] = torch.tensor(alpha, dtype=torch.float64)
    desk.lora = {**desk.lora, DOWN: numbers(1, 64, SIZE), UP: numbers(2, SIZE, 64)}
    source, base = desk.adapter(), desk.base()
    for job in (
        lambda: adaptsurgery.merge(base, source, desk.out),
        lambda: adaptsurgery.convert(source, desk.out, "lycoris", base=base),
        lambda: adaptsurgery.combine([source], desk.out, base=base),
    ):
        desk.refused(job, "out-of-range")


def test_a_weight_that_takes_a_scale_out_of_range(desk: Desk) -> None:
    desk.lora[ALPHA] = torch.tensor(1e-200, dtype=torch.float64)
    source, base = desk.adapter(), desk.base()
    for weight in (1e-200, -1e-200):
        desk.refused(
            lambda w=weight: adaptsurgery.merge(base, (source, w), desk.out), "out-of-range"
        )
        desk.refused(
            lambda w=weight: adaptsurgery.combine([(source, w)], desk.out, base=base),
            "out-of-range",
        )


def test_a_merge_tells_what_an_adapter_brings_that_is_no_number(tmp_path: Path) -> None:
    """A parameter that is replaced outright is copied, as it is in a conversion."""
    desk = Desk(tmp_path)
    desk.weights["m.k.weight"][0, :3] = math.nan
    adapter = desk.peft()
    desk.weights["m.k.weight"] = numbers(2, SIZE, SIZE)
    report = adaptsurgery.merge(desk.base(), [adapter], desk.out)
    (note,) = [n for n in report.notes if n.code == "nonfinite-copied"]
    assert "`m.k.weight` 3" in note.text
