"""The quickstart as a job: what it makes, what it compares, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptsurgery
from adaptsurgery import Adapter, SurgeryError
from adaptsurgery.algorithms import HRA, DoRA, Full, LoHa, LoKr, LoRA, Norm
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import compose
from adaptsurgery.quickstart import given, making, minilm, quickstart, run, students, tiny

ALGORITHMS = ("lora", "loha", "lokr", "hra")
TWO = {"linear": (128, 64), "conv.0": (64, 96, 3, 3)}


def real_model() -> Path:
    """Where pip put MiniLM; the package itself is not imported."""
    home = minilm.folder()
    assert home is not None
    return home


def save_model(path: Path, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    save_file(
        {f"{name}.weight": torch.randn(s, generator=generator) for name, s in shapes.items()}, path
    )
    return path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less training: enough for the losses to fall."""
    monkeypatch.setattr(run, "BASE_STEPS", 30)
    monkeypatch.setattr(tiny.Student, "steps", 12)
    monkeypatch.setattr(tiny.Student, "tuning_steps", 12)


# -- The tiny model --------------------------------------------------------------------------------


def test_the_text_is_there_and_the_measured_code_was_not_taught() -> None:
    assert min(len(tiny.prose()), len(tiny.code()), len(tiny.unseen_code())) > 50_000
    assert not set(tiny._CODE) & set(tiny._UNSEEN_CODE)
    assert int(tiny.prose().max()) < tiny.BYTES


def test_the_model_is_small_and_sees_only_what_came_before() -> None:
    model = tiny.TinyModel()
    assert sum(p.numel() for p in model.parameters()) * 4 < 1_000_000
    text = tiny.pieces(tiny.prose(), 2, torch.Generator().manual_seed(1))
    other = text.clone()
    other[:, 40:] = 65
    assert torch.equal(model(text)[:, :40], model(other)[:, :40])


@pytest.mark.parametrize("recipe", making.RECIPES, ids=lambda r: r.algorithm)
def test_initial_values_do_nothing_and_adapted_equals_folded(recipe: Any) -> None:
    torch.manual_seed(0)
    model = tiny.TinyModel().requires_grad_(False)
    text = tiny.pieces(tiny.code(), 2, torch.Generator().manual_seed(1))
    layers = {
        p: la for p, la in tiny.Student(model).layers().items() if len(la.shape) in recipe.dims
    }
    generator = torch.Generator().manual_seed(2)
    fresh = {p: recipe.fresh(la.shape, generator) for p, la in layers.items()}
    plain = model(text)
    with students.adapted(model, fresh):
        assert torch.allclose(model(text), plain, atol=1e-5)
    assert torch.equal(model(text), plain)
    active = {
        p: making._set_apart(recipe, u, layers[p].weight, generator) for p, u in fresh.items()
    }
    with students.adapted(model, active):
        applied = model(text)
    for path, update in active.items():
        module: Any = model.get_submodule(path)
        module.weight.copy_(update.fold(module.weight))
    assert torch.allclose(applied, model(text), atol=1e-4)
    assert not torch.allclose(applied, plain, atol=1e-2)


def test_made_updates_are_of_the_strength_that_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(s, generator=generator) for name, s in TWO.items()}
    for recipe in making.RECIPES:
        assert making.make(recipe, weights, 0).moved == pytest.approx(0.03, rel=0.3)


# -- The whole of it -------------------------------------------------------------------------------


def test_files_of_the_whole_run(short: None, tmp_path: Path) -> None:
    lines: list[str] = []
    report = quickstart(tmp_path / "q", small=True, tell=lines.append)
    assert report.facts["failed"] == []
    assert [a["algorithm"] for a in report.facts["adapters"]] == list(ALGORITHMS)
    for adapter in report.facts["adapters"]:
        assert adapter["loss_after"] < adapter["loss_before"]
        assert adapter["hops_identical"] and adapter["bytes_back"]
        assert adapter["alpha"] != adapter["rank"]
    assert report.facts["refused"] == "no-hra"
    base = tmp_path / "q" / "model.safetensors"
    assert base.stat().st_size < 1_000_000
    # Every command that was told does again what it did, in the folder it was told for.
    kept = {p.name for p in (tmp_path / "q").iterdir()}
    assert set(report.outputs) == kept
    assert "hra-kohya.safetensors" not in kept
    for name in ALGORITHMS[:3]:
        again = adaptsurgery.verify(
            tmp_path / "q" / name, tmp_path / "q" / f"{name}-back", base=base
        )
        assert again.max_error == 0
    assert sum(line.startswith("$ adaptsurgery convert") for line in lines) == 3 * 3 + 1 + 3 + 3
    found = report.facts["extracted"]
    assert [a["algorithm"] for a in found["adapters"]] == list(ALGORITHMS)
    assert found["after"] < found["before"]
    for adapter in found["adapters"]:
        assert 0 < adapter["error"] < 1 and adapter["parameters"] <= 24_000
        assert adapter["error_merged"] == pytest.approx(adapter["error"], rel=1e-3)
        assert found["after"] < adapter["loss"] < found["before"]
    assert sum(line.startswith("$ adaptsurgery extract") for line in lines) == 4


