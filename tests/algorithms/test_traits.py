"""The table of algorithms says of each what its class does: held against the definitions."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import slots

from adaptsurgery.algorithms import ALGORITHMS, LowRank, build, fitter
from adaptsurgery.core.config import AdapterConfig
from adaptsurgery.core.law import Order
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.traits import TRAITS, title_of, traits_of

SHAPES = [(6, 4), (4, 6, 3), (6, 4, 3, 3), (2, 4, 1, 2, 2)]
ADDITIVE = [name for name, row in TRAITS.items() if row.adds and not row.dense]


def test_every_class_has_its_row_and_agrees_with_it() -> None:
    assert [known.name for known in ALGORITHMS] == list(TRAITS)
    for known in ALGORITHMS:
        row = traits_of(known.name)
        assert row.adds == (known.order is Order.ADD)
        assert row.turns == (known.order is Order.TURN)
        assert row.weighs == known.weighs and row.reversible == known.reversible
        assert row.low_rank == (hasattr(known, "to_lora") and known.order is Order.ADD)
        assert {*row.rows, *row.factor, *row.spatial, *row.pointwise, *row.cores} <= {*row.slots}
        assert all({*known_set} <= {*row.slots} for known_set in row.complete)
        assert title_of(known.name) == row.title
        if row.extracts:
            assert callable(fitter(known.name))
        else:
            with pytest.raises(SurgeryError) as raised:
                fitter(known.name)
            assert raised.value.code == "no-fit"
        if row.peft_type:
            assert AdapterConfig.known[known.name].__name__ == row.config
    assert len({row.peft_type for row in TRAITS.values() if row.peft_type}) == len(
        AdapterConfig.known
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("algorithm", [*ADDITIVE, "hra"])
@given(st.data())
def test_shapes_tell_what_the_tensors_are(
    algorithm: str, shape: tuple[int, ...], data: st.DataObject
) -> None:
    tensors, _ = data.draw(slots(algorithm, shape))
    update, row = build(algorithm, tensors, 1.0, shape), traits_of(algorithm)
    shapes = {slot: tuple(t.shape) for slot, t in tensors.items()}
    assert row.misfit(shapes) == ""
    columns = torch.Size(shape[1:]).numel()
    assert row.extent(shapes, {}) == (shape[0] if row.adds else 0, columns)
    kernel = row.kernel(shapes)
    assert kernel is None or kernel == shape[2:] or (kernel == () and set(shape[2:]) <= {1})
    rank = getattr(update, "rank", None)
    if rank is not None and row.rank(shapes) is not None:
        assert row.rank(shapes) == rank
    assert row.low_rank == isinstance(update, LowRank)


@pytest.mark.parametrize("algorithm", ADDITIVE)
@given(st.data())
def test_a_factor_and_rows_are_where_the_row_says(algorithm: str, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES[:3]))
    tensors, _ = data.draw(slots(algorithm, shape))
    tensors.pop("up_bias", None)
    row, delta = traits_of(algorithm), reference.delta(algorithm, tensors, shape)
    slot = row.factor_slot(tensors)
    doubled = reference.delta(algorithm, {**tensors, slot: -2 * tensors[slot]}, shape)
    torch.testing.assert_close(doubled, -2 * delta)
    if row.transposes_core and "t1" in tensors:
        return
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    unit = row.unit(shapes)
    first = (shape[0] // unit // 2) * unit
    if not first:
        return
    cut = {n: t[: first // unit] if n in row.rows else t for n, t in tensors.items()}
    upper = reference.delta(algorithm, cut, (first, *shape[1:]))
    torch.testing.assert_close(upper, delta[:first])


@pytest.mark.parametrize("algorithm", ADDITIVE)
@given(st.data())
def test_a_shape_that_does_not_fit_is_named(algorithm: str, data: st.DataObject) -> None:
    """One row more in any one slot but those that stand alone, or no row: never taken for whole."""
    tensors, _ = data.draw(slots(algorithm, (6, 4)))
    row = traits_of(algorithm)
    shapes = {slot: tuple(t.shape) for slot, t in tensors.items()}
    for slot, dim in row.ranks:
        if (slot in shapes and f"{slot[:-1]}a" in shapes) or algorithm == "lora":
            grown = list(shapes[slot])
            grown[dim] += 1
            assert row.misfit({**shapes, slot: tuple(grown)})
    for slot in shapes:
        assert "no elements" in row.misfit({**shapes, slot: (0, *shapes[slot][1:])})
