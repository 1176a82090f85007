"""An algorithm that the house has never seen, in a class and a row, through every job.

``Toy`` adds Δ = left·diag(gain)·right. With its class in ALGORITHMS, its row in TRAITS and its keys in
one layout, each job carries it or refuses it by name. ``Odd`` has the same, and is of a kind of update
that the law has no place for: nothing applies it, and nothing leaves it out without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import adaptsurgery
from adaptsurgery import algorithms
from adaptsurgery.algorithms import LoRA
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Delta, Update
from adaptsurgery.graph.attach import attach, detach
from adaptsurgery.graph.merge import merge as merge_graph
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery_formats import ModuleState, lycoris_keys, peft
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.traits import TRAITS, Traits

Sent = Callable[[], object]
SHAPES = {"fc": (6, 4), "out": (3, 6)}


# Ten lines and a row.
@dataclass(frozen=True, eq=False, kw_only=True)
class Toy(Delta):
    left: Tensor
    gain: Tensor
    right: Tensor
    name: ClassVar[str] = "toy"

    def matrix(self) -> Tensor:
        return self.left * self.gain @ self.right

    def add_rows_(self, block: Tensor, start: int, stop: int, factor: float) -> None:
        block.addmm_(self.left[start:stop] * self.gain, self.right, alpha=factor)

    def delta(self, x: Tensor, layer: Layer, form: Any = "factored") -> Tensor:
        return layer.forward(x, self.like(layer.sample(x)).matrix().reshape(layer.shape), None)

    def to_lora(self) -> LoRA:
        return LoRA(self.left * self.gain, self.right, scale=self.scale)


ROW = Traits(
    name="toy",
    title="Toy",
    dims={"left": (2, 2), "gain": (1, 1), "right": (2, 2)},
    complete=(("left", "gain", "right"),),
    extent=lambda t, _: (t["left"][0], t["right"][1]),
    wanted=lambda t: {"left": (None, t["right"][0]), "gain": (t["right"][0],)},
    ranks=(("right", 0),),
    rows=("left",),
    factor=("left",),
    low_rank=True,
)


@dataclass(frozen=True, eq=False)
class Odd(Update):
    """W' = −W."""

    sign: Tensor
    name: ClassVar[str] = "odd"

    def folded(self, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        return -weight

    def apply(self, x: Tensor, layer: Layer, *rest: Any, **more: Any) -> Tensor:
        return -layer.forward(x)


ODD_ROW = Traits(
    name="odd",
    title="Odd",
    dims={"sign": (1, 1)},
    complete=(("sign",),),
    extent=lambda t, _: (t["sign"][0], 0),
    adds=False,
    weighs=False,
    reversible=False,
    scaled=False,
)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(algorithms, "ALGORITHMS", (*algorithms.ALGORITHMS, Toy, Odd))
    for row in (ROW, ODD_ROW):
        monkeypatch.setitem(TRAITS, row.name, row)
        for slot in row.slots:
            monkeypatch.setitem(lycoris_keys.SUFFIXES, f"{row.name}_{slot}", (row.name, slot))
    yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x)))


