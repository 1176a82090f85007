"""Pairs that are none, and checkpoints that are broken: a clear error, or the right result; no debris."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import checkpoint_pairs as models
import pytest
import torch

import adaptsurgery
from adaptsurgery.adapters.report import Report
from adaptsurgery.jobs.extract.extract import extract
from adaptsurgery_formats.errors import SurgeryError

UP = "model.layers.0.up.weight"


class Bench:
    """A pair of checkpoints in a folder, and extractions from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, models.weights()
        self.tuned = models.moved(self.base)

    def write(self) -> tuple[Path, Path]:
        return (
            models.write(self.folder / "base.safetensors", self.base),
            models.write(self.folder / "tuned.safetensors", self.tuned),
        )

    def extract(self, **options: Any) -> Report:
        goal = {} if {"rank", "energy", "max_error", "budget"} & options.keys() else {"rank": 2}
        return extract(*self.write(), self.folder / "out", **goal, **options)

    def refused(self, code: str, **options: Any) -> SurgeryError:
        with pytest.raises(SurgeryError) as caught:
            self.extract(**options)
        assert caught.value.code == code
        left = {p.name for p in self.folder.iterdir()}
        assert left == {"base.safetensors", "tuned.safetensors"}, "something was left behind"
        return caught.value


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def codes(report: Report) -> list[str]:
    return [note.code for note in report.notes]


def test_different_architectures(bench: Bench) -> None:
    bench.tuned = {f"other.{i}.weight": torch.randn(4, 4) for i in range(5)}
    error = bench.refused("different-architectures")
    assert any("only in the base: `model.embed_tokens.weight`" in item for item in error.items)
    assert any("other.0.weight" in item for item in error.items)


def test_different_shapes_are_all_listed(bench: Bench) -> None:
    bench.tuned[UP] = torch.randn(50, 24)
    bench.tuned["model.conv.weight"] = torch.randn(16, 12, 5, 5)
    error = bench.refused("shapes-differ")
    assert len(error.items) == 2 and any("48×24 and 50×24" in item for item in error.items)
    report = bench.extract(exclude=["layers.0.up", "conv"])
    left = {d["name"]: d["reason"] for d in report.facts["left_out"]}
    assert left.get("model.layers.0.up.bias") == "excluded" and report.facts["modules"] == 6


def test_a_missing_partner_on_either_side(bench: Bench) -> None:
    del bench.tuned[UP]
    del bench.base["model.layers.1.down.weight"]
    report = bench.extract()
    told = {note.code: note.text for note in report.notes}
    assert UP in told["only-in-base"] and "model.layers.1.down.weight" in told["only-in-tuned"]
    assert {"model.layers.0.up", "model.layers.1.down"}.isdisjoint(
        r["name"] for r in report.facts["layers"]
    )


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [UP, "model.layers.0.norm.weight"])
def test_numbers_that_are_not_finite(bench: Bench, side: str, number: float, key: str) -> None:
    getattr(bench, side)[key].flatten()[3] = number
    error = bench.refused("non-finite")
    assert key in error.what and ("base" if side == "base" else "fine-tuned") in error.what


def test_infinities_in_what_is_left_out_stop_nothing(bench: Bench) -> None:
    mask = torch.full((4, 4), float("-inf")).triu(1)
    bench.base["model.mask"], bench.tuned["model.mask"] = mask, mask.clone()
    norm = "model.layers.0.norm.weight"
    bench.tuned[norm][3] = float("nan")
    assert "--no-dense" in bench.refused("non-finite").next
    report = bench.extract(dense=False)
    left = {d["name"]: d["norm"] for d in report.facts["left_out"]}
    assert left[norm] == -1 and "model.mask" not in left and report.facts["error"] > 0
    bench.tuned["model.mask"] = mask.t().clone()
    shutil.rmtree(bench.folder / "out")
    told = {d["name"] for d in bench.extract(dense=False).facts["left_out"]}
    assert "model.mask" in told


def test_what_has_no_difference_has_no_share_of_it(bench: Bench) -> None:
    bench.tuned = {k: bench.base[k] for k in bench.base} | {UP: bench.tuned[UP]}
    bench.tuned["model.layers.0.extra.weight"] = torch.randn(3, 4)
    report = bench.extract()
    [text] = [n.text for n in report.notes if n.code == "left-out"]
    assert text == "not in the adapter: model.layers.0.extra.weight (new, not measured)"


