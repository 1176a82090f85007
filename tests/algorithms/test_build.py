"""The one door: every slot of every algorithm, and what it refuses."""

from __future__ import annotations

import pkgutil
from dataclasses import fields

import pytest
import torch

import adaptsurgery.algorithms as algorithms
from adaptsurgery.algorithms import ALGORITHMS, HRA, DoRA, Full, LoHa, LoKr, LoRA, Norm, build
from adaptsurgery_formats.errors import KeyRefused, ShapeError, ValueRefused
from adaptsurgery_formats.state import SLOTS
from adaptsurgery_formats.traits import traits_of


def test_every_algorithm_is_listed_and_names_its_slots() -> None:
    files = {module.name for module in pkgutil.iter_modules(algorithms.__path__)}
    homes = {algorithm.__module__.rpartition(".")[2] for algorithm in (*ALGORITHMS, DoRA)}
    assert {name for name in files if not name.endswith("_config")} == homes
    assert {algorithm.name for algorithm in ALGORITHMS} == set(SLOTS)
    for algorithm in ALGORITHMS:
        given = {*algorithm.takes, *traits_of(algorithm.name).options}
        slots = {f.name for f in fields(algorithm)} - given
        assert slots == set(SLOTS[algorithm.name]) - {"magnitude"}


def test_build_gives_each_its_class() -> None:
    square = torch.ones(4, 4)
    assert isinstance(build("lora", {"up": square, "down": square}), LoRA)
    assert isinstance(build("hra", {"u": torch.randn(4, 2)}, apply_gs=True), HRA)
    assert isinstance(build("full", {"diff_b": torch.ones(4)}), Full)
    assert isinstance(build("norm", {"w_norm": torch.ones(4)}), Norm)
    dora = build("lora", {"up": square, "down": square, "magnitude": torch.ones(4, 1)}, 0.5)
    assert isinstance(dora, DoRA) and dora.inner.scale == 0.5 and dora.axis == 0


def test_what_build_refuses() -> None:
    square = torch.ones(4, 4)
    with pytest.raises(ValueRefused, match="nearest: `loha`"):
        build("lohe", {})
    with pytest.raises(KeyRefused, match="no slot `w1_a`"):
        build("lora", {"up": square, "down": square, "w1_a": square})
    with pytest.raises(KeyRefused, match="not its down"):
        build("lora", {"up": square})
    with pytest.raises(KeyRefused, match="apply_gs"):
        build("lora", {"up": square, "down": square}, apply_gs=True)
    with pytest.raises(KeyRefused, match="magnitude"):
        build("hra", {"u": square, "magnitude": square})
    with pytest.raises(ValueRefused, match="no-weight"):
        build("hra", {"u": torch.randn(4, 2)}, 0.5)


def test_shapes_that_misfit_are_told_as_algebra() -> None:
    m = torch.ones
    cases = [
        (lambda: LoRA(m(4, 2), m(3, 5)), r"differ in r"),
        (lambda: LoRA(m(4, 2), m(2, 5, 3), m(2, 2, 3)), r"down beside mid"),
        (lambda: LoRA(m(4, 2), m(2, 5), up_bias=m(5)), r"up_bias"),
        (lambda: LoRA(m(4, 2), m(2, 5), weight_shape=(5, 4)), r"Δ is \(4, 5\)"),
        (lambda: LoHa(m(4, 2), m(2, 5), m(4, 3), m(3, 5)), r"halves"),
        (lambda: LoHa(m(4, 2), m(2, 5), m(4, 2), m(2, 5), t1=m(2, 2, 1)), r"together"),
        (lambda: LoKr(w1=m(2, 2)), r"w2 is stored"),
        (lambda: LoKr(w1=m(2, 2), w1_a=m(2, 2), w1_b=m(2, 2), w2=m(1, 1)), r"w1 is stored"),
        (lambda: LoKr(w1=m(2, 2), w2_a=m(2, 3), w2_b=m(2, 2)), r"differ in r"),
        (lambda: HRA(m(4)), r"u is not"),
        (lambda: Full(), r"neither"),
        (lambda: Norm(w_norm=m(3), b_norm=m(4)), r"not both"),
        (lambda: DoRA(LoRA(m(4, 2), m(2, 5)), m(3, 1)), r"magnitude is neither"),
        (lambda: DoRA(LoRA(m(4, 2), m(2, 5)), m(4)), r"magnitude is neither"),
    ]
    for make, told in cases:
        with pytest.raises(ShapeError, match=told):
            make()


def test_a_column_of_zeros_is_refused_not_nan() -> None:
    u = torch.randn(4, 3)
    u[:, 1] = 0
    with pytest.raises(ValueRefused, match=r"columns \[1\]"):
        build("hra", {"u": u})
    for use in (lambda h: h.fold(torch.ones(2, 4)), lambda h: h.to_lora(torch.ones(2, 4))):
        with pytest.raises(ValueRefused, match="zero-column"):
            use(HRA(u))
    u[0, 0] = torch.inf
    with pytest.raises(ValueRefused, match="non-finite"):
        build("hra", {"u": u})


def test_gram_schmidt_of_dependent_columns_is_refused() -> None:
    """PEFT's paired initial value under apply_GS: its own result there is rounding noise."""
    pairs = torch.randn(8, 2).repeat_interleave(2, dim=1)
    build("hra", {"u": pairs})
    with pytest.raises(ValueRefused, match="dependent-columns"):
        build("hra", {"u": pairs}, apply_gs=True)
    with pytest.raises(ValueRefused, match="dependent-columns"):
        build("hra", {"u": torch.randn(3, 4)}, apply_gs=True)


def test_norm_differences_fold_into_weight_and_bias() -> None:
    w, b = torch.randn(5), torch.randn(5)
    norm = build("norm", {"w_norm": torch.ones(5), "b_norm": 2 * torch.ones(5)}, 0.5)
    torch.testing.assert_close(norm.fold(w), w + 0.5)
    torch.testing.assert_close(norm.fold_bias(b), b + 1)
    torch.testing.assert_close(norm.unfold(norm.fold(w)), w)
    only_bias = build("norm", {"b_norm": torch.ones(5)})
    assert torch.equal(only_bias.fold(w), w) and only_bias.fold(w) is not w
    with pytest.raises(ShapeError):
        norm.fold(torch.ones(6))


def test_a_hidden_kernel_is_a_matrix_until_a_shape_is_given() -> None:
    slots = {"w1": torch.randn(2, 2), "w2_a": torch.randn(3, 2), "w2_b": torch.randn(2, 9)}
    assert build("lokr", slots).dense().shape == (6, 18)  # type: ignore[attr-defined]
    shaped = build("lokr", slots, weight_shape=(6, 2, 3, 3))
    assert shaped.dense().shape == (6, 2, 3, 3)  # type: ignore[attr-defined]
    weight = torch.randn(6, 2, 3, 3)
    torch.testing.assert_close(build("lokr", slots).fold(weight), shaped.fold(weight))


def test_dora_leaves_an_empty_row_empty() -> None:
    up = torch.tensor([[0.0], [1.0]])
    dora = DoRA(LoRA(up, torch.ones(1, 3)), torch.ones(2, 1))
    weight = torch.zeros(2, 3)
    assert torch.equal(dora.fold(weight)[0], torch.zeros(3))
