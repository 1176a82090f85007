"""Fresh adapters from a config: nothing changes at first, gradients reach them, a loss goes down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_nets import Convs, Mlp, close, equal, example, exported, made, run

from adaptsurgery.algorithms import AdapterConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from adaptsurgery.graph.attach import attach, detach
from adaptsurgery.graph.dropout import set_train
from adaptsurgery.graph.merge import merge
from adaptsurgery.graph.plan import plan
from adaptsurgery.graph.state import adapter_parameters, adapter_state
from adaptsurgery_formats.errors import NameLookupError, ValueRefused

EVERY = ["a", "b", "first", "round", "point", "out"]
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=2, lora_alpha=6, lora_dropout=0.3, target_modules=EVERY),
    "dora": LoraConfig(r=2, lora_alpha=6, lora_dropout=0.3, use_dora=True, target_modules=EVERY),
    "loha": LoHaConfig(
        r=2, alpha=6, rank_dropout=0.2, module_dropout=0.1, use_effective_conv2d=True,
        target_modules=EVERY,
    ),
    "lokr": LoKrConfig(r=2, alpha=6, rank_dropout=0.2, rank_dropout_scale=True, target_modules=EVERY),
    "hra": HRAConfig(r=2, target_modules=EVERY),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("net", [Mlp, Convs])
def test_training_lowers_a_loss(net: Any, name: str) -> None:
    model = made(net)
    program, x = exported(model), example(model, 7)
    plain = run(program, x)
    fresh = attach(program, CONFIGS[name], mode="factored")
    close(run(fresh, x), [t.double() for t in plain], 1e-4)
    training = set_train(fresh, True, base=False)
    parameters = adapter_parameters(training)
    module = training.module()
    torch.manual_seed(5)
    goal = torch.randn_like(plain[0])
    optimiser = torch.optim.Adam(parameters.values(), lr=0.02)
    start = loss_of(fresh, x, goal)
    reached: set[str] = set()
    for _ in range(40):
        optimiser.zero_grad()
        out = module(x)
        first = out[0] if isinstance(out, tuple) else out
        torch.nn.functional.mse_loss(first, goal).backward()
        reached |= {n for n, p in parameters.items() if p.grad is not None and bool(p.grad.any())}
        optimiser.step()
    assert reached == set(parameters), "a parameter had no gradient"
    trained = set_train(training, False)
    assert loss_of(trained, x, goal) < 0.9 * start
    close(run(merge(trained), x), [t.double() for t in run(trained, x)], 1e-4)
    assert equal(run(detach(trained), x), plain), "the base was trained too"


def loss_of(program: Any, x: torch.Tensor, goal: torch.Tensor) -> float:
    return float(torch.nn.functional.mse_loss(run(program, x)[0], goal))


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr"])
def test_dropouts_are_off_until_they_are_turned_on(name: str) -> None:
    model = made(Mlp)
    h = attach(exported(model), CONFIGS[name], generator=torch.Generator().manual_seed(1))
    for p in adapter_parameters(h).values():
        p.data.normal_(std=0.5)
    x = example(model, 16)
    on = set_train(h, True, base=False)
    assert equal(run(h, x), run(h, x))
    draws = [run(on, x) for _ in range(4)]
    assert any(not equal(draws[0], other) for other in draws[1:])
    assert equal(run(set_train(on, False), x), run(h, x))
    # A second adapter is put beside the first as it is: still training.
    both = attach(on, CONFIGS["hra"], "other")
    assert any(not equal(run(both, x), run(both, x)) for _ in range(4))


def test_dropout_of_the_input_is_lora_s_alone() -> None:
    """At p = 1 a LoRA sees nothing, and the base still sees its input."""
    config = LoraConfig(r=2, lora_dropout=1.0, target_modules=["a"], init_lora_weights=False)
    model = made(Mlp)
    program, x = exported(model), example(model, 7)
    h = attach(program, config)
    assert not equal(run(h, x), run(program, x))
    on = set_train(h, True, base=False)
    close(run(on, x), [t.double() for t in run(program, x)])


def test_a_plan_and_its_config_attach_alike() -> None:
    model = made(Mlp)
    program = exported(model)
    config = CONFIGS["lora"]
    first = attach(program, config, generator=torch.Generator().manual_seed(1))
    second = attach(program, plan(program, config), generator=torch.Generator().manual_seed(1))
    for one, other in zip(adapter_state(first).values(), adapter_state(second).values()):
        assert torch.equal(one.down, other.down)  # type: ignore[attr-defined]


def test_a_plan_for_another_graph_and_a_config_without_a_match() -> None:
    program, other = exported(made(Mlp)), exported(made(Convs))
    with pytest.raises(ValueRefused, match="another graph"):
        attach(other, plan(program, CONFIGS["lora"]))
    with pytest.raises(NameLookupError):
        attach(program, LoraConfig(target_modules=["nothing"]))


def test_a_bf16_base_with_a_float32_adapter() -> None:
    model = made(Mlp).bfloat16()
    x = example(model, 5).bfloat16()
    program = torch.export.export(model, (x,))
    h = attach(program, CONFIGS["hra"])
    h = attach(h, CONFIGS["lora"], "more")
    assert {p.dtype for p in adapter_parameters(h).values()} == {torch.float32}
    out = h.module()(x)
    assert out[0].dtype == torch.bfloat16
    torch.testing.assert_close(out[0], program.module()(x)[0], atol=0.1, rtol=0.1)
