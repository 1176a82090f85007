"""(IA)³ of the real PEFT and the real LyCORIS: merged, folded, live, in a graph, and back."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptsurgery
from adaptsurgery import PeftModel
from adaptsurgery.algorithms import IA3
from adaptsurgery.graph.attach import attach
from adaptsurgery.graph.merge import merge as merge_graph
from adaptsurgery_formats.errors import SurgeryError

warnings.filterwarnings("ignore", module="peft")
TARGETS, INWARD = ["fc", "out", "conv", "wide", "c_fc"], ["out", "wide"]


class Net(nn.Module):
    """Linears and convolutions with a bias and without, and transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.wide = nn.Conv2d(6, 4, (3, 1), bias=False)
        self.fc = nn.Linear(4, 10)
        self.c_fc = Conv1D(14, 10)
        self.out = nn.Linear(14, 5)
        self.bare = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.wide(torch.tanh(self.conv(x)))).flatten(2).transpose(1, 2)
        return self.bare(self.out(torch.tanh(self.c_fc(torch.tanh(self.fc(y))))))


def seen() -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(5))


class Made:
    """A base on disk, PEFT's adapter of it, and what PEFT merges."""

    def __init__(self, folder: Path, **said: Any) -> None:
        torch.manual_seed(0)
        self.net = Net().eval()
        self.base, self.path = folder / "base.safetensors", folder / "adapter"
        save_file(self.net.state_dict(), self.base)
        said = {"target_modules": TARGETS, "feedforward_modules": INWARD, **said}
        config = peft.IA3Config(**said, init_ia3_weights=False)
        self.peer = peft.get_peft_model(copy.deepcopy(self.net), config).eval()
        self.peer.save_pretrained(self.path)
        with torch.no_grad():
            self.wanted = self.peer(seen())
        self.merged = copy.deepcopy(self.peer).merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("ia3"))


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=atol, msg=name)


def refused(code: str, attempt: Callable[[], object]) -> None:
    with pytest.raises(SurgeryError) as raised:
        attempt()
    assert raised.value.code == code, raised.value


def test_merge_is_peft_s_and_comes_out_again(made: Made, tmp_path: Path) -> None:
    out, back = tmp_path / "m.safetensors", tmp_path / "b.safetensors"
    adaptsurgery.merge(made.base, [made.path], out)
    close(load_file(out), made.merged)
    adaptsurgery.verify_merge(out, made.base, [made.path])
    adaptsurgery.unmerge(out, [made.path], back)
    close(load_file(back), made.net.state_dict(), 2e-6)