def test_the_same_seed_gives_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "BASE_STEPS", 4)
    monkeypatch.setattr(tiny.Student, "steps", 3)
    monkeypatch.setattr(run, "STEPS", (run.adapters,))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quickstart(tmp_path / name, small=True, seed=seed)
    files = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")}
        for n in "abc"
    ]
    assert files[0] == files[1] != files[2]


def test_a_temporary_folder_goes_and_the_thread_count_returns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = torch.get_num_threads()
    base = save_model(tmp_path / "m.safetensors", TWO)
    report = quickstart(base=base)
    assert report.facts["failed"] == []
    assert report.outputs == []
    assert torch.get_num_threads() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    def fail(work: run.Work) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "STEPS", (run.adapters, run.around, fail))
    base, folder = save_model(tmp_path / "m.safetensors", TWO), tmp_path / "q"
    if there:
        folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        quickstart(folder, base=base)
    assert folder.exists() == there
    assert not there or list(folder.iterdir()) == []


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(SurgeryError) as caught:
            quickstart(folder)
        assert caught.value.code == "output-exists"
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_does_not_agree_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "_same_files", lambda first, second: False)
    monkeypatch.setattr(run, "AGREE", -1.0)
    lines: list[str] = []
    base = save_model(tmp_path / "m.safetensors", TWO)
    report = quickstart(base=base, tell=lines.append)
    assert any("bytes" in what for what in report.facts["failed"])
    assert any("outputs" in what for what in report.facts["failed"])
    assert "do not agree" in report.verdict
    assert any("DOES NOT AGREE" in line for line in lines)


# -- The real model --------------------------------------------------------------------------------


def test_minilm_is_transformers_own(tmp_path: Path) -> None:
    """The vectors are those of transformers' BERT with mean pooling, padding included."""
    from transformers import AutoModel

    student = minilm.Student.read(real_model() / "model.safetensors")
    ids, mask = minilm.tokens(("a short text", "another, which is a little longer " * 4))
    with torch.no_grad():
        states = AutoModel.from_pretrained(real_model()).eval()(ids, mask).last_hidden_state
        kept = mask[..., None].float()
        wanted = torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)
        assert torch.allclose(student.module(ids, mask), wanted, atol=1e-5)
    student.write(tmp_path / "again.safetensors")
    stored, again = (
        load_file(p) for p in (real_model() / "model.safetensors", tmp_path / "again.safetensors")
    )
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())


def test_minilm_learns_what_it_is_not_measured_on() -> None:
    taught, measured = minilm.pairs(taught=True), minilm.pairs(taught=False)
    assert len(taught) > 1_000 and len(measured) >= minilm.MEASURED
    assert not set(minilm._TAUGHT) & set(minilm._MEASURED)


