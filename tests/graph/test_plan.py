"""A plan is what PEFT's own rules choose on the live model; what cannot be had is named."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.export import export

from adaptsurgery.algorithms.hra import HRAConfig
from adaptsurgery.algorithms.loha import LoHaConfig
from adaptsurgery.algorithms.lokr import LoKrConfig
from adaptsurgery.algorithms.lora_config import LoraConfig
from adaptsurgery.graph.attach import attach
from adaptsurgery.graph.plan import plan
from adaptsurgery.graph.state import adapters
from adaptsurgery_formats.errors import NameLookupError, ValueRefused


class Small(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(11, 8), nn.Linear(8, width)
        self.attn, self.lm_head = nn.MultiheadAttention(8, 2), nn.Linear(8, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.emb(x))
        return self.lm_head(self.attn(x, x * 2, x)[0])


def small() -> Any:
    return export(Small().eval(), (torch.randint(0, 11, (2, 5)),))


# Model → what to target, as PEFT takes it.
TARGETS: dict[str, dict[str, Any]] = {
    "vit": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    "bert": {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"]},
    "llama": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 4}},
    "llama-tied": {"target_modules": "all-linear"},
    "t5": {"target_modules": ["q", "v"], "layers_to_transform": [0], "layers_pattern": "block"},
    "phi3": {"target_modules": r".*\.(qkv_proj|down_proj)", "alpha_pattern": {"down_proj": 5}},
    "albert": {"target_modules": ["query", "value", "ffn"]},
    "mixtral": {"target_modules": "all-linear"},
    "sd15": {"target_modules": ["to_q", "to_out.0", "conv1", "ff.net.0.proj"]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_the_choice_is_pefts(name: str) -> None:
    given = TARGETS[name]
    saved = given.get("modules_to_save", [])
    wanted = peft.tuners.tuners_utils.inspect_matched_modules(
        peft.LoraModel(
            zoo.MODELS[name]().model,
            peft.LoraConfig(r=2, lora_alpha=3, **{k: v for k, v in given.items() if k != "modules_to_save"}),
            "default",
        )
    )["matched"]  # fmt: skip
    wanted = [path for path in wanted if not any(path.startswith(s) for s in saved)]
    made = plan(zoo.program(name), LoraConfig(r=2, lora_alpha=3, **given))
    assert {site.path for site in made.sites} == set(wanted)
    assert list(made.saved) == saved and not made.unsupported
    for _, target in made.placed:
        own = "q_proj" in target.name and "layers.1" in target.name and "rank_pattern" in given
        assert target.rank == (4 if own else 2)
        down = "down_proj" in target.name and "alpha_pattern" in given
        assert target.alpha == (5 if down else 3)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig, HRAConfig])
def test_every_algorithm_plans(config: Any) -> None:
    made = plan(small(), config(r=2, target_modules=["fc", "out_proj"]))
    assert [site.path for site in made.sites] == ["fc", "attn.out_proj"]


def test_all_linear_leaves_a_head_out_and_says_so() -> None:
    made = plan(small(), LoraConfig(target_modules="all-linear"))
    assert [site.path for site in made.sites] == ["fc", "attn.out_proj"]
    assert [(note.code, note.where) for note in made.notes] == [("left-out", "lm_head")]
    whole = plan(small(), LoraConfig(target_modules="all-linear"), outputs=())
    assert [site.path for site in whole.sites] == ["fc", "attn.out_proj", "lm_head"]


def test_the_table_names_sites_patterns_and_what_cannot_be() -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["fc", "attn", "emb", "nowhere"])
    made = plan(small(), config)
    text = str(made)
    assert [site.path for site in made.unsupported] == ["emb", "attn"]
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["fc", "linear", "8×8", "1", "4", "6"]
    assert "adapters go on linears" in text and "part of `attn.in_proj_weight`" in text
    assert "note: target_modules.nowhere: no module is called so" in text
    with pytest.raises(ValueRefused, match=r"2 targets cannot be adapted") as caught:
        made.check(small())
    assert caught.value.code == "unsupported-site" and caught.value.next


def test_a_plan_knows_its_graph(tmp_path: Any) -> None:
    program = small()
    made = plan(program, LoraConfig(target_modules=["fc"]))
    torch.export.save(program, tmp_path / "m.pt2")
    made.check(torch.export.load(tmp_path / "m.pt2"))
    other = export(Small().eval(), (torch.randint(0, 11, (5,)),))
    for g in (other, program.module()):
        with pytest.raises(ValueRefused, match="one for another graph") as caught:
            made.check(g)
        assert caught.value.code == "another-graph"


@pytest.mark.parametrize("mode", ["factored", "weight"])  # which puts others in a layer's place
@pytest.mark.parametrize("kind", ["program", "module", "traced"])
def test_a_plan_is_for_a_graph_whatever_adapters_are_on_it(kind: str, mode: Any) -> None:
    program = small()
    g: Any = program if kind == "program" else program.module()
    if kind == "traced":
        g = torch.fx.symbolic_trace(nn.Sequential(OrderedDict(fc=nn.Linear(4, 4))))
    config = LoraConfig(target_modules=["fc"])
    made = plan(g, config)
    h = attach(g, HRAConfig(r=2, target_modules=["fc"]), "first", mode)
    both = attach(h, made, "second")
    assert adapters(both) == adapters(attach(h, plan(h, config), "second")) == ["first", "second"]
    plan(h, config).check(g)


def test_nothing_matched_names_what_is_near() -> None:
    with pytest.raises(NameLookupError, match="no module is targeted") as caught:
        plan(small(), LoraConfig(target_modules=["fd"]))
    assert caught.value.code == "no-targets"


class Still(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_a_graph_without_layers() -> None:
    program = export(Still(), (torch.randn(2),))
    with pytest.raises(NameLookupError, match="no layer of the graph can be adapted") as caught:
        plan(program, LoraConfig(target_modules=["fc"]))
    assert caught.value.code == "no-sites"
