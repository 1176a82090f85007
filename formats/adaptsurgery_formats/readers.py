"""One row a reader: which layouts and spellings it takes, what it does with alpha, what it leaves out.

A reader is a program that loads adapter files. ``readers_of`` holds a parsed adapter against each
row of ``READERS`` and says who reads it whole as it is, who a part of it, and who nothing. A row
starts from what the layout itself holds and names the reader's own limits on top of it.

Sources: PEFT and LyCORIS as installed, read and run; sd-scripts' ``networks`` at the commit in its
row, read, and ``lora.py`` run over the goldens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from adaptsurgery_formats import FORMATS, AdapterFile, lycoris
from adaptsurgery_formats.names import Component, Names
from adaptsurgery_formats.state import AdapterState, ModuleState, kernel_of, magnitude_axis
from adaptsurgery_formats.traits import traits_of

# What a reader does with a module that it does not read as the layout means it.
REFUSES = "refuses"  # it takes no file of this layout
FAILS = "fails"  # it raises, so that nothing of the file is read
DROPS = "drops"  # it leaves the module out in silence
MISREADS = "misreads"  # it leaves a part of the module out, and computes another ΔW


@dataclass(frozen=True, eq=False, repr=False)
class Seen:
    """A module as a reader meets it: in its layout, beside others, on a weight that may be known."""

    module: ModuleState
    layout: str
    names: Names | None
    shares: bool  # whether another module of the file acts on the same layer
    stored: Mapping[str, tuple[int, ...]]  # the file's keys and shapes, before any base was known

    @property
    def component(self) -> Component | None:
        return self.names.components.get(self.module.component) if self.names else None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the weight, where the base is known."""
        component = self.component
        return component.shape(self.module.path, self.module.naming) if component else None

    def dims(self, *suffixes: str) -> set[int]:
        """How many dimensions the tensors have that the file stores under the suffixes."""
        keys = (key for key in self.module.keys if key.endswith(suffixes))
        return {len(self.stored[key]) for key in keys}


@dataclass(frozen=True, eq=False, repr=False)
class Limit:
    """Modules that a reader does not read as the layout means them: which, why, what it does."""

    what: str
    fate: str
    of: Callable[[Seen], bool]


@dataclass(frozen=True, eq=False, repr=False)
class Reader:
    """One reader as data.

    ``layouts`` gives, for each layout that it takes, the pattern that its keys begin with.
    ``algorithms`` are those it takes of what the layout holds, () for all. ``prefixes`` are kohya's
    by (model, component), where they are other than the first of the model's table; ``renames``
    the models whose diffusers' names it turns into its own on loading.
    """

    name: str
    title: str
    checked: str  # the version that the row was checked against
    layouts: Mapping[str, str]
    alpha: str
    limits: tuple[Limit, ...] = ()
    algorithms: tuple[str, ...] = ()
    prefixes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    renames: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Reason:
    """Why modules are not read as the layout means them: what becomes of how many, such as which."""

    fate: str
    what: str
    modules: int
    example: str


@dataclass(frozen=True, eq=False, repr=False)
class Verdict:
    """What one reader makes of one file as it is: of how many modules, how many it reads rightly."""

    reader: Reader
    modules: int
    read: int
    reasons: tuple[Reason, ...] = ()

    @property
    def how(self) -> str:
        """ "whole", "part" or "nothing"."""
        if not self.reasons:
            return "whole"
        return "part" if self.read else "nothing"


def readers_of(
    state: AdapterState, files: Sequence[AdapterFile], names: Names | None = None
) -> dict[str, Verdict]:
    """What each reader makes of a parsed adapter as its ``files`` are, by the reader's name.

    With the ``names`` of its base the modules' names and shapes are judged too. Without them a
    reader is taken to have a model with these modules, as far as the file shows them.
    """
    places = Counter((m.component, m.path) for m in state.modules)
    stored = {key: tensor.shape for file in files for key, tensor in file.tensors.items()}
    seen = [
        Seen(m, state.layout, names, places[m.component, m.path] > 1, stored) for m in state.modules
    ]
    return {name: _verdict(reader, state.layout, seen) for name, reader in READERS.items()}


