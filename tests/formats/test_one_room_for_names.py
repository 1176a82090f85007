"""What models call their layers is said in names/ alone; the laws of what is said there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import adaptsurgery
import adaptsurgery_formats
from adaptsurgery_formats.errors import ShapeError
from adaptsurgery_formats.names import heads
from adaptsurgery_formats.names.aligning import Alignment, Lookup, best_alignments
from adaptsurgery_formats.names.cuts import cut_of, part_of
from adaptsurgery_formats.names.families import (
    FAMILIES,
    FUSED,
    INTERLEAVED,
    default_targets,
    family,
    weights_of,
)
from adaptsurgery_formats.names.orientation import CONV1D_NAMES
from adaptsurgery_formats.names.rows import Rows, Shape, StoredWeight, shape_of

PACKAGES = [Path(p.__file__).parent for p in (adaptsurgery, adaptsurgery_formats)]
LAYERS = {
    *FUSED, *(part for parts in FUSED.values() for part in parts), *INTERLEAVED, *CONV1D_NAMES,
    *(t for targets in default_targets().values() if isinstance(targets, tuple) for t in targets),
    *heads.OUTPUTS, *heads.TASK_HEADS, *heads.ANSWER_HEADS, *heads.SAVED_TABLES, "experts",
    "down_proj", "o_proj", "block_sparse_moe", "vision_tower", "language_model", "text_model",
}  # fmt: skip
# A word of these may be anything; a file that says one of them says no layer's name by it.
WORDS = {"q", "k", "v", "key", "value", "query", "output", "shared", "score"}
# Made of layers of their own: what they say is what they make.
MAKERS = {"quickstart"}
READERS = "readers.py"  # a row says by a pattern which keys a reader leaves out


def literals(path: Path) -> Iterator[str]:
    """The strings of a file that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    texts = {
        id(node.value) for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value


def test_no_other_file_names_layers() -> None:
    for root in PACKAGES:
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(root).parts
            if place[0] in ("names", READERS) or MAKERS & set(place):
                continue
            for text in literals(path):
                names = set(re.split(r"[^A-Za-z0-9_]+", text)) & LAYERS - WORDS
                example = text.endswith(".lora_A.weight")  # a whole key, as a format shows one
                assert not names or example or " " in text, f"{path}: {text!r}"


def test_every_row_that_another_shares_is_there() -> None:
    for kind, row in FAMILIES.items():
        assert not isinstance(row, str) or isinstance(FAMILIES[row], type(family(kind)))
    assert family("of no model") == family("")


segments = st.text("abc0123456789", min_size=1, max_size=3)
paths = st.lists(segments, min_size=1, max_size=5).map(".".join)
heads_of_paths = st.lists(st.text("xyz", min_size=1, max_size=2), max_size=2).map(
    lambda parts: "".join(f"{p}." for p in parts)
)


@given(paths, heads_of_paths, heads_of_paths)
def test_an_alignment_is_undone_by_its_inverse(path: str, strip: str, add: str) -> None:
    there, back = Alignment(strip, add), Alignment(add, strip)
    assert back.of(there.of(strip + path)) == strip + path


@given(st.lists(paths, min_size=1, max_size=8, unique=True), heads_of_paths, st.booleans())
def test_aligned_names_find_the_weights_that_they_were(
    names: list[str], head: str, flat: bool
) -> None:
    """An adapter of a model without its head finds the very rows, whatever the names are."""
    weights = {head + n: StoredWeight((Rows(f"{head}{n}.weight"),)) for n in names}
    given_names = [n.replace(".", "_") if flat else n for n in names]
    assume(len(set(given_names)) == len(names))
    wanted = {g: weights[head + n] for g, n in zip(given_names, names)}
    best = best_alignments(Lookup(weights, flat), given_names, lambda aligned: True)
    assert any(
        len(aligned.found) == len(wanted)
        and all(wanted[name] in places for name, places in aligned.found.items())
        for aligned in best
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_a_cut_gives_every_row_to_one_part(q: int, kv: int, inputs: int) -> None:
    """q, k and v one below the other are the fused weight, by whichever of them is known."""
    name = "a.qkv_proj.weight"
    parameters = {name: Shape((q + 2 * kv, inputs))}
    weights = weights_of(parameters, {})
    parts = [weights[f"a.{p}_proj"] for p in "qkv"]
    for known in ({0: q}, {1: kv}, {2: kv}, {0: q, 1: kv, 2: kv}):
        cut = cut_of(name, parameters, {}, known)
        assert cut == (q, kv, kv)
        rows = [part_of(part, cut).rows[0] for part in parts]
        assert [(r.start, r.stop) for r in rows] == [
            (0, q), (q, q + kv), (q + kv, q + 2 * kv)
        ]  # fmt: skip
        assert shape_of(tuple(rows), parameters) == parameters[name].shape


@given(st.integers(1, 9), st.integers(1, 9))
def test_heads_of_a_config_cut_as_the_adapters_do(groups: int, width: int) -> None:
    config = {"num_attention_heads": 2 * groups, "num_key_value_heads": groups,
              "hidden_size": 2 * groups * width}  # fmt: skip
    name, rows = "a.qkv_proj.weight", groups * width
    parameters = {name: Shape((4 * rows, 3))}
    assert cut_of(name, parameters, config, {}) == (2 * rows, rows, rows)
    with pytest.raises(ShapeError):
        cut_of(name, parameters, {}, {})


@pytest.mark.parametrize("name", sorted(k for k, parts in FUSED.items() if len(parts) == 3))
def test_a_fused_name_is_its_parts(name: str) -> None:
    """Stored split, the fused module is the three; the three by themselves stay what they are."""
    parameters = {f"m.{p}.weight": Shape((4, 3)) for p in FUSED[name]}
    weights = weights_of(parameters, {})
    assert [r.name for r in weights[f"m.{name}"].rows] == list(parameters)
    assert shape_of(weights[f"m.{name}"].rows, parameters) == (12, 3)
    for part in FUSED[name]:
        assert weights[f"m.{part}"].module == f"m.{part}"


def test_orientation_is_told_by_what_turns() -> None:
    rows = Rows("stack", 2, 5, index=1, turned=True)
    assert shape_of((rows,), {"stack": Shape((4, 6, 8))}) == (3, 6)
    assert shape_of((Rows("stack", index=0),), {"stack": Shape((4, 6, 8))}) == (6, 8)
