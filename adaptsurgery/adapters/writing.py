"""An adapter becomes a file or a folder: spelled, read again, held against its source, and landed whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from adaptsurgery.adapters.comparing import EXACT, NO_NUMBER, VerificationError, compare, verdict
from adaptsurgery.adapters.loading import CONFIG, WEIGHTS, AnyPath, Loaded, format_named
from adaptsurgery.adapters.renaming import names_for, renamed
from adaptsurgery.adapters.report import Report, Row
from adaptsurgery.adapters.rewritings import carry_out
from adaptsurgery.adapters.updates import nonfinite_allowed
from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.apart import Guard, keep_apart
from adaptsurgery.checkpoint.atomic import check_output, output
from adaptsurgery.checkpoint.finite import Nonfinite
from adaptsurgery.checkpoint.safetensors import held_open
from adaptsurgery.checkpoint.watched import check_watched
from adaptsurgery.checkpoint.writer import layout, order, write_safetensors
from adaptsurgery_formats import WRITABLE, AdapterFile, AdapterState, Format
from adaptsurgery_formats.errors import FileError, LayoutError
from adaptsurgery_formats.metadata import sshs_hashes
from adaptsurgery_formats.names import flatten
from adaptsurgery_formats.resolve import find_modules
from adaptsurgery_formats.tensors import total_bytes

# What an existing PEFT folder may hold and still be replaced.
CARD = "README.md"


_OURS = (CONFIG, WEIGHTS, CARD, f"*/{CONFIG}", f"*/{WEIGHTS}", f"*/{CARD}")


Progress = Callable[[int, int], None]


def write_adapter(
    loaded: Loaded,
    out: Path,
    to: str,
    *,
    change: Callable[[Loaded], AdapterState] | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    hashes: bool = True,
    progress: Progress | None = None,
    others: Sequence[AnyPath] = (),
) -> Report:
    """A loaded adapter in a layout, after a change of its algorithm if one is asked for.

    ``others`` are what it was made of besides: nobody may read the output who may not read them all.
    """
    target = writable(to)
    assert target.spell is not None
    keep_apart(loaded.paths, [out], guard=_guard(target))
    keep_apart([loaded.base_place], [out], guard="folder")
    nonfinite = Nonfinite(allow_nonfinite)
    with nonfinite_allowed(allow_nonfinite):
        _find_names(loaded, target)
        changed = change(loaded) if change else loaded.state
        state = renamed(changed, loaded.names, target)
        state = carry_out(state, target.plan(state, loaded.names), loaded.names)
        files = target.spell(state, loaded.names)
        rows = _checked(loaded, files, target, changed)
    report = _report(loaded, state, rows, target, files)
    check_watched(loaded.watched)
    if not dry_run:
        inputs = [*loaded.inputs, *others]
        landing = partial(check_watched, loaded.watched)
        report.outputs = _write(
            files, out, target, overwrite, hashes, progress, inputs, nonfinite, landing
        )
        report.notes += nonfinite.notes(str(out))
    return report


def writable(name: str) -> Format:
    target = format_named(name)
    if target.spell is None:
        raise LayoutError(
            f"{target.title} is read but not written",
            next="--to " + ", ".join(WRITABLE),
            code="read-only-layout",
        )
    return target


def check_paths(
    sources: Sequence[AnyPath],
    written: AnyPath,
    target: Format,
    overwrite: bool,
    base: AnyPath | None = None,
) -> None:
    """Refuse an output that is read, or that cannot be written, before any work is done."""
    out = Path(written)
    folder = target.name == "peft"
    if "\0" in str(out):
        raise FileError("no file can have such a name", where=str(out), code="bad-name")
    if folder and out.suffix in (".safetensors", ".bin"):
        raise FileError(
            "PEFT's layout is a folder", where=str(out), next="-o FOLDER", code="not-a-directory"
        )
    keep_apart(sources, [out], guard=_guard(target))
    keep_apart([base], [out], guard="folder")
    pickled = out.suffix in (".bin", ".pt", ".pth", ".ckpt")
    if not folder and (pickled or system.names_folder(written)):
        raise FileError(
            "this layout is one safetensors file",
            where=str(out),
            next=f"-o {out.with_suffix('.safetensors') if out.name else 'FILE.safetensors'}",
            code="bad-name",
        )
    check_output(out, overwrite=overwrite, directory=folder, replaceable=_OURS)


def _guard(target: Format) -> Guard:
    """What is read of a folder of adapters is all that it holds, of which a new folder is a part."""
    return "whole" if target.name == "peft" else "folder"


def _find_names(loaded: Loaded, target: Format) -> None:
    """Find the model of an adapter that came without a base, where the target's names need it."""
    loaded.names, loaded.state = names_for(loaded.state, loaded.names, target)
    if loaded.names is None and target.name == "kohya" and not loaded.state.prefix:
        loaded.state.note(
            "assumed-prefix",
            loaded.state.where,
            "no bundled model has these modules: the prefixes follow the components' names, "
            "lora_unet_ where there is none; --base names the model",
        )


