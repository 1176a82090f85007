"""Conversion: file → adapter → the target's names and needs → file, with ΔW checked on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from adaptsurgery.checkpoint import system
from adaptsurgery.checkpoint.atomic import check_output, output
from adaptsurgery.checkpoint.writer import layout, order, write_safetensors
from adaptsurgery.jobs.apart import Guard, keep_apart
from adaptsurgery.jobs.change import EXACT, as_lora
from adaptsurgery.jobs.loading import CONFIG, WEIGHTS, AnyPath, Loaded, format_named, load_state
from adaptsurgery.jobs.renaming import names_for, renamed
from adaptsurgery.jobs.report import Report, Row
from adaptsurgery.jobs.steps import carry_out
from adaptsurgery.jobs.verify import VerificationError, compare, verdict
from adaptsurgery_formats import WRITABLE, AdapterFile, AdapterState, Format
from adaptsurgery_formats.errors import FileError, LayoutError
from adaptsurgery_formats.metadata import sshs_hashes
from adaptsurgery_formats.names import flatten
from adaptsurgery_formats.resolve import resolve
from adaptsurgery_formats.tensors import total_bytes

# What an existing PEFT folder may hold and still be replaced.
CARD = "README.md"
_OURS = (CONFIG, WEIGHTS, CARD, f"*/{CONFIG}", f"*/{WEIGHTS}", f"*/{CARD}")
Progress = Callable[[int, int], None]


def convert(
    source: AnyPath | Sequence[AnyPath],
    out: str | os.PathLike[str],
    to: str,
    *,
    layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    algorithm: str | None = None,
    rank: int | None = None,
    allow_lossy: bool = False,
    prefix: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
    hashes: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Write the adapter at ``source`` to ``out`` in another layout, with the same ΔW.

    Several sources are parts of one adapter, a UNet's and its text encoders'.
    ``to`` is "peft" (``out`` is a folder), "lycoris" or "kohya" (a file). ``layout`` overrules the
    source's detection; ``base`` gives the module list: a checkpoint, a folder, a Hub name, or
    sd15, sd2, sdxl, flux. ``algorithm`` "lora" changes LoHa, LoKr, HRA and DoRA into LoRA,
    truncated to ``rank`` if given; what cannot be exact needs ``allow_lossy``. ``prefix`` takes the
    place of lora_unet or lycoris for a model that no bundled table has. ``hashes`` False
    leaves kohya's sshs hashes out, which take a second reading of the data. Nothing is written in
    a dry run, and nothing is left behind by a failure.

    Raises SurgeryError for any input that cannot be converted exactly: what, where, seen, next.
    """
    target = writable(to)
    if algorithm not in (None, "lora"):
        raise LayoutError(f"--as {algorithm} is not offered", next="--as lora", code="no-such-form")
    if rank is not None and algorithm is None:
        raise LayoutError("--rank goes with --as lora", code="rank-without-as")
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    check_paths(sources, out, target, overwrite, base)
    loaded = load_state(sources, base=base, layout=layout)
    _set_prefix(loaded, prefix.rstrip("_"), target)
    return write_adapter(
        loaded,
        Path(out),
        to,
        change=partial(as_lora, rank=rank, allow_lossy=allow_lossy) if algorithm else None,
        overwrite=overwrite,
        dry_run=dry_run,
        hashes=hashes,
        progress=progress,
    )


def write_adapter(
    loaded: Loaded,
    out: Path,
    to: str,
    *,
    change: Callable[[Loaded], AdapterState] | None = None,
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
    _find_names(loaded, target)
    changed = change(loaded) if change else loaded.state
    state = renamed(changed, loaded.names, target)
    state = carry_out(state, target.plan(state, loaded.names), loaded.names)
    files = target.spell(state, loaded.names)
    rows = _checked(loaded, files, target, changed)
    report = _report(loaded, state, rows, target, files)
    if not dry_run:
        inputs = [*loaded.inputs, *others]
        report.outputs = _write(files, out, target, overwrite, hashes, progress, inputs)
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
            next=f"-o {out.with_suffix('.safetensors')}",
            code="bad-name",
        )
    check_output(out, overwrite=overwrite, directory=folder, replaceable=_OURS)


def _guard(target: Format) -> Guard:
    """What is read of a folder of adapters is all that it holds, of which a new folder is a part."""
    return "whole" if target.name == "peft" else "folder"


def _set_prefix(loaded: Loaded, prefix: str, target: Format) -> None:
    """The prefix of flat names: the caller's, or the source's own within its layout."""
    if prefix and (target.name == "peft" or not prefix.isidentifier()):
        raise LayoutError(
            f"`{prefix}` cannot go before {target.title}'s names",
            next="letters, digits and underscores, for --to kohya or --to lycoris",
            code="bad-prefix",
        )
    if prefix and len(loaded.state.components) > 1:
        raise LayoutError(
            "one prefix cannot tell several components apart",
            where=loaded.state.where,
            seen=", ".join(loaded.state.components),
            next="leave --prefix out, or convert the components one by one",
            code="bad-prefix",
        )
    if prefix and loaded.names is not None and loaded.names.model:
        raise LayoutError(
            f"{loaded.names.model}'s prefixes are those that its readers know",
            where=loaded.state.where,
            next="leave --prefix out",
            code="bad-prefix",
        )
    kept = loaded.state.prefix if target.name == loaded.state.layout else ""
    loaded.state = replace(loaded.state, prefix=prefix or kept)


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
        state = resolve(state, loaded.names)
    elif any(m.naming == "flat" for m in state.modules):
        state = _unflattened(state, changed)
    before = replace(loaded, state=changed)
    rows = list(compare(before, replace(loaded, state=state)))
    wrong = [r for r in rows if not r.error <= EXACT]  # NaN is wrong too
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
) -> list[str]:
    """The files under their final names, whole or not at all."""
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
            write_safetensors(at, file.tensors, file.metadata, progress=tell)
            card = out / file.component / CARD
            if folder and card.is_file():  # the output's own model card stays
                system.copy_file(card, at.parent / CARD)
            if file.config is not None:
                text = json.dumps(file.config, indent=2, sort_keys=True)
                system.write_text(at.parent / CONFIG, text)
    if not folder:
        return [str(out)]
    return [str(out / f.component / name) for f in files for name in (CONFIG, WEIGHTS)]


def _add_hashes(file: AdapterFile, wanted: bool) -> None:
    """sd-scripts' hashes, in files that carry its metadata."""
    if wanted and any(key.startswith("ss_") for key in file.metadata) and file.config is None:
        tensors = [file.tensors[key] for key in order(file.tensors)]
        file.metadata |= sshs_hashes(
            tensors, file.metadata, lambda metadata: layout(file.tensors, metadata)
        )
