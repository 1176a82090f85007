"""LoHa from two weights: never farther than the LoRA of its rank, and a true LoHa found again."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptsurgery.algorithms import extract
from adaptsurgery.algorithms.loha import LoHa, fit
from adaptsurgery.core.geometry import Layer
from adaptsurgery.nearest import hadamard
from adaptsurgery.nearest.goal import Fit, Goal
from adaptsurgery_formats.errors import SurgeryError, ValueRefused


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def true_loha(m: int, n: int, rank: int, seed: int, noise: float = 0.0) -> Tensor:
    """A LoHa of normal factors, and noise of that part of its norm."""
    halves = [
        drawn(m, rank, seed=seed + 2 * h) @ drawn(rank, n, seed=seed + 2 * h + 1) for h in (1, 2)
    ]
    delta = halves[0] * halves[1]
    other = drawn(m, n, seed=seed)
    return delta + noise * delta.norm() / other.norm() * other


def lora_error(delta: Tensor, rank: int) -> float:
    """‖D − SVD_r(D)‖/‖D‖."""
    values = torch.linalg.svdvals(delta.double().flatten(1))
    return float(values[rank:].norm() / values.norm())


def fitted(delta: Tensor, goal: Goal | None = None, *, rank: int = 0, seed: int = 0) -> Fit:
    return fit(torch.zeros_like(delta), delta, goal or Goal(rank=rank), seed=seed)


def slots_of(found: Fit) -> dict[str, Tensor]:
    assert isinstance(found.update, LoHa) and found.update.scale == 1
    held = found.update.tensors()
    assert found.parameters == sum(t.numel() for t in held.values())
    return held


def measured(found: Fit, delta: Tensor) -> float:
    made = reference.loha({n: t.double() for n, t in slots_of(found).items()}, tuple(delta.shape))
    return float((delta.double() - made).norm() / delta.double().norm())


# --- the laws ------------------------------------------------------------------------------------

KINDS = ("normal", "sparse", "decaying", "low rank", "product", "rows", "constant")


@st.composite
def differences(draw: st.DrawFn) -> Tensor:
    m, n, seed = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(0, 10**6))
    kind, plain = draw(st.sampled_from(KINDS)), drawn(m, n, seed=seed)
    if kind == "sparse":
        kept = drawn(m, n, seed=seed + 1) > 1.5
        kept[0, 0] = True
        return plain * kept
    if kind == "decaying":
        return plain / torch.arange(1.0, n + 1) ** 2
    if kind == "low rank":
        return drawn(m, 3, seed=seed) @ drawn(3, n, seed=seed + 1)
    if kind == "product":
        return true_loha(m, n, draw(st.integers(1, 4)), seed)
    if kind == "rows":
        return plain * (torch.arange(m)[:, None] % 5 == 0)
    return plain if kind == "normal" else torch.full((m, n), 0.3)


@settings(max_examples=40)
@given(differences(), st.integers(1, 8))
def test_never_farther_than_the_lora_of_its_rank(delta: Tensor, rank: int) -> None:
    found = fitted(delta, rank=rank)
    assert found.error <= lora_error(delta, rank) * (1 + 1e-4) + 1e-6
    assert found.error == pytest.approx(measured(found, delta), rel=1e-4, abs=1e-6)
    assert found.rank == min(rank, *delta.shape)
    # No factor is out of proportion: what is added up is of the size of what comes out.
    terms = {n: t.abs() for n, t in slots_of(found).items()}
    assert float(reference.loha(terms, tuple(delta.shape)).norm()) <= 1e3 * float(delta.norm())


@pytest.mark.parametrize("shape", [(24, 4, 3, 3), (16, 6, 5), (12, 5, 2, 3, 2)])
def test_convolutions_are_flat(shape: tuple[int, ...]) -> None:
    delta = drawn(*shape)
    found = fitted(delta, rank=3)
    columns = math.prod(shape[1:])
    assert {n: tuple(t.shape) for n, t in slots_of(found).items()} == {
        "w1_a": (shape[0], 3), "w1_b": (3, columns), "w2_a": (shape[0], 3), "w2_b": (3, columns)
    }  # fmt: skip
    assert isinstance(found.update, LoHa) and found.update.dense().shape == shape
    assert found.error == pytest.approx(measured(found, delta), rel=1e-5)
    assert found.error < lora_error(delta, 3)


@pytest.mark.parametrize("rank", [4, 8])
def test_flat_and_sparse_deltas_are_nearer_than_a_lora_of_twice_the_rank(rank: int) -> None:
    normal = drawn(300, 400)
    sparse = normal * (drawn(300, 400, seed=1) > 2)
    for delta in (normal, sparse):
        assert fitted(delta, rank=rank).error < lora_error(delta, 2 * rank)


# --- true products -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_true_products_are_found_again(rank: int) -> None:
    errors = [fitted(true_loha(96, 120, rank, 10 * s), rank=rank, seed=s).error for s in range(6)]
    assert max(errors) < 1e-5, errors


def test_true_products_of_few_rows_are_found_again() -> None:
    """Where most random starts end elsewhere, and the nearest set out again."""
    errors = [fitted(true_loha(64, 64, 4, 10 * s), rank=4, seed=s).error for s in range(6)]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_under_noise_what_is_left_is_no_more_than_the_noise(noise: float) -> None:
    part = noise / math.sqrt(1 + noise**2)
    errors = [fitted(true_loha(128, 160, 3, 10 * s, noise), rank=3).error for s in range(10)]
    assert sum(error <= part * 1.01 for error in errors) >= 9, errors


def test_a_product_of_a_lower_rank_is_found_at_a_higher_one() -> None:
    assert fitted(true_loha(96, 120, 2, 5), rank=3).error < 1e-5


def test_in_float64_a_true_product_is_found_beyond_float32() -> None:
    halves = [
        drawn(60, 2, seed=h, dtype=torch.float64) @ drawn(2, 70, seed=h + 2, dtype=torch.float64)
        for h in (1, 2)
    ]
    found = fitted(halves[0] * halves[1], rank=2)
    assert found.error < 1e-7 and slots_of(found)["w1_a"].dtype == torch.float64


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(80, 96), (5, 80)),
    "conv2d": (lambda: nn.Conv2d(12, 64, 3, padding=1), (2, 12, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(24, 64, 3), (2, 24, 9)),
}


def peft_model(layer: nn.Module, rank: int, alpha: int) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(r=rank, alpha=alpha, target_modules=["layer"], init_weights=False)
    return peft.get_peft_model(Net(copy.deepcopy(layer)), config).eval()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_loha_trained_by_peft_is_recovered_and_loads_again(kind: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    layer = LAYERS[kind][0]()
    tuned = peft_model(layer, 3, 900).merge_and_unload().layer.weight.detach()
    found = fit(layer.weight.detach(), tuned, Goal(rank=3))
    assert found.error < 1e-5
    fresh = peft_model(layer, 3, 3)
    state = {f"base_model.model.layer.hada_{n}": t for n, t in slots_of(found).items()}
    assert peft.get_peft_model_state_dict(fresh).keys() == state.keys()
    peft.set_peft_model_state_dict(fresh, state)
    x = torch.randn(LAYERS[kind][1])
    with torch.no_grad():
        wanted = Layer.from_module(layer).forward(x, tuned)
        assert float((fresh(x) - wanted).norm() / wanted.norm()) < 1e-5
        assert isinstance(found.update, LoHa)
        ours = found.update.dense()
        theirs = fresh.base_model.model.layer.get_delta_weight("default")
        assert float((theirs - ours).norm() / ours.norm()) < 1e-6


@pytest.mark.parametrize("kind", LAYERS)
def test_a_loha_trained_by_lycoris_is_recovered_and_loads_again(kind: str) -> None:
    """By its forward pass, for its own merge scales twice."""
    modules = pytest.importorskip("lycoris.modules")
    torch.manual_seed(4)
    layer = LAYERS[kind][0]()
    module = modules.loha.LohaModule("layer", layer, lora_dim=2, alpha=3).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    slots = {n.removeprefix("hada_"): p.detach() for n, p in module.named_parameters()}
    base, shape = layer.weight.detach(), tuple(layer.weight.shape)
    tuned = (base.double() + 1.5 * reference.delta("loha", slots, shape)).float()
    found = fit(base, tuned, Goal(rank=2))
    assert found.error < 1e-5
    made, x = slots_of(found), torch.randn(LAYERS[kind][1])
    with torch.no_grad():
        loaded = modules.loha.LohaModule.make_module_from_state_dict(
            "layer", layer, made["w1_a"], made["w1_b"], made["w2_a"], made["w2_b"],
            None, None, torch.tensor(2.0), None,
        )  # fmt: skip
        wanted = Layer.from_module(layer).forward(x, tuned)
        assert float((loaded.eval()(x) - wanted).norm() / wanted.norm()) < 1e-5


# --- the steps -----------------------------------------------------------------------------------


def sides(m: int, n: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two random sides, those of every row and column of one norm, as a step leaves them."""
    both = [drawn(2, size, rank, seed=seed + size, dtype=torch.float64) for size in (m, n)]
    rows, columns = (side / side.norm(dim=2, keepdim=True) for side in both)
    return rows, columns


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 4), st.integers(0, 10**6))
def test_a_step_knows_its_residual_and_never_goes_up(m: int, n: int, rank: int, seed: int) -> None:
    delta = drawn(m, n, seed=seed, dtype=torch.float64)
    rows, columns = sides(m, n, rank, seed)
    target = hadamard.DenseDifference(delta)
    before = float((delta - hadamard.product(rows, columns)).square().sum())
    for lift in (False, True):
        problem = hadamard._Rows(target, columns)
        assert target.square + float(problem.value(rows).sum()) == pytest.approx(before, rel=1e-9)
        for new in (problem.solved(rows), problem.lifted(rows)):
            left = float((delta - hadamard.product(new, columns)).square().sum())
            assert target.square + float(problem.value(new).sum()) == pytest.approx(
                left, rel=1e-6, abs=1e-9
            )
        stepped, left = hadamard._side(target, columns, rows, lift)
        after = float((delta - hadamard.product(stepped, columns)).square().sum())
        assert float(left) <= before * (1 + 1e-9)
        assert after == pytest.approx(float(left), rel=1e-6, abs=1e-9)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 4), st.integers(0, 10**6))