@pytest.mark.slow
def test_the_steps_on_minilm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Adapters of the real model, merged and taken out again; its extraction is left to a run."""
    monkeypatch.setattr(minilm.Student, "steps", 2)
    monkeypatch.setattr(minilm.Student, "rate", 0.02)  # two steps, but steps that do something
    monkeypatch.setattr(run, "STEPS", (run.adapters, run.around, run.merging))
    report = quickstart(tmp_path / "q")
    assert report.facts["failed"] == []
    assert report.facts["model"]["name"] == minilm.NAME
    assert [a["modules"] for a in report.facts["adapters"]] == [36] * 4
    for adapter in report.facts["adapters"]:
        assert adapter["merged_output"] < 1e-4 and adapter["unmerged"] < 1e-6


# -- A model of the user's -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "code"),
    [("sd15", "base-needed"), ("nothing.safetensors", "no-such-file"), ("small", "no-layers")],
)
def test_bases_that_cannot_be_used(tmp_path: Path, base: str, code: str) -> None:
    path = base
    if base == "small":
        path = str(
            save_model(tmp_path / "m.safetensors", {"a": (8, 8), "b.embed_tokens": (256, 64)})
        )
    elif base != "sd15":
        path = str(tmp_path / base)
    with pytest.raises(SurgeryError) as caught:
        quickstart(tmp_path / "q", base=path)
    assert caught.value.code == code
    assert not (tmp_path / "q").exists()


def test_a_pipeline_gives_its_largest_component(tmp_path: Path) -> None:
    for name, shapes in {"unet": TWO, "text_encoder": {"fc": (64, 64)}}.items():
        (tmp_path / "p" / name).mkdir(parents=True)
        save_model(tmp_path / "p" / name / "model.safetensors", shapes)
        (tmp_path / "p" / name / "config.json").write_text("{}")
    index = {"unet": ["diffusers", "X"], "text_encoder": ["transformers", "Y"]}
    (tmp_path / "p" / "model_index.json").write_text(json.dumps(index))
    report = quickstart(base=tmp_path / "p")
    assert report.facts["failed"] == []
    assert sorted(report.facts["model"]["layers"]) == ["unet.conv.0", "unet.linear"]


def test_conv1d_of_transformers_is_read_the_right_way_round(tmp_path: Path) -> None:
    """GPT-2 stores (i, o): the bias tells; a square weight tells nothing and is left out."""
    tensors = {
        "h.0.c_attn.weight": torch.randn(64, 192), "h.0.c_attn.bias": torch.zeros(192),
        "h.0.c_proj.weight": torch.randn(64, 64), "h.0.c_proj.bias": torch.zeros(64),
        "wte.weight": torch.randn(512, 64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "m.safetensors")
    found = given.look_at(str(tmp_path / "m.safetensors"))
    assert {name: tuple(w.shape) for name, w in found.weights.items()} == {"h.0.c_attn": (192, 64)}
    assert torch.equal(found.weights["h.0.c_attn"], tensors["h.0.c_attn.weight"].t())
    assert quickstart(base=tmp_path / "m.safetensors").facts["failed"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"{n}.weight": torch.randn(s).to(dtype) for n, s in TWO.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    assert quickstart(base=tmp_path / "m.safetensors").facts["failed"] == []


def test_minilm_and_what_peft_makes_of_it(tmp_path: Path) -> None:
    """On the real MiniLM: the real PEFT loads what came back, and computes what fold gives."""
    import peft
    from transformers import AutoModel

    base = real_model() / "model.safetensors"
    report = quickstart(tmp_path / "q", base=base)
    assert report.facts["failed"] == []
    assert len({name.split(".", 3)[-1] for name in report.facts["model"]["layers"]}) > 3
    tokens = torch.arange(1000, 1024).reshape(2, 12)

    def output(model: Any) -> Any:
        with torch.no_grad():
            return model(tokens).last_hidden_state

    def fresh() -> Any:
        return AutoModel.from_pretrained(real_model()).eval()

    plain = output(fresh())
    for name in ALGORITHMS:
        ours = fresh()
        for path, update in adaptsurgery.load(tmp_path / "q" / name, base=base).items():
            module = ours.get_submodule(path)
            module.weight.data = update.fold(module.weight.data)
        wanted = output(ours)
        effect = float((wanted - plain).abs().max())
        assert effect > 1e-2
        forms = [name, "hra-as-lora-back"] if name == "hra" else [f"{name}-back"]
        forms += [f"{name}-as-lora"] if name != "lora" else []
        for form in forms:
            folder = tmp_path / "q" / form
            model = peft.PeftModel.from_pretrained(fresh(), str(folder)).eval()
            held = peft.get_peft_model_state_dict(model)
            file = load_file(folder / "adapter_model.safetensors")
            assert held.keys() == file.keys()
            assert float((output(model) - wanted).abs().max()) < 1e-3 * effect, form


# -- Adapter.from_updates --------------------------------------------------------------------------


def updates() -> dict[str, Any]:
    """An update of every algorithm for a weight (12, 8)."""
    torch.manual_seed(3)
    t = torch.randn
    lora = LoRA(t(12, 3), t(3, 8), scale=0.7)
    full = Full(t(12, 8), t(12), scale=0.5)
    return {
        "lora": lora,
        "loha": LoHa(t(12, 3), t(3, 8), t(12, 3), t(3, 8), scale=0.3),
        "lokr": LoKr(w1=t(3, 2), w2_a=t(4, 2), w2_b=t(2, 4), scale=1.5),
        "lokr-full": LoKr(w1=t(3, 2), w2=t(4, 4), scale=1.5),
        "hra": HRA(t(8, 4)),
        "hra-gs": HRA(t(8, 4), apply_gs=True),
        "full": full,
        "dora": DoRA(lora, t(12, 1).abs()),
        "several": compose([lora, full]),
    }


@pytest.mark.parametrize("name", updates())
def test_from_updates_gives_the_updates_back(name: str) -> None:
    update = updates()[name]
    adapter = Adapter.from_updates({"block.fc": update})
    weight = torch.randn(12, 8, dtype=torch.float64)
    found = adapter["block.fc"].fold(weight)
    assert torch.allclose(found, update.fold(weight), rtol=1e-6, atol=1e-6)
    bias = torch.randn(12, dtype=torch.float64)
    assert torch.allclose(adapter["block.fc"].fold_bias(bias), update.fold_bias(bias), atol=1e-6)


@pytest.mark.parametrize("name", updates())
@pytest.mark.parametrize("layout", ["peft", "kohya", "lycoris"])
def test_from_updates_can_be_saved_or_is_refused_by_name(
    name: str, layout: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "m.safetensors", {"block.fc": (12, 8)})
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    adapter = Adapter.from_updates({"block.fc": updates()[name]}, base=base)
    peft_has_none = layout == "peft" and name in ("full", "several")
    if peft_has_none or (layout != "peft" and name.startswith("hra")):
        with pytest.raises(SurgeryError) as caught:
            adapter.save(out, layout)
        assert caught.value.code in ("no-full", "no-hra")
        return
    adapter.save(out, layout)
    found = adaptsurgery.load(out, base=base)["block.fc"]
    weight = torch.randn(12, 8, dtype=torch.float64)
    assert torch.allclose(found.fold(weight), updates()[name].fold(weight), atol=1e-5)


def test_from_updates_of_a_norm_and_a_convolution(tmp_path: Path) -> None:
    shapes = {"conv": (8, 4, 3, 3), "norm": (8,)}
    base = save_model(tmp_path / "m.safetensors", shapes)
    lora = LoRA(torch.randn(8, 2, 1, 1), torch.randn(2, 4, 3, 3), scale=2.0)
    norm = Norm(torch.randn(8), torch.randn(8))
    adapter = Adapter.from_updates({"conv": lora, "norm": norm}, base=base, metadata={"a": "b"})
    adapter.save(tmp_path / "out.safetensors", "lycoris")
    again = adaptsurgery.load(tmp_path / "out.safetensors", base=base)
    assert again.metadata["a"] == "b"
    x = torch.randn(1, 4, 6, 6)
    layer = Layer("conv2d", torch.randn(8, 4, 3, 3))
    assert torch.equal(again["conv"].apply(x, layer), lora.apply(x, layer))
    assert torch.equal(again["norm"].fold(torch.ones(8)), norm.fold(torch.ones(8)))


def test_from_updates_refuses_what_the_base_does_not_have(tmp_path: Path) -> None:
    base = save_model(tmp_path / "m.safetensors", {"block.fc": (12, 8)})
    lora = updates()["lora"]
    with pytest.raises(SurgeryError) as caught:
        Adapter.from_updates({"block.fd": lora}, base=base)
    assert (caught.value.code, "block.fc" in caught.value.next) == ("unknown-module", True)
    wrong = LoRA(torch.randn(5, 3), torch.randn(3, 8))
    with pytest.raises(SurgeryError) as caught:
        Adapter.from_updates({"block.fc": wrong}, base=base)
    assert caught.value.code == "bad-shape"
    with pytest.raises(SurgeryError) as caught:
        Adapter.from_updates({"block.fc": lora}).save(tmp_path / "out")
    assert caught.value.code == "unknown-layout"
