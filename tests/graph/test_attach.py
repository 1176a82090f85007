"""attach ≡ the eager fold; detach ≡ identity, to the bit; merge ≡ fold: on every kind of graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_nets import (
    ALGORITHMS,
    Convs,
    Guarded,
    Mlp,
    Tied,
    close,
    code,
    equal,
    example,
    exported,
    exported_as,
    folded,
    made,
    run,
    update_for,
    updates_for,
    wanted,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram

from adaptsurgery.algorithms import HRA, LoRA, LoraConfig, build
from adaptsurgery.core.update import compose
from adaptsurgery.graph.attach import attach, detach, set_scale
from adaptsurgery.graph.dropout import set_train
from adaptsurgery.graph.merge import merge
from adaptsurgery.graph.record import tag_of
from adaptsurgery.graph.sites import RECORD
from adaptsurgery.graph.state import adapter_parameters, adapter_state, adapters, load_state
from adaptsurgery_formats.errors import NameLookupError, ShapeError, SurgeryError, ValueRefused

KINDS = ("program", "module", "symbolic")


def graph_of(model: nn.Module, kind: str) -> Any:
    if kind == "symbolic":
        return torch.fx.symbolic_trace(model)
    program = exported(model)
    return program if kind == "program" else program.module()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["factored", "weight"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("net", [Guarded, Convs])
def test_the_laws(net: type[nn.Module], algorithm: str, mode: Any, kind: str) -> None:
    model = made(net)
    g = graph_of(model, kind)
    before, x = code(g), example(model, 7)
    plain, updates = run(g, x), updates_for(model, algorithm, bias=True)
    h = attach(g, updates, mode=mode)
    assert type(h) is type(g) or isinstance(h, torch.fx.GraphModule)
    close(run(h, x), wanted(model, updates, x))
    assert code(g) == before and equal(run(g, x), plain), "the input was changed"
    back = detach(h)
    assert code(back) == before and equal(run(back, x), plain)
    assert state_names(back) == state_names(g)
    one = merge(h)
    close(run(one, x), wanted(model, updates, x))
    assert "default" not in " ".join(state_names(one)) and adapters(one) == []


def state_names(g: Any) -> list[str]:
    return sorted(g.state_dict if isinstance(g, ExportedProgram) else g.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_by_the_one_law(kind: str) -> None:
    """W·Ra·Rb + Δ: rotations in the order of attaching, the Δ sees the original x."""
    model = made(Mlp)
    g, x = graph_of(model, kind), example(model, 5)
    parts = {n: update_for(a, (8, 6), seed=s) for s, (n, a) in enumerate(
        {"one": "hra", "two": "lora", "three": "hra", "four": "dora"}.items()
    )}  # fmt: skip
    h = g
    for name, update in parts.items():
        h = attach(h, {"a": update}, name)
    assert adapters(h) == [*parts]
    whole = compose(parts.values())
    close(run(h, x), wanted(model, {"a": whole}, x))
    turned = compose([parts["three"], parts["one"]])
    assert not equal(
        run(folded(model, {"a": turned}), x.double()),
        wanted(model, {"a": compose([parts["one"], parts["three"]])}, x),
    )
    h = detach(h, "one")
    close(run(h, x), wanted(model, {"a": compose([*parts.values()][1:])}, x))
    for name in ("four", "two", "three"):
        h = detach(h, name)
    assert code(h) == code(g)


def test_the_same_after_a_file_in_a_fresh_process(tmp_path: Path) -> None:
    model = made(Guarded)
    program, x = exported(model), example(model, 7)
    updates = updates_for(model, "loha")
    torch.export.save(program, tmp_path / "base.pt2")
    torch.export.save(attach(program, updates), tmp_path / "adapted.pt2")
    torch.save((x, run(program, x), wanted(model, updates, x)), tmp_path / "x.pt")
    script = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from graph_nets import close, code, equal, run
from adaptsurgery.graph.attach import detach
folder = sys.argv[1]
x, plain, wanted = torch.load(folder + "/x.pt")
base, adapted = (torch.export.load(f"{folder}/{n}.pt2") for n in ("base", "adapted"))
close(run(adapted, x), wanted)
back = detach(adapted)
assert code(back) == code(base) and equal(run(back, x), plain)
"""
    here = str(Path(__file__).parents[1] / "helpers")
    subprocess.run([sys.executable, "-c", script, str(tmp_path), here], check=True)


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "hra", "dora"])
def test_detach_after_a_decomposition_and_a_new_export(algorithm: str) -> None:
    model = made(Mlp)
    program, x = exported(model), example(model, 7)
    h = attach(program, updates_for(model, algorithm))
    lower = h.run_decompositions()
    assert adapters(lower) == ["default"]
    assert equal(run(detach(lower), x), run(program.run_decompositions(), x))
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    again = torch.export.export(h.module(), (example(model),), dynamic_shapes=sizes)
    assert equal(run(detach(again), x), run(program, x))


