"""Surgery on model adapters and checkpoints.

    import adaptsurgery
    adapter = adaptsurgery.load("style.safetensors")          # any layout, found by look-up
    adaptsurgery.convert("style.safetensors", "out", "peft")  # the same ΔW in another layout
    adaptsurgery.merge("model/", ["style.safetensors"], "merged/")

Importing this package is cheap: torch comes in with the first call that needs numbers.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing's own, without its import: Ctrl-C is answered only after this file
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from adaptsurgery.adapters.adapter import Adapter, load
    from adaptsurgery.adapters.report import Report
    from adaptsurgery.algorithms.hra import HRAConfig
    from adaptsurgery.algorithms.loha import LoHaConfig
    from adaptsurgery.algorithms.lokr import LoKrConfig
    from adaptsurgery.algorithms.lora_config import LoraConfig
    from adaptsurgery.core.config import AdapterConfig
    from adaptsurgery.jobs.combining.combine import combine
    from adaptsurgery.jobs.convert import convert
    from adaptsurgery.jobs.extract.extract import extract
    from adaptsurgery.jobs.fold import fold, unfold
    from adaptsurgery.jobs.inspect import inspect
    from adaptsurgery.jobs.merging.check import verify_merge
    from adaptsurgery.jobs.merging.merge import merge, plan_merge, unmerge
    from adaptsurgery.jobs.resize import resize
    from adaptsurgery.jobs.rewrite import rewrite
    from adaptsurgery.jobs.verify import verify
    from adaptsurgery.modules.model import AdaptedModel, HRAModel, LoHaModel, LoKrModel, LoraModel
    from adaptsurgery.modules.peft_model import PeftModel, get_peft_model
    from adaptsurgery.modules.penalty import orthogonality
    from adaptsurgery.targeting import find_targets
    from adaptsurgery_formats.errors import SurgeryError

__version__ = "0.1.0"
__all__ = [
    "AdaptedModel",
    "Adapter",
    "AdapterConfig",
    "HRAConfig",
    "HRAModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoraConfig",
    "LoraModel",
    "PeftModel",
    "Report",
    "SurgeryError",
    "combine",
    "convert",
    "extract",
    "find_targets",
    "fold",
    "get_peft_model",
    "inspect",
    "load",
    "merge",
    "orthogonality",
    "plan_merge",
    "resize",
    "rewrite",
    "unfold",
    "unmerge",
    "verify",
    "verify_merge",
]

# Public name → where it lives; submodules are attributes too, at every level.
_HOMES = {
    "AdaptedModel": "adaptsurgery.modules.model",
    "HRAModel": "adaptsurgery.modules.model",
    "LoHaModel": "adaptsurgery.modules.model",
    "LoKrModel": "adaptsurgery.modules.model",
    "LoraModel": "adaptsurgery.modules.model",
    "PeftModel": "adaptsurgery.modules.peft_model",
    "get_peft_model": "adaptsurgery.modules.peft_model",
    "orthogonality": "adaptsurgery.modules.penalty",
    "AdapterConfig": "adaptsurgery.algorithms",
    "HRAConfig": "adaptsurgery.algorithms",
    "LoHaConfig": "adaptsurgery.algorithms",
    "LoKrConfig": "adaptsurgery.algorithms",
    "LoraConfig": "adaptsurgery.algorithms",
    "Adapter": "adaptsurgery.adapters.adapter",
    "load": "adaptsurgery.adapters.adapter",
    "combine": "adaptsurgery.jobs.combining.combine",
    "convert": "adaptsurgery.jobs.convert",
    "find_targets": "adaptsurgery.targeting",
    "extract": "adaptsurgery.jobs.extract.extract",
    "fold": "adaptsurgery.jobs.fold",
    "unfold": "adaptsurgery.jobs.fold",
    "inspect": "adaptsurgery.jobs.inspect",
    "merge": "adaptsurgery.jobs.merging.merge",
    "plan_merge": "adaptsurgery.jobs.merging.merge",
    "unmerge": "adaptsurgery.jobs.merging.merge",
    "verify_merge": "adaptsurgery.jobs.merging.check",
    "resize": "adaptsurgery.jobs.resize",
    "rewrite": "adaptsurgery.jobs.rewrite",
    "verify": "adaptsurgery.jobs.verify",
    "Report": "adaptsurgery.adapters.report",
    "SurgeryError": "adaptsurgery_formats.errors",
}
_ROOMS = (
    "adapters", "algorithms", "checkpoint", "cli", "core", "graph", "jobs", "modules", "nearest",
    "quickstart", "targeting",
)  # fmt: skip


def submodules(package: str) -> Callable[[str], ModuleType]:
    """A package's ``__getattr__``: each of its submodules is imported when it is first touched."""

    def find(name: str) -> ModuleType:
        path = f"{package}.{name}"
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if home := _home_of_class(name):
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _home_of_class(name: str) -> str:
    """Where the config or the model class of an algorithm lives, by the table of all of them."""
    if not name.endswith(("Config", "Model")):
        return ""
    from adaptsurgery_formats.traits import TRAITS

    homes = {row.config: "adaptsurgery.algorithms" for row in TRAITS.values() if row.config}
    homes |= {row.model: "adaptsurgery.modules.model" for row in TRAITS.values() if row.config}
    return homes.get(name, "")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_ROOMS])
