"""The library's view of an adapter: module paths mapped to updates, and where they came from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptsurgery.adapters.loading import (
    AnyBase,
    AnyPath,
    Loaded,
    names_of,
    parse_files,
    read_adapter,
    read_files,
)
from adaptsurgery.adapters.report import Report
from adaptsurgery.adapters.rows import as_stored
from adaptsurgery.adapters.updates import modules_of, update_of
from adaptsurgery.adapters.writing import write_adapter
from adaptsurgery.checkpoint.watched import check_watched, watching
from adaptsurgery_formats import AdapterState, ModuleState, Note
from adaptsurgery_formats.errors import NameLookupError, nearest
from adaptsurgery_formats.names import Names, names_of_modules
from adaptsurgery_formats.resolve import find_modules
from adaptsurgery_formats.tensors import Tensor

if TYPE_CHECKING:
    from adaptsurgery.core.update import Update


class Adapter(Mapping[str, "Update"]):
    """An adapter file as a mapping from module paths to updates, built when they are asked for.

    A key is the module's dotted path, with its component before it ("unet.mid_block…") where the
    file adapts several. ``provenance`` tells where a module came from. Two entries on one layer (a
    LoRA and a bias difference) are one update, composed.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        several = len(loaded.state.components) > 1
        self._modules: dict[str, list[ModuleState]] = {}
        for module in loaded.state.modules:
            key = module.label if several else module.path
            self._modules.setdefault(key, []).append(module)

    @classmethod
    def from_updates(
        cls,
        updates: Mapping[str, Update],
        base: str | os.PathLike[str] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> Adapter:
        """An adapter of updates made or found elsewhere, to be saved in any layout that holds them.

        A key is a module's dotted path; with a ``base``, which the paths are looked up in, its
        component may stand before it ("unet.mid_block…"). Raises NameLookupError for a path that
        the base does not have or has in several components, ShapeError for an update that does not
        fit its weight, ValueRefused for one that no file has a place for.
        """
        with watching() as watched:
            names, read = names_of(base) if base is not None else (None, None)
        state = AdapterState("memory", [], metadata=dict(metadata or {}), where="memory")
        for key, update in updates.items():
            component, path = _placed(key, names)
            state.modules += modules_of(path, update, component)
        state = find_modules(state, names) if names else state
        return cls(Loaded(state, [], names, read, watched=watched))

    def __getitem__(self, path: str) -> Update:
        modules = self.modules(path)
        where = self._loaded.state.where
        updates = [update_of(m, self._loaded.names, where) for m in modules]
        self.check_unchanged()
        if len(updates) == 1:
            return updates[0]
        from adaptsurgery.core.update import compose

        return compose(updates)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, path: object) -> bool:
        return path in self._modules

    def __repr__(self) -> str:
        algorithms = "+".join(dict.fromkeys(m.algorithm for m in self._loaded.state.modules))
        return (
            f"<Adapter {self.layout} {algorithms}, {len(self)} modules, {self._loaded.state.where}>"
        )

    @property
    def paths(self) -> list[Path]:
        """The local files or folders it was read from."""
        return list(self._loaded.paths)

    @property
    def layout(self) -> str:
        return self._loaded.state.layout

    @property
    def model(self) -> str:
        """The bundled table that the names were found in, or an empty string."""
        return self._loaded.names.model if self._loaded.names else ""

    @property
    def components(self) -> list[str]:
        return self._loaded.state.components

    @property
    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Parameters that the file replaces outright (modules_to_save), by component and name."""
        return self._loaded.state.saved

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self._loaded.state.metadata)

    @property
    def notes(self) -> list[Note]:
        """What was noticed on reading: scale rules, untouched fields."""
        return list(self._loaded.state.notes)

    def modules(self, path: str) -> list[ModuleState]:
        """The parsed modules at a path: tensors by reference, alpha, rank, scale and its rule.

        Raises NameLookupError with the nearest paths for one that the adapter does not have.
        """
        if path not in self._modules:
            raise NameLookupError(
                f"the adapter has no `{path}`",
                where=self._loaded.state.where,
                next=nearest(path, self._modules),
            )
        return self._modules[path]

    def check_unchanged(self) -> None:
        """Raise FileError "input-changed" where a file is not what it was when it was loaded.

        Updates are read when they are asked for, and ask this themselves.
        """
        check_watched(self._loaded.watched)

    def provenance(self, path: str) -> dict[str, Any]:
        """File, layout, keys, and the scale with the rule that it follows from."""
        modules = self.modules(path)
        return {
            "file": self._loaded.state.where,
            "layout": self.layout,
            "keys": [key for m in modules for key in m.keys],
            "algorithm": [m.algorithm for m in modules],
            "rank": [m.rank for m in modules],
            "alpha": [m.alpha for m in modules],
            "scale": [m.scale for m in modules],
            "rule": [m.rule for m in modules],
        }

    def on(self, modules: Mapping[str, tuple[int, ...]]) -> Adapter:
        """The adapter on a model's own modules, whatever its family calls them and how they are cut.

        ``modules``: path → the weight's shape. Raises what ``load`` raises for a base, InexactError
        where a part of a fused layer cannot be said as a change of the whole.
        """
        names = names_of_modules(modules, "the model")
        state = as_stored(find_modules(self._loaded.state, names), names)
        return Adapter(replace(self._loaded, state=state, names=names, base=None))

    def save(
        self,
        path: str | os.PathLike[str],
        layout: str | None = None,
        *,
        overwrite: bool = False,
        hashes: bool = True,
    ) -> Report:
        """Write the adapter in a layout (its own if none is named); see ``convert``."""
        return write_adapter(
            self._loaded, Path(path), layout or self.layout, overwrite=overwrite, hashes=hashes
        )


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every module's weight of a live model by the module's name, as it was built."""
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = (
            name.replace(".base_layer.", ".").replace(".original_module.", ".").rpartition(".")
        )
        if leaf == "weight" and path:
            shapes[path] = tuple(parameter.shape)
    return shapes


def parts(path: Path) -> Counter[str]:
    """How many modules a local file or folder has for each model that it tells apart.

    By component, or by the prefix that stands for one; the names are looked up nowhere.
    """
    modules = parse_files(read_files(path)).modules
    return Counter(m.component or m.options.get("prefix", "") for m in modules)


def _placed(key: str, names: Names | None) -> tuple[str, str]:
    """Component and path of a key that may begin with a component's name."""
    component, _, path = key.partition(".")
    if names is not None and component and component in names.components:
        if names.components[component].locate(key) is None:
            return component, path
    return "", key


def load(
    path: AnyPath | Sequence[AnyPath],
    base: AnyBase | None = None,
    layout: str | None = None,
) -> Adapter:
    """The adapter at a path or Hub name (``org/name[@revision][:file]``).

    Several paths are parts of one adapter, a UNet's and its text encoders'.
    ``base`` gives the module list (a checkpoint, a folder, a Hub name, sd15, sd2, sdxl, flux, or the
    list itself: module path → its weight's shape), which flat names need unless a bundled table has them; ``layout`` overrules detection. Only
    headers are read until an update is asked for. Raises SurgeryError for whatever is wrong.
    """
    return Adapter(read_adapter(path, base=base, layout=layout))