def test_notes_that_torch_lost_are_told() -> None:
    """What stands within no_grad loses its notes when a program is decomposed."""
    model = made(Guarded)
    lower = attach(exported(model), updates_for(model, "lora")).run_decompositions()
    with pytest.raises(ValueRefused, match="not whole") as raised:
        detach(lower)
    assert raised.value.code == "notes-lost"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_merged_by_itself(kind: str, strict: bool) -> None:
    model = made(Tied)
    g = exported(model, strict=strict) if kind == "program" else graph_of(model, kind)
    x, updates = example(model, 7), {"head": update_for("lora", (10, 6))}
    want = _untied(model, updates)
    close(run(attach(g, updates), x), run(want, x))
    one = merge(attach(g, updates))
    close(run(one, x), run(want, x))
    assert equal(run(g, x), run(model, x))


def _untied(model: nn.Module, updates: Any) -> nn.Module:
    out = folded(model, updates)
    assert isinstance(out, Tied)
    out.embed.weight = nn.Parameter(out.embed.weight.detach().clone())
    return out


def test_state_scale_and_other_numbers() -> None:
    model = made(Mlp)
    g, x = exported(model), example(model, 7)
    updates = updates_for(model, "lora")
    h = attach(g, updates, mode="factored")
    state = adapter_state(h)
    assert list(state) == ["a", "b"]
    first, given = state["a"], updates["a"]
    assert isinstance(first, LoRA) and isinstance(given, LoRA)
    assert torch.equal(first.up, given.up) and first.scale == given.scale
    double = {path: update.scaled(2.0) for path, update in updates.items()}
    doubled = set_scale(h, 2.0)
    close(run(doubled, x), wanted(model, double, x))
    close(run(set_scale(doubled, 2.0), x), wanted(model, double, x))
    assert equal(run(set_scale(set_scale(doubled, 0.0), 1.0), x), run(h, x))
    other = updates_for(model, "hra")
    loaded = load_state(h, other)
    close(run(loaded, x), wanted(model, other, x))
    assert not any("lora" in name for name in loaded.state_dict)
    close(run(h, x), wanted(model, updates, x))


def test_the_parameters_are_those_of_the_module() -> None:
    model = made(Mlp)
    h = attach(exported(model), updates_for(model, "lora"))
    parameters = adapter_parameters(h)
    held = dict(h.module().named_parameters())
    assert [*parameters] == [
        f"{p}.default.lora_{slot}" for p in ("a", "b") for slot in ("up", "down")
    ]
    assert all(parameters[name] is held[name] and held[name].requires_grad for name in parameters)
    on = set_train(h, True)
    assert all(adapter_parameters(on)[name] is p for name, p in parameters.items())


def test_dropouts_of_the_base_are_turned() -> None:
    model = made(Mlp)
    g, x = exported(model), example(model, 7)
    on = set_train(g)
    assert not equal(run(on, x), run(on, x))
    off = set_train(on, False)
    assert code(off) == code(g) and equal(run(off, x), run(g, x))


