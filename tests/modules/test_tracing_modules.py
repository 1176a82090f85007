"""Adapted models through torch.fx, torch.export, torch.compile and jit tracing, in both modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from live_nets import ALGORITHMS, Mixed, configs, ids, logits, tiny
from torch import nn

from adaptsurgery import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model

TARGETS = ["seq", "conv", "fc", "out"]
DROPS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.3},
    "loha": {"rank_dropout": 0.3, "module_dropout": 0.2},
    "lokr": {"rank_dropout": 0.3, "rank_dropout_scale": True},
    "hra": {},
}
X = ids(2, 5)


def made(algorithm: str, **said: Any) -> PeftModel:
    torch.manual_seed(0)
    torch._dynamo.reset()
    ours, _ = configs(algorithm, r=2, alpha=3, target_modules=TARGETS, **DROPS[algorithm], **said)
    return get_peft_model(Mixed(), ours)


def all_four() -> PeftModel:
    torch._dynamo.reset()
    model = get_peft_model(
        Mixed(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), mixed=True
    )
    for config in (LoHaConfig, LoKrConfig, HRAConfig):
        model.add_adapter(config.algorithm, config(r=2, target_modules=TARGETS, init_weights=False))
    model.set_adapter(["default", "loha", "lokr", "hra"])
    return model


def once(model: Any, *x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    out: torch.Tensor = model(*x)
    return out


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_symbolic_trace(algorithm: str, training: bool) -> None:
    """The graph holds every adapter tensor by name, no number of its own, and its gradients."""
    model = made(algorithm).train(training).get_base_model()
    graph = torch.fx.symbolic_trace(model)
    held = {n.target for n in graph.graph.nodes if n.op == "get_attr"}
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert wanted <= held and not [n for n in held if "_tensor_constant" in str(n)]
    a, b = once(graph, X), once(model, X)
    torch.testing.assert_close(a, b)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad(a.square().sum(), parameters)
    torch.testing.assert_close(mine, torch.autograd.grad(b.square().sum(), parameters))
    if training and algorithm != "hra":
        torch.manual_seed(6)
        assert not torch.allclose(graph(X), a), "its dropouts are constants"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_export_with_an_open_batch(algorithm: str, training: bool) -> None:
    model = made(algorithm).train(training).get_base_model()  # whose forward names its inputs
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    held = {name for name in program.state_dict if ".default" in name}
    assert held == {name for name in model.state_dict() if ".default" in name}
    x = ids(7, 5)
    if not training:
        torch.testing.assert_close(program.module()(x), model(x))
    assert program.module()(x).shape == (7, 3)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_compile_without_a_break(algorithm: str, training: bool) -> None:
    model = made(algorithm).train(training)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    if not training:
        torch.testing.assert_close(whole(X), model(X))
    whole(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_four_at_once() -> None:
    model = all_four().eval()
    wanted = model(X)
    torch.testing.assert_close(torch.fx.symbolic_trace(model.get_base_model())(X), wanted)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), wanted)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_jit_trace(algorithm: str) -> None:
    model = made(algorithm).eval()
    traced = torch.jit.trace(model, X, check_trace=False)
    x = ids(4, 5)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dora"])
def test_the_traced_model_scripts(algorithm: str, training: bool) -> None:
    said = {"use_dora": True} if algorithm == "dora" else {}
    model = made("lora" if said else algorithm, **said).train(training).get_base_model()
    graph = torch.fx.symbolic_trace(model)
    for node in graph.graph.nodes:
        node.type = None  # fx misspells annotations that are strings
    graph.recompile()
    torch.testing.assert_close(once(torch.jit.script(graph), X), once(model, X))


def test_a_dora_traces() -> None:
    model = made("lora", use_dora=True).eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model.get_base_model())(X), model(X))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_transformer_exports_in_training(algorithm: str) -> None:
    base, given = tiny("llama")
    ours, _ = configs(algorithm, r=2, target_modules=["q_proj", "v_proj"], **DROPS[algorithm])
    model = get_peft_model(base, ours)
    kept = {"use_cache": False, **given}
    program = torch.export.export(model.eval(), (), kept)
    torch.testing.assert_close(logits(program.module()(**kept)), logits(model(**kept)))
    torch.export.export(model.train(), (), kept)


def test_a_traced_model_can_be_traced_again_and_left_alone() -> None:
    model = made("loha").eval().get_base_model()
    keys = set(vars(model))
    first = torch.fx.symbolic_trace(model)
    second = torch.fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(first(X), second(X))
    assert set(vars(model)) == keys and isinstance(first, nn.Module)


def test_a_rank_that_is_dearer_than_the_layer_is_folded_ahead() -> None:
    """A LoHa's factors are of rank r²: with sizes left open the graph has W' once instead."""
    base = nn.Sequential(nn.Linear(1024, 1024))
    for rank, folded in ((2, False), (32, True)):
        config = LoHaConfig(r=rank, target_modules=["0"], init_weights=False)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        graph = torch.fx.symbolic_trace(model.get_base_model())
        x = torch.randn(3, 1024)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)
        linears = [n for n in graph.graph.nodes if n.target is torch._C._nn.linear]
        called = [n for n in graph.graph.nodes if n.op == "call_module"]
        assert (len(linears) == 1 and not called) is folded