def _verdict(reader: Reader, layout: str, seen: Sequence[Seen]) -> Verdict:
    if layout not in reader.layouts:
        what = f"it takes {' and '.join(FORMATS[name].title for name in reader.layouts)}"
        label = seen[0].module.label if seen else ""
        return Verdict(reader, len(seen), 0, (Reason(REFUSES, what, len(seen), label),))
    missed = [(limit, s.module.label) for s in seen if (limit := _limit(reader, s)) is not None]
    counts = Counter((limit.fate, limit.what) for limit, _ in missed)
    first = {(limit.fate, limit.what): label for limit, label in reversed(missed)}
    reasons = tuple(Reason(*why, count, first[why]) for why, count in counts.items())
    fails = any(reason.fate == FAILS for reason in reasons)
    return Verdict(reader, len(seen), 0 if fails else len(seen) - len(missed), reasons)


def _limit(reader: Reader, seen: Seen) -> Limit | None:
    """The first thing that keeps a reader from reading a module as the layout means it, or None."""
    module, layout = seen.module, seen.layout
    if not all(map(_beginning(reader.layouts[layout]), module.keys)):
        return _OTHER_PREFIX
    if reader.algorithms and module.algorithm not in reader.algorithms:
        return Limit(f"modules with a {traits_of(module.algorithm).title}", DROPS, _always)
    if (unheld := FORMATS[layout].holds(module, seen.shape)) is not None:
        return Limit(unheld.what, FAILS, _always)
    if layout == "kohya" and not _is_called_so(reader, seen):
        return _OTHER_NAMES
    return next((limit for limit in reader.limits if limit.of(seen)), None)


@cache
def _beginning(pattern: str) -> Callable[[str], object]:
    """What tells whether a key begins with a pattern."""
    return re.compile(pattern).match


def _always(seen: Seen) -> bool:
    return True


_OTHER_PREFIX = Limit("modules under a prefix that it does not look for", DROPS, _always)
_OTHER_NAMES = Limit("modules that its model calls otherwise", DROPS, _always)


def _is_called_so(reader: Reader, seen: Seen) -> bool:
    """Whether a flat name is the one that a reader makes of its own model; True without a table."""
    module, component, names = seen.module, seen.component, seen.names
    if component is None or names is None or not names.model:
        return True
    usual = component.kohya_prefixes[0]
    if module.options.get("prefix") != reader.prefixes.get((names.model, component.name), usual):
        return False
    if module.naming == component.kohya_naming or module.naming not in ("native", "diffusers"):
        return True
    if component.kohya_naming == "native":  # some modules are called alike in both
        return module.path in component.native or names.model in reader.renames
    return False


# --- what limits are about -----------------------------------------------------------------------


def _has_no_alpha(seen: Seen) -> bool:
    return traits_of(seen.module.algorithm).scaled and seen.module.alpha is None


def _is_ia3(seen: Seen) -> bool:
    return seen.module.algorithm == "ia3"


def _has_magnitude(seen: Seen) -> bool:
    return "magnitude" in seen.module.tensors


def _is_per_input(seen: Seen) -> bool:
    return _has_magnitude(seen) and magnitude_axis(seen.module) == "in"


def _is_bias_beside(seen: Seen) -> bool:
    return seen.shares and traits_of(seen.module.algorithm).dense


def _is_bias_alone(seen: Seen) -> bool:
    return seen.module.tensors.keys() in ({"diff_b"}, {"b_norm"})


def _is_pointwise_core(seen: Seen) -> bool:
    return seen.module.tucker and all(k == 1 for k in kernel_of(seen.module) or ())


def _is_core(seen: Seen) -> bool:
    return seen.module.tucker and not _is_pointwise_core(seen)