def test_tensors_without_numbers_have_none_to_refuse() -> None:
    model = made(Mlp)
    meta = LoRA(torch.empty(8, 2, device="meta"), torch.empty(2, 6, device="meta"))
    with FakeTensorMode():
        fake = LoRA(torch.empty(8, 2), torch.empty(2, 6))
    for update in (meta, fake):
        on = attach(exported(model), {"a": update})
        assert adapter_parameters(on)["a.default.lora_up"].shape == (8, 2)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_leaves_the_input_alone(kind: str) -> None:
    model = made(Mlp)
    g = graph_of(model, kind)
    before = code(g)
    h = attach(g, updates_for(model, "lora"))
    after = code(h)
    good = update_for("lora", (8, 6))
    assert isinstance(good, LoRA)
    loose = LoRA(good.up, good.down, scale=float("inf"))
    large = LoRA(1e6 * good.up, good.down)
    bad = {**updates_for(model, "lora"), "a": LoRA(good.up / 0, good.down)}
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: attach(h, {"a": good}), ValueRefused, "name-taken"),
        (lambda: attach(g, {"nothing": good}), NameLookupError, "no-site"),
        (lambda: attach(g, {}), NameLookupError, "no-site"),
        (lambda: attach(g, {"a": good, "b": good}), ShapeError, "bad-shape"),
        (lambda: attach(g, {"a": good}, "not a name"), ValueRefused, "bad-name"),
        (lambda: attach(g, {"a": good}, mode="other"), ValueRefused, "bad-mode"),  # type: ignore[arg-type]
        (lambda: detach(h, "other"), NameLookupError, "no-adapter"),
        (lambda: detach(g), NameLookupError, "no-adapter"),
        (lambda: merge(g), NameLookupError, "no-adapter"),
        (lambda: load_state(h, {"a": good}), NameLookupError, "other-modules"),
        (lambda: set_scale(h, float("nan")), ValueRefused, "bad-scale"),
        (lambda: attach(g, {"a": loose}), ValueRefused, "bad-scale"),
        (lambda: attach(g, bad), ValueRefused, "non-finite"),
        (lambda: attach(g, {"a": large}, dtype=torch.float16), ValueRefused, "non-finite"),
        (lambda: load_state(h, bad), ValueRefused, "non-finite"),
        (
            lambda: attach(g, LoraConfig(target_modules=["a"], bias="all")),
            ValueRefused,
            "base-trained",
        ),
        (
            lambda: attach(g, LoraConfig(target_modules=["a"], modules_to_save=["b"])),
            ValueRefused,
            "base-trained",
        ),
        (lambda: set_scale(attach(g, {"a": HRA(torch.randn(6, 2))}), 2), ValueRefused, "no-weight"),
    ]
    for call, error, slug in cases:
        with pytest.raises(error) as raised:
            call()
        assert raised.value.code == slug  # type: ignore[attr-defined]
    assert code(g) == before and code(h) == after


def test_what_is_without_effect_is_warned_of() -> None:
    class Whole(dict[str, Any]):
        saved = {"": {"b.weight": torch.zeros(4, 8)}}  # noqa: RUF012

    g = exported(made(Mlp))
    with pytest.warns(UserWarning, match="nowhere: no module is called so"):
        attach(g, LoraConfig(target_modules=["a", "nowhere"]))
    with pytest.warns(UserWarning, match="b.weight: modules_to_save"):
        attach(g, Whole(a=update_for("lora", (8, 6))))


