"""A sum of adapters of three algorithms and layouts, as the real PEFT adds and loads it."""

from __future__ import annotations

from pathlib import Path

import peer_nets as nets
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery import convert
from adaptsurgery.jobs.combining.combine import combine
from adaptsurgery.jobs.merging.merge import merge
from adaptsurgery_formats.errors import SurgeryError


def test_the_real_peft_gives_the_summed_output(tmp_path: Path) -> None:
    """LoRA, LoHa and LoKr of PEFT, LyCORIS and kohya files; weights and outputs of the real peer."""
    model = nets.net(even=True)
    x = nets.inputs(model)
    base = nets.save_base(model, tmp_path / "base.safetensors")
    targets = ["fc_in", "fc_out", "conv_in"]
    configs = [
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False),
        peft.LoHaConfig(r=2, alpha=3, target_modules=targets, init_weights=False),
        peft.LoKrConfig(r=4, alpha=6, target_modules=targets, init_weights=False),
    ]
    sources: list[tuple[Path, float]] = []
    merged = nets.net(even=True)
    for n, (config, weight) in enumerate(zip(configs, (1.0, 0.5, -0.7))):
        folder = tmp_path / f"peft{n}"
        nets.write_peft(model, folder, config, x, seed=n)
        source = folder
        if n:
            source = tmp_path / f"{n}.safetensors"
            convert(folder, source, ("kohya", "lycoris")[n - 1], base=base)
        sources.append((source, weight))
        loaded = peft.PeftModel.from_pretrained(nets.net(even=True), str(folder))
        with_it = dict(loaded.merge_and_unload().named_parameters())
        plain = dict(model.named_parameters())
        for name, p in merged.named_parameters():
            p.data += weight * (with_it[name].data - plain[name].data)
    combine(sources, tmp_path / "out", to="peft", base=base)
    with torch.no_grad():
        assert nets.apart(nets.peft_output(model, tmp_path / "out", x), merged(x)) < nets.TOLERANCE


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 6)
        self.bare = torch.nn.Linear(6, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bare(self.fc(self.table(ids)))


def made(folder: Path, seed: int, *targets: str, **options: object) -> Path:
    """An adapter that PEFT makes for a small net and saves."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), **options)  # type: ignore[arg-type]
    model = peft.get_peft_model(Small(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def output(net: Small, adapter: Path) -> torch.Tensor:
    copied = Small()
    copied.load_state_dict(net.state_dict())
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copied, adapter)(torch.arange(5))


def test_biases_of_lora_b_go_where_peft_takes_them(tmp_path: Path) -> None:
    """Zeros for layers that another adapter has without one, and not beside an embedding's."""
    biased = made(tmp_path / "a", 1, "fc", lora_bias=True)
    plain = made(tmp_path / "b", 2, "fc", init_lora_weights="gaussian")
    other = made(tmp_path / "c", 3, "bare")
    table = made(tmp_path / "d", 4, "table", "fc")
    net = Small()
    with torch.no_grad():
        base = net(torch.arange(5))
    combine([plain, (biased, 0.5)], tmp_path / "ab")
    wanted = output(net, plain) + 0.5 * (output(net, biased) - base)
    torch.testing.assert_close(output(net, tmp_path / "ab"), wanted, atol=1e-5, rtol=1e-5)
    report = combine([biased, other], tmp_path / "ac")
    assert [(n.code, n.where) for n in report.notes] == [("lora-bias", "bare")]
    wanted = output(net, tmp_path / "ac")
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "ac", tmp_path / "merged.safetensors")
    net.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(net(torch.arange(5)), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(SurgeryError, match="no-lora-bias"):
        combine([biased, table], tmp_path / "ad")
    assert not (tmp_path / "ad").exists()
