"""Extracted adapters and the real PEFT and LyCORIS: their fine-tunes are found, our files load there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peer_nets as nets
import peft
import pytest
import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from peft import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptsurgery

pytestmark = pytest.mark.slow
LAYERS = ["conv_in", "point", "fc_in", "fc_out"]
LINEAR = ["fc_in", "fc_out"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(target_modules=LAYERS, r=3, lora_alpha=5),
    "loha": LoHaConfig(target_modules=LAYERS, r=3, alpha=5),
    "lokr": LoKrConfig(target_modules=LAYERS, r=4, alpha=6, decompose_factor=8),
    "lokr-both": LoKrConfig(target_modules=LAYERS, r=3, alpha=6, decompose_factor=8, decompose_both=True),
    "lokr-full": LoKrConfig(target_modules=LAYERS, r=128, alpha=64, decompose_factor=4),
    "hra": HRAConfig(target_modules=LINEAR, r=4),
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "lora": {"rank": 3},
    "loha": {"rank": 3},
    "lokr": {"rank": 4, "factor": 8},
    "lokr-both": {"rank": 3, "factor": 8, "decompose_both": True},
    "lokr-full": {"rank": 128, "factor": 4},
    "hra": {"rank": 4},
}


class Block(nn.Module):
    """Layers of some hundred channels, where a LoHa's factors are found in nearly every case."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.point = nn.Conv2d(64, 256, 3), nn.Conv2d(256, 192, 1)
        self.fc_in, self.fc_out = nn.Linear(192, 256), nn.Linear(256, 256)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nets.Net(Block()).double()


def save(path: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    save_file({k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}, path)
    return path


def recovered(base: Path, tuned: Path, out: Path, algorithm: str, **options: Any) -> None:
    """An extraction whose merge gives the fine-tune back: to float32's rounding of W' and of D's factors."""
    report = adaptsurgery.extract(base, tuned, out, algorithm=algorithm, **options)
    merged = out.with_name("merged.safetensors")
    adaptsurgery.merge(base, out, merged)
    before, wanted, got = load_file(base), load_file(tuned), load_file(merged)
    moved = [k for k in wanted if not torch.equal(wanted[k], before[k])]
    assert len(moved) == report.facts["modules"] >= 2
    for key in moved:
        eps = torch.finfo(wanted[key].dtype).eps
        off = float((got[key].double() - wanted[key].double()).norm())
        change = (wanted[key].double() - before[key].double()).norm()
        assert float(change) > 0.02 * float(before[key].double().norm()), "hardly a change"
        assert off <= eps * float(wanted[key].double().norm()) + 2e-6 * float(change), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fine_tune_of_pefts_is_recovered(tmp_path: Path, name: str) -> None:
    model = wide()
    config = copy.deepcopy(CONFIGS[name])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    marks = ("lora_", "hada_", "lokr_", "hra_")
    own = {n: p for n, p in adapted.named_parameters() if any(m in n for m in marks)}
    nets._randomise(own, torch.float32, 1)
    base = save(tmp_path / "base.safetensors", model)
    tuned = save(tmp_path / "tuned.safetensors", adapted.merge_and_unload())
    algorithm = name.partition("-")[0]
    recovered(base, tuned, tmp_path / "out", algorithm, **OPTIONS[name])


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_a_fine_tune_of_lycoris_is_recovered(tmp_path: Path, algo: str) -> None:
    """Merged by LyCORIS with alpha = rank, the one case in which its own merge is right."""
    model = wide()
    base = save(tmp_path / "base.safetensors", model)
    nets.LycorisNetwork.apply_preset({"target_module": ["Block"], "enable_conv": True})
    network = create_lycoris(
        model, 1.0, linear_dim=4, linear_alpha=4, conv_dim=4, conv_alpha=4, algo=algo, factor=8,
        preset=nets._empty_preset(tmp_path / "empty"),
    )  # fmt: skip
    network.double()
    network.apply_to()
    nets._randomise(dict(network.named_parameters()), torch.float32, 2)
    network.restore()
    network.merge_to()
    tuned = save(tmp_path / "tuned.safetensors", model)
    more = {"factor": 8} if algo == "lokr" else {}
    recovered(base, tuned, tmp_path / "out.safetensors", algo, rank=4, to="lycoris", **more)


def fine_tuned(tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """A change of full rank on every weight, which no adapter gives exactly."""
    model = nets.net(even=True, conv1d=False)
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(3)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=random).double()
        parameter.data += 0.2 * float(parameter.std()) * noise
    return model, save(tmp_path / "b.safetensors", model), save(tmp_path / "t.safetensors", other)


def folded_output(model: nn.Module, base: Path, adapter: Path, x: Tensor) -> Tensor:
    """The output with D̂ in the weights, folded here in float64."""
    folded = copy.deepcopy(model)
    adaptsurgery.fold(folded, adaptsurgery.load(adapter, base=base))
    out: Tensor = folded(x).detach()
    return out


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra"])
def test_peft_loads_it_and_gives_our_change(tmp_path: Path, algorithm: str) -> None:
    model, base, tuned = fine_tuned(tmp_path)
    more = {} if algorithm != "hra" else {"include": LINEAR}
    report = adaptsurgery.extract(
        base, tuned, tmp_path / "out", algorithm=algorithm, budget=20_000, dense=False, **more
    )
    assert 0.05 < report.facts["layers_error"] < 1
    x = nets.inputs(model)
    plain = model(x).detach()
    wanted = folded_output(model, base, tmp_path / "out", x) - plain
    got = nets.peft_output(model, tmp_path / "out", x) - plain
    assert nets.apart(got, wanted) < (1e-5 if algorithm == "hra" else 1e-6)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "auto"])
