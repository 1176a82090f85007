"""LoKr from two weights: the nearest Kronecker product, in shapes that the real loaders make again."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptsurgery.algorithms import build, extract
from adaptsurgery.algorithms.lokr import LoKr, candidates, fit, sweep
from adaptsurgery.core.geometry import Layer
from adaptsurgery.nearest.goal import Fit, Goal
from adaptsurgery.nearest.kronecker import (
    CutMatrix,
    LowRankCut,
    Tucker,
    Whole,
    leading_vector,
    nearest_product,
)
from adaptsurgery_formats.errors import SurgeryError, ValueRefused
from adaptsurgery_formats.lokr_cuts import (
    FACTORIZATIONS,
    Storage,
    lycoris_factorization,
    lycoris_loads,
    peft_decompose_factor,
    peft_factorization,
    sweepable_factors,
)

LOADERS = ("peft", "lycoris")
SHAPES = [(24, 20), (12, 30), (16, 9), (12, 8, 3, 3), (8, 12, 1, 1), (9, 4, 3, 2)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def true_kron(first: Tensor, second: Tensor) -> Tensor:
    """(a, c) ⊗ (b, d, *k), a block at a time."""
    rows = [torch.cat([w * second for w in row], 1) for row in first]
    return torch.cat(rows, 0)


def rearranged(delta: Tensor, a: int, c: int) -> Tensor:
    """Van Loan and Pitsianis's R, a block a row."""
    b, d = delta.shape[0] // a, delta.shape[1] // c
    blocks = [
        delta[i * b : (i + 1) * b, j * d : (j + 1) * d].flatten()
        for i in range(a)
        for j in range(c)
    ]
    return torch.stack(blocks).double()


def slots_of(found: Fit) -> dict[str, Tensor]:
    assert isinstance(found.update, LoKr) and found.update.scale == 1
    return found.update.tensors()


def measured(found: Fit, delta: Tensor) -> float:
    """‖D − D̂‖/‖D‖ by the definition, in float64."""
    made = reference.lokr({n: t.double() for n, t in slots_of(found).items()}, tuple(delta.shape))
    return float((delta.double() - made).norm() / delta.double().norm())


def fitted(delta: Tensor, goal: Goal | None = None, **own: Any) -> Fit:
    base = drawn(*delta.shape, seed=99)
    found = fit(base, base + delta, goal or Goal(rank=own.pop("rank")), **own)
    assert found.parameters == sum(t.numel() for t in slots_of(found).values())
    return found


# --- the nearest product -------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q"), [(5, 40), (40, 5), (1, 7), (300, 310), (310, 280), (270, 300)])
@pytest.mark.parametrize("kind", ["flat", "decaying", "rank 1"])
def test_the_leading_vector_captures_what_the_svd_does(p: int, q: int, kind: str) -> None:
    matrix = drawn(p, q, seed=p)
    if kind == "rank 1":
        matrix = torch.outer(drawn(p), drawn(q, seed=1))
    elif kind == "decaying":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u / torch.arange(1.0, len(s) + 1)) @ vt
    best = float(torch.linalg.svdvals(matrix.double())[0]) ** 2
    vector = leading_vector(matrix, seed=3)
    assert abs(float(vector.norm()) - 1) < 1e-6
    assert float((vector @ matrix.double()).square().sum()) >= best * (1 - 1e-5)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_factors_are_the_best_there_are(shape: tuple[int, ...], loader: str) -> None:
    delta = drawn(*shape)
    found = fitted(delta, rank=1000, loader=loader)
    (a, _), (c, _) = (FACTORIZATIONS[loader](n, -1) for n in shape[:2])
    values = torch.linalg.svdvals(rearranged(delta, a, c))
    least = math.sqrt(1 - float(values[0] ** 2 / values.square().sum()))
    assert found.error == pytest.approx(least, rel=1e-5)
    assert found.limit == pytest.approx(least, rel=1e-5)
    assert found.error == pytest.approx(measured(found, delta), rel=1e-5)