def test_identical_files_are_an_empty_adapter(bench: Bench) -> None:
    bench.tuned = dict(bench.base)
    error = bench.refused("zero-delta")
    assert "the same, to the bit" in error.seen


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra"])
def test_an_empty_adapter_if_it_is_allowed(bench: Bench, algorithm: str) -> None:
    bench.tuned = dict(bench.base)
    report = bench.extract(allow_empty=True, algorithm=algorithm)
    assert report.facts["error"] == 0 and report.facts["modules"] == 8
    assert {row["error"] for row in report.facts["layers"]} == {0.0}
    out = bench.folder / "merged.safetensors"
    adaptsurgery.merge(bench.folder / "base.safetensors", bench.folder / "out", out)
    for key, tensor in models.read(out).items():
        torch.testing.assert_close(tensor, bench.base[key], rtol=1e-6, atol=1e-6)


def test_only_a_norm_changed(bench: Bench) -> None:
    bench.tuned = dict(bench.base)
    bench.tuned["model.layers.0.norm.weight"] = bench.base["model.layers.0.norm.weight"] + 1
    error = bench.refused("zero-delta")
    assert "model.layers.0.norm.weight" in error.seen and "--to lycoris" in error.next
    files = bench.folder / "base.safetensors", bench.folder / "tuned.safetensors"
    out = bench.folder / "out.safetensors"
    assert extract(*files, out, rank=2, to="lycoris").outputs
    assert set(models.read(out)) == {"lycoris_model_layers_0_norm.w_norm"}


def test_layers_that_are_equal_are_no_part_of_the_adapter(bench: Bench) -> None:
    for key in bench.base:
        if key != UP:
            bench.tuned[key] = bench.base[key]
    report = bench.extract()
    assert list(adaptsurgery.load(bench.folder / "out")) == ["model.layers.0.up"]
    assert report.facts["unchanged"] == 7
    assert [r.change for r in report.rows].count("identical") == 7


def test_layers_that_are_all_alike(bench: Bench) -> None:
    """The same change on every layer: each is found by itself."""
    change = torch.randn(24, 1) @ torch.randn(1, 24)
    for i in range(2):
        key = f"model.layers.{i}.q_proj.weight"
        bench.base[key] = bench.base["model.layers.0.q_proj.weight"].clone()
        bench.tuned[key] = bench.base[key] + change
    report = bench.extract(include=["q_proj"])
    assert report.facts["layers_error"] < 1e-5
    errors = [r["error"] for r in report.facts["layers"]]
    assert errors[0] == pytest.approx(errors[1], abs=1e-6)


def test_a_rank_above_the_layers_is_cut_down(bench: Bench) -> None:
    report = bench.extract(rank=100, include=["up"])
    assert {r["rank"] for r in report.facts["layers"]} == {24}
    assert report.facts["layers_error"] < 1e-5
    assert any("cut down to 24" in note.text for note in report.notes)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra"])
