"""Extraction end to end: what is written, merged again, is what the report says it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_pairs as models
import pytest
import torch

import adaptsurgery
from adaptsurgery.adapters.report import Report
from adaptsurgery.algorithms import HRA
from adaptsurgery.jobs.extract.extract import extract

TARGETS = ("peft", "lycoris", "kohya")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = models.weights()
    return (
        models.write(folder / "base.safetensors", base),
        models.write(folder / "tuned.safetensors", models.moved(base)),
    )


def name_for(to: str, folder: Path) -> Path:
    return folder / ("out" if to == "peft" else "out.safetensors")


def merged_error(pair: tuple[Path, Path], out: Path, folder: Path) -> float:
    """How far a merge of the adapter into the base is from the fine-tune, of all that changed."""
    adaptsurgery.merge(pair[0], out, folder / "merged.safetensors", overwrite=True)
    base, tuned, got = map(models.read, (*pair, folder / "merged.safetensors"))
    return models.apart(got, tuned, base)


CASES = [
    (algorithm, to)
    for algorithm in ("lora", "loha", "lokr", "hra", "auto")
    for to in TARGETS
    if algorithm != "hra" or to == "peft"
]


@pytest.mark.parametrize(("algorithm", "to"), CASES)
def test_a_merge_of_what_is_written_has_the_error_that_is_told(
    pair: tuple[Path, Path], tmp_path: Path, algorithm: str, to: str
) -> None:
    out = name_for(to, tmp_path)
    few = {"include": ["layers.0.up", "conv"]} if algorithm in ("loha", "auto") else {}
    report = extract(*pair, out, algorithm=algorithm, rank=4, to=to, **few)
    assert 0 < report.facts["error"] < 1
    assert merged_error(pair, out, tmp_path) == pytest.approx(report.facts["error"], rel=1e-4)
    assert report.facts["energy"] == pytest.approx(1 - report.facts["error"] ** 2)
    assert all(r["error"] > 1e-3 for r in report.facts["layers"] if r["algorithm"])
    assert not list(tmp_path.glob(".adaptsurgery-*"))


def test_what_is_no_matrix_comes_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Embeddings, heads, norms and biases are exact; the lone parameter is left out, and told."""
    base, tuned = map(models.read, pair)
    for to in TARGETS:
        out = name_for(to, tmp_path)
        report = extract(*pair, out, rank=4, to=to, overwrite=True)
        adaptsurgery.merge(pair[0], out, tmp_path / "m.safetensors", overwrite=True)
        got = models.read(tmp_path / "m.safetensors")
        for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.norm.bias",
                    "model.layers.1.up.bias"):  # fmt: skip
            torch.testing.assert_close(got[key], tuned[key], rtol=0, atol=1e-6)
        assert torch.equal(got["model.cls_token"], base["model.cls_token"])
        [left] = report.facts["left_out"]
        change = (tuned["model.cls_token"] - base["model.cls_token"]).norm()
        assert left["name"] == "model.cls_token"
        assert left["share"] == pytest.approx((float(change) / report.facts["norm"]) ** 2, rel=1e-4)
        assert "left-out" in codes(report)
        del got  # which has the file mapped that is replaced next