def test_lycoris_loads_it_and_gives_our_change(tmp_path: Path, algorithm: str) -> None:
    model, base, tuned = fine_tuned(tmp_path)
    out = tmp_path / "out.safetensors"
    adaptsurgery.extract(
        base, tuned, out, algorithm=algorithm, budget=20_000, dense=False, to="lycoris"
    )
    x = nets.inputs(model)
    plain = model(x).detach()
    wanted = folded_output(model, base, out, x) - plain
    got = nets.lycoris_output(model, out, x) - plain
    assert nets.apart(got, wanted) < 1e-6


class Small(nn.Module):
    """A linear, a norm, an embedding, and a head, all with what adapters do not cover."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 16)
        self.fc_in, self.fc_out = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.score = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.fc_out(torch.tanh(self.fc_in(self.embed_tokens(ids))))
        out: Tensor = self.score(self.norm(hidden))
        return out


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra"])
def test_peft_loads_what_goes_beside_the_adapter(tmp_path: Path, algorithm: str) -> None:
    """Biases, norms, embeddings and heads arrive with the adapter: the fine-tune's own outputs."""
    torch.manual_seed(0)
    model = Small().double()
    tuned = copy.deepcopy(model)
    for name, parameter in tuned.named_parameters():
        if name not in ("fc_in.weight", "fc_out.weight"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    change = {"lora": adaptsurgery.algorithms.LoRA, "loha": adaptsurgery.algorithms.LoHa}
    for layer in (tuned.fc_in, tuned.fc_out):
        o, i = layer.weight.shape
        if algorithm == "hra":
            update: Any = adaptsurgery.algorithms.HRA(torch.randn(i, 2).double())
        elif algorithm == "lokr":
            update = adaptsurgery.algorithms.LoKr(
                w1=torch.randn(4, 4).double(), w2=torch.randn(o // 4, i // 4).double()
            )
        else:
            shapes = [(o, 1), (1, i)] * (2 if algorithm == "loha" else 1)
            update = change[algorithm](*(torch.randn(s).double() for s in shapes))
        layer.weight.data = update.fold(layer.weight.data)
    base, path = save(tmp_path / "b.safetensors", model), save(tmp_path / "t.safetensors", tuned)
    goal = {"rank": 12, "factor": 4} if algorithm == "lokr" else {"rank": 2 if algorithm == "hra" else 1}  # fmt: skip
    report = adaptsurgery.extract(base, path, tmp_path / "out", algorithm=algorithm, **goal)
    assert report.facts["error"] < 1e-5 and not report.facts["left_out"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
    ids = torch.arange(20)[None]
    plain, wanted = model(ids), tuned(ids)
    assert nets.apart(loaded(ids) - plain, wanted - plain) < 1e-4


class Beside(nn.Module):
    """An embedding, a layer with a bias, and norms with and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 12)
        self.layer = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(10)
        self.scale = nn.RMSNorm(10)


@pytest.mark.parametrize(
    "moved", ["embed.weight", "scale.weight", "layer.bias", "norm.bias", "norm.weight"]
)
def test_what_lycoris_own_loader_makes_of_dense_differences(tmp_path: Path, moved: str) -> None:
    """It refuses a file with an embedding's or an RMSNorm's, ignores a bias's; each is noted."""
    torch.manual_seed(0)
    model = Beside()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = {k: v.clone() for k, v in base.items()}
    for key in ("layer.weight", moved):
        tuned[key] += 0.1 * torch.randn(tuned[key].shape)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    file = tmp_path / "out.safetensors"
    report = adaptsurgery.extract(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", file, rank=10, to="lycoris"
    )
    noted = " ".join(n.text for n in report.notes if n.code == "lycoris-loader")
    assert ("refuses" in noted) == (moved in ("embed.weight", "scale.weight"))
    assert ("1 biases out" in noted) == (moved == "layer.bias")
    if "refuses" in noted:
        assert moved in noted
        with pytest.raises((ValueError, AttributeError)):
            create_lycoris_from_weights(1.0, str(file), model)
        return
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    network.merge_to(1.0)
    found = model.state_dict()
    torch.testing.assert_close(found["layer.weight"], tuned["layer.weight"], rtol=1e-5, atol=1e-5)
    kept = base if moved == "layer.bias" else tuned
    torch.testing.assert_close(found[moved], kept[moved], rtol=1e-5, atol=1e-5)
