"""A block edit is the composed fold, whatever the storage, the slices, the order of blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases, numbers, slots
from torch import Tensor

from adaptsurgery.algorithms import HRA, DoRA, LoRA, build
from adaptsurgery.core.blocks import (
    BlockEdit,
    Norms,
    Placed,
    change_rows,
    edit_for,
    edit_of,
    settle,
)
from adaptsurgery.core.rounding import rounded
from adaptsurgery.core.update import Delta, Update, compose
from adaptsurgery_formats.errors import InexactError, ShapeError, ValueRefused

ALGORITHMS = ("lora", "loha", "lokr", "hra", "full", "dora")
KINDS = ("linear", "Conv1D", "conv1d", "conv2d", "conv3d", "embedding")


def in_blocks(edit: BlockEdit, stored: Tensor, rows: int) -> Tensor:
    """The edit on a copy, ``rows`` units at a time."""
    out = stored.clone().contiguous()
    matrix, step = out.view(edit.rows, edit.columns), rows * edit.unit
    for start in range(0, edit.rows, step):
        edit.apply(matrix[start : start + step], start)
    return out


def near(seen: Tensor, wanted: Tensor) -> None:
    assert seen.shape == wanted.shape
    torch.testing.assert_close(seen, wanted, rtol=1e-11, atol=1e-11 * float(1 + wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(st.data())
def test_an_edit_in_blocks_is_the_fold(algorithm: str, kind: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(algorithm, kind))
    layer, update = case.layer, case.update
    stored = layer.weight.detach()
    place = Placed(update, transposed=layer.transposed)
    edit = edit_of([place], tuple(stored.shape), torch.float64)
    seen = in_blocks(edit, stored, data.draw(st.integers(1, 9)))
    near(layer.canonical(seen), update.fold(case.weight))
    if algorithm != "dora":
        back = edit_of([place], tuple(stored.shape), torch.float64, inverse=True)
        near(in_blocks(back, seen, 2), stored)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d"])
@given(st.data())
def test_several_updates_keep_the_law(kind: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(data.draw(st.sampled_from(["lora", "dora"])), kind))
    names = data.draw(st.lists(st.sampled_from(ALGORITHMS[:5]), max_size=4))
    held = [build(a, data.draw(slots(a, case.shape))[0], 1.0, case.shape) for a in names]
    updates: list[Update] = data.draw(st.permutations([case.update, *held]))
    layer = case.layer
    places = [Placed(u, transposed=layer.transposed) for u in updates]
    edit = edit_of(places, tuple(layer.weight.shape), torch.float64)
    seen = in_blocks(edit, layer.weight.detach(), 3)
    near(layer.canonical(seen), compose(updates).fold(case.weight))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(st.data())
def test_fused_weights_take_updates_of_their_parts(
    algorithm: str, transposed: bool, data: st.DataObject
) -> None:
    """A fused qkv: each part's update on its own outputs, the rest as it was."""
    parts = [data.draw(cases(algorithm, "linear")) for _ in range(2)]
    i = parts[0].shape[1]
    chosen = [part for part in parts if part.shape[1] == i]
    fused = torch.cat([part.weight for part in chosen] + [numbers(1, 3, i)])
    places, wanted, at = [], [], 0
    for part in chosen:
        rows = (at, at + part.shape[0])
        places.append(Placed(part.update, rows=rows, transposed=transposed))
        wanted.append(part.update.fold(part.weight))
        at = rows[1]
    stored = fused.t().contiguous() if transposed else fused
    seen = in_blocks(edit_of(places, tuple(stored.shape), torch.float64), stored, 2)
    near(seen.t() if transposed else seen, torch.cat([*wanted, fused[at:]]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra", "full", "dora"])
@given(st.data())
def test_split_weights_take_rows_of_a_fused_update(
    algorithm: str, transposed: bool, data: st.DataObject
) -> None:
    case: Case = data.draw(cases(algorithm, "linear"))
    cut = data.draw(st.integers(0, case.shape[0]))
    whole, pieces = case.update.fold(case.weight), []
    for source in ((0, cut), (cut, case.shape[0])):
        part = case.weight[source[0] : source[1]]
        stored = part.t().contiguous() if transposed else part
        place = Placed(case.update, source=source, transposed=transposed)
        if algorithm == "dora" and case.update.axis == 1 and source[1] - source[0] < case.shape[0]:  # type: ignore[attr-defined]
            with pytest.raises(InexactError, match="cannot-split"):
                edit_of([place], tuple(stored.shape), torch.float64)
            return
        seen = in_blocks(edit_of([place], tuple(stored.shape), torch.float64), stored, 2)
        pieces.append(seen.t() if transposed else seen)
    near(torch.cat(pieces), whole)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(st.data())
def test_one_expert_of_a_stack(algorithm: str, transposed: bool, data: st.DataObject) -> None:
    case: Case = data.draw(cases(algorithm, "linear"))
    count = data.draw(st.integers(1, 3))
    expert = data.draw(st.integers(0, count - 1))
    stack = torch.stack([case.weight + n for n in range(count)])
    wanted = stack.clone()
    wanted[expert] = case.update.fold(stack[expert])
    stored = stack.transpose(1, 2).contiguous() if transposed else stack
    place = Placed(case.update, expert=expert, transposed=transposed)
    edit = edit_of([place], tuple(stored.shape), torch.float64)
    assert edit.unit in (1, stored.shape[1])
    seen = in_blocks(edit, stored, data.draw(st.integers(1, 4)))
    near(seen.transpose(1, 2) if transposed else seen, wanted)


def test_biases_and_norms_are_vectors() -> None:
    up_bias = torch.randn(6).double()
    lora = LoRA(torch.randn(6, 2), torch.randn(2, 4), up_bias=up_bias, scale=0.5)
    bias = torch.randn(8).double()
    edit = edit_of([Placed(lora, 2.0, rows=(1, 7), bias=True)], (8,), torch.float64)
    wanted = bias.clone()
    wanted[1:7] += up_bias
    near(in_blocks(edit, bias, 3), wanted)
    norm = build("norm", {"w_norm": up_bias, "b_norm": 2 * up_bias}, 0.5)
    for vector, is_bias in ((up_bias, False), (2 * up_bias, True)):
        edit = edit_of([Placed(norm, bias=is_bias)], (6,), torch.float64)
        near(in_blocks(edit, torch.ones(6).double(), 6), 1 + 0.5 * vector)


def test_what_fits_nowhere_is_refused() -> None:
    lora = LoRA(torch.randn(6, 2), torch.randn(2, 4))
    dora, hra = DoRA(lora, torch.ones(6, 1)), HRA(torch.randn(4, 2))
    for place in (
        Placed(lora, rows=(0, 5)),
        Placed(lora, rows=(4, 10)),
        Placed(lora, source=(0, 7)),
        Placed(lora, transposed=True),
        Placed(HRA(torch.randn(5, 1))),
        Placed(lora, expert=0),
    ):
        with pytest.raises(ShapeError):
            edit_of([place], (6, 4))
    with pytest.raises(ValueRefused, match="two-renorms"):
        edit_of([Placed(dora), Placed(dora)], (6, 4))
    with pytest.raises(InexactError, match="no-inverse"):
        edit_of([Placed(dora)], (6, 4), inverse=True)
    for update in (dora, hra):
        with pytest.raises(ValueRefused, match="no-weight"):
            edit_of([Placed(update, 0.5)], (6, 4))
    edit_of([Placed(dora, rows=(0, 6)), Placed(dora, rows=(6, 12))], (12, 4))


def tensors(algorithm: str, o: int, i: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "lora": {"up": (o, 8), "down": (8, i)},
        "loha": {"w1_a": (o, 8), "w1_b": (8, i), "w2_a": (o, 8), "w2_b": (8, i)},
        "lokr": {"w1": (8, 8), "w2_a": (o // 8, 4), "w2_b": (4, i // 8)},
        "hra": {"u": (i, 8)},
    }[algorithm]  # type: ignore[assignment]
    return {n: numbers(k, *s).float() * 0.05 for k, (n, s) in enumerate(shapes.items())}  # type: ignore[attr-defined]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "hra"])
def test_float64_mathematics_rounded_once(
    algorithm: str, dtype: torch.dtype, transposed: bool
) -> None:
    o, i = 256, 1024
    update = build(algorithm, tensors(algorithm, o, i), 1.0 if algorithm == "hra" else 0.7)
    weight = (numbers(9, o, i) * 0.05).to(dtype)
    exact = update.fold(weight.double())
    wanted = rounded(exact, dtype)
    # Where W and Δ all but cancel, the last place that counts is W's.
    ulp = torch.finfo(dtype).eps * torch.maximum(exact.abs(), weight.double().abs())
    stored = weight.t().contiguous() if transposed else weight
    for compute in (torch.float64, torch.float32):
        place, shape = Placed(update, transposed=transposed), tuple(stored.shape)
        edit = edit_for(lambda d: edit_of([place], shape, d), dtype, dtype, compute)  # noqa: B023
        seen = stored.clone()
        if edit.whole:
            wide = stored.to(edit.compute)
            edit.apply(wide)
            settle(wide, seen, True)
        else:
            scratch = torch.empty(edit.stride, edit.columns, dtype=edit.compute)
            change_rows(edit, stored, seen, 0, scratch)
        seen = seen.t() if transposed else seen
        wrong = seen != wanted
        assert int(wrong.sum()) <= (0 if compute == torch.float64 else 1e-4 * wanted.numel())
        assert bool(((seen.double() - wanted.double()).abs() <= ulp * 1.01)[wrong].all())


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=20))
def test_rounding_is_once(values: list[float]) -> None:
    """Against the nearest of the neighbours, found by exact arithmetic on integers."""
    wide = torch.tensor(values, dtype=torch.float64)
    near_half = wide.float().to(torch.bfloat16).double()
    for exact in (wide, near_half * (1 + 2.0**-9), near_half * (1 + 2.0**-9) * (1 + 2.0**-40)):
        for dtype in (torch.bfloat16, torch.float16):
            seen = rounded(exact, dtype)
            for other in (_beside(seen, 1), _beside(seen, -1)):
                mine, theirs = (seen.double() - exact).abs(), (other.double() - exact).abs()
                fine = (mine <= theirs) | ~other.isfinite() | ~seen.isfinite()
                assert bool(fine.all())


def _beside(numbers: Tensor, step: int) -> Tensor:
    return (numbers.view(torch.int16) + step).view(numbers.dtype)


def test_torch_itself_rounds_float64_twice() -> None:
    """Why ``rounding`` exists; if this fails, torch has mended it."""
    just_above_half = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert float(just_above_half.to(torch.bfloat16)) == 1.0
    assert float(rounded(just_above_half, torch.bfloat16)) == 1.0 + 2.0**-7


def test_overflow_is_refused_by_row_and_column() -> None:
    edit = edit_of([Placed(build("full", {"diff": torch.full((4, 3), 7e4)}))], (4, 3))
    weight = torch.zeros(4, 3, dtype=torch.float16)
    with pytest.raises(ValueRefused, match=r"row 10, column 0.*float16"):
        change_rows(None, torch.full((1, 1), 7e4), torch.empty(1, 1).half(), 10, torch.empty(1, 1))
    with pytest.raises(ValueRefused, match="non-finite"):
        change_rows(edit, weight, weight.clone(), 0, torch.empty(4, 3))
    large = torch.full((1, 3), 6e4)
    change_rows(None, large, large.half(), 0, torch.empty(1, 3))  # a norm above, numbers below


def _norms(weight: torch.Tensor, diff: torch.Tensor, piece: int, block: int) -> Norms:
    """The sums over pieces of a merge of ``diff``, changed a block at a time."""
    edit = edit_of([Placed(build("full", {"diff": diff}))], tuple(weight.shape))
    sums = Norms()
    for start in range(0, len(weight), piece):
        part, one = weight[start : start + piece], Norms()
        scratch = torch.empty(block, weight.shape[1])
        change_rows(edit, part, part.clone(), start, scratch, one)
        sums += one
    return sums


def test_norms_are_those_of_the_weight_and_its_change() -> None:
    diff, weight = torch.randn(40, 30), torch.randn(40, 30)
    found = _norms(weight, diff, 20, 20).as_dict()
    assert found["before"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert found["after"] == pytest.approx(float((weight + diff).norm()), rel=1e-5)
    assert found["change"] == pytest.approx(float(diff.norm()), rel=1e-5)
    assert found["share"] == 1.0 and found["moved"] == 1


def test_norms_of_large_pieces_are_those_of_a_block_of_each() -> None:
    diff, weight = torch.randn(4000, 30), torch.randn(4000, 30)
    sums = _norms(weight, diff, 500, 100)
    assert (sums.measured, sums.numbers) == (800 * 30, 4000 * 30)
    found = sums.as_dict()
    assert found["change"] == pytest.approx(float(diff.norm()), rel=0.03)
    assert found["share"] == 0.2
    assert set(Norms().as_dict().values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_moves_where_nothing_was_measured_is_seen(dtype: torch.dtype) -> None:
    weight, diff = torch.randn(4000, 30).to(dtype), torch.zeros(4000, 30)
    assert not _norms(weight, diff, 2000, 100).moved
    diff[3999, 29] = 1.0
    sums = _norms(weight, diff, 2000, 100)
    assert sums.moved and sums.change == 0.0
    diff[3999, 29] = float(weight[3999, 29].double() * 1e-3)
    assert _norms(weight, diff, 2000, 100).moved == (dtype == torch.float32)  # bf16 rounds it away


def _rank(algorithm: str, r: int, k: int, ratio: float) -> Update:
    """An update of 512 × 512 and rank r, ``ratio`` times as large as a weight of 0.05."""
    n = 512
    names: dict[str, tuple[tuple[int, int], ...]] = {
        "lora": ((n, r), (r, n)),
        "loha": ((n, r), (r, n)) * 2,
        "lokr": ((16, r), (r, 16), (32, r), (r, 32)),
    }
    slots = {
        "lora": ("up", "down"),
        "loha": ("w1_a", "w1_b", "w2_a", "w2_b"),
        "lokr": ("w1_a", "w1_b", "w2_a", "w2_b"),
    }[algorithm]
    drawn = [numbers(7 * k + m, *shape).float() for m, shape in enumerate(names[algorithm])]
    update = build(algorithm, dict(zip(slots, drawn)), 1.0)
    assert isinstance(update, Delta)
    return update.scaled(ratio * 0.05 / float(update.dense().std()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithms", ["lora", "loha", "lokr", "lora loha lokr lora"])
def test_a_change_as_large_as_the_weight_is_rounded_as_well(
    algorithms: str, dtype: torch.dtype, transposed: bool
) -> None:
    """All but 1e-4 equal float64 mathematics, whatever ΔW/W and the number of adapters."""
    weight = (numbers(9, 512, 512) * 0.05).to(dtype)
    stored = weight.t().contiguous() if transposed else weight
    rank = 64 if dtype == torch.float16 else 16
    for ratio in (0.1, 1.0):
        updates = [_rank(a, rank, k, ratio) for k, a in enumerate(algorithms.split())]
        exact = weight.double()
        for update in updates:
            exact = update.fold(exact)
        places = [Placed(u, transposed=transposed) for u in updates]
        edit = edit_for(lambda d: edit_of(places, (512, 512), d), dtype, dtype, torch.float32)  # noqa: B023
        seen = torch.empty_like(stored)
        change_rows(edit, stored, seen, 0, torch.empty(edit.stride, 512, dtype=edit.compute))
        wrong = (seen.t() if transposed else seen) != rounded(exact, dtype)
        assert int(wrong.sum()) <= 1e-4 * wrong.numel()


def test_a_device_without_float64_gets_none() -> None:
    asked: list[torch.dtype] = []

    def build_edit(dtype: torch.dtype) -> BlockEdit:
        asked.append(dtype)
        return edit_of([], (4, 4), dtype)

    for device in ("mps", "cpu"):
        edit_for(build_edit, torch.float16, torch.float16, torch.float32, torch.device(device))
    assert asked == [torch.float32, torch.float64]
