"""What is done with an input, by name; each job asks the oracle where its input has an answer.

A job returns how it ended (None for done), raises the tool's SurgeryError, or Wrong.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import adaptsurgery
from fuzzing import oracle
from fuzzing.oracle import Wrong

Options = dict[str, Any]
_PATHS = ("in/", "out/", "{room}")


class Place:
    """A trial's room: what texts in options mean there."""

    def __init__(self, room: Path) -> None:
        self.room = room

    def __call__(self, value: Any) -> Any:
        """The value with every path of the room in full."""
        if isinstance(value, str) and "{room}" in value:
            value = value.replace("{room}", str(self.room))
        elif isinstance(value, str) and value.startswith(_PATHS):
            value = f"{self.room}/{value}"
        elif isinstance(value, list):
            value = [self(v) for v in value]
        return value


def header(place: Place, options: Options) -> str | None:
    """Our reader against the safetensors library's: never laxer, and the same bytes."""
    from adaptsurgery.checkpoint.safetensors import read_safetensors

    path = place(options["source"])
    theirs = oracle.by_library(path)
    read = read_safetensors(path)
    if theirs is None:
        raise Wrong("a header is accepted that the safetensors library refuses")
    oracle.same_tensors(read, theirs)
    return None


def inspect(place: Place, options: Options) -> str | None:
    _call(adaptsurgery.inspect, place, options, "source").as_dict()
    return None


def convert(place: Place, options: Options) -> str | None:
    check = options.pop("check", False)
    report = _call(adaptsurgery.convert, place, options, "source", "out", "to")
    if check and not _copies(report):
        source, base = place(options["source"]), place(options.get("base"))
        folded = "algorithm" in options
        oracle.same_changes(source, place(options["out"]), report.max_error, folded, base)
    return None


def verify(place: Place, options: Options) -> str | None:
    """Nothing differs from itself, and equal bytes that are no numbers are told."""
    check = options.pop("check", False)
    report = _call(adaptsurgery.verify, place, options, "source", "other")
    if options["source"] == options["other"] and report.max_error > 1e-6:
        raise Wrong("an adapter differs from itself")
    if check and "not numbers" not in report.verdict:
        oracle.finite_adapter(place(options["source"]))
    return None


def merge(place: Place, options: Options) -> str | None:
    return _merged(adaptsurgery.merge, place, options, 1.0)


def unmerge(place: Place, options: Options) -> str | None:
    return _merged(adaptsurgery.unmerge, place, options, -1.0)


def _merged(job: Callable[..., Any], place: Place, options: Options, sign: float) -> str | None:
    check = options.pop("check", False)
    adapters = [(place(path), weight) for path, weight in options.pop("adapters")]
    out, base = place(options["out"]), place(options["base"])
    more = {k: place(v) for k, v in options.items() if k not in ("out", "base")}
    report = job(base, adapters, out, **{"workers": 1, **more})
    if _copies(report):
        return None
    oracle.finite_model(out, base)
    if "max_shard_size" in options:
        oracle.within(out, options["max_shard_size"])
    if check:
        oracle.merged_rightly(out, base, adapters, sign)
        adaptsurgery.verify_merge(out, base, adapters, inverse=sign < 0)
    return None


def combine(place: Place, options: Options) -> str | None:
    check = options.pop("check", False)
    sources = [(place(path), weight) for path, weight in options.pop("sources")]
    more = {k: place(v) for k, v in options.items() if k != "out"}
    report = adaptsurgery.combine(sources, place(options["out"]), **more)
    if check and not _copies(report):
        oracle.summed_rightly(sources, place(options["out"]), report.max_error, more.get("base"))
    return None


def resize(place: Place, options: Options) -> str | None:
    check = options.pop("check", False)
    report = _call(adaptsurgery.resize, place, options, "source", "out")
    if check and not _copies(report):
        source, base = place(options["source"]), place(options.get("base"))
        oracle.same_changes(source, place(options["out"]), report.max_error, False, base)
    return None


def extract(place: Place, options: Options) -> str | None:
    """The error that is told is the error that is there."""
    check = options.pop("check", False)
    report = _call(adaptsurgery.extract, place, {"workers": 1, **options}, "base", "tuned", "out")
    if check:
        base, tuned, out = (place(options[name]) for name in ("base", "tuned", "out"))
        oracle.extracted_rightly(base, tuned, out, report)
    return None