def test_compressed_and_uncompressed_steps_are_one(m: int, n: int, rank: int, seed: int) -> None:
    delta = drawn(m, n, seed=seed, dtype=torch.float64)
    rows, columns = sides(m, n, rank, seed)
    target = hadamard.DenseDifference(delta)
    new, left = hadamard._uncompressed(delta, columns, rows, target.ridge)
    same = hadamard._Rows(target, columns).solved(rows)
    made, expected = hadamard.product(new, columns), hadamard.product(same, columns)
    assert float((made - expected).norm()) <= 1e-5 * float(delta.norm())
    assert float(left) == pytest.approx(float((delta - made).square().sum()), rel=1e-9, abs=1e-12)


def test_a_factored_target_is_the_dense_one() -> None:
    left, right = drawn(20, 4, dtype=torch.float64), drawn(30, 4, seed=1, dtype=torch.float64)
    dense, factored = hadamard.DenseDifference(left @ right.t()), hadamard.Factored(left, right)
    assert factored.square == pytest.approx(dense.square)
    for one, other, size in ((dense, factored, 30), (dense.flipped(), factored.flipped(), 20)):
        c = drawn(size, 6, dtype=torch.float64)
        assert torch.allclose(one.times(c), other.times(c))


def test_the_lift_leaves_basins_that_alternation_stays_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def recovered() -> int:
        found = 0
        for seed in range(3):
            target = hadamard.DenseDifference(true_loha(96, 120, 3, 10 * seed).double())
            starts = [sides(96, 120, 3, 1000 * seed + 50 * s) for s in range(24)]
            rows, columns = (torch.stack(side) for side in zip(*starts))
            *_, left = hadamard.refine(target, rows, columns, 40, lifted=40, enough=0)
            found += int((left < 1e-8).sum())
        return found

    with_lift = recovered()
    monkeypatch.setattr(hadamard._Rows, "lifted", lambda self, own: own)
    assert with_lift >= 3 * max(1, recovered())