class Desk:
    """A model, its checkpoint, and adapters of it."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.net = folder, Net()
        self.base = folder / "base.safetensors"
        self.weights = {n: t.numpy().copy() for n, t in self.net.state_dict().items()}
        save_file(self.weights, self.base)
        self.rng = np.random.default_rng(1)

    def toy(self, name: str, rank: int = 2) -> tuple[Path, dict[str, np.ndarray]]:
        """A file of toys on every layer, and the Δ that each is."""
        held, deltas = {}, {}
        for path, (o, i) in SHAPES.items():
            left, right = self.numbers(o, rank), self.numbers(rank, i)
            gain, alpha = self.numbers(rank), np.float32(3)
            held |= {f"{path}.toy_left": left, f"{path}.toy_gain": gain}
            held |= {f"{path}.toy_right": right, f"{path}.alpha": alpha}
            wide = left.astype(np.float64) * gain @ right
            deltas[f"{path}.weight"] = float(alpha) / rank * wide
        return self.file(name, held), deltas

    def odd(self, name: str, *, beside: bool = False) -> Path:
        """A file of an Odd on one layer, alone or with a LoRA on the other."""
        held: dict[str, Any] = {"fc.odd_sign": self.numbers(6)}
        if beside:
            held |= {"out.lora_up.weight": self.numbers(3, 1), "out.alpha": np.float32(1)}
            held |= {"out.lora_down.weight": self.numbers(1, 6)}
        return self.file(name, held)

    def numbers(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def file(self, name: str, held: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.safetensors"
        save_file({f"lycoris_{key}": np.asarray(value) for key, value in held.items()}, path)
        return path

    def at(self, name: str) -> Path:
        return self.folder / name

    def merged(self, deltas: dict[str, np.ndarray], sign: float = 1.0) -> dict[str, np.ndarray]:
        return {n: w + sign * deltas.get(n, 0.0) for n, w in self.weights.items()}


@pytest.fixture
def desk(tmp_path: Path, toys: None) -> Desk:
    return Desk(tmp_path)


def close(seen: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert seen.keys() == wanted.keys()
    for name, numbers in wanted.items():
        np.testing.assert_allclose(seen[name], numbers, rtol=2e-5, atol=2e-5, err_msg=name)


def refused(code: str, attempt: Sent) -> None:
    with pytest.raises(SurgeryError) as raised:
        attempt()
    assert raised.value.code == code, raised.value


def deltas_of(path: Path, desk: Desk) -> dict[str, np.ndarray]:
    """The Δ of a LoRA file in kohya's or LyCORIS's keys, by plain numpy."""
    held, found = load_file(path), {}
    for name in {key.partition(".")[0] for key in held}:
        up, down = held[f"{name}.lora_up.weight"], held[f"{name}.lora_down.weight"]
        scale = float(held[f"{name}.alpha"]) / down.shape[0]
        layer = name.rpartition("_")[2]
        found[f"{layer}.weight"] = scale * up.astype(np.float64) @ down
    return found


# -- A friendly stranger ---------------------------------------------------------------------------


def test_inspect_tells_what_it_is_and_where_it_can_go(desk: Desk) -> None:
    path, _ = desk.toy("a")
    seen = adaptsurgery.inspect(path, base=desk.base)
    assert seen.algorithms == {"toy": 2} and seen.ranks == {"2": 2}
    assert [row["how"] for row in seen.convertible.values()] == ["refused", "exact", "exact"]
    assert seen.convertible["peft"]["code"] == "no-toy"


def test_convert_and_verify_carry_it_or_say_why_not(desk: Desk) -> None:
    path, deltas = desk.toy("a")
    adaptsurgery.convert(path, desk.at("kohya.safetensors"), "kohya", base=desk.base)
    report = adaptsurgery.verify(path, desk.at("kohya.safetensors"), base=desk.base)
    assert {row.change for row in report.rows} == {"identical"}
    refused("no-toy", lambda: adaptsurgery.convert(path, desk.at("p"), "peft", base=desk.base))
    assert not desk.at("p").exists()
    lora = desk.at("lora.safetensors")
    adaptsurgery.convert(path, lora, "lycoris", base=desk.base, algorithm="lora")
    close(deltas_of(lora, desk), deltas)
    assert adaptsurgery.verify(path, lora, base=desk.base).max_error < 1e-6
    other, _ = desk.toy("b")
    refused("not-equal", lambda: adaptsurgery.verify(path, other, base=desk.base))


def test_merge_and_unmerge(desk: Desk) -> None:
    (first, one), (second, two) = desk.toy("a"), desk.toy("b", 3)
    out, back = desk.at("merged.safetensors"), desk.at("back.safetensors")
    adaptsurgery.merge(desk.base, [first, (second, -0.5)], out)
    wanted = desk.merged({n: one[n] - 0.5 * two[n] for n in one})
    close(load_file(out), wanted)
    adaptsurgery.verify_merge(out, desk.base, [first, (second, -0.5)])
    adaptsurgery.unmerge(out, [first, (second, -0.5)], back)
    close(load_file(back), desk.weights)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0), (-1.0, 0.0)])
def test_combine(desk: Desk, weights: tuple[float, float]) -> None:
    (first, one), (second, two) = desk.toy("a"), desk.toy("b", 3)
    out = desk.at("sum.safetensors")
    adaptsurgery.combine([(first, weights[0]), (second, weights[1])], out, base=desk.base)
    merged = desk.at("merged.safetensors")
    adaptsurgery.merge(desk.base, [out], merged)
    close(
        load_file(merged), desk.merged({n: weights[0] * one[n] + weights[1] * two[n] for n in one})
    )


def test_the_zero_sum_is_zeros_of_its_own(desk: Desk) -> None:
    path, _ = desk.toy("a")
    out = desk.at("zero.safetensors")
    adaptsurgery.combine([path, (path, -1.0)], out, base=desk.base, allow_zero=True)
    assert not any(load_file(out)[f"lycoris_{n}.toy_left"].any() for n in SHAPES)


def test_resize(desk: Desk) -> None:
    path, deltas = desk.toy("a", 3)
    out = desk.at("small.safetensors")
    adaptsurgery.resize(path, out, rank=1, base=desk.base)
    found = deltas_of(out, desk)
    for name, delta in deltas.items():
        u, s, vt = np.linalg.svd(delta)
        np.testing.assert_allclose(found[name], s[0] * np.outer(u[:, 0], vt[0]), atol=2e-5)


def test_extract_offers_what_can_be_fitted(desk: Desk) -> None:
    def extract() -> object:
        return adaptsurgery.extract(
            desk.base, desk.base, desk.at("x.safetensors"), algorithm="toy", to="lycoris", rank=1
        )

    refused("no-such-option", extract)


def test_a_live_model_folds_it_and_layers_say_what_they_lack(desk: Desk) -> None:
    path, deltas = desk.toy("a")
    adapter = adaptsurgery.load(path, base=desk.base)
    adaptsurgery.fold(desk.net, adapter, 0.5)
    close(
        {n: t.detach().numpy() for n, t in desk.net.state_dict().items()},
        desk.merged(deltas, 0.5),
    )
    adaptsurgery.unfold(desk.net, adapter, 0.5)
    layer = AdaptedLayer(desk.net.fc)
    refused("no-live-slot", lambda: layer.add("toy", adapter["fc"]))
    assert not layer.settings


def test_with_names_in_peft_a_layer_holds_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for slot in ROW.slots:
        monkeypatch.setitem(peft.SUFFIXES, f"toy_{slot}", ("toy", slot))
    path, deltas = desk.toy("a")
    adapter = adaptsurgery.load(path, base=desk.base)
    layer = AdaptedLayer(desk.net.fc)
    layer.add("toy", adapter["fc"])
    layer.active = ("toy",)
    x = torch.randn(5, 4)
    weight = torch.tensor(desk.merged(deltas)["fc.weight"])
    wanted = x.double() @ weight.t() + torch.tensor(desk.weights["fc.bias"])
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)
    layer.merge(["toy"])
    torch.testing.assert_close(layer.base_layer.weight.double(), weight, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    np.testing.assert_array_equal(
        layer.base_layer.weight.detach().numpy(), desk.weights["fc.weight"]
    )


def test_a_graph_holds_it(desk: Desk) -> None:
    path, deltas = desk.toy("a")
    adapter = adaptsurgery.load(path, base=desk.base)
    graph, x = torch.fx.symbolic_trace(desk.net), torch.randn(5, 4)
    wanted = Net()
    wanted.load_state_dict(
        {n: torch.tensor(w, dtype=torch.float32) for n, w in desk.merged(deltas).items()}
    )
    for mode in ("factored", "weight"):
        adapted = attach(graph, adapter, mode=mode)  # type: ignore[arg-type]
        torch.testing.assert_close(adapted(x), wanted(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merge_graph(adapted)(x), wanted(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(detach(adapted)(x), desk.net(x))


def test_its_modules_are_spelled_from_updates(desk: Desk) -> None:
    update = Toy(left=torch.ones(6, 1), gain=torch.ones(1), right=torch.ones(1, 4), scale=0.5)
    made = adaptsurgery.Adapter.from_updates({"fc": update}, base=desk.base)
    out = desk.at("made.safetensors")
    made.save(out, "lycoris")
    adaptsurgery.merge(desk.base, [out], desk.at("m.safetensors"))
    close(
        load_file(desk.at("m.safetensors")),
        desk.merged({"fc.weight": np.full((6, 4), 0.5)}),
    )


# -- One of an unknown kind ------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
def test_an_unknown_kind_is_applied_by_nothing(desk: Desk, beside: bool) -> None:
    path = desk.odd("odd", beside=beside)
    adapter = adaptsurgery.load(path, base=desk.base)
    graph = torch.fx.symbolic_trace(desk.net)
    out = desk.at("out.safetensors")
    layer = AdaptedLayer(desk.net.fc)
    attempts: dict[str, Sent] = {
        "merge": lambda: adaptsurgery.merge(desk.base, [path], out),
        "unmerge": lambda: adaptsurgery.unmerge(desk.base, [path], out),
        "fold": lambda: adaptsurgery.fold(desk.net, adapter),
        "unfold": lambda: adaptsurgery.unfold(desk.net, adapter),
        "graph": lambda: attach(graph, adapter),
        "layer": lambda: layer.add("odd", adapter["fc"]),
        "half": lambda: adaptsurgery.merge(desk.base, [(path, 0.5)], out),
        "lora": lambda: adaptsurgery.convert(
            path, out, "lycoris", base=desk.base, algorithm="lora"
        ),
        "peft": lambda: adaptsurgery.convert(path, desk.at("p"), "peft", base=desk.base),
        "sum": lambda: adaptsurgery.combine([path, path], out, base=desk.base),
        "sum beside": lambda: adaptsurgery.combine([path, desk.toy("toy")[0]], out, base=desk.base),
    }
    codes = {"unmerge": "no-inverse", "half": "no-weight", "peft": "no-odd"}
    codes |= {"sum": "no-sum", "sum beside": "no-sum"}
    for where, attempt in attempts.items():
        with pytest.raises(SurgeryError) as raised:
            attempt()
        assert raised.value.code == codes.get(where, "unknown-update"), (where, raised.value)
        assert not out.exists() and not desk.at("p").exists()
    held = {n: t.detach().numpy() for n, t in desk.net.state_dict().items()}
    assert all(np.array_equal(held[n], w) for n, w in desk.weights.items())


def test_an_unknown_kind_is_carried_where_bytes_are(desk: Desk) -> None:
    path = desk.odd("odd", beside=True)
    assert adaptsurgery.inspect(path, base=desk.base).algorithms == {"odd": 1, "lora": 1}
    kohya, small = desk.at("k.safetensors"), desk.at("s.safetensors")
    adaptsurgery.convert(path, kohya, "kohya", base=desk.base)
    adaptsurgery.resize(path, small, rank=1, base=desk.base)
    alone = desk.at("c.safetensors")
    adaptsurgery.combine([path], alone, base=desk.base)
    for out in (kohya, small, alone):
        held = load_file(out)
        [key] = [k for k in held if k.endswith("fc.odd_sign")]
        assert held[key].tobytes() == load_file(path)["lycoris_fc.odd_sign"].tobytes()


def test_a_name_without_a_row_is_refused_by_name() -> None:
    from adaptsurgery_formats import FORMATS
    from adaptsurgery_formats.state import delta_shape, kernel_of, module_rank

    stranger = ModuleState("fc", "nobody", {})
    for ask in (delta_shape, kernel_of, module_rank):
        refused("unknown-algorithm", lambda ask=ask: ask(stranger))  # type: ignore[misc]
    for layout in FORMATS.values():
        refused("unknown-algorithm", lambda layout=layout: layout.holds(stranger, None))  # type: ignore[misc]
    refused("unknown-algorithm", lambda: algorithms.build("nobody", {}))
