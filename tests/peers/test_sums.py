"""A sum of adapters of three algorithms and layouts, as the real PEFT adds and loads it."""

from __future__ import annotations

from pathlib import Path

import nets
import peft
import torch

from adaptsurgery import convert
from adaptsurgery.jobs.combining.combine import combine


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
