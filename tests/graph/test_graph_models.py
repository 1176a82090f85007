"""The acceptance: on every model of the zoo a graph with adapters is the live model with the same ones.

The live side is `Update.apply` in the layer's own forward, adaptsurgery's live models, and PEFT's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn

import adaptsurgery
from adaptsurgery import graph
from adaptsurgery.algorithms.hra import HRAConfig
from adaptsurgery.algorithms.loha import LoHaConfig
from adaptsurgery.algorithms.lokr import LoKrConfig
from adaptsurgery.algorithms.lora_config import LoraConfig
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update
from adaptsurgery.graph import Site

pytestmark = pytest.mark.slow
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, lora_alpha=3),
    "loha": LoHaConfig(r=2, alpha=3),
    "lokr": LoKrConfig(r=2, alpha=3, decompose_both=True),
    "hra": HRAConfig(r=4),
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Linears that no one calls: nn.MultiheadAttention takes their weights.
FUNCTIONS = {"attn.out_proj", "encoder.layers.0.self_attn.out_proj"}
FEW = 10  # sites at most, spread over the model: a UNet has 80 of the same kinds


def spread(sites: list[Site]) -> list[Site]:
    """At most FEW sites, from the first to the last."""
    step = max(1, -(-len(sites) // FEW))
    return sites[::step]


def random_update(site: Site, config: Any, seed: int) -> Update:
    """A new adapter for a site with numbers of some weight in all of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    alpha = getattr(config, "lora_alpha", getattr(config, "alpha", None))
    update: Any = config.fresh(
        site.shape, rank=config.r, alpha=alpha, kind=site.kind, generator=generator
    )
    values = {
        slot: torch.randn(tensor.shape, generator=generator) * 0.4
        for slot, tensor in update.tensors().items()
    } if hasattr(update, "tensors") else {"u": torch.randn(update.u.shape, generator=generator)}  # fmt: skip
    changed: Update = replace(update, **values)
    return changed


def updates_for(sites: list[Site], algorithm: str) -> dict[str, Update]:
    config = CONFIGS[algorithm]
    return {site.path: random_update(site, config, n) for n, site in enumerate(sites)}


def outputs(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return zoo.first(model(**inputs))


def live(model: nn.Module, sites: list[Site], updates: dict[str, Update]) -> nn.Module:
    """A copy with updates: in a layer's forward, or folded into a parameter of a larger module."""
    model = copy.deepcopy(model)  # a program shares its tensors with its model
    modules = dict(model.named_modules())
    for site in sites:
        module, update = modules[site.path], updates[site.path]
        called = isinstance(module, LAYERS) or type(module).__name__ == "Conv1D"
        if called and site.path not in FUNCTIONS:
            module.register_forward_hook(_applied(update))
        else:
            owner, _, name = site.weight.rpartition(".")
            parameter = modules[owner].get_parameter(name)
            parameter.data = update.fold(parameter.data)
    return model


def _applied(update: Update) -> Callable[..., Tensor]:
    def hook(module: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return update.apply(given[0], Layer.from_module(module), "factored")

    return hook


def assert_same(got: Tensor, wanted: Tensor) -> None:
    size = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got, wanted, atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("algorithm", CONFIGS)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_graph_with_adapters_is_the_live_model(name: str, algorithm: str) -> None:
    found, program = zoo.entry(name), zoo.program(name)
    sites = spread([site for site in graph.find_sites(program) if site.adaptable])
    updates = updates_for(sites, algorithm)
    adapted = graph.attach(program, updates).module()
    wanted = live(found.model, sites, updates)
    for inputs in (found.inputs, found.other):
        assert_same(outputs(adapted, inputs), outputs(wanted, inputs))
    moved = outputs(wanted, found.inputs) - outputs(found.model, found.inputs)
    assert moved.abs().max() > 1e-3, "the adapters do nothing"


@pytest.mark.parametrize("algorithm", CONFIGS)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_merged_graph_is_the_merged_model(name: str, algorithm: str) -> None:
    found, program = zoo.entry(name), zoo.program(name)
    sites = spread([site for site in graph.find_sites(program) if site.adaptable and site.weight])
    updates = updates_for(sites, algorithm)
    merged = graph.merge(graph.attach(program, updates))
    assert not graph.adapters(merged)
    wanted = live(found.model, sites, updates)
    assert_same(outputs(merged.module(), found.other), outputs(wanted, found.other))


# Model → target names for PEFT, and the algorithms that PEFT does right on them: none of LoHa, LoKr
# and HRA takes a Conv1D, and HRA's conv knows no dilation.
ALL = ("lora", "loha", "lokr", "hra")
PEERS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "vit": (["q_proj", "v_proj", "fc1"], ALL),
    "bert": (["query", "value", "classifier"], ALL),
    "gpt2": (["c_attn", "c_proj"], ("lora",)),
    "llama": (["q_proj", "k_proj", "down_proj"], ALL),
    "llama-tied": (["v_proj", "up_proj"], ALL),
    "t5": (["q", "v", "wo"], ALL),
    "clip": (["q_proj", "out_proj", "fc2"], ALL),
    "phi3": (["qkv_proj", "down_proj"], ALL),
    "albert": (["query", "ffn"], ALL),
    "mixtral": (["q_proj", "o_proj"], ALL),
    "wav2vec2": (["q_proj", "intermediate_dense"], ALL),
    "sd15": (["to_q", "to_out.0", "ff.net.0.proj", "conv1"], ALL),
    "flux": (["to_q", "to_v", "proj_mlp"], ALL),
    "sd3": (["to_q", "to_out.0"], ALL),
    "vae": (["to_q", "conv1"], ALL),
    "resnet": (["conv1", "conv3", "fc"], ALL),
}
PEFTS: dict[str, Any] = {
    "lora": lambda t: peft.LoraConfig(r=2, lora_alpha=3, target_modules=t),
    "loha": lambda t: peft.LoHaConfig(r=2, alpha=3, target_modules=t),
    "lokr": lambda t: peft.LoKrConfig(r=2, alpha=3, target_modules=t),
    "hra": lambda t: peft.HRAConfig(r=4, target_modules=t),
}
WRAPPED = {
    "lora": peft.LoraModel, "loha": peft.LoHaModel, "lokr": peft.LoKrModel, "hra": peft.HRAModel,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "algorithm"), [(n, a) for n, (_, which) in PEERS.items() for a in which]
)
def test_pefts_own_file_on_a_graph_is_pefts_model(
    name: str, algorithm: str, tmp_path: Path
) -> None:
    found, program = zoo.entry(name), zoo.program(name)
    torch.manual_seed(1)
    targets = PEERS[name][0]
    model = copy.deepcopy(found.model)
    wrapped = peft.PeftModel(model, PEFTS[algorithm](targets))
    for key, parameter in wrapped.named_parameters():
        if any(part in key for part in ("lora_", "hada_", "lokr_", "hra_u")):
            nn.init.normal_(parameter, std=0.5)
    wrapped.eval().save_pretrained(tmp_path)
    adapter = adaptsurgery.load(tmp_path)
    adapted = graph.attach(program, adapter)
    wanted = outputs(model, found.other)
    assert_same(outputs(adapted.module(), found.other), wanted)
    live_model = adaptsurgery.PeftModel.from_pretrained(copy.deepcopy(found.model), tmp_path)
    assert_same(outputs(live_model, found.other), wanted)
