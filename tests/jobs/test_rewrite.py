"""The rewrite job and its command: .pt2 in, .pt2 and ONNX out, whole or not at all."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import adaptsurgery
from adaptsurgery import Adapter, SurgeryError, graph
from adaptsurgery.algorithms import HRA, LoRA
from adaptsurgery.cli import run
from adaptsurgery.jobs.rewrite import rewrite


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"fc_in": nn.Linear(6, 8), "fc_out": nn.Linear(8, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["fc_out"](self.body["fc_in"](x).relu())


X = torch.linspace(-1, 1, 30).reshape(5, 6)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(Net().eval(), (X[:2],), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    updates = {
        "body.fc_in": LoRA(torch.randn(8, 2, generator=generator), torch.randn(2, 6, generator=generator), scale=1.5),
    }  # fmt: skip
    Adapter.from_updates(updates).save(tmp_path / "lora.safetensors", "kohya")
    return tmp_path / "lora.safetensors"


def output(path: Path) -> Tensor:
    return torch.export.load(path).module()(X).detach()


def config_file(tmp_path: Path, **said: Any) -> Path:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "HRA", "r": 2, **said}))
    return path


def test_an_adapter_of_flat_names_is_looked_up_in_the_program(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    report = rewrite(model, tmp_path / "out.pt2", adapter=adapter)
    assert [row.module for row in report.rows] == ["body.fc_in"]
    assert report.facts["parameters"]["adapter"] == 28
    program = torch.export.load(tmp_path / "out.pt2")
    assert graph.adapters(program) == ["default"]
    merged = tmp_path / "merged.pt2"
    rewrite(model, merged, adapter=adapter, merge=True)
    assert graph.adapters(torch.export.load(merged)) == []
    torch.testing.assert_close(output(merged), output(tmp_path / "out.pt2"))
    assert not torch.allclose(output(merged), output(model), atol=1e-2)
    back = graph.detach(program)
    assert torch.equal(back.module()(X), torch.export.load(model).module()(X))


def test_a_config_makes_a_new_adapter_by_its_seed(model: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, target_modules=["fc_out"], init_weights=False)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        rewrite(model, tmp_path / f"{name}.pt2", config=config, seed=seed)
    states = [
        graph.adapter_state(torch.export.load(tmp_path / f"{n}.pt2"))["body.fc_out"] for n in "abc"
    ]
    a, b, c = [s.u for s in states if isinstance(s, HRA)]
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_second_adapter_beside_the_first(model: Path, adapter: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.pt2", tmp_path / "two.pt2"
    rewrite(model, one, adapter=adapter)
    config = config_file(tmp_path, target_modules=["fc_in", "fc_out"], init_weights=False)
    report = rewrite(one, two, config=config, name="second", seed=1)
    assert [row.module for row in report.rows] == ["body.fc_in", "body.fc_out"]
    program = torch.export.load(two)
    assert graph.adapters(program) == ["default", "second"]
    assert not torch.allclose(output(two), output(one), atol=1e-3)
    assert torch.equal(graph.detach(program, "second").module()(X), output(one))


def test_onnx_beside_it(model: Path, adapter: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    onnx = tmp_path / "out.onnx"
    report = rewrite(model, tmp_path / "out.pt2", adapter=adapter, onnx=onnx)
    assert report.outputs == [str(tmp_path / "out.pt2"), str(onnx)]
    session = runtime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(got), output(tmp_path / "out.pt2"), atol=1e-5, rtol=0
    )


def test_onnx_alone(model: Path, adapter: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    before = {p.name for p in tmp_path.iterdir()}
    report = rewrite(model, adapter=adapter, onnx=tmp_path / "out.onnx")
    assert {p.name for p in tmp_path.iterdir()} - before == {"out.onnx"}
    assert report.outputs == [str(tmp_path / "out.onnx")]
    assert report.facts["bytes"] == (tmp_path / "out.onnx").stat().st_size
    rewrite(model, tmp_path / "out.pt2", adapter=adapter)
    session = runtime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    want = output(tmp_path / "out.pt2")
    torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=0)


def test_no_output_is_said_clearly(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    words = ["rewrite", str(model), "--adapter", str(adapter)]
    assert run(words) == 1
    said = capsys.readouterr().err
    assert "nothing-to-write" in said and all(o in said for o in ("-o", "--onnx", "--table"))
    assert run([*words, "--table"]) == 0
    said = capsys.readouterr().out
    assert "body.fc_in" in said and "nothing written: no -o, no --onnx" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("option", "name"), [("out", "a.onnx"), ("onnx", "a.pt2")])
def test_an_output_whose_ending_is_the_others(
    option: str, name: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {option: tmp_path / name}
    with pytest.raises(SurgeryError) as caught:
        rewrite(model, adapter=adapter, **given)
    assert caught.value.code == "other-ending" and not (tmp_path / name).exists()


def test_no_input_is_replaced(model: Path, adapter: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path)
    for what in ({"adapter": adapter}, {"config": config}):
        (path,) = what.values()
        data = path.read_bytes()
        for option in ("out", "onnx"):
            with pytest.raises(SurgeryError) as caught:
                rewrite(model, **{option: path}, overwrite=True, **what)  # type: ignore[arg-type]
            assert caught.value.code == "output-is-input" and path.read_bytes() == data


def test_a_field_that_is_not_known_is_named(
    model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    said = {"target_module": ["x"], "lora_alpha": 4, "megatron_core": "mine"}
    config = config_file(tmp_path, target_modules=["fc_out"], **said)
    report = rewrite(model, config=config, dry_run=True)
    notes = {n.text.split("`")[1]: n for n in report.notes if n.code == "unknown-field"}
    assert notes.keys() == said.keys()
    assert all(note.where == str(config) for note in notes.values())
    assert "`target_modules`" in notes["target_module"].text
    assert not [w for w in recwarn if "kept, but" in str(w.message)]  # said once


def test_the_command(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["rewrite", str(model), "--table"]) == 0
    table = capsys.readouterr().out
    assert "body.fc_in   linear  8×6" in table and "2 layers" in table
    words = ["rewrite", str(model), "--adapter", str(adapter), "-o", str(tmp_path / "o.pt2")]
    assert run([*words, "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "o.pt2").exists()
    assert run([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] and said["facts"]["sites"][0]["path"] == "body.fc_in"
    assert run(words) == 1
    assert "output-exists" in capsys.readouterr().err
    assert run([*words, "--overwrite", "--quiet"]) == 0
    assert run(["rewrite", str(model), "-o", "x.pt2"]) == 1
    assert "config-or-adapter" in capsys.readouterr().err


def changed(model: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The archive with its graph's description changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if "/models/" in name and name.endswith(".json"):
                said = json.loads(data)
                change(said)
                data = json.dumps(said).encode()
            new.writestr(name, data)
    return out.getvalue()


def newer(said: dict[str, Any]) -> None:
    said["schema_version"]["major"] += 1


def without_nodes(said: dict[str, Any]) -> None:
    del said["graph_module"]


BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "truncated": (lambda m: m.read_bytes()[: m.stat().st_size // 2], "truncated"),
    "of a few bytes": (lambda m: m.read_bytes()[:40], "truncated"),
    "newer": (lambda m: changed(m, newer), "newer-schema"),
    "incomplete": (lambda m: changed(m, without_nodes), "not-a-program"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_programs_that_cannot_be_read(
    kind: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    make, code = BROKEN[kind]
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(make(model))
    with pytest.raises(SurgeryError) as caught:
        rewrite(bad, tmp_path / "out.pt2", adapter=adapter)
    assert caught.value.code == code and caught.value.next and str(bad) in caught.value.where
    assert not (tmp_path / "out.pt2").exists()


def of_torch(save: Callable[[io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    save(out)
    return out.getvalue()


OTHERS: dict[str, Callable[[], bytes]] = {
    "an empty file": lambda: b"",
    "a safetensors file": lambda: safetensors.torch.save({"a": X}),
    "a pickle": lambda: of_torch(
        lambda f: torch.save({"a": X}, f, _use_new_zipfile_serialization=False)
    ),
    "a checkpoint of torch.save": lambda: of_torch(lambda f: torch.save({"a": X}, f)),
    "JSON": lambda: b'{"peft_type": "HRA"}',
    "a file that begins with b'Hello": lambda: b"Hello",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_program_is_called_what_it_is(kind: str, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(OTHERS[kind]())
    with pytest.raises(SurgeryError) as caught:
        rewrite(tmp_path / "bad.pt2", tmp_path / "out.pt2", adapter=adapter)
    assert caught.value.code == "not-a-program" and caught.value.seen.startswith(kind)
    assert "torch.export.save" in caught.value.next


def test_onnx_is_no_program(model: Path, adapter: Path, tmp_path: Path) -> None:
    rewrite(model, adapter=adapter, onnx=tmp_path / "a.onnx")
    with pytest.raises(SurgeryError) as caught:
        rewrite(tmp_path / "a.onnx")
    assert caught.value.code == "not-a-program" and caught.value.seen == "an ONNX file"


class Named(nn.Module):
    """What transformers' models do: an object of a class of their own comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return BaseModelOutput(last_hidden_state=self.fc(x))


