"""Which way round stacked experts lie; a table that may be tied; tensors that no merge wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptsurgery.adapters.comparing import VerificationError
from adaptsurgery.checkpoint.base import Base, BaseFile, assemble
from adaptsurgery.jobs.merging.check import verify_merge
from adaptsurgery.jobs.merging.match import match
from adaptsurgery.jobs.merging.matched import Change
from adaptsurgery.jobs.merging.merge import merge
from adaptsurgery.jobs.merging.tying import settle_ties
from adaptsurgery_formats import AdapterState, ModuleState
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.tensors import Tensor

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
Shape = tuple[int, ...]


def base_from(shapes: dict[str, Shape], config: dict[str, Any] | None = None) -> Base:
    tensors = {name: Tensor("F32", shape, ()) for name, shape in shapes.items()}
    file = BaseFile("model.safetensors", "", tensors, {})
    return assemble("base", [file], configs={"": config} if config else {})


def lora(path: str, out: int, into: int, **more: Any) -> ModuleState:
    tensors = {"up": Tensor("F32", (out, 2), ()), "down": Tensor("F32", (2, into), ())}
    return ModuleState(
        path, "lora", tensors, 2.0, "alpha/r", 2, naming="base", keys=(path,), **more
    )


def change(base: Base, module: ModuleState) -> Change:
    changes = match(base, [AdapterState("peft", [module])]).changes
    ((found,),) = changes.values()
    return found


def refused(base: Base, module: ModuleState) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        match(base, [AdapterState("peft", [module])])
    return caught.value


# Of each pair one is square: h = I, or h = 2I.
@pytest.mark.parametrize("config", [{}, {"model_type": "qwen3_vl_moe"}, {"model_type": "mixtral"}])
@pytest.mark.parametrize(
    ("up", "down", "h", "inner", "turned"),
    [
        ((4, 8, 16), (4, 8, 8), 8, 8, True),
        ((4, 16, 8), (4, 8, 8), 8, 8, False),
        ((4, 8, 8), (4, 4, 8), 8, 4, True),
        ((4, 8, 8), (4, 8, 4), 8, 4, False),
    ],
)
def test_the_sibling_tells(
    up: Shape, down: Shape, h: int, inner: int, turned: bool, config: dict[str, Any]
) -> None:
    base = base_from({UP: up, DOWN: down}, config)
    got = change(base, lora("mlp.experts.1.up_proj", inner, h))
    assert (got.index, got.at, got.rows, got.turned) == (1, inner, inner, turned)
    got = change(base, lora("mlp.experts.1.down_proj", h, inner))
    assert (got.index, got.at, got.rows, got.turned) == (1, 0, h, turned)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt_oss"},
        {"model_type": "llama4_text"},
        {"model_type": "vlm", "text_config": {"model_type": "qwen3_vl_moe_text"}},
    ],
)
def test_the_config_tells_where_there_is_no_sibling(config: dict[str, Any]) -> None:
    module = lora("mlp.experts.1.down_proj", 8, 8)
    assert change(base_from({DOWN: (4, 8, 8)}, config), module).turned


@pytest.mark.parametrize(("name", "part", "out"), [(UP, "up_proj", 4), (DOWN, "down_proj", 8)])
def test_a_square_stack_of_which_nothing_tells_is_refused(name: str, part: str, out: int) -> None:
    for config in ({}, {"model_type": "other"}):
        error = refused(base_from({name: (4, 8, 8)}, config), lora(f"mlp.experts.1.{part}", out, 8))
        assert f"`{name}` is square" in error.what


@pytest.mark.parametrize("config", [{}, {"text_config": {"model_type": "gpt_oss"}}])
def test_gate_and_up_interleaved_without_a_model_type_of_its_own(config: dict[str, Any]) -> None:
    shapes = {UP: (4, 8, 12), f"{UP}_bias": (4, 12), DOWN: (4, 6, 8), f"{DOWN}_bias": (4, 8)}
    error = refused(base_from(shapes, config), lora("mlp.experts.1.up_proj", 6, 8))
    assert error.code == "interleaved-weight" and "interleaved" in error.what
    assert change(base_from(shapes, config), lora("mlp.experts.1.down_proj", 8, 6)).turned


def test_an_adapter_the_other_way_round_than_the_sibling_tells_is_refused() -> None:
    base = base_from({UP: (4, 12, 8), DOWN: (4, 8, 6)})
    assert refused(base, lora("mlp.experts.1.down_proj", 6, 8)).code == "bad-shape"


@pytest.mark.parametrize(("head", "notes"), [(False, ["tied-table"]), (True, [])])
def test_a_table_without_a_config_may_be_tied(head: bool, notes: list[str]) -> None:
    more = {"lm_head.weight": (20, 8)} if head else {}
    base = base_from({"model.embed_tokens.weight": (20, 8), **more})
    adapters = [AdapterState("peft", [lora("model.embed_tokens", 8, 20, kind="embedding")])]
    found = match(base, adapters)
    assert settle_ties(base, adapters, found) == set()
    assert [n.code for n in found.notes] == notes


def test_a_tensor_that_the_merge_did_not_write(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / f"{n}.safetensors" for n in ("base", "adapter", "out"))
    save_file({"a.b.weight": torch.ones(6, 4)}, base)
    parts = {"lora_up.weight": (6, 2), "lora_down.weight": (2, 4)}
    save_file({f"lora_unet_a_b.{k}": torch.ones(*s) for k, s in parts.items()}, adapter)
    merge(base, adapter, out)
    assert verify_merge(out, base, adapter).rows
    save_file({**load_file(out), "a.extra.weight": torch.ones(2)}, out)
    with pytest.raises(VerificationError) as caught:
        verify_merge(out, base, adapter)
    assert caught.value.code == "extra-tensor" and "`a.extra.weight`" in str(caught.value)