def test_rows_and_columns(tmp_path: Path, algorithm: str) -> None:
    random = torch.Generator().manual_seed(0)
    base = {"row.weight": torch.randn(1, 12, generator=random),
            "column.weight": torch.randn(12, 1, generator=random),
            "plain.weight": torch.randn(12, 12, generator=random)}  # fmt: skip
    paths = models.write(tmp_path / "b.safetensors", base), tmp_path / "t.safetensors"
    models.write(paths[1], models.moved(base))
    report = extract(*paths, tmp_path / "out", algorithm=algorithm, rank=2)
    adaptsurgery.merge(paths[0], tmp_path / "out", tmp_path / "m.safetensors")
    got, tuned = models.read(tmp_path / "m.safetensors"), models.read(paths[1])
    assert models.apart(got, tuned, base) == pytest.approx(report.facts["error"], rel=1e-3)
    rows = {r["name"]: r["error"] for r in report.facts["layers"]}
    if algorithm in ("lora", "loha"):
        assert max(rows["row"], rows["column"]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(bench: Bench, dtype: torch.dtype) -> None:
    bench.base[UP], bench.tuned[UP] = bench.base[UP].to(dtype), bench.tuned[UP].to(dtype)
    error = bench.refused("bad-dtype")
    assert len(error.items) == 1 and UP in error.items[0] and "dequantise" in error.next


def test_counters_and_buffers_are_no_trouble(bench: Bench) -> None:
    for side in (bench.base, bench.tuned):
        side["model.position_ids"] = torch.arange(9)
    bench.tuned["model.steps"] = bench.base["model.steps"] = torch.tensor(3)
    bench.tuned["model.steps"] = torch.tensor(4)
    report = bench.extract()
    left = {d["name"]: d["reason"] for d in report.facts["left_out"]}
    assert left["model.steps"] == "not a floating-point parameter"
    assert "model.position_ids" not in left


def test_two_models_that_have_nothing_in_common(bench: Bench) -> None:
    bench.tuned = models.weights(seed=99)
    report = bench.extract()
    [note] = [n for n in report.notes if n.code == "not-a-fine-tune"]
    assert "1.4" in note.text


def test_a_change_below_the_storages_rounding(bench: Bench) -> None:
    fine = models.moved(bench.base, 1e-4)
    bench.base = {k: v.bfloat16() for k, v in bench.base.items()}
    bench.tuned = {k: v.bfloat16() for k, v in fine.items()}
    assert "rounding-noise" in codes(bench.extract())
    shutil.rmtree(bench.folder / "out")
    bench.tuned = models.moved({k: v.float() for k, v in bench.base.items()}, 0.1)
    bench.tuned = {k: v.bfloat16() for k, v in bench.tuned.items()}
    assert "rounding-noise" not in codes(bench.extract())


def test_the_rounding_that_is_told_is_about_right(bench: Bench) -> None:
    from adaptsurgery.jobs.extract.fitting import noise_of
    from adaptsurgery.jobs.extract.pairs import Pair, Side

    weight = torch.randn(400, 400)
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        side = Side(0, "w", name, (400, 400))
        told = noise_of(Pair("", "w", side, side), weight)
        assert float((weight.to(dtype) - weight).norm()) == pytest.approx(told, rel=0.15)


def test_a_grown_vocabulary(bench: Bench) -> None:
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        bench.tuned[key] = torch.cat([bench.tuned[key], torch.randn(3, 24)])
    report = bench.extract()
    assert codes(report).count("grown-vocabulary") == 2
    saved = models.read(bench.folder / "out" / "adapter_model.safetensors")
    assert saved["base_model.model.lm_head.weight"].shape == (43, 24)
    files = bench.folder / "base.safetensors", bench.folder / "tuned.safetensors"
    other = extract(*files, bench.folder / "out.safetensors", rank=2, to="kohya")
    left = {d["name"]: d["share"] for d in other.facts["left_out"]}
    assert left["lm_head.weight"] > 0.01 and "model.embed_tokens.weight" in left


def test_a_new_head(bench: Bench) -> None:
    bench.tuned["classifier.weight"] = torch.randn(3, 24)
    bench.tuned["classifier.bias"] = torch.randn(3)
    report = bench.extract()
    assert "only-in-tuned" in codes(report)
    saved = models.read(bench.folder / "out" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.bias"], bench.tuned["classifier.bias"])


def test_a_tiny_and_a_huge_model(bench: Bench) -> None:
    for size in (1e-30, 1e30):
        bench.base = {k: size * v for k, v in models.weights().items()}
        bench.tuned = {k: size * v for k, v in models.moved(models.weights()).items()}
        report = bench.extract(overwrite=True)
        assert 0.5 < report.facts["layers_error"] < 0.99


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"rank": 2, "energy": 0.5}, "one-goal"),
        ({"rank": 0}, "bad-goal"),
        ({"max_error": 1.5}, "bad-goal"),
        ({"algorithm": "loraa"}, "no-such-option"),
        ({"dtype": "fp8"}, "no-such-option"),
        ({"algorithm": "hra", "to": "kohya"}, "no-hra"),
        ({"factor": 4}, "option-without-effect"),
        ({"tucker": True, "algorithm": "hra"}, "option-without-effect"),
        ({"tucker": True, "to": "peft"}, "option-without-effect"),
        ({"algorithm": "hra", "rank_pattern": {"up": 2}}, "hra-ranks"),
        ({"include": ["nothing_of_that_name"]}, "no-match"),
        ({"exclude": ["nothing_of_that_name"]}, "no-match"),
        ({"include": ["("]}, "bad-pattern"),
        ({"shard_index": 2, "num_shards": 2}, "no-such-part"),
        ({"budget": 5}, "budget-too-small"),
        ({"report": "r.txt"}, "bad-name"),
    ],
)
def test_options_that_cannot_be(bench: Bench, options: dict[str, Any], code: str) -> None:
    bench.refused(code, **options)


def test_outputs_that_would_replace_an_input(bench: Bench) -> None:
    base, tuned = bench.write()
    for out in (base, tuned):
        with pytest.raises(SurgeryError) as caught:
            extract(base, tuned, out, rank=2, to="kohya", overwrite=True)
        assert caught.value.code == "output-is-source"
    with pytest.raises(SurgeryError) as caught:
        extract(base, base.with_name("none.safetensors"), bench.folder / "out", rank=2)
    assert caught.value.code in ("no-such-file", "hub-offline")


def test_an_option_without_effect_is_noted(bench: Bench) -> None:
    report = bench.extract(rank_pattern={"nothing": 3}, include=["up"], conv_rank=2)
    assert {"pattern-without-effect", "option-without-effect"} <= set(codes(report))


def test_pickles_are_refused(bench: Bench) -> None:
    base = bench.write()[0]
    torch.save(bench.tuned, bench.folder / "t.bin")
    with pytest.raises(SurgeryError) as caught:
        extract(base, bench.folder / "t.bin", bench.folder / "out", rank=2)
    assert caught.value.code == "pickle-base"