def test_balancing_changes_no_product_and_evens_out_columns() -> None:
    rows, columns = sides(20, 30, 3, 1)
    rows = rows * torch.tensor([1e-6, 1.0, 1e5])
    even_rows, even_columns = hadamard.balanced(rows, columns)
    wanted = hadamard.product(rows, columns)
    assert torch.allclose(hadamard.product(even_rows, even_columns), wanted, rtol=1e-9, atol=0)
    squares = [side.square().mean(1) for side in (even_rows, even_columns)]
    assert torch.allclose(squares[0], squares[1])


def test_factors_that_cancel_are_rejected() -> None:
    """Two terms of 10⁶ whose difference is D, in float64: near, and of no use in any file."""
    delta = drawn(20, 30)
    lora = hadamard._from_svd(hadamard.leading(delta, 2))
    exact = hadamard._from_svd(hadamard.leading(delta.double(), 20))
    rows, columns = exact[0].clone(), exact[1].clone()
    big = (
        torch.full((20, 1), 1e3, dtype=torch.float64),
        torch.full((30, 1), 1e3, dtype=torch.float64),
    )
    first = torch.cat([rows[0], big[0], big[0]], 1), torch.cat([columns[0], big[1], -big[1]], 1)
    second = torch.nn.functional.pad(rows[1], (0, 2)), torch.nn.functional.pad(columns[1], (0, 2))
    cancelling = torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]])
    wide = delta.double()
    assert float((wide - hadamard.product(*cancelling)).norm() / wide.norm()) < 1e-6
    assert hadamard._judged(wide, [cancelling], lora) is lora
    assert hadamard._judged(wide, [exact], lora) is not lora
    broken = rows.clone()
    broken[0, 0, 0] = math.nan
    assert hadamard._judged(wide, [(broken, columns)], lora) is lora