def test_a_failure_half_way_leaves_the_input_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Mlp)
    g, x = exported(model), example(model, 5)
    before, plain, names = code(g), run(g, x), state_names(g)
    real, count = LoRA.delta, 0

    def failing(self: LoRA, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > 1:
            raise RuntimeError("half-way")
        return real(self, *args, **options)

    monkeypatch.setattr(LoRA, "delta", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        attach(g, updates_for(model, "lora"), mode="factored")
    assert code(g) == before and equal(run(g, x), plain) and state_names(g) == names


def test_a_merge_in_a_wrong_order_is_refused() -> None:
    model = made(Mlp)
    h = attach(exported(model), {"a": update_for("lora", (8, 6))}, "delta")
    h = attach(h, {"a": update_for("hra", (8, 6))}, "turn")
    with pytest.raises(ValueRefused, match="before a rotation"):
        merge(h, "delta")
    x = example(model, 5)
    close(run(merge(h, "turn"), x), [t.double() for t in run(h, x)])
    close(run(merge(h), x), [t.double() for t in run(h, x)])


class Chain(nn.Module):
    """Layers that read each other's outputs with nothing between, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(x)) + self.c(x)


def test_a_merge_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6)).half().eval()
    program = torch.export.export(model, (torch.randn(2, 6).half(),))
    h = attach(program, {"0": LoRA(torch.full((6, 1), 1e3), torch.full((1, 6), 1e3))})
    with pytest.raises(ValueRefused) as raised:
        merge(h)
    assert raised.value.code == "non-finite" and "`0`" in raised.value.what
    small = attach(program, {"0": LoRA(torch.ones(6, 1), torch.ones(1, 6))})
    assert merge(small).state_dict["0.weight"].isfinite().all()


class Named(nn.Module):
    """A model that has tensors of its own where an adapter's would be."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.a.default = nn.Module()
        self.a.default.lora_up = nn.Parameter(torch.ones(6))
        self.a.default.register_buffer("lora_down", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) * self.a.default.lora_up + self.a.default.lora_down
        return y


@pytest.mark.parametrize("kind", ["program", "module", "traced"])
def test_the_models_own_tensors_keep_their_names(kind: str) -> None:
    torch.manual_seed(2)
    model, x = Named().eval(), torch.randn(3, 6)
    g = torch.fx.symbolic_trace(model) if kind == "traced" else exported_as(model, kind, x)
    first, second = ({"a": update_for("lora", (6, 6), seed=n)} for n in (1, 2))
    h = attach(g, first)
    close(run(h, x), wanted(model, first, x))
    other = load_state(h, second)
    close(run(other, x), wanted(model, second, x))
    for end in (detach(h), detach(other)):
        assert equal(run(end, x), run(g, x)) and code(end) == code(g)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra"])
def test_a_layer_that_reads_an_adapted_layer(algorithm: str) -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.randn(3, 6)
    program = torch.export.export(model, (x,))
    makers = {
        "lora": {"up": (6, 2), "down": (2, 6)},
        "loha": {"w1_a": (6, 2), "w1_b": (2, 6), "w2_a": (6, 2), "w2_b": (2, 6)},
        "lokr": {"w1": (2, 3), "w2": (3, 2)},
        "hra": {"u": (6, 3)},
    }
    updates = {
        path: build(algorithm, {n: torch.randn(s) for n, s in makers[algorithm].items()})
        for path in "abc"
    }
    adapted = attach(program, updates)
    merged = Chain().eval()
    merged.load_state_dict(model.state_dict())
    for path in "abc":
        layer = merged.get_submodule(path)
        layer.weight.data = updates[path].fold(layer.weight.data)
    torch.testing.assert_close(adapted.module()(x), merged(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(detach(adapted).module()(x), model(x))
    assert detach(adapted).graph_module.code == program.graph_module.code


@pytest.mark.parametrize("note", ["{not json", "[]", '{"site": 5}', '{"strange": 1}', 5,
    '{"site": "a", "adapters": [{"name": "x"}]}', '{"site": "a", "adapters": 5}', "[" * 5000])  # fmt: skip
def test_a_note_that_is_none_of_ours_is_refused(note: Any) -> None:
    program = graph_of(Chain(), "symbolic")
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    node.meta["custom"] = {RECORD: note}
    with pytest.raises(SurgeryError) as caught:
        tag_of(node)
    assert caught.value.code == "bad-note" and caught.value.next
