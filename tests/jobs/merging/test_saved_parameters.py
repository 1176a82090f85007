"""Saved parameters and buffers in a merge."""

from __future__ import annotations

from pathlib import Path

import torch
from merge_files import base_file, peft_file, refused
from safetensors.torch import load_file

from adaptsurgery.jobs.merging.merge import merge


def test_buffers_of_integers_are_replaced_as_they_are(tmp_path: Path) -> None:
    stored = {"bn.num_batches_tracked": torch.tensor(5), "bn.weight": torch.ones(3), "fc.weight": torch.ones(3, 4)}  # fmt: skip
    base = base_file(tmp_path / "base", stored)
    slots = {"fc.lora_A.weight": torch.ones(2, 4), "fc.lora_B.weight": torch.ones(3, 2)}
    more = {"bn.num_batches_tracked": torch.tensor(7), "bn.weight": torch.full((3,), 2.0)}
    given = {"r": 2, "lora_alpha": 2, "modules_to_save": ["bn"]}
    merge(base, peft_file(tmp_path / "a", "LORA", slots | more, **given), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert int(found["bn.num_batches_tracked"]) == 7 and found["bn.weight"].tolist() == [2, 2, 2]
    wrong = more | {"bn.weight": torch.tensor([1, 2, 3])}
    other = peft_file(tmp_path / "b", "LORA", slots | wrong, **given)
    error = refused("dtype", lambda: merge(base, other, tmp_path / "never"))
    assert "`bn.weight`" in error.what and not (tmp_path / "never").exists()
