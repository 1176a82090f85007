"""The report: a page by itself, with what it promises in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import checkpoint_pairs as models
import pytest

from adaptsurgery.adapters.report import Report
from adaptsurgery.jobs.extract import page as pages
from adaptsurgery.jobs.extract.extract import extract
from adaptsurgery_formats.errors import SurgeryError


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    folder = tmp_path_factory.mktemp("report")
    base = models.weights()
    paths = models.write(folder / "b.safetensors", base), folder / "t.safetensors"
    models.write(paths[1], models.moved(base))
    report = extract(
        *paths,
        folder / "out",
        rank=4,
        compare=True,
        report=folder / "r.html",
        include=["layers.0.up", "point"],
    )
    assert str(folder / "r.html") in report.outputs
    return report, (folder / "r.html").read_text("utf-8")


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    void: ClassVar = frozenset({"meta", "br", "path", "use", "rect", "circle", "line"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_it_is_whole_and_needs_no_network(told: tuple[Report, str]) -> None:
    _, text = told
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and parser.seen.count("svg") == 3
    links = re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert all(link.startswith("#") for link in links)
    loads = [u for u in re.findall(r"https?://[^\s\"'<]+", text) if "www.w3.org" not in u]
    assert not loads and "<script" not in text and "@import" not in text
    assert len(text) < 500_000


def test_ids_are_once_and_their_uses_exist(told: tuple[Report, str]) -> None:
    ids = re.findall(r' id="([^"]*)"', told[1])
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]*)"', told[1]) + re.findall(r"url\(#([^)]*)\)", told[1])
    assert set(used) <= set(ids)


def test_its_ink_is_the_pages(told: tuple[Report, str]) -> None:
    assert "prefers-color-scheme: dark" in told[1] and "currentColor" in told[1]
    for svg in re.findall(r"<svg.*?</svg>", told[1], re.S):
        assert not re.search(r"(?:fill|stroke): #(?:000000|ffffff|010203)", svg)


def test_it_has_the_figures(told: tuple[Report, str]) -> None:
    report, text = told
    worst = max(report.facts["layers"], key=lambda r: r["error"] * r["norm"])
    for wanted in (
        "Error and energy of each layer", "Parameters against error", "Singular values",
        "The hardest layers", "The algorithms, over all layers", "Left out", "Kept dense",
        f"{worst['error']:.3g}", f"{report.facts['parameters']:,}", "left-out", "model.cls_token",
    ):  # fmt: skip
        assert wanted in text
    hardest = text[text.index("The hardest layers") :]
    assert hardest.index(f"<td>{worst['name']}</td>") == hardest.index("<td>")


def test_json_has_all_of_it(tmp_path: Path) -> None:
    base = models.weights()
    paths = models.write(tmp_path / "b.safetensors", base), tmp_path / "t.safetensors"
    models.write(paths[1], models.moved(base))
    few = ["layers.0.up", "point"]
    report = extract(*paths, tmp_path / "out", rank=2, report=tmp_path / "r.json", include=few)
    read = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert read["facts"]["error"] == report.facts["error"]
    assert len(read["facts"]["layers"]) == 2 and read["verdict"] == report.verdict
    assert any(layer["curve"] for layer in read["facts"]["layers"])
    with pytest.raises(SurgeryError) as refused:
        extract(*paths, tmp_path / "o2", rank=2, report=tmp_path / "r.json")
    assert refused.value.code == "output-exists" and not (tmp_path / "o2").exists()


def test_without_matplotlib_it_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "find_spec", lambda _: None)
    with pytest.raises(SurgeryError) as refused:
        extract(
            tmp_path / "none", tmp_path / "none", tmp_path / "o", rank=2, report=tmp_path / "r.html"
        )
    assert refused.value.code == "report-extra" and "adaptsurgery[report]" in refused.value.next


def test_names_from_files_are_text() -> None:
    facts = {
        "tuned": "<b>t</b>", "base": "b", "algorithms": [], "ranks": [], "layers_error": 0.0, "error": 0.0,
        "modules": 0, "parameters": 0, "bytes": 0, "norm": 0.0, "weight": 0.0, "layers": [],
        "by_algorithm": {}, "dense": [], "seed": 0,
        "left_out": [{"name": "<script>x</script>", "reason": "<i>", "norm": 0.0, "share": 0.0}],
    }  # fmt: skip
    text = pages.page(Report("extract", "<u>", facts=facts))
    assert not re.search("<script|<b>t|<i>|<u>", text) and "&lt;script&gt;" in text


def test_the_spectra_shown_go_on_past_the_rank() -> None:
    rows = [
        {"name": name, "spectrum": [1.0 / k for k in range(1, count + 1)], "rank": 4,
         "curve": {}, "norm": 1.0, "error": 0.5}
        for name, count in (("short", 4), ("long", 9), ("none", 0))
    ]  # fmt: skip
    assert [row["name"] for row in pages._with_spectra(rows)] == ["long"]
    assert [row["name"] for row in pages._with_spectra(rows[:1])] == ["short"]