def test_half_of_it_is_half_the_way(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    adaptsurgery.merge(made.base, [(made.path, 0.5)], out)
    base = made.net.state_dict()
    close(load_file(out), {n: (base[n] + t) / 2 for n, t in made.merged.items()})


def test_two_scale_one_after_the_other(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "twice.safetensors"
    adaptsurgery.merge(made.base, [made.path, made.path], out)
    base = made.net.state_dict()
    twice = {n: torch.where(base[n] == 0, 0, t * (t / base[n])) for n, t in made.merged.items()}
    close(load_file(out), twice, 1e-5)


def test_inspect_and_the_way_round(made: Made, tmp_path: Path) -> None:
    told = adaptsurgery.inspect(made.path, base=made.base)
    assert told.algorithms == {"ia3": 5} and not told.ranks
    assert {n: row["how"] for n, row in told.convertible.items()} == {
        "peft": "exact", "lycoris": "refused", "kohya": "refused",
    }  # fmt: skip
    again = tmp_path / "again"
    adaptsurgery.convert(made.path, again, "peft", base=made.base)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert load_file(again / names[0]).keys() == load_file(made.path / names[0]).keys()
    ours, theirs = (json.loads((p / names[1]).read_text()) for p in (again, made.path))
    assert ours == theirs
    report = adaptsurgery.verify(made.path, again, base=made.base)
    assert {row.change for row in report.rows} == {"identical"}
    out = tmp_path / "x.safetensors"
    for layout in ("lycoris", "kohya"):
        refused(
            "other-ia3", lambda to=layout: adaptsurgery.convert(made.path, out, to, base=made.base)
        )  # type: ignore[misc]
    refused("no-lora-form", lambda: adaptsurgery.convert(
        made.path, tmp_path / "lora", "peft", base=made.base, algorithm="lora"))  # fmt: skip
    refused(
        "no-sum",
        lambda: adaptsurgery.combine([made.path, made.path], tmp_path / "s", base=made.base),
    )
    refused(
        "no-sum", lambda: adaptsurgery.combine([(made.path, 0.5)], tmp_path / "s", base=made.base)
    )
    adaptsurgery.combine([made.path], tmp_path / "alone", base=made.base)
    kept = load_file(tmp_path / "alone" / names[0])
    assert all(torch.equal(t, kept[n]) for n, t in load_file(made.path / names[0]).items())


def test_a_config_is_written_anew_from_updates(made: Made, tmp_path: Path) -> None:
    """Of vectors, on either side, and PEFT loads what is saved."""
    torch.manual_seed(1)
    updates = {"fc": IA3(l=torch.randn(10)), "out": IA3(l=torch.randn(14), on_input=True)}
    path = tmp_path / "new"
    adaptsurgery.Adapter.from_updates(updates, base=made.base).save(path, "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(made.net), path).eval()
    live = copy.deepcopy(made.net)
    adaptsurgery.fold(live, updates)
    with torch.no_grad():
        torch.testing.assert_close(live(seen()), theirs(seen()), rtol=1e-5, atol=1e-6)


def test_live_models(made: Made, tmp_path: Path) -> None:
    live = PeftModel.from_pretrained(copy.deepcopy(made.net), made.path).eval()
    with torch.no_grad():
        torch.testing.assert_close(live(seen()), made.wanted, rtol=1e-5, atol=1e-6)
    live.save_pretrained(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(made.net), tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(seen()), made.wanted, rtol=1e-5, atol=1e-6)
    live.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(live(seen()), made.wanted, rtol=1e-5, atol=1e-6)
    live.unmerge_adapter()
    close(live.unload().state_dict(), made.net.state_dict())


def test_a_new_one_trains_as_peft_s_does(made: Made) -> None:
    said = {"target_modules": TARGETS, "feedforward_modules": INWARD}
    ours = adaptsurgery.get_peft_model(copy.deepcopy(made.net), adaptsurgery.IA3Config(**said))
    theirs = peft.get_peft_model(copy.deepcopy(made.net), peft.IA3Config(**said))
    assert type(ours.base_model).__name__ == "IA3Model"
    grads = []
    for model in (ours, theirs):
        model(seen()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 5
    close(*grads, atol=1e-4)  # type: ignore[arg-type]
    refused("bad-config", lambda: adaptsurgery.IA3Config(target_modules=["fc"]))
    refused("bad-config", lambda: adaptsurgery.IA3Config(**said, layers_to_transform=[0]))
    own = set(peft.IA3Config().to_dict())
    assert set(ours.peft_config["default"].to_dict()) == own


def test_a_graph(made: Made) -> None:
    adapter = adaptsurgery.load(made.path, base=made.base)
    graph = torch.fx.symbolic_trace(made.net)
    adapted = attach(graph, adapter)
    for each in (adapted, merge_graph(adapted)):
        with torch.no_grad():
            torch.testing.assert_close(each(seen()), made.wanted, rtol=1e-5, atol=1e-6)


def test_fold_and_unfold(made: Made) -> None:
    live = copy.deepcopy(made.net)
    adaptsurgery.fold(live, adaptsurgery.load(made.path, base=made.base))
    close(live.state_dict(), made.merged)
    adaptsurgery.unfold(live, adaptsurgery.load(made.path, base=made.base))
    close(live.state_dict(), made.net.state_dict(), 2e-6)


def test_what_peft_would_read_otherwise_is_refused(made: Made, tmp_path: Path) -> None:
    config = json.loads((made.path / "adapter_config.json").read_text())
    tensors = load_file(made.path / "adapter_model.safetensors")

    def written(name: str, changed: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        return folder

    sides = written("sides", {"feedforward_modules": ["fc"]})
    refused("config-disagrees", lambda: adaptsurgery.load(sides, base=made.base))
    for n, wrong in enumerate((None, 3, [1], {"a": 1})):
        path = written(f"wrong{n}", {"feedforward_modules": wrong})
        refused("bad-config", lambda path=path: adaptsurgery.load(path, base=made.base))  # type: ignore[misc]
    regex = written("regex", {"feedforward_modules": "out|wide"})
    adaptsurgery.verify(regex, made.path, base=made.base)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lycoris(on_input: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """It scales the weight alone: a bias stays."""
    torch.manual_seed(0)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.conv(x)).flatten(2).transpose(1, 2))

    net, base = Plain().eval(), tmp_path / "base.safetensors"
    save_file(net.state_dict(), base)
    inward = {key: {"algo": "ia3", "train_on_input": on_input} for key in ("fc", "conv")}
    preset = {"target_module": ["Linear", "Conv2d"], "target_name": [], "name_algo_map": inward}
    LycorisNetwork.apply_preset(preset)
    peer_net = copy.deepcopy(net)
    peer = create_lycoris(peer_net, 1.0, algo="ia3")
    LycorisNetwork.apply_preset({"name_algo_map": {}})
    assert {bool(module.on_input) for module in peer.loras} == {on_input}
    peer.apply_to()
    for module in peer.loras:
        nn.init.normal_(module.weight, 0, 0.3)
        module.weight.data = module.weight.data.to(dtype).float()
    path = tmp_path / "ia3.safetensors"
    peer.save_weights(path, dtype, {})
    with torch.no_grad():
        wanted = peer_net.eval()(seen())
    told = adaptsurgery.inspect(path, base=base)
    assert told.algorithms == {"ia3": 2} and told.layout["name"] == "lycoris"
    out, live = tmp_path / "m.safetensors", copy.deepcopy(net)
    adaptsurgery.merge(base, [path], out)
    live.load_state_dict(load_file(out))
    folded = copy.deepcopy(net)
    adaptsurgery.fold(folded, adaptsurgery.load(path, base=base))
    for each in (live, folded):
        with torch.no_grad():
            torch.testing.assert_close(each(seen()), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(each.fc.bias, net.fc.bias)
    again, kohya = tmp_path / "again.safetensors", tmp_path / "k.safetensors"
    adaptsurgery.convert(path, again, "lycoris", base=base)
    held, kept = load_file(path), load_file(again)
    assert held.keys() == kept.keys()
    assert all(torch.equal(t, kept[n]) and t.dtype == kept[n].dtype for n, t in held.items())
    adaptsurgery.convert(path, kohya, "kohya", base=base)
    assert adaptsurgery.verify(path, kohya, base=base).max_error == 0
    refused("other-ia3", lambda: adaptsurgery.convert(path, tmp_path / "p", "peft", base=base))
    adaptsurgery.unmerge(out, [path], tmp_path / "b.safetensors")
    close(load_file(tmp_path / "b.safetensors"), net.state_dict(), 2e-6)