def test_a_class_that_is_not_imported_is_named_with_the_remedy(tmp_path: Path) -> None:
    program = torch.export.export(Named().eval(), (X,))
    torch.export.save(program, tmp_path / "m.pt2")
    report = rewrite(tmp_path / "m.pt2")  # its class is imported here
    assert [site["path"] for site in report.facts["sites"]] == ["fc"]
    words = [sys.executable, "-m", "adaptsurgery", "rewrite", str(tmp_path / "m.pt2"), "--table"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "error[unknown-class]" in done.stderr
    assert "transformers.modeling_outputs.BaseModelOutput" in done.stderr
    assert "by a subclass" in done.stderr and "Traceback" not in done.stderr


def test_nothing_is_written_where_something_is_wrong(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "out.pt2", sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SurgeryError, match=r"no such file|is not there"):
        rewrite(tmp_path / "none.pt2", out, adapter=adapter)
    with pytest.raises(SurgeryError) as caught:
        rewrite(model, out, config=config_file(tmp_path, target_modules=["nowhere"]))
    assert caught.value.code == "no-targets"
    with pytest.raises(SurgeryError) as caught:
        rewrite(model, model, adapter=adapter, overwrite=True)
    assert caught.value.code == "output-is-input"

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the exporter fell over")

    monkeypatch.setattr("adaptsurgery.graph.onnx.export_onnx", fail)
    with pytest.raises(RuntimeError):
        rewrite(model, out, adapter=adapter, onnx=tmp_path / "out.onnx")
    (tmp_path / "adapter_config.json").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "options", [{"merge": True}, {"mode": "weight"}, {"name": "x"}, {"base": "b"}, {"seed": 1}]
)
def test_an_option_without_effect_is_refused(
    options: dict[str, Any], model: Path, adapter: Path, tmp_path: Path
) -> None:
    cases: list[dict[str, Any]] = [{}]
    cases += [{"adapter": adapter}] if "seed" in options else []
    cases += [{"config": config_file(tmp_path)}] if "base" in options else []
    for what in cases:
        with pytest.raises(SurgeryError, match="without effect") as caught:
            rewrite(model, tmp_path / "out.pt2" if what else None, **what, **options)
        assert caught.value.code == "no-effect"


def test_it_is_the_librarys() -> None:
    assert adaptsurgery.rewrite is rewrite
