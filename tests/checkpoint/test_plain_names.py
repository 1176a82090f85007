"""Names that become paths, wherever they come from: what leads out is refused, and nothing crashes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptsurgery.checkpoint import hub
from adaptsurgery.checkpoint.base import parse_index, read_base
from adaptsurgery.checkpoint.system import local_path
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.paths import check_below, check_name, leads_out, misnamed

OUTSIDE = ["", ".", "..", "/x", "x/y", "../x", "x/../y", "a\\b", "C:x", "C:\\x", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out(name: str) -> None:
    assert leads_out(name) and misnamed(name)
    with pytest.raises(SurgeryError) as caught:
        check_name(name, "a model")
    assert caught.value.code == "path-escapes"
    with pytest.raises(SurgeryError) as caught:
        parse_index({"weight_map": {"key": name}}, Path("an index"))
    assert caught.value.code == "path-escapes"


@pytest.mark.parametrize(
    "name",
    ["a\x1b[31m", "a\n", "a ", "a.", "CON", "nul.txt", "Lpt9", "\udc80", "x" * 256, "é" * 128],
)
def test_names_that_some_system_cannot_have(name: str) -> None:
    assert misnamed(name) and not leads_out(name)


@pytest.mark.parametrize("name", ["a", "-rf", "~", "x y", "Default", "é", "x" * 255, "con1", "com"])
def test_names_that_all_can_have(name: str) -> None:
    assert not misnamed(name)
    check_name(name, "")


def test_paths_below_a_folder() -> None:
    for path in ("x", "unet/x.safetensors", "a/b/c", "..x/y"):
        check_below(path, "")
    for wrong in ("", "/x", "x/", "x//y", "../x", "a/../../x", "a/./b", "x\0", 5, None):
        with pytest.raises(SurgeryError) as caught:
            check_below(wrong, "")
        assert caught.value.code == "path-escapes"


def test_a_shard_name_too_long_for_a_file(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}))
    with pytest.raises(SurgeryError) as caught:
        read_base(tmp_path)
    assert caught.value.code == "bad-name"


REVISIONS = ["..", "/etc", "../../x", "main/../..", "a//b", "a\\b", "a\x1bb", "x" * 300, "a/."]


@pytest.mark.parametrize("revision", REVISIONS)
def test_revisions_that_are_paths(
    revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for spec in (f"org/name@{revision}", f"org/name@{revision}:x.safetensors"):
        for ask in (hub.base_headers, lambda s: hub.resolve(s, kind="adapter")):
            with pytest.raises(SurgeryError) as caught:
                ask(spec)
            assert caught.value.code in ("path-escapes", "bad-name")


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "feature/x", "a" * 40])
def test_revisions_of_the_hub(revision: str) -> None:
    assert hub.parse_spec(f"org/name@{revision}:x.safetensors").revision == revision


def test_a_home_that_nobody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "~nosuchuser/x"
    assert local_path(spec) is None
    for ask in (hub.base_headers, lambda s: hub.resolve(s, kind="base")):
        with pytest.raises(SurgeryError) as caught:
            ask(spec)
        assert caught.value.code == "no-such-file"
    (tmp_path / "~nosuchuser").mkdir()
    (tmp_path / spec).write_bytes(b"")
    assert local_path(spec) == spec and hub.resolve(spec, kind="base") == Path(spec)


def test_the_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_bytes(b"")
    assert local_path("~/x") == str(tmp_path / "x")