def _checked(
    loaded: Loaded, files: Sequence[AdapterFile], target: Format, changed: AdapterState
) -> list[Row]:
    """Read back what was spelled and hold its ΔW against the source's; one row per module.

    ``changed`` is the source's state after a change of algorithm, whose errors were weighed
    already: a row of it may be lossy, what was spelled from it may not. Raises VerificationError
    where that is not so, which is an error of ours.
    """
    state = target.parse(files)
    if loaded.names is not None:
        state = find_modules(state, loaded.names)
    elif any(m.naming == "flat" for m in state.modules):
        state = _unflattened(state, changed)
    before = replace(loaded, state=changed)
    rows = list(compare(before, replace(loaded, state=state)))
    wrong = [r for r in rows if r.change != NO_NUMBER and not r.error <= EXACT]  # NaN is wrong too
    if wrong:
        raise VerificationError(
            f"`{wrong[0].module}` would not keep its ΔW: nothing was written",
            where=loaded.state.where,
            seen=f"relative error {wrong[0].error:.3g}",
            next="this is an error in adaptsurgery; please report it",
        )
    return rows if changed is loaded.state else list(compare(loaded, before))


def _unflattened(state: AdapterState, source: AdapterState) -> AdapterState:
    """Flat names as the source's paths: there is no other list to look them up in."""
    paths = {flatten(m.path): m for m in source.modules}
    modules = [
        replace(m, path=paths[m.path].path, component=paths[m.path].component, naming="base")
        for m in state.modules
    ]
    return replace(state, modules=modules)


def _report(
    loaded: Loaded,
    state: AdapterState,
    rows: list[Row],
    target: Format,
    files: Sequence[AdapterFile],
) -> Report:
    facts = {
        "source": loaded.state.where,
        "from": loaded.state.layout,
        "to": target.name,
        "model": loaded.names.model if loaded.names else "",
        "components": state.components,
        "modules": len(rows),
        "tensors": sum(len(f.tensors) for f in files),
        "bytes": sum(t.nbytes for f in files for t in f.tensors.values()),
    }
    notes = list(dict.fromkeys([*loaded.state.notes, *state.notes]))
    return Report("convert", verdict(rows), rows, notes, facts=facts)


def _write(
    files: Sequence[AdapterFile],
    out: Path,
    target: Format,
    overwrite: bool,
    hashes: bool,
    progress: Progress | None,
    inputs: Sequence[AnyPath],
    nonfinite: Nonfinite,
    landing: Callable[[], object],
) -> list[str]:
    """The files under their final names, whole or not at all; ``landing`` has the last word."""
    total = sum(total_bytes(f.tensors.values()) for f in files)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    folder = target.name == "peft"
    with output(
        out, overwrite=overwrite, directory=folder, replaceable=_OURS, needed=total, inputs=inputs
    ) as place:
        for file in files:
            at = place / file.component / WEIGHTS if folder else place
            at.parent.mkdir(exist_ok=True)
            _add_hashes(file, hashes)
            write_safetensors(at, file.tensors, file.metadata, nonfinite=nonfinite, progress=tell)
            card = out / file.component / CARD
            if folder and card.is_file():  # the output's own model card stays
                system.copy_file(card, at.parent / CARD)
            if file.config is not None:
                text = json.dumps(file.config, indent=2, sort_keys=True)
                system.write_text(at.parent / CONFIG, text)
        landing()
    if not folder:
        return [str(out)]
    return [str(out / f.component / name) for f in files for name in (CONFIG, WEIGHTS)]


def _add_hashes(file: AdapterFile, wanted: bool) -> None:
    """sd-scripts' hashes, in files that carry its metadata."""
    if wanted and any(key.startswith("ss_") for key in file.metadata) and file.config is None:
        tensors = [file.tensors[key] for key in order(file.tensors)]
        with held_open():
            file.metadata |= sshs_hashes(
                tensors, file.metadata, lambda metadata: layout(file.tensors, metadata)
            )