# --- goals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [Goal(energy=0.5), Goal(max_error=0.6)], ids=str)
def test_the_least_rank_that_is_good_enough(goal: Goal) -> None:
    delta = drawn(40, 50) / torch.arange(1.0, 51) ** 0.5
    found = fitted(delta, goal)
    assert goal.met_by(found.error) and found.rank > 1
    assert not goal.met_by(fitted(delta, rank=found.rank - 1).error)


def test_a_true_product_is_found_by_its_error_alone() -> None:
    found = fitted(true_loha(96, 120, 3, 1), Goal(max_error=1e-4))
    assert found.rank == 3 and found.error < 1e-5


def test_everything_is_reached_at_last() -> None:
    assert fitted(drawn(12, 15), Goal(energy=1.0)).error < 2e-6


def test_the_largest_rank_within_a_budget() -> None:
    assert fitted(drawn(40, 50), Goal(budget=2 * 90 * 3 + 179)).rank == 3
    with pytest.raises(ValueRefused, match="budget-too-small"):
        fitted(drawn(40, 50), Goal(budget=179))


# --- the same bits, any scale, and edges ---------------------------------------------------------


def bits(update: LoHa) -> list[bytes]:
    return [t.numpy().tobytes() for t in update.tensors().values()]


@pytest.mark.parametrize(
    "delta", [drawn(300, 280), true_loha(300, 280, 3, 7, 0.1)], ids=["flat", "product"]
)
def test_one_seed_gives_the_same_bits(delta: Tensor) -> None:
    base = drawn(300, 280, seed=9)
    one, two = (extract("loha", base, base + delta, rank=3, seed=5) for _ in range(2))
    assert bits(one) == bits(two)
    assert bits(one) != bits(extract("loha", base, base + delta, rank=3, seed=6))


@pytest.mark.parametrize("power", [-100, -37, 3, 100])
def test_powers_of_two_go_through_to_the_bit(power: int) -> None:
    delta = drawn(24, 20, seed=5)
    plain, grown = fitted(delta, rank=2), fitted(delta * 2.0**power, rank=2)
    assert grown.error == plain.error and grown.norm == plain.norm * 2.0**power
    assert plain.spectrum is not None and grown.spectrum is not None
    assert torch.allclose(grown.spectrum / 2.0**power, plain.spectrum)
    product = 1.0
    for name, tensor in slots_of(plain).items():
        ratio = (slots_of(grown)[name] / tensor).unique()
        assert len(ratio) == 1
        product *= float(ratio)
    assert product == 2.0**power


def test_the_spectrum_is_the_leading_singular_values() -> None:
    delta = drawn(60, 50)
    found = fitted(delta, rank=3)
    assert found.spectrum is not None
    wanted = torch.linalg.svdvals(delta.double())[: len(found.spectrum)]
    assert torch.allclose(found.spectrum, wanted, rtol=1e-5) and len(wanted) >= 3


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (1, 1), (2, 50)])
def test_thin_weights_are_exact_at_a_rank_cut_down(shape: tuple[int, int]) -> None:
    found = fitted(drawn(*shape), rank=9)
    assert found.rank == min(shape) and found.error < 2e-6 and "cut down" in found.notes[0]


def test_equal_weights_give_zero_and_say_so() -> None:
    weight = drawn(24, 20)
    for goal in (Goal(rank=2), Goal(budget=200), Goal(energy=0.9)):
        found = fit(weight, weight.clone(), goal)
        assert found.error == found.norm == 0 and "equal" in found.notes[0]
        assert not reference.loha(slots_of(found), (24, 20)).any()


def test_a_rank_past_the_largest_that_is_searched_is_a_lora_and_noted() -> None:
    delta = drawn(90, 100)
    found = fitted(delta, rank=hadamard.MOST + 2)
    assert found.error == pytest.approx(lora_error(delta, hadamard.MOST + 2), rel=1e-3)
    assert "written as the LoRA" in found.notes[0]


def test_bfloat16_checkpoints_give_float32_factors() -> None:
    base = drawn(96, 120)
    found = fit(base.bfloat16(), (base + true_loha(96, 120, 2, 3)).bfloat16(), Goal(rank=2))
    assert (
        all(t.dtype == torch.float32 for t in slots_of(found).values())
        and 1e-5 < found.error < 0.02
    )


def test_what_is_no_pair_of_weights_is_refused() -> None:
    weight = drawn(24, 20)
    bad = weight.clone()
    bad[3, 4] = math.inf
    pairs = (
        (weight, bad),
        (weight, weight[:-1]),
        (weight.int(), weight.int()),
        (weight[0], weight[1]),
    )
    for base, tuned in pairs:
        with pytest.raises(SurgeryError):
            fit(base, tuned, Goal(rank=2))