def test_no_dense_leaves_them_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*pair, tmp_path / "out", rank=4, dense=False)
    assert {d["reason"] for d in report.facts["left_out"]} == {"--no-dense"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none"


def codes(report: Report) -> list[str]:
    return [note.code for note in report.notes]


@pytest.mark.parametrize("to", TARGETS)
def test_layers_are_chosen_by_pefts_rules(pair: tuple[Path, Path], tmp_path: Path, to: str) -> None:
    def chosen(**options: Any) -> set[str]:
        out = name_for(to, tmp_path)
        report = extract(*pair, out, rank=2, to=to, overwrite=True, **options)
        return {r["name"] for r in report.facts["layers"]}

    up = {"model.layers.0.up", "model.layers.1.up"}
    assert chosen(include=["up"]) == up
    assert chosen(include=["layers.1.up", "conv"]) == {"model.layers.1.up", "model.conv"}
    assert chosen(include=[r".*layers\.\d\.(up|down)"], exclude=["down"]) == up
    assert "lm_head" in chosen(include=["lm_head", "up"])
    everything = chosen()
    assert up | {"model.conv", "model.point"} < everything
    assert not {"lm_head", "model.embed_tokens"} & everything


def test_an_embedding_becomes_a_lora_of_peft(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*pair, tmp_path / "out", include=["embed_tokens"], rank=3)
    keys = models.read(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    assert {k: tuple(t.shape) for k, t in keys.items()} == {
        f"{prefix}A": (3, 40), f"{prefix}B": (24, 3)
    }  # fmt: skip
    [row] = [r for r in report.facts["layers"] if r["algorithm"]]
    base, tuned = (models.read(p)["model.embed_tokens.weight"] for p in pair)
    change = (tuned - base).T
    made = keys[f"{prefix}B"] @ keys[f"{prefix}A"]
    assert float((change - made).norm() / change.norm()) == pytest.approx(row["error"], rel=1e-4)


def test_ranks_of_their_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(
        *pair, tmp_path / "out", rank=4, conv_rank=2,
        rank_pattern={"layers.0.up": 6, r"layers\.1\..*": 3, "conv": 5},
    )  # fmt: skip
    ranks = {r["name"].removeprefix("model."): r["rank"] for r in report.facts["layers"]}
    assert ranks["layers.0.up"] == 6 and ranks["layers.1.down"] == 3
    assert ranks["layers.0.down"] == ranks["point"] == 4 and ranks["conv"] == 5
    assert adaptsurgery.load(tmp_path / "out").modules("model.layers.0.up")[0].rank == 6
    plain = extract(*pair, tmp_path / "plain", rank=4, conv_rank=2)
    assert {r["name"]: r["rank"] for r in plain.facts["layers"]}["model.conv"] == 2


def test_an_error_asked_for_is_kept_by_every_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*pair, tmp_path / "out", max_error=0.5, include=["up", "q_proj"])
    rows = report.facts["layers"]
    assert len(rows) == 4 and all(0.3 < r["error"] <= 0.5 + 1e-6 for r in rows)
    more = extract(*pair, tmp_path / "more", energy=0.8, include=["up"])
    assert all(0.8 - 1e-6 <= r["energy"] < 0.9 for r in more.facts["layers"])


@pytest.mark.parametrize("algorithm", ["lokr", "hra"])
def test_an_error_that_is_out_of_reach_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, algorithm: str
) -> None:
    with pytest.raises(adaptsurgery.SurgeryError) as refused:
        extract(*pair, tmp_path / "out", algorithm=algorithm, max_error=0.2, include=["up"])
    assert refused.value.code == "out-of-reach"
    told = " ".join(refused.value.items)
    assert len(refused.value.items) == 2 and "layers.0.up" in told and "layers.1.up" in told
    assert not list(tmp_path.iterdir())


def test_one_factor_for_all_that_is_not_good_enough_for_each_is_refused(tmp_path: Path) -> None:
    """True LoKrs of two factors, of which PEFT can have one; LyCORIS has both."""
    random = torch.Generator().manual_seed(0)
    base = {f"l{n}.weight": torch.randn(48, 48, generator=random) for n in range(3)}
    sides = {"l0.weight": (2, 24), "l1.weight": (4, 12), "l2.weight": (4, 12)}
    tuned = {
        name: w + torch.kron(*(torch.randn(n, n, generator=random) for n in sides[name]))
        for name, w in base.items()
    }
    pair = models.write(tmp_path / "b.safetensors", base), models.write(tmp_path / "t.safetensors", tuned)  # fmt: skip
    with pytest.raises(adaptsurgery.SurgeryError) as refused:
        extract(*pair, tmp_path / "out", algorithm="lokr", max_error=0.1)
    error = refused.value
    assert error.code == "out-of-reach" and "decompose_factor 4" in error.what
    assert len(error.items) == 1 and "`l0`" in error.items[0] and "--to lycoris" in error.next
    with pytest.raises(adaptsurgery.SurgeryError, match="another --factor"):
        extract(*pair, tmp_path / "out", algorithm="lokr", factor=4, max_error=0.1)
    assert not (tmp_path / "out").exists()
    report = extract(
        *pair, tmp_path / "out.safetensors", algorithm="lokr", max_error=0.1, to="lycoris"
    )
    assert report.facts["error"] < 1e-5 and not report.facts["left_out"]
    peft = extract(*pair, tmp_path / "out", algorithm="lokr", max_error=0.1, exclude=["l0"])
    assert peft.facts["factors"] == [4] and peft.facts["layers_error"] < 1e-5


