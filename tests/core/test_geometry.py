"""A Layer computes what its module computes, for every kind and setting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, modules
from torch import nn

from adaptsurgery.core.geometry import Layer
from adaptsurgery_formats.errors import ShapeError, ValueRefused


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_layer_is_its_module(kind: str, data: st.DataObject) -> None:
    case = data.draw(modules(kind))
    layer = case.layer
    torch.testing.assert_close(layer.forward(case.x), case.module(case.x), rtol=1e-12, atol=1e-12)
    assert layer.stored(layer.canonical()).data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_positions_count_the_outputs(kind: str, data: st.DataObject) -> None:
    case = data.draw(modules(kind))
    outputs = case.shape[0]
    assert case.layer.positions(case.x) * outputs == case.module(case.x).numel()


def test_transformers_conv1d_is_read_without_importing_it() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    layer = Layer.from_module(conv1d)
    x = torch.randn(3, 4)
    assert layer.transposed and layer.shape == (6, 4)
    torch.testing.assert_close(layer.forward(x), conv1d(x))


def test_same_padding_with_an_even_kernel_pads_behind() -> None:
    """Total d·(k − 1) = 3: one before, two behind, in every padding mode."""
    for mode in ("zeros", "circular"):
        conv = nn.Conv1d(1, 1, 4, padding="same", padding_mode=mode, bias=False)
        assert Layer.from_module(conv).pads() == [1, 2]


def test_what_is_no_layer_is_refused() -> None:
    for module in (nn.ReLU(), nn.ConvTranspose2d(2, 2, 3), nn.Embedding(3, 2, max_norm=1.0)):
        with pytest.raises(ValueRefused):
            Layer.from_module(module)
    with pytest.raises(ValueRefused):
        Layer("lineal", torch.zeros(2, 2))
    with pytest.raises(ShapeError):
        Layer("conv2d", torch.zeros(2, 2))
