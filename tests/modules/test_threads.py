"""One live model that several threads put adapters into, call, and take adapters out of."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from adaptsurgery import LoraConfig, PeftModel, get_peft_model

THREADS, ROUNDS = 8, 10


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads change places after a few steps, so that what may meet does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def made() -> PeftModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def at_once(work: Callable[[int], None]) -> list[BaseException]:
    """What went wrong in any of the threads."""
    failed: list[BaseException] = []

    def one(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_adapters_that_come_and_go_touch_no_other() -> None:
    model, x = made(), torch.ones(2, 6)
    before, keys = model(x), list(model.state_dict())

    def work(number: int) -> None:
        for turn in range(ROUNDS):
            name = f"a{number}_{turn}"
            model.add_adapter(name, LoraConfig(r=1, target_modules=["0", "1"]))
            assert torch.equal(model(x), before)
            model.delete_adapter(name)

    assert at_once(work) == []
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]
    assert torch.equal(model(x), before)


def test_a_forward_goes_through_what_is_left() -> None:
    """An active adapter is taken out while others call the model: each gives one of both answers."""
    model, x = made(), torch.ones(2, 6)
    alone = model(x)

    def work(number: int) -> None:
        for _ in range(ROUNDS * 3):
            if number:
                assert model(x).isfinite().all()
                continue
            model.add_adapter("turn", LoraConfig(r=2, target_modules=["0"]))
            model.base_model.set_adapter(["default", "turn"])
            model.delete_adapter("turn")

    assert at_once(work) == []
    assert torch.equal(model(x), alone)


def test_a_copy_and_a_pickle_take_turns_of_their_own() -> None:
    model = made()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with model.base_model.turn.lock:
            thread = threading.Thread(target=other.unload, daemon=True)
            thread.start()
            thread.join(20)
        assert not thread.is_alive()