def test_hra_has_the_rank_that_is_asked_for_on_every_layer(tmp_path: Path) -> None:
    """Where the nearest rotation of one layer takes an odd number of reflections, and PEFT has one rank."""
    base = {n: w for n, w in models.weights().items() if "up.weight" in n or "point" in n}
    reflected = HRA(models.weights(3)["model.layers.0.up.weight"][:3].t())
    tuned = models.moved(base)
    tuned["model.layers.0.up.weight"] = reflected.fold(base["model.layers.0.up.weight"])
    pair = (models.write(tmp_path / "b.safetensors", base),
            models.write(tmp_path / "t.safetensors", tuned))  # fmt: skip
    for rank in (3, 4, 14):
        report = extract(*pair, tmp_path / str(rank), algorithm="hra", rank=rank)
        assert report.facts["ranks"] == [rank]


@pytest.mark.parametrize(("algorithm", "to"), [("lora", "kohya"), ("lora", "lycoris"), ("lokr", "peft")])  # fmt: skip
def test_tucker_cores_are_written_and_measured(
    pair: tuple[Path, Path], tmp_path: Path, algorithm: str, to: str
) -> None:
    out = name_for(to, tmp_path)
    own = {"factor": 2} if algorithm == "lokr" else {}
    report = extract(
        *pair, out, rank=2, to=to, algorithm=algorithm, tucker=True, include=["conv"], **own
    )
    file = out if out.is_file() else out / "adapter_model.safetensors"
    [core] = [t for k, t in models.read(file).items() if "lora_mid" in k or "lokr_t2" in k]
    assert core.shape == (2, 2, 3, 3)
    adaptsurgery.merge(pair[0], out, tmp_path / "merged.safetensors")
    base, tuned, merged = (
        models.read(p)["model.conv.weight"] for p in (*pair, tmp_path / "merged.safetensors")
    )
    [row] = [r for r in report.facts["layers"] if r["algorithm"]]
    assert float((merged - tuned).norm() / (tuned - base).norm()) == pytest.approx(row["error"], abs=1e-6)  # fmt: skip


def test_the_memory_foretold_is_of_the_workers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, four = (
        extract(*pair, tmp_path / "out", rank=2, dry_run=True, workers=n).facts for n in (1, 4)
    )
    assert one["predicted_peak_memory"] < four["predicted_peak_memory"]


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra", "auto"])
def test_a_budget_is_of_the_whole_adapter(
    pair: tuple[Path, Path], tmp_path: Path, algorithm: str
) -> None:
    report = extract(*pair, tmp_path / "out", algorithm=algorithm, budget=3000, dense=False)
    assert 1000 < report.facts["parameters"] <= 3000
    stored = models.read(tmp_path / "out" / "adapter_model.safetensors")
    if algorithm != "lokr":  # PEFT's ranks may ask for another storage of it
        assert sum(t.numel() for t in stored.values()) <= 3000


