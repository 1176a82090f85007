"""Files of the real LyCORIS → PEFT: the real PEFT loads them and computes what LyCORIS did.

A named refusal stands where PEFT cannot hold the file; ``algorithm="lora"`` is then equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peer_nets as nets
import pytest
import torch

from adaptsurgery import SurgeryError, convert

NETS: dict[str, dict[str, Any]] = {
    "odd": {},
    "odd2d": {"conv1d": False},
    "even": {"even": True, "conv1d": False},
    "even1d": {"even": True},
}


@dataclass(frozen=True)
class Case:
    net: str
    algo: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    def __str__(self) -> str:
        said = [f"{k}={str(v).removeprefix('torch.')}" for k, v in self.options.items()]
        return "-".join([self.net, self.algo, *said])


RS = {"module_options": {"rs_lora": True}}
DORA, DORA_IN = {"dora_wd": True}, {"dora_wd": True, "wd_on_output": False}
TUCKER = {"use_tucker": True}
HALVES = [{"dtype": torch.bfloat16}, {"dtype": torch.float16, "alpha_dtype": torch.bfloat16}]

LORA = [
    *(Case("odd", "lora", o) for o in [{}, TUCKER, RS, DORA, DORA | TUCKER, *HALVES]),
    *(Case("even1d", "locon", o) for o in [{}, TUCKER | HALVES[1]]),
    Case("odd", "lora", DORA_IN, "dora-axis"),
]
LOHA = [
    *(Case("odd", "loha", o) for o in [{}, TUCKER, RS, TUCKER | HALVES[0], HALVES[1]]),
    *(Case("odd", "loha", o, "no-dora") for o in [DORA, DORA_IN]),
]
BOTH = {"decompose_both": True}
LOKR = [
    Case(
        "even", "lokr", {"dim": 3, "factor": factor} | option, refused
    )
    for factor in (4, 8, -1)
    for option, refused in [
        ({}, ""),
        (TUCKER, ""),
        (BOTH | {"dim": 1}, ""),
        (BOTH | TUCKER | {"dim": 2 if factor != 4 else 1}, ""),
        ({"full_matrix": True}, ""),
        (RS, ""),
        (HALVES[0], ""),
        ({"unbalanced_factorization": True}, "lokr-factor"),
        (DORA, "no-dora"),
        (DORA_IN, "no-dora"),
    ]
]  # fmt: skip
LOKR_ODD = [
    Case("even1d", "lokr", {"dim": 3, "factor": 8}),
    Case("even1d", "lokr", {"dim": 3, "factor": 8} | TUCKER),
    Case("odd2d", "lokr", {"factor": -1}),
    Case("odd2d", "lokr", {"factor": 4}, "lokr-factor"),
    Case("odd", "lokr", {"factor": 4}, "peft-conv1d-lokr"),
    Case("odd", "lokr", {"factor": -1, "full_matrix": True}, "peft-conv1d-lokr"),
    Case("odd", "lokr", {"factor": -1, "dim": 1}),
    # one rank-1 core that PEFT cannot read, on the Conv1d: all are flattened
    Case("odd", "lokr", {"factor": -1, "dim": 1} | TUCKER),
    Case("odd", "lokr", {"factor": -1, "dim": 1} | TUCKER | BOTH),
]


@pytest.mark.parametrize("case", LORA + LOHA + LOKR + LOKR_ODD, ids=str)
def test_peft_computes_what_lycoris_did(case: Case, tmp_path: Path) -> None:
    model = nets.net(**NETS[case.net])
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_lycoris(model, tmp_path / "in.safetensors", case.algo, x, **case.options)
    assert nets.apart(model(x), wanted) > 0.02, "the adapter does nothing to speak of"
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    if case.refused:
        with pytest.raises(SurgeryError) as refusal:
            convert(source, out, "peft", base=base)
        assert refusal.value.code == case.refused and not out.exists()
    else:
        report = convert(source, out, "peft", base=base)
        assert report.max_error < 1e-6
        assert nets.apart(nets.peft_output(model, out, x), wanted) < nets.TOLERANCE


@pytest.mark.parametrize(
    "case", [c for c in LORA + LOHA + LOKR + LOKR_ODD if c.refused or c.algo != "lora"], ids=str
)
def test_as_lora_computes_the_same(case: Case, tmp_path: Path) -> None:
    model = nets.net(**NETS[case.net])
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_lycoris(model, tmp_path / "in.safetensors", case.algo, x, **case.options)
    lossy = {"rank": 128, "allow_lossy": True} if "dora_wd" in case.options else {}
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    report = convert(source, out, "peft", base=base, algorithm="lora", **lossy)  # type: ignore[arg-type]
    assert report.max_error < 1e-6
    assert nets.apart(nets.peft_output(model, out, x), wanted) < nets.TOLERANCE


def test_a_dora_as_lora_needs_a_rank_and_leave(tmp_path: Path) -> None:
    model = nets.net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    nets.write_lycoris(model, tmp_path / "in.safetensors", "loha", x, **DORA)
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    for given, code in [({}, "rank-needed"), ({"rank": 4}, "lossy")]:
        with pytest.raises(SurgeryError) as refusal:
            convert(source, out, "peft", base=base, algorithm="lora", **given)  # type: ignore[arg-type]
        assert refusal.value.code == code


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_a_convolution_in_groups(algo: str, tmp_path: Path) -> None:
    model = nets.net(conv1d=False, groups=4)
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    wanted = nets.write_lycoris(model, tmp_path / "in.safetensors", algo, x)
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base)
    assert nets.apart(nets.peft_output(model, tmp_path / "out", x), wanted) < nets.TOLERANCE


def test_dense_and_norm_differences_are_refused_by_name(tmp_path: Path) -> None:
    model = nets.net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    nets.write_lycoris(model, tmp_path / "in.safetensors", "full", x)
    with pytest.raises(SurgeryError) as refusal:
        convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", base=base)
    assert refusal.value.code == "no-full"


def test_different_algorithms_are_refused_and_equal_as_lora(tmp_path: Path) -> None:
    model = nets.net()
    x, base = nets.inputs(model), nets.save_base(model, tmp_path / "base.safetensors")
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    by_class = {"Conv2d": {"algo": "loha"}, "Linear": {"algo": "lokr", "factor": 4}}
    wanted = nets.write_lycoris(model, source, "lora", x, algo_map=by_class)
    with pytest.raises(SurgeryError) as refusal:
        convert(source, out, "peft", base=base)
    assert refusal.value.code == "mixed-algorithms"
    convert(source, out, "peft", base=base, algorithm="lora")
    assert nets.apart(nets.peft_output(model, out, x), wanted) < nets.TOLERANCE