OPTIONS: list[dict[str, Any]] = [
    {}, {"factor": 2}, {"decompose_both": True, "factor": 4}, {"tucker": True, "factor": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(48, 40), (24, 20, 3, 3), (40, 24, 3, 2)])
def test_the_error_is_that_of_the_update(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    delta = drawn(*shape) + 0.5 * true_kron(
        drawn(4, 4), drawn(shape[0] // 4, shape[1] // 4, *shape[2:])
    )
    found = fitted(delta, rank=2, **options)
    assert found.error == pytest.approx(measured(found, delta), rel=1e-5)
    assert found.limit is not None and found.limit <= found.error * (1 + 1e-6)


def cut_of(kind: str, rank: int) -> CutMatrix:
    return {"whole": Whole, "low": lambda: LowRankCut(rank), "tucker": lambda: Tucker(rank)}[kind]()


@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.sampled_from(["whole", "low"]),
    st.sampled_from(["low", "tucker"]),
)
def test_every_half_step_captures_as_much_or_more(
    seed: int, rank: int, first: str, second: str
) -> None:
    a, c, b, d, k = 4, 6, 7, 5, 3
    r = drawn(a * c, b * d * k, seed=seed)
    cuts = cut_of(first, rank), cut_of(second, rank)
    found = nearest_product(r, leading_vector(r), ((a, c), (b, d, k)), cuts)
    captured = torch.tensor([0.0, *found.captured], dtype=torch.float64)
    assert (captured.diff() >= -1e-9).all() and len(found.captured) <= 30
    # And it is what the factors capture.
    w1 = found.first[0] if first == "whole" else found.first[0] @ found.first[1]
    if second == "low":
        w2 = found.second[0] @ found.second[1]
    else:
        w2 = torch.einsum("pqk,pb,qd->bdk", found.second[2], *found.second[:2])
    missing = (r.double() - torch.outer(w1.flatten(), w2.flatten())).norm() / r.double().norm()
    assert 1 - float(missing) ** 2 == pytest.approx(found.captured[-1], abs=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_never_worse_than_the_nearest_product_and_then_its_svd(
    seed: int, rank: int, both: bool
) -> None:
    a, c, b, d = 8, 10, 12, 11
    r = drawn(a * c, b * d, seed=seed)
    u, s, vt = torch.linalg.svd(r.double(), full_matrices=False)
    first, second = u[:, 0].reshape(a, c), (s[0] * vt[0]).reshape(b, d)
    if both:
        first = best_of_rank(first, rank)
    missing = (
        r.double() - torch.outer(first.flatten(), best_of_rank(second, rank).flatten())
    ).norm()
    cuts = LowRankCut(rank) if both else Whole(), LowRankCut(rank)
    found = nearest_product(r, leading_vector(r), ((a, c), (b, d)), cuts)
    assert 1 - found.captured[-1] <= float(missing / r.double().norm()) ** 2 + 1e-6


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_a_large_low_rank_factor_is_cut_as_well_as_by_svds() -> None:
    """Past the size where each cut is exact: the end is a fixed point of exact half-steps."""
    r = drawn(4, 120 * 130)
    found = nearest_product(r, leading_vector(r), ((2, 2), (120, 130)), (Whole(), LowRankCut(3)))
    w2 = found.second[0] @ found.second[1]
    w1 = (r.double() @ w2.flatten()) / w2.norm() ** 2
    again = best_of_rank((w1 @ r.double()).reshape(120, 130) / w1.norm() ** 2, 3)
    exact = (r.double() - torch.outer(w1, again.flatten())).norm() / r.double().norm()
    assert 1 - found.captured[-1] <= float(exact) ** 2 + 1e-4


# --- adapters of the peers -----------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(40, 48), (5, 40)),
    "conv2d": (lambda: nn.Conv2d(20, 24, 3, padding=1), (2, 20, 6, 6)),
    "1x1": (lambda: nn.Conv2d(20, 24, 1), (2, 20, 4, 4)),
    "conv1d": (lambda: nn.Conv1d(20, 24, 3), (2, 20, 9)),
}
PEFT = [
    {"r": 2}, {"r": 30}, {"r": 3, "decompose_factor": 2}, {"r": 1, "decompose_both": True},
    {"r": 2, "decompose_factor": 8, "decompose_both": True},
    {"r": 2, "decompose_factor": 2, "use_effective_conv2d": True},
]  # fmt: skip


def peft_model(layer: nn.Module, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {
        "alpha": settings["r"],
        "target_modules": ["layer"],
        "init_weights": False,
        **settings,
    }
    return peft.get_peft_model(Net(copy.deepcopy(layer)), peft.LoKrConfig(**settings)).eval()


@pytest.mark.parametrize("settings", PEFT, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_lokr_trained_by_peft_is_recovered_and_loads_again(
    kind: str, settings: dict[str, Any]
) -> None:
    """Merged into its weight by PEFT, found again, and put into a fresh PEFT model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    layer = LAYERS[kind][0]()
    model = peft_model(
        layer, alpha=3 * settings["r"], **{k: v for k, v in settings.items() if k != "alpha"}
    )
    own = {
        "factor": settings.get("decompose_factor", -1), "tucker": settings.get("use_effective_conv2d", False),
        "decompose_both": settings.get("decompose_both", False),
    }  # fmt: skip
    storage = peft_storage(tuple(layer.weight.shape), **own)
    if storage.refusal(settings["r"]):
        with pytest.raises(ValueRefused, match="not-loadable"):
            fit(layer.weight, layer.weight + 1, Goal(rank=settings["r"]), **own)
        return
    tuned = model.merge_and_unload().layer.weight.detach()
    found = fit(layer.weight.detach(), tuned, Goal(rank=settings["r"]), **own)
    rounding = 1e-7 * float(tuned.norm()) / found.norm  # of the merge
    assert found.error < 2e-6 + 3 * rounding
    # The real loader takes the tensors as they are, and gives our Δ.
    fresh = peft_model(layer, **settings)
    state = {f"base_model.model.layer.lokr_{n}": for_peft(n, t) for n, t in slots_of(found).items()}
    assert {k: v.shape for k, v in peft.get_peft_model_state_dict(fresh).items()} == {
        k: v.shape for k, v in state.items()
    }
    peft.set_peft_model_state_dict(fresh, state)
    same(fresh, layer, torch.randn(LAYERS[kind][1]), found)


def for_peft(name: str, tensor: Tensor) -> Tensor:
    """PEFT keeps a Conv1d's core as (r, r, k, 1)."""
    return tensor[..., None] if name == "t2" and tensor.dim() == 3 else tensor


def peft_storage(
    shape: tuple[int, ...], factor: int, tucker: bool, decompose_both: bool
) -> Storage:
    out, into = (peft_factorization(n, factor) for n in shape[:2])
    return Storage(shape, out, into, decompose_both, tucker, "peft")


def same(model: Any, layer: nn.Module, x: Tensor, found: Fit) -> None:
    with torch.no_grad():
        wanted = model(x) - layer(x)
        seen = found.update.apply(x, Layer.from_module(layer)) - layer(x)
    assert float((seen - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    "settings", [{}, {"factor": 2}, {"decompose_both": True}, {"lora_dim": 30}], ids=str
)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d"])
def test_a_lokr_trained_by_lycoris_is_recovered_and_loads_again(
    kind: str, settings: dict[str, Any]
) -> None:
    """By its forward pass, for its own merge scales twice; its loader guesses from the shapes."""
    modules = pytest.importorskip("lycoris.modules")
    torch.manual_seed(2)
    layer = LAYERS[kind][0]()
    settings = {"lora_dim": 2, "alpha": 3, **settings}
    module = modules.LokrModule("layer", layer, **settings)
    slots = {}
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter)
        slots[name.removeprefix("lokr_")] = parameter.detach().clone()
    shape = tuple(layer.weight.shape)
    scale = 1.0 if {"w1", "w2"} <= slots.keys() else 3 / settings["lora_dim"]
    base = layer.weight.detach()
    tuned = build("lokr", slots, scale, shape).fold(base.double()).float()
    own = {
        "factor": settings.get("factor", -1),
        "decompose_both": settings.get("decompose_both", False),
    }
    found = fit(base, tuned, Goal(rank=settings["lora_dim"]), loader="lycoris", **own)
    assert found.error < 2e-6
    made = slots_of(found)
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in slots.items()}
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
    x = torch.randn(LAYERS[kind][1])
    with torch.no_grad():
        loaded = modules.LokrModule.make_module_from_state_dict(
            "layer", layer, *(made.get(n) for n in names), torch.tensor(float(found.rank)), None
        )
        seen = loaded.eval()(x)
        wanted = Layer.from_module(layer).forward(x, tuned)
    assert float((seen - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("kernel", [(3,), (3, 1)])
def test_peft_fails_at_a_core_of_rank_1_beside_a_last_kernel_side_of_1(
    kernel: tuple[int, ...],
) -> None:
    """So that such a LoKr is refused."""
    conv = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1](12, 16, kernel)
    model = peft_model(conv, r=1, decompose_factor=2, use_effective_conv2d=True)
    with pytest.raises(RuntimeError, match="view size"):
        model(torch.randn(2, 12, *(9,) * len(kernel)))
    delta = drawn(*conv.weight.shape)
    with pytest.raises(ValueRefused, match="tucker core of rank 1"):
        fitted(delta, rank=1, factor=2, tucker=True)
    assert fitted(delta, rank=2, factor=2, tucker=True).error < 1


# --- factors -------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 450), st.sampled_from(LOADERS))
def test_no_factor_cuts_in_a_way_that_is_not_among_the_candidates(
    o: int, i: int, factor: int, loader: str
) -> None:
    cut = FACTORIZATIONS[loader]
    known = sweepable_factors(o, i, loader)
    assert (cut(o, factor), cut(i, factor)) in known
    assert all((cut(o, f), cut(i, f)) == cuts for cuts, f in known.items())
    listed = candidates((o, i), loader)
    assert listed and len(listed) == len(set(listed))
    if len(listed) > 1:
        assert all((cut(o, f)[0], cut(i, f)[0]) != (1, 1) for f in listed)


@given(st.sampled_from(SHAPES), st.sampled_from(LOADERS), st.booleans(), st.booleans())
def test_each_rank_kept_says_more_for_more_numbers(
    shape: tuple[int, ...], loader: str, both: bool, tucker: bool
) -> None:
    for out, into in sweepable_factors(shape[0], shape[1], loader):
        storage = Storage(shape, out, into, both, tucker, loader)
        ranks = storage.ranks()
        sizes = [storage.parameters(rank) for rank in ranks]
        assert sizes == sorted(set(sizes)) and ranks == sorted(ranks)
        assert not any(storage.refusal(rank) for rank in ranks)
        if loader == "lycoris":
            assert all(lycoris_loads(storage.shapes(rank), *shape[:2]) for rank in ranks)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_fits_a_budget_loads_and_no_other_factor_is_nearer(loader: str) -> None:
    delta = drawn(48, 40)
    found = fitted(delta, Goal(budget=500), loader=loader)
    assert found.parameters <= 500
    shapes = {n: tuple(t.shape) for n, t in slots_of(found).items()}
    a, c = shapes["w1"]
    if loader == "peft":
        assert peft_decompose_factor([(a, 48 // a), (c, 40 // c)]) is not None
    else:
        assert lycoris_loads(shapes, 48, 40) and a <= 48 // a and c <= 40 // c
    for factor in candidates((48, 40), loader):
        try:
            assert (
                fitted(delta, Goal(budget=500), loader=loader, factor=factor).error >= found.error
            )
        except ValueRefused as refusal:
            assert refusal.code in ("budget-too-small", "not-loadable")


def test_one_factor_for_layers_of_several_shapes() -> None:
    """``sweep`` gives each layer's errors by factor; a true common one is found again."""
    first = true_kron(drawn(4, 4, seed=1), drawn(12, 10, seed=2))
    second = true_kron(drawn(4, 4, seed=3), drawn(6, 16, seed=4))
    layers = [first, second]
    factors = sorted({f for delta in layers for f in candidates(tuple(delta.shape))})
    tables = [sweep(torch.zeros_like(d), d, Goal(rank=16), factors) for d in layers]
    totals = {f: sum(t[f].error ** 2 for t in tables) for f in factors}
    best = min(totals, key=totals.__getitem__)
    assert best == 4 and totals[best] < 1e-10
    # Factors that cut alike share one answer.
    cuts = {f: tuple(peft_factorization(n, f) for n in first.shape) for f in factors}
    assert len({id(one) for one in tables[0].values()}) == len(set(cuts.values()))


def test_a_factor_of_1_is_a_lora_and_taken_on_request_only() -> None:
    delta = drawn(24, 20)
    assert 1 not in candidates((24, 20)) and candidates((1, 1)) == [-1]
    found = fitted(delta, rank=3, factor=1)
    values = torch.linalg.svdvals(delta.double())
    assert found.error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-5)


# --- goals ---------------------------------------------------------------------------------------


def test_a_true_lokr_is_found_by_its_error_alone() -> None:
    delta = true_kron(drawn(6, 5), drawn(8, 2, seed=1) @ drawn(2, 9, seed=2))
    found = fitted(delta, Goal(max_error=1e-4))
    assert {n: tuple(t.shape) for n, t in slots_of(found).items()} == {
        "w1": (6, 5),
        "w2_a": (8, 2),
        "w2_b": (2, 9),
    }
    assert found.rank == 2 and found.error < 2e-6


@pytest.mark.parametrize("goal", [Goal(energy=0.2), Goal(max_error=0.9)], ids=str)
def test_the_fewest_parameters_that_are_good_enough(goal: Goal) -> None:
    delta = drawn(24, 20)
    found = fitted(delta, goal)
    assert goal.met_by(found.error)
    for factor in candidates((24, 20)):
        try:
            assert fitted(delta, goal, factor=factor).parameters >= found.parameters
        except ValueRefused as refusal:
            assert refusal.code == "out-of-reach"
    smaller = fitted(delta, Goal(budget=found.parameters - 1))
    assert not goal.met_by(smaller.error)


def test_what_no_lokr_reaches_is_refused_with_the_least_errors() -> None:
    with pytest.raises(ValueRefused, match="out-of-reach") as caught:
        fitted(drawn(24, 20), Goal(max_error=0.1))
    assert any("w1 (2, 2)" in item for item in caught.value.items)
    with pytest.raises(ValueRefused, match="budget-too-small"):
        fitted(drawn(24, 20), Goal(budget=3))


# --- the same bits, any scale, and edges ---------------------------------------------------------


def bits(update: LoKr) -> list[bytes]:
    return [t.contiguous().numpy().tobytes() for t in update.tensors().values()]


def test_one_seed_gives_the_same_bits() -> None:
    base, tuned = drawn(320, 300), drawn(320, 300, seed=1)
    own: dict[str, Any] = {"rank": 4, "factor": 20}  # R (300, 320): by Lanczos
    assert bits(extract("lokr", base, tuned, **own)) == bits(extract("lokr", base, tuned, **own))


@pytest.mark.parametrize("power", [-100, -37, 3, 100])
def test_powers_of_two_go_through_to_the_bit(power: int) -> None:
    delta = drawn(24, 20, seed=5)
    plain = fit(torch.zeros(24, 20), delta, Goal(rank=2))
    grown = fit(torch.zeros(24, 20), delta * 2.0**power, Goal(rank=2))
    assert grown.error == plain.error and grown.norm == plain.norm * 2.0**power
    product = 1.0
    for name, tensor in slots_of(plain).items():
        ratio = slots_of(grown)[name] / tensor
        assert len(ratio.unique()) == 1
        product *= float(ratio.flatten()[0])
    assert product == 2.0**power


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (1, 1), (13, 17), (7, 1, 3, 3)])
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_odd_shapes(shape: tuple[int, ...], rank: int) -> None:
    delta = drawn(*shape)
    found = fitted(delta, rank=rank)
    assert found.error == pytest.approx(measured(found, delta), rel=1e-4, abs=1e-6)
    if min(shape[:2]) == 1 and 1 in shape[:2] and found.limit is not None:
        assert found.error <= 1


def test_equal_weights_give_zeros_and_say_so() -> None:
    weight = drawn(24, 20)
    for goal in (Goal(rank=2), Goal(budget=100), Goal(energy=0.9)):
        found = fit(weight, weight.clone(), goal)
        assert found.error == found.norm == found.limit == 0 and "equal" in found.notes[0]
        assert not any(t.any() for t in slots_of(found).values())


def test_a_constant_difference_is_exact() -> None:
    assert fitted(torch.full((24, 20), 0.25), rank=1, factor=2).error < 2e-6


def test_a_rank_past_w2s_own_is_filled_with_zeros_and_noted() -> None:
    found = fitted(drawn(8, 200), rank=9)
    assert slots_of(found)["w2_a"].shape == (4, 9) and "rest of rank 9 is zero" in found.notes[0]
    assert found.error == pytest.approx(found.limit, rel=1e-6)


def test_bfloat16_and_float64_checkpoints() -> None:
    delta = true_kron(drawn(4, 4), drawn(6, 5))
    base, tuned = drawn(24, 20), drawn(24, 20) + delta
    half = fit(base.bfloat16(), tuned.bfloat16(), Goal(rank=9))
    assert (
        all(t.dtype == torch.float32 for t in slots_of(half).values()) and 1e-4 < half.error < 0.02
    )
    exact = true_kron(drawn(4, 4).double(), drawn(6, 5).double())
    double = fit(base.double(), base.double() + exact, Goal(rank=9))
    assert all(t.dtype == torch.float64 for t in slots_of(double).values()) and double.error < 1e-12


def test_what_is_no_pair_of_weights_is_refused() -> None:
    weight = drawn(24, 20)
    bad = weight.clone()
    bad[3, 4] = math.nan
    for base, tuned in (
        (weight, bad),
        (weight, weight[:-1]),
        (weight.int(), weight.int()),
        (weight[0], weight[1]),
    ):
        with pytest.raises(SurgeryError):
            fit(base, tuned, Goal(rank=2))
    for wrong in ({"loader": "kohya"}, {"factor": 0}, {"factor": -2}):
        with pytest.raises(ValueRefused):
            fitted(weight, rank=2, **wrong)


@pytest.mark.parametrize(
    ("shape", "own", "said"),
    [
        ((16, 8, 3), {}, "Conv1d LoKr with a full w2"),
        ((16, 8, 3, 3, 3), {}, "no LoKr for Conv3d"),
        ((16, 12, 3, 3), {"tucker": True, "factor": 2, "loader": "lycoris"}, "guesses another"),
    ],
)
def test_what_a_loader_would_not_give_back_is_refused(
    shape: tuple[int, ...], own: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueRefused, match=said) as caught:
        fitted(drawn(*shape), rank=2, **own)
    assert caught.value.code == "not-loadable" and "w1" in caught.value.seen


def test_lycoris_takes_conv3d() -> None:
    delta = true_kron(drawn(4, 2), drawn(4, 4, 2, 2, 2))
    found = fitted(delta, rank=2, loader="lycoris")
    assert slots_of(found)["w2"].shape == (4, 4, 2, 2, 2) and found.error < 2e-6
    assert lycoris_factorization(16, -1) == (4, 4)
