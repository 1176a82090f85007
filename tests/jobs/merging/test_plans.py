"""A merge's plan from somebody else's JSON: any value in any place is a plan or is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_run import left_behind, write_adapter, write_base

from adaptsurgery.jobs.merging.merge import plan_merge
from adaptsurgery.jobs.merging.plan import MergePlan
from adaptsurgery.jobs.merging.run import run_plan
from adaptsurgery_formats.errors import SurgeryError

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    1 << 70,
    1.5,
    "x\x1b[31m",
    [],
    ["x"],
    {},
    {"x": 1},
    float("inf"),
)


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    base = write_base(tmp_path / "base")
    made = plan_merge(base, [write_adapter(tmp_path / "a.safetensors")])
    return json.loads(made.to_json())


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The first of every kind of place: in lists, the first item stands for all."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value))[:1] if isinstance(value, list) else []
    for key, inner in items:
        yield (*here, key)
        yield from places(inner, (*here, key))


def changed(plan: Any, place: tuple[Any, ...], value: Any) -> str:
    edited = inner = copy.deepcopy(plan)
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return json.dumps(edited)


def test_a_plan_is_the_same_after_json(plan: Any) -> None:
    again = MergePlan.from_json(json.dumps(plan))
    assert json.loads(again.to_json()) == plan


def test_any_value_in_any_place_is_a_plan_or_is_refused(plan: Any) -> None:
    refused = 0
    for place in places(plan):
        for value in ODD:
            try:
                made = MergePlan.from_json(changed(plan, place, value))
            except SurgeryError as error:
                assert error.code in ("bad-plan", "path-escapes", "no-such-option")
                assert str(error).replace("\n", "").isprintable()
                refused += 1
            else:
                assert made.nbytes >= 0 and made.digest
    assert refused > 300


@pytest.mark.parametrize(
    "place, value",
    [
        (("jobs", 0, "tensors", 0, "source"), "nowhere"),
        (("jobs", 0, "tensors", 0, "shape"), [1]),
        (("jobs", 0, "tensors", 0, "file"), 3),
        (("jobs", 0, "tensors", 0, "dtype"), "F33"),
        (("jobs", 0, "tensors", 1, "key"), None),
        (("jobs", 1, "name"), None),
        (("jobs", 0, "clone"), 9),
    ],
)
def test_what_counts_beyond_its_lists_is_refused(
    plan: Any, place: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    if value is None:  # the same as the first one's
        first = (*place[:-2], 0, place[-1])
        value = plan
        for step in first:
            value = value[step]
    with pytest.raises(SurgeryError) as caught:
        run_plan(MergePlan.from_json(changed(plan, place, value)), tmp_path / "out")
    assert caught.value.code == "bad-plan"
    assert not left_behind(tmp_path) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [("adapter",), ("module",), ("shape",)])
def test_a_change_that_is_none_of_the_adapters_is_refused(
    plan: Any, place: tuple[Any, ...], tmp_path: Path
) -> None:
    at = next(n for n, t in enumerate(plan["jobs"][0]["tensors"]) if t["changes"])
    where = ("jobs", 0, "tensors", at, "changes", 0, *place)
    with pytest.raises(SurgeryError) as caught:
        run_plan(
            MergePlan.from_json(changed(plan, where, [] if place == ("shape",) else 99)),
            tmp_path / "out",
        )
    assert caught.value.code == "bad-plan"
    assert not left_behind(tmp_path)