def fold(place: Place, options: Options) -> str | None:
    """A live model's weights against the oracle's, and out again."""
    from fuzzing import live

    base, adapter = place(options["base"]), place(options["adapter"])
    model = live.of_file(base)
    adaptsurgery.fold(model, adapter, options["weight"])
    live.weighs(model, oracle.merged(base, [(adapter, options["weight"])], 1.0))
    return None


def attach(place: Place, options: Options) -> str | None:
    """Into a live model, one forward, saved, merged; the model is as before where it is refused."""
    from fuzzing import live

    return live.attached(place, options)


def config(place: Place, options: Options) -> str | None:
    """An adapter_config.json, read and asked about names."""
    from adaptsurgery import AdapterConfig, find_targets

    read = AdapterConfig.from_pretrained(place(options["source"]))
    find_targets(dict.fromkeys(options["names"], "linear"), read)
    return None


def rewrite(place: Place, options: Options) -> str | None:
    _call(adaptsurgery.rewrite, place, options, "source")
    return None


def plan(place: Place, options: Options) -> str | None:
    """A merge's plan with some of its values edited, carried out."""
    from adaptsurgery import plan_merge
    from adaptsurgery.jobs.merging.plan import MergePlan
    from adaptsurgery.jobs.merging.run import run_plan

    made = plan_merge(place(options["base"]), [place(options["adapter"])])
    data = json.loads(made.to_json())
    for path, value in options["edits"]:
        _edit(data, path, place(value))
    run_plan(MergePlan.from_json(json.dumps(data)), Path(place(options["out"])), workers=1)
    oracle.finite_model(place(options["out"]), place(options["base"]))
    if not options["edits"]:
        oracle.merged_rightly(
            place(options["out"]), place(options["base"]), [(place(options["adapter"]), 1.0)], 1.0
        )
    return None


def _edit(data: Any, path: list[Any], value: Any) -> None:
    """One value replaced, unless an earlier edit has left no such place."""
    with suppress(TypeError, LookupError):
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value


def pickled(place: Place, options: Options) -> str | None:
    """A torch pickle converted: the numbers are those that torch itself reads."""
    source, out = place(options["source"]), place(options["out"])
    report = adaptsurgery.convert(source, out, options["to"], base=place(options["base"]))
    oracle.same_as_pickle(source, out, report.max_error, place(options["base"]))
    return None


def command(place: Place, options: Options) -> str | None:
    """A command line in this process: its exit code, its streams, its JSON."""
    from adaptsurgery.cli import run

    args = [_argument(place, a) for a in options["args"]]
    stream: Any = sys.stdout
    code = run(args)
    text = stream.text() if hasattr(stream, "text") else ""
    error = sys.stderr.text() if hasattr(sys.stderr, "text") else ""
    if "--json" in args and code in (0, 1) and text and "--help" not in args and "-h" not in args:
        json.loads(text.splitlines()[-1] if text.count("\n") == 1 else text)
    if code == 2:
        return "usage"
    if code == 0:
        _shards(args)
        return None
    match = re.search(r"error\[([\w-]+)\]", error)
    return f"refused: {match[1] if match else _untold(text, code)}"


def _untold(text: str, code: int) -> str:
    different = re.search(r"differ|not equal", text)
    return "different" if code == 1 and different else f"untold, exit {code}"


def _argument(place: Place, arg: str) -> str:
    """An argument with its paths in full, also behind "=" and with a weight after."""
    if arg.startswith("--") and "=" in arg:
        name, _, value = arg.partition("=")
        return f"{name}={place(value)}"
    return str(place(arg))


def _shards(args: list[str]) -> None:
    """Where a shard size was given in plain numbers, no shard of several tensors is larger."""
    if args[0] in ("merge", "unmerge") and "--max-shard-size" in args and "-o" in args:
        size = args[args.index("--max-shard-size") + 1]
        out = args[args.index("-o") + 1]
        if re.fullmatch(r"[\d.]+", size) and os.path.exists(out):
            oracle.within(out, float(size))


def _copies(report: Any) -> bool:
    """Whether it tells of bytes that are no numbers and were copied."""
    return any(note.code == "nonfinite-copied" for note in report.notes)


def _call(job: Callable[..., Any], place: Place, options: Mapping[str, Any], *names: str) -> Any:
    given = [place(options[name]) for name in names]
    return job(*given, **{k: place(v) for k, v in options.items() if k not in names})


JOBS: dict[str, Callable[[Place, Options], str | None]] = {
    job.__name__: job
    for job in (
        header, inspect, convert, verify, merge, unmerge, combine, resize, extract, fold, attach,
        config, rewrite, plan, pickled, command,
    )
}  # fmt: skip