def test_auto_takes_the_best_of_each_layer_or_of_all(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A layer that a LoKr gives exactly beside ones that a LoRA gives exactly."""
    base = models.weights()
    random = torch.Generator().manual_seed(5)
    tuned = dict(base)
    for name in ("q_proj", "down"):
        key = f"model.layers.0.{name}.weight"
        a, b = torch.randn(base[key].shape[0], 1, generator=random), torch.randn(1, base[key].shape[1], generator=random)  # fmt: skip
        tuned[key] = base[key] + 0.1 * a @ b
    key = "model.layers.0.up.weight"
    tuned[key] = base[key] + 0.1 * torch.kron(torch.randn(6, 4, generator=random), torch.randn(8, 6, generator=random))  # fmt: skip
    path = models.write(tmp_path / "t.safetensors", tuned)
    each = extract(
        pair[0], path, tmp_path / "o.safetensors", algorithm="auto", rank=2, to="lycoris"
    )
    taken = {
        r["name"]: (r["algorithm"], r["error"]) for r in each.facts["layers"] if r["algorithm"]
    }
    assert taken["model.layers.0.up"][0] == "lokr"
    assert each.facts["error"] < 1e-5 and len(taken) == 3
    one = extract(pair[0], path, tmp_path / "o", algorithm="auto", rank=2, to="peft")
    assert one.facts["algorithms"] == ["lora"] and one.facts["error"] > 0.1
    assert set(one.facts["by_algorithm"]) == {"lora", "loha", "lokr", "hra"}


def test_peft_gets_one_decompose_factor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """All layers come from a factor that nobody named: it is found, and every layer has it."""
    base = models.weights()
    random = torch.Generator().manual_seed(6)
    tuned = dict(base)
    for i in range(2):
        for name, (o, n) in {"q_proj": (24, 24), "up": (48, 24), "down": (24, 48)}.items():
            w1, w2 = (torch.randn(*s, generator=random) for s in ((8, 8), (o // 8, n // 8)))
            tuned[f"model.layers.{i}.{name}.weight"] = base[
                f"model.layers.{i}.{name}.weight"
            ] + 0.1 * torch.kron(w1, w2)
    path = models.write(tmp_path / "t.safetensors", tuned)
    report = extract(pair[0], path, tmp_path / "o", algorithm="lokr", budget=2000)
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["decompose_factor"] == 8 and report.facts["factors"] == [8]
    assert report.facts["error"] < 1e-5


def test_hra_has_one_rank_whatever_the_layers_need(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Layers that need fewer reflections get equal pairs, which undo each other."""
    base = models.weights()
    random = torch.Generator().manual_seed(7)
    tuned = dict(base)
    for name, rank in (("q_proj", 2), ("down", 6)):
        w = base[f"model.layers.0.{name}.weight"].double()
        u = torch.randn(w.shape[1], rank, generator=random).double()
        tuned[f"model.layers.0.{name}.weight"] = adaptsurgery.algorithms.HRA(u).fold(w).float()
    path = models.write(tmp_path / "t.safetensors", tuned)
    report = extract(pair[0], path, tmp_path / "o", algorithm="hra", max_error=1e-3)
    ranks = {r["name"]: r["rank"] for r in report.facts["layers"] if r["algorithm"]}
    assert ranks == {"model.layers.0.q_proj": 2, "model.layers.0.down": 6}
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["r"] == 6
    assert merged_error((pair[0], path), tmp_path / "o", tmp_path) < 1e-4


def test_gpt2s_transposed_weights(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(2)
    base = {
        "h.0.attn.c_attn.weight": torch.randn(16, 48, generator=random),
        "h.0.attn.c_attn.bias": torch.randn(48, generator=random),
        "h.0.attn.c_proj.weight": torch.randn(16, 16, generator=random),
        "h.0.attn.c_proj.bias": torch.randn(16, generator=random),
        "wte.weight": torch.randn(30, 16, generator=random),
    }
    paths = models.write(tmp_path / "b.safetensors", base), tmp_path / "t.safetensors"
    models.write(paths[1], models.moved(base))
    for to in TARGETS:
        out = name_for(to, tmp_path)
        report = extract(*paths, out, rank=4, to=to, overwrite=True)
        shapes = {r["name"]: r["shape"] for r in report.facts["layers"]}
        assert shapes["h.0.attn.c_attn"] == [48, 16]
        assert merged_error(paths, out, tmp_path) == pytest.approx(report.facts["error"], rel=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    with pytest.raises(adaptsurgery.SurgeryError) as refused:
        extract(*paths, tmp_path / "no", algorithm="loha", rank=4)
    assert refused.value.code == "nothing-held"


def test_prefixes_shards_and_dtypes_may_differ(tmp_path: Path) -> None:
    """A base in shards under `model.` in bfloat16, its fine-tune in one float32 file without it."""
    base = {k: v.bfloat16() for k, v in models.weights().items() if k.startswith("model.")}
    tuned = models.moved({k: v.float() for k, v in base.items()})
    first = models.write_shards(tmp_path / "base", base, 3)
    bare = {k.removeprefix("model."): v for k, v in tuned.items()}
    second = models.write(tmp_path / "t.safetensors", dict(sorted(bare.items(), reverse=True)))
    report = extract(first, second, tmp_path / "out", rank=4)
    assert "prefix" in codes(report)
    assert "model.layers.0.up" in adaptsurgery.load(tmp_path / "out")
    back = extract(second, first, tmp_path / "back", rank=4)
    assert "layers.0.up" in adaptsurgery.load(tmp_path / "back")
    assert back.facts["error"] == pytest.approx(report.facts["error"], rel=1e-3)


def test_tied_weights_are_taken_once(tmp_path: Path) -> None:
    base, folders = models.weights(), []
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    tuned = models.moved(base)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    for name, tensors in (("base", base), ("tuned", tuned)):
        folder = tmp_path / name
        folder.mkdir()
        models.write(folder / "model.safetensors", {k: v.clone() for k, v in tensors.items()})
        (folder / "config.json").write_text('{"tie_word_embeddings": true}')
        folders.append(folder)
    report = extract(*folders, tmp_path / "out", rank=4)
    assert "tied" in codes(report)
    saved = models.read(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.weight" in saved
    assert not any("lm_head" in key for key in saved)


def test_storage_dtypes_are_in_the_errors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = models.weights()
    tuned = dict(base)
    random = torch.Generator().manual_seed(9)
    key = "model.layers.0.up.weight"
    a, b = torch.randn(48, 2, generator=random), torch.randn(2, 24, generator=random)
    tuned[key] = base[key] + 0.1 * a @ b
    path = models.write(tmp_path / "t.safetensors", tuned)
    errors = {}
    for dtype in ("fp32", "fp16", "bf16"):
        out = tmp_path / dtype
        report = extract(pair[0], path, out, rank=2, dtype=dtype)
        stored = models.read(out / "adapter_model.safetensors")
        assert {t.dtype for t in stored.values()} == {
            {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        }
        errors[dtype] = report.facts["layers_error"]
    assert errors["fp32"] < 1e-5 < errors["fp16"] < errors["bf16"] < 1e-2


def test_compare_tells_the_others_at_the_same_size(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*pair, tmp_path / "out", rank=4, compare=True, include=["up"])
    row = report.facts["layers"][0]
    others = {o["algorithm"]: o for o in row["others"]}
    assert set(others) == {"loha", "lokr", "hra"}
    assert all(o["failed"] or o["parameters"] <= row["parameters"] for o in others.values())
    plain = extract(*pair, tmp_path / "plain", rank=4, include=["up"])
    assert models.tree(tmp_path / "out").keys() == models.tree(tmp_path / "plain").keys()
    assert plain.facts["layers"][0]["error"] == row["error"]


def test_a_dry_run_reads_headers_and_writes_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptsurgery.checkpoint.safetensors import Span

    def read(_: Span) -> bytes:
        raise AssertionError("a dry run read numbers")

    monkeypatch.setattr(Span, "read", read)
    report = extract(*pair, tmp_path / "out", algorithm="auto", rank=4, dry_run=True)
    assert "layers" in report.verdict and not report.outputs
    assert not list(tmp_path.iterdir())


def test_the_library_has_it_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert adaptsurgery.extract is extract
    report = adaptsurgery.extract(*pair, tmp_path / "out", rank=2)
    assert report.outputs and json.dumps(report.as_dict(), allow_nan=False)


def test_a_low_rank_lokr_of_pefts_default_cut(tmp_path: Path) -> None:
    """Wide enough that w2 is stored in two factors, of a rank that is not PEFT's default."""
    base = {f"l.{i}.weight": torch.randn(256, 256) for i in range(2)}
    paths = models.write(tmp_path / "b.safetensors", base), tmp_path / "t.safetensors"
    models.write(paths[1], models.moved(base))
    report = extract(*paths, tmp_path / "out", algorithm="lokr", rank=3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["alpha"], config["decompose_factor"]) == (3, 3, -1)
    assert merged_error(paths, tmp_path / "out", tmp_path) == pytest.approx(report.facts["error"], rel=1e-4)  # fmt: skip
