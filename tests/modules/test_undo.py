"""A live model is as it was where an adapter's way in is cut short, whatever line it is cut at."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import adaptsurgery
from adaptsurgery import AdapterConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from adaptsurgery.modules import files
from adaptsurgery_formats.errors import SurgeryError

ROOT = Path(adaptsurgery.__file__).parent
# Where a call is cut: not among workers, whose locks a trace could leave held, as no signal does.
CUT = tuple(str(ROOT / room) for room in ("modules", "core", "algorithms", "checkpoint/atomic.py"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def config(**more: Any) -> LoraConfig:
    return LoraConfig(target_modules=["0", "1"], r=2, **more)


def adapted(seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(Net(), config(modules_to_save=["head"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def state(model: nn.Module) -> tuple[Any, ...]:
    """All that can be told of a model: keys in order, numbers, classes, what trains, what is set."""
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    shown = [(type(m).__name__, m.training, m.extra_repr()) for m in model.modules()]
    trained = [(n, p.requires_grad) for n, p in model.named_parameters()]
    configs = {k: v.to_dict() for k, v in getattr(model, "peft_config", {}).items()}
    active = list(getattr(model, "active_adapters", []))
    return list(kept.items()), shown, trained, configs, active


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    keys = [k for k, _ in a[0]] == [k for k, _ in b[0]]
    return keys and a[1:] == b[1:] and all(torch.equal(x, y) for (_, x), (_, y) in zip(a[0], b[0]))


def cut_short(call: Callable[[], object], at: int, error: type[BaseException]) -> bool:
    """Call, with ``error`` raised at the at-th line that runs there; whether it came so far."""
    left = at

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        file = frame.f_code.co_filename
        if not file.startswith(CUT) or file.endswith("alone.py"):  # a lock's `with` alone
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except error:
        pass
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)  # a trace may raise where a `with` ends, which no signal does
        gc.enable()
    return left <= 0


def folder_of(tmp_path: Path) -> Path:
    adapted(1).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Path], object]]] = {
    "get": (Net, lambda m, _: get_peft_model(m, config(modules_to_save=["head"]))),
    "get mixed": (Net, lambda m, _: get_peft_model(m, config(bias="all"), mixed=True)),
    "from_pretrained": (Net, lambda m, folder: PeftModel.from_pretrained(m, folder)),
    "add": (adapted, lambda m, _: m.add_adapter("second", config(modules_to_save=["head"]))),
    "load": (adapted, lambda m, folder: m.load_adapter(folder, "second")),
    "swap": (adapted, lambda m, folder: m.hotswap_adapter(folder)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_model_is_as_it_was(name: str, tmp_path: Path) -> None:
    make, call = CALLS[name]
    folder, step = folder_of(tmp_path), 53
    for error in (KeyboardInterrupt, MemoryError):
        at, cut = 1, True
        while cut:
            model = make()
            before = state(model)
            cut = cut_short(lambda: call(model, folder), at, error)  # noqa: B023
            assert not cut or same(state(model), before), f"line {at} of {name}"
            at += step
        assert at > 5 * step


def test_the_last_lines_too(tmp_path: Path) -> None:
    """Where all is done but the return."""
    folder = folder_of(tmp_path)
    for name, (make, call) in CALLS.items():
        low, high = 1, 1 << 16
        while low < high:  # the number of lines
            middle = (low + high) // 2
            model = make()
            low, high = (
                (middle + 1, high)
                if cut_short(lambda: call(model, folder), middle, KeyboardInterrupt)  # noqa: B023
                else (low, middle)
            )
        for at in range(low - 12, low):
            model = make()
            before = state(model)
            cut_short(lambda: call(model, folder), at, KeyboardInterrupt)  # noqa: B023
            assert same(state(model), before), f"{name}, {low - at} lines before its end"


def test_the_next_try_goes_well() -> None:
    model = adapted()
    cut_short(lambda: model.add_adapter("second", config()), 900, MemoryError)
    model.add_adapter("second", config())
    model.set_adapter("second")
    assert model(torch.ones(1, 4)).isfinite().all()


def test_saving_over_an_older_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and config belong together, also where the last of them cannot land."""
    old, new = adapted(), get_peft_model(Net(), LoKrConfig(target_modules=["2"], r=2))
    old.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real, fails = files.output, ""

    def output(path: Path, **given: Any) -> Any:
        if path.name == fails:
            raise KeyboardInterrupt
        return real(path, **given)

    monkeypatch.setattr(files, "output", output)
    for name in (files.WEIGHTS, files.FILE):
        fails = name
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    at, cut = 1, True
    while cut:
        old.save_pretrained(tmp_path)
        cut = cut_short(lambda: new.save_pretrained(tmp_path), at, KeyboardInterrupt)
        kind = json.loads((tmp_path / files.FILE).read_text())["peft_type"]
        lora = b"lora_A" in (tmp_path / files.WEIGHTS).read_bytes()
        assert kind == ("LORA" if lora else "LOKR"), f"line {at}"
        at += 41


NAMES = [
    "/abs", "//x", "/", "x/y", "../x", "..", ".", "a\\b", "C:x", "C:", "a\0b", "a\nb", "", " ",
    "CON", "lpt1", "a ", "x" * 256, "é" * 128, 5, None, ["x"], b"x", ("a",),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_no_adapter_can_have(name: Any, tmp_path: Path) -> None:
    net, model, folder = Net(), adapted(), folder_of(tmp_path)
    for call in (
        lambda: get_peft_model(net, config(), adapter_name=name),
        lambda: model.add_adapter(name, config()),
        lambda: PeftModel.from_pretrained(net, folder, adapter_name=name),
        lambda: model.load_adapter(folder, name),
    ):
        with pytest.raises(SurgeryError) as caught:
            call()
        assert caught.value.code == "bad-name"
    assert not list(net.named_buffers()) and len(list(net.parameters())) == 8
    for call in (
        lambda: model.set_adapter(name),
        lambda: model.delete_adapter(name),
        lambda: model.save_pretrained(tmp_path / "out", selected_adapters=[name]),
    ):
        with pytest.raises(SurgeryError) as caught:
            call()
        assert caught.value.code == "unknown-adapter"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["-rf", "~", "~root", "*", "é", "0", "Default", "x" * 255])
def test_names_stay_within_the_folder(name: str, tmp_path: Path) -> None:
    model = get_peft_model(Net(), config(), adapter_name=name)
    model.save_pretrained(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / name / files.WEIGHTS).is_file()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"r": NaN}', '{"r": 1e999}', '{"r": -Infinity}', "\ud800", "{", ""]
)
def test_a_config_that_is_no_json(text: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(text, "utf-8", errors="surrogatepass")
    with pytest.raises(SurgeryError) as caught:
        AdapterConfig.from_pretrained(tmp_path)
    assert caught.value.code == "bad-config"
