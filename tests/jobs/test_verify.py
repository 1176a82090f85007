"""verify: what counts as the same, and which names are held together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_adapters import lora, peft

import adaptsurgery
from adaptsurgery.adapters.comparing import VerificationError


def test_a_module_that_adds_nothing_may_be_missing(tmp_path: Path) -> None:
    first = lora("blocks.0.q")
    zero = lora("blocks.1.q") | {"blocks.1.q.lora_B.weight": torch.zeros(6, 2)}
    more = peft(tmp_path / "more", first | zero)
    report = adaptsurgery.verify(peft(tmp_path / "few", first), more)
    assert [row.detail for row in report.rows] == ["", "adds nothing"]
    with pytest.raises(VerificationError):
        adaptsurgery.verify(tmp_path / "few", peft(tmp_path / "two", first | lora("blocks.1.q")))


def test_a_bias_adds_something(tmp_path: Path) -> None:
    first = lora("blocks.0.q") | {"blocks.0.q.lora_B.bias": torch.zeros(6)}
    second = lora("blocks.1.q") | {"blocks.1.q.lora_B.weight": torch.zeros(6, 2)}
    second["blocks.1.q.lora_B.bias"] = torch.ones(6)
    few = peft(tmp_path / "few", first, lora_bias=True)
    with pytest.raises(VerificationError):
        adaptsurgery.verify(few, peft(tmp_path / "more", first | second, lora_bias=True))


def test_one_unnamed_model_is_the_others_one_component(tmp_path: Path) -> None:
    plain = peft(tmp_path / "plain", lora("blocks.0.attn.q"))
    (tmp_path / "pipeline").mkdir()
    peft(tmp_path / "pipeline" / "transformer", lora("blocks.0.attn.q"))
    for pair in ((plain, tmp_path / "pipeline"), (tmp_path / "pipeline", plain)):
        assert adaptsurgery.verify(*pair).verdict == "1/1 modules: 1 identical"
