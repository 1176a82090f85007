"""The rewritings that a target asks for, one by one."""

from __future__ import annotations

import pytest
import torch
from small_adapters import delta, module, rand

from adaptsurgery.adapters.rewritings import carry_out
from adaptsurgery_formats import AdapterState, Rewriting
from adaptsurgery_formats.errors import InexactError
from adaptsurgery_formats.files import FOLD_SCALE, JOIN_W2
from adaptsurgery_formats.names import Names, from_modules


def kronecker(kernel: tuple[int, ...]) -> tuple[AdapterState, Names]:
    d = 2 * torch.Size(kernel).numel()
    tensors = {"w1": rand(2, 3), "w2_a": rand(4, 2), "w2_b": rand(2, d)}
    state = AdapterState("lycoris", [module("lokr", tensors)])
    return state, from_modules({"": {"q": (8, 6, *kernel)}}, "base")


@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 1)])
def test_a_joined_w2_has_the_kernel_of_its_weight(kernel: tuple[int, ...]) -> None:
    state, names = kronecker(kernel)
    (joined,) = carry_out(state, [Rewriting(state.modules[0], JOIN_W2)], names).modules
    assert joined.tensors["w2"].shape == (4, 2, *kernel)
    wanted = delta(state.modules[0])
    assert torch.allclose(delta(joined).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


def test_a_w2_is_not_joined_on_a_conv1d() -> None:
    state, names = kronecker((3,))
    with pytest.raises(InexactError, match="peft-conv1d-lokr"):
        carry_out(state, [Rewriting(state.modules[0], JOIN_W2)], names)


@pytest.mark.parametrize("scale, said", [(0.3, "fold the scale into w1 (F32)"), (0.5, FOLD_SCALE)])
def test_a_rewriting_says_the_dtype_that_it_came_to(scale: float, said: str) -> None:
    tensors = {"w1": rand(2, 3, dtype=torch.bfloat16), "w2": rand(4, 2, dtype=torch.bfloat16)}
    state = AdapterState("peft", [module("lokr", tensors, scale=scale)])
    carry_out(state, [Rewriting(state.modules[0], FOLD_SCALE)])
    assert [note.text for note in state.notes] == [said]
