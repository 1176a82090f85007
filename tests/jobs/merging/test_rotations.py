"""Rotations of fused rows, and two DoRAs on one weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from merge_files import base_file, peft_file, refused
from safetensors.torch import load_file
from test_match import base_from, hra, lora, only

from adaptsurgery.jobs.merging.match import match
from adaptsurgery.jobs.merging.merge import merge
from adaptsurgery_formats import AdapterState
from adaptsurgery_formats.tensors import Tensor


def dora(path: str, out: int, into: int) -> Any:
    module = lora(path, out, into)
    return replace(module, tensors={**module.tensors, "magnitude": Tensor("F32", (out, 1), ())})


def test_two_doras_on_one_weight_are_refused_by_the_plan() -> None:
    base = base_from({"fc.weight": (6, 4), "attn.qkv_proj.weight": (12, 4)})
    one, two = (AdapterState("peft", [dora("fc", 6, 4)], where=w) for w in "ab")
    error = refused("two-renorms", lambda: match(base, [one, two]))
    assert "`fc.weight`" in error.what and error.where == "b"
    split = [AdapterState("peft", [dora(f"attn.{n}_proj", 4, 4)]) for n in "qv"]
    assert match(base, split).modules == 2  # rows of their own
    whole = AdapterState("peft", [dora("attn.qkv_proj", 12, 4)])
    refused("two-renorms", lambda: match(base, [split[1], whole]))


def test_rotations_of_the_parts_of_gpt2s_c_attn(tmp_path: Path) -> None:
    """Each turns the inputs of its own rows, so that different R are exact on one fused weight."""
    weight = torch.randn(6, 18)  # a Conv1D: (i, 3·o)
    base = base_file(tmp_path / "base", {"h.0.attn.c_attn.weight": weight}, model_type="gpt2")
    us = {n: torch.randn(6, 4) for n in "qv"}
    slots = {f"h.0.attn.{n}_proj.hra_u": u for n, u in us.items()}
    merge(base, peft_file(tmp_path / "a", "HRA", slots, r=4), tmp_path / "out")
    wanted = weight.double()
    for n, u in us.items():
        rows = slice(6 * "qkv".index(n), 6 * "qkv".index(n) + 6)
        turn = torch.eye(6, dtype=torch.float64)
        for column in (u.double() / u.double().norm(dim=0)).t():
            turn @= torch.eye(6, dtype=torch.float64) - 2 * torch.outer(column, column)
        wanted[:, rows] = (wanted[:, rows].t() @ turn).t()
    found = load_file(tmp_path / "out/model.safetensors")["h.0.attn.c_attn.weight"]
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert torch.equal(found[:, 6:12], weight[:, 6:12])


def test_a_fused_rotation_on_split_weights() -> None:
    base = base_from({f"attn.{n}_proj.weight": (4, 6) for n in "qkv"})
    found = match(base, [AdapterState("peft", [hra("attn.qkv_proj", 6)])])
    assert len(found.changes) == 3
    config = {"num_attention_heads": 2, "hidden_size": 6, "num_key_value_heads": 1}
    fused = base_from({"attn.qkv_proj.weight": (12, 6)}, config)
    change = only(match(fused, [AdapterState("peft", [hra("attn.k_proj", 6)])]))
    assert (change.at, change.rows) == (6, 3)