def _has_other_dims(seen: Seen) -> bool:
    """Whether a LoRA's factors are stored in other dimensions than the layer's own."""
    if seen.module.algorithm != "lora":
        return False
    dims = seen.dims("lora_up.weight", "lora_down.weight")
    return len(dims | ({len(seen.shape)} if seen.shape else set())) > 1


def _has_long_w2_b(seen: Seen) -> bool:
    return seen.module.algorithm == "lokr" and max(seen.dims("lokr_w2_b"), default=2) > 2


def _is_cut_otherwise(seen: Seen) -> bool:
    return not lycoris.is_rebuilt(seen.module, seen.names)


def _is_turned(seen: Seen) -> bool:
    return lycoris.is_turned(seen.module, seen.names)


def _is_no_image_layer(seen: Seen) -> bool:
    return len(seen.shape or seen.module.tensors["down"].shape) not in (2, 4)


# What sd-scripts puts no LoRA on: it takes what lies in attention, resnet and sampling blocks of a
# UNet, in double and single blocks of Flux, in attention and MLP of a text encoder.
_NO_SD_SCRIPTS = (
    r"lora_unet_(conv_in|conv_out|time_embed|time_embedding_linear|add_embedding|class_embedding"
    r"|label_emb|input_blocks_0_0|out_2|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
    r"|lora_te[123]?_(\w*_)?(text_projection|embeddings?|shared|embed_tokens|token_embedding)"
)


def _is_out_of_reach(seen: Seen) -> bool:
    return any(re.match(_NO_SD_SCRIPTS, key) for key in seen.module.keys)


_OTHER_DIMS = Limit("factors of other dimensions than the layer's weight", FAILS, _has_other_dims)

READERS: dict[str, Reader] = {
    row.name: row
    for row in (
        Reader(
            name="peft",
            title="PEFT",
            checked="0.21.2",
            layouts={"peft": r"base_model\.model\."},
            alpha="the config's: alpha/r, alpha/√r with use_rslora",
        ),
        Reader(
            name="lycoris",
            title="LyCORIS",
            checked="4.1.3",
            layouts={"lycoris": "lycoris_", "kohya": "lora_(unet|te[123]?)_"},
            alpha="alpha/r; 0 is r; 1 where both Kronecker factors are full; fails without one",
            prefixes={("flux", "text_encoder_2"): "lora_te2"},
            limits=(
                Limit("(IA)³, which it writes and makes no module of", FAILS, _is_ia3),
                Limit("a bias difference beside another adapter", DROPS, _is_bias_beside),
                Limit("a bias difference without a weight's", FAILS, _is_bias_alone),
                Limit("modules without an alpha", FAILS, _has_no_alpha),
                Limit("a DoRA with a norm per input", FAILS, _is_per_input),
                Limit("a tucker core of a 1×1 convolution", FAILS, _is_pointwise_core),
                Limit("transformers' Conv1D", FAILS, _is_turned),
                Limit("a w2_b with the kernel's dimensions", FAILS, _has_long_w2_b),
                Limit("Kronecker factors cut otherwise than it guesses", FAILS, _is_cut_otherwise),
                _OTHER_DIMS,
            ),
        ),
        Reader(
            name="sd-scripts",
            title="sd-scripts",
            checked="48d368f (February 2026)",
            layouts={"kohya": "lora_(unet|te[123]?)_"},
            alpha="alpha/r; absent or 0 is r",
            algorithms=("lora",),
            renames=("sdxl",),
            limits=(
                Limit("layers that it puts no LoRA on", DROPS, _is_out_of_reach),
                Limit("other layers than Linear and Conv2d", DROPS, _is_no_image_layer),
                Limit("transformers' Conv1D", DROPS, _is_turned),
                Limit("a tucker core", FAILS, _is_core),
                _OTHER_DIMS,
                Limit("the lora_mid of a 1×1 convolution", MISREADS, _is_pointwise_core),
                Limit("dora_scale", MISREADS, _has_magnitude),
            ),
        ),
    )
}  # a new reader: its row here
