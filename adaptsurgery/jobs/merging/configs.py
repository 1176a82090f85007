"""What a merge changes in a model's config.json: ties, vocabulary, dtype, quantisation.

A config may hold others (``text_config``, ``vision_config``), each with keys of its own. A change
is a merge patch (RFC 7396): an object for an object, None for a key that goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptsurgery.checkpoint.base import Base
from adaptsurgery_formats import AdapterState
from adaptsurgery_formats.reading import typed

if TYPE_CHECKING:
    from adaptsurgery.jobs.merging.matched import Matched
    from adaptsurgery.jobs.merging.recipe import MergeRecipe

Config = Mapping[str, Any]
FLAG = "tie_word_embeddings"
_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_QUANTISED = ("quantization_config", "compression_config")
_DTYPES = ("dtype", "torch_dtype")


def config_changes(
    base: Base,
    matches: Matched,
    adapters: Sequence[AdapterState],
    untied: set[str],
    options: MergeRecipe,
) -> dict[str, dict[str, Any]]:
    """Component → the patch of its config.json; components without a change are left out."""
    changes = {}
    for component, config in base.configs.items():
        rows = dict(_grown(base, matches, adapters, component))
        where = getattr(config, "where", "")
        change = _patch(config, lambda c: _change(c, component in untied, rows, options, where))  # noqa: B023
        if component in untied:
            change[FLAG] = False
        if change:
            changes[component] = change
    return changes


def patched(config: Config, change: Config) -> dict[str, Any]:
    """A config with a patch laid over it."""
    out = dict(config)
    for key, value in change.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = patched(out[key], value)
        else:
            out[key] = value
    return out


def may_tie(config: Config) -> bool:
    """Whether neither a config nor those in it deny that the head is the embedding."""
    return all(typed(c, FLAG, bool) is not False for c in nested(config))


def is_text_of(config: Config) -> bool:
    """Whether a language model is a part of this one."""
    return text_config(config) is not None


def text_config(config: Config) -> Config | None:
    """The config of the language model in this one; FileError "bad-config" where it is none."""
    return typed(config, "text_config", dict)


def nested(config: Config) -> Iterator[Config]:
    """A config, and the text model's in it."""
    yield config
    if (text := text_config(config)) is not None:
        yield text


def _patch(config: Config, change: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """``change`` of a config and of all that it holds, as one patch."""
    out = change(config)
    for key, inner in config.items():
        if isinstance(inner, Mapping) and (deeper := _patch(inner, change)):
            out[key] = deeper
    return out


def _change(
    config: Config, untied: bool, rows: Mapping[int, int], options: MergeRecipe, where: str
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if untied and FLAG in config:
        out[FLAG] = False
    if rows and (size := typed(config, "vocab_size", int, where) or 0) in rows:
        out["vocab_size"] = rows[size]
    if options.dequantize:
        out |= dict.fromkeys(k for k in _QUANTISED if k in config)
    if options.dtype != "auto":
        out |= {k: _LONG[options.dtype] for k in _DTYPES if isinstance(config.get(k), str)}
    return out


def _grown(
    base: Base, matches: Matched, adapters: Sequence[AdapterState], component: str
) -> Iterator[tuple[int, int]]:
    """Rows of a component's replaced tables, before and after, where they differ."""
    for (home, name), saved in matches.saved.items():
        at = base.parameters[home].get(name)
        after = adapters[saved.adapter].saved[saved.component][saved.name].shape
        if home == component and at and len(after) == 2 and at.shape[0] != after[0]:
            yield at.shape[0], after[0]
