"""What a format reads and writes: the content of one adapter file, and the format itself as data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptsurgery_formats.errors import InexactError, LayoutError
from adaptsurgery_formats.names import Names
from adaptsurgery_formats.paths import misnamed
from adaptsurgery_formats.peft_config import check_config
from adaptsurgery_formats.state import AdapterState, ModuleState
from adaptsurgery_formats.tensors import Tensor
from adaptsurgery_formats.traits import TRAITS, traits_of

# Our own metadata keys: what a layout cannot say by itself, kept so that the way back is exact.
META_OURS = "adaptsurgery."
META_COMPONENT = "adaptsurgery.component"
META_MODEL = "adaptsurgery.model"
META_CONFIG = "adaptsurgery.adapter_config"
META_PREFIX = "adaptsurgery.prefix"  # where it is not the layout's own
META_ALPHA = "adaptsurgery.alpha"  # "BF16 0": the alphas' dtype and number of dimensions


@dataclass
class AdapterFile:
    """One safetensors file's keys and metadata, with the adapter_config.json beside it if any.

    ``component`` is the sub-folder of a pipeline's adapter ("unet", "text_encoder"), or "".
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    component: str = ""
    where: str = ""


_COMPONENT = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)


def carried_component(metadata: Mapping[str, str], where: str) -> str:
    """The component that an earlier conversion put into the metadata; it names a folder, so no path."""
    component = metadata.get(META_COMPONENT, "")
    if component and (not _COMPONENT.fullmatch(component) or misnamed(component)):
        raise LayoutError(
            f"metadata {META_COMPONENT} is no component's name",
            where=where,
            seen=component,
            code="bad-name",
        )
    return component


def carried_config(metadata: dict[str, str], where: str) -> dict[str, Any]:
    """Take PEFT's configs, by component, out of the metadata where an earlier conversion put them."""
    text = metadata.pop(META_CONFIG, "{}")
    try:
        config = json.loads(text)
        for each in config.values():
            check_config(each, where)
    except (ValueError, RecursionError, AttributeError, LayoutError) as error:
        raise LayoutError(
            f"metadata {META_CONFIG} is damaged",
            where=where,
            seen=getattr(error, "what", str(error)),
            next="remove it: only the way back to PEFT loses its original fields",
            code="bad-config",
        ) from None
    return dict(config)


# Exact rewritings that a layout may ask for before it can spell a module. They need arithmetic,
# so the format only names them and the caller carries them out.
FOLD_MID = "fold lora_mid into lora_down"
FLATTEN_TUCKER = "flatten the tucker core"
FOLD_SCALE = "fold the scale into w1"
JOIN_W1 = "multiply w1_a by w1_b"
JOIN_W2 = "multiply w2_a by w2_b"


@dataclass(frozen=True)
class Rewriting:
    """A rewriting that a module needs before it can be spelled."""

    module: ModuleState
    step: str


@dataclass(frozen=True)
class Unheld:
    """Why a layout has no place for a module: the refusal's code, the reason, and what to do."""

    code: str
    what: str
    next: str

    def error(self, module: ModuleState, where: str) -> InexactError:
        """The refusal of a module."""
        return InexactError(
            f"`{module.label}`: {self.what}", where=where, next=self.next, code=self.code
        )


def no_such(algorithm: str, they_have: str) -> Unheld:
    """What says that a layout ("LyCORIS has") has no key for an algorithm."""
    row = traits_of(algorithm)
    what = f"{they_have} no {row.title}"
    if row.turns:
        exact = "--as lora --base BASE"
        return Unheld(f"no-{algorithm}", f"{what}; `{exact}` is exact", exact)
    remedy = "--as lora is exact" if row.low_rank else "merge it into the base instead"
    return Unheld(f"no-{algorithm}", what, remedy)


@dataclass(frozen=True, eq=False, repr=False)
class Format:
    """One layout, as data: how to know its keys, parse them, and spell an adapter.

    ``holds`` says why the layout has no place for a module, or None where it has one, whatever the
    others are. It takes the shape of the weight as it is stored where that is known, and may be
    asked of a module without tensors: then of all that its algorithm, kind and options tell. An
    algorithm that the layout has no key for is never held. ``naming`` gives the names it writes for a component: "diffusers", "native" or
    the component's own kohya_naming where it is None.
    """

    name: str
    title: str
    claims: Callable[[str], bool]
    parse: Callable[[Sequence[AdapterFile]], AdapterState]
    plan: Callable[[AdapterState, Names | None], list[Rewriting]]
    spell: Callable[[AdapterState, Names | None], list[AdapterFile]] | None
    holds: Callable[[ModuleState, tuple[int, ...] | None], Unheld | None]
    naming: str | None
    examples: tuple[str, ...]

    @property
    def refuses(self) -> dict[str, str]:
        """Algorithm → why, of those that the layout has no module of at all."""
        unheld = {name: self.holds(ModuleState("", name, {}), None) for name in TRAITS}
        return {name: refusal.what for name, refusal in unheld.items() if refusal is not None}
