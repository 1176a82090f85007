"""kohya's metadata: which keys describe the network and must be told anew, and the two hashes.

All values are strings. ``ss_network_dim`` and ``ss_network_alpha`` are a number, or "Dynamic"
where modules differ (as kohya's resize tool writes it). The hashes are those that sd-scripts
writes: A1111 shows the first digits of ``sshs_model_hash``. Everything else a user's file says
(tags, titles, training settings) is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from adaptsurgery_formats.state import ALPHA_OVER_R, AdapterState, ModuleState
from adaptsurgery_formats.tensors import Part, Tensor
from adaptsurgery_formats.traits import traits_of

HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash")
_LEGACY_START, _LEGACY_STOP = 0x100000, 0x110000
_ARCHITECTURE = {"flux": "networks.lora_flux"}


def describe_network(state: AdapterState, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with ss_network_* told anew from the modules, and stale hashes removed."""
    kept = {k: v for k, v in metadata.items() if k not in HASH_KEYS}
    low_rank = [m for m in state.modules if traits_of(m.algorithm).scaled]
    if not low_rank:
        return kept
    algorithms = list(dict.fromkeys(m.algorithm for m in low_rank))
    plain = algorithms == ["lora"] and len(low_rank) == len(state.modules)
    plain = plain and not any(m.tucker or "magnitude" in m.tensors for m in low_rank)
    kept["ss_network_module"] = (
        _ARCHITECTURE.get(state.model, "networks.lora") if plain else "lycoris.kohya"
    )
    kept["ss_network_dim"] = _common(m.rank for m in low_rank)
    kept["ss_network_alpha"] = _common(_alpha(m) for m in low_rank)
    args = _arguments(kept.get("ss_network_args", ""))
    if args is None:  # not for us to understand: as it was
        return kept
    if plain:
        args.pop("algo", None)
    else:
        args["algo"] = {"lora": "locon"}.get(algorithms[0], algorithms[0])
    if args or "ss_network_args" in kept:
        kept["ss_network_args"] = json.dumps(args)
    return kept


def _alpha(module: ModuleState) -> float | None:
    if module.rank is None:
        return module.alpha
    return module.alpha if module.rule == ALPHA_OVER_R else module.scale * module.rank


def _common(values: Iterable[float | None]) -> str:
    numbers = set(values)
    if len(numbers) != 1:
        return "Dynamic"
    value = numbers.pop()
    if value is None:
        return "Dynamic"
    return str(int(value)) if value == int(value) else repr(value)


def _arguments(text: str) -> dict[str, object] | None:
    try:
        args = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return None
    return args if isinstance(args, dict) else None


def sshs_hashes(
    tensors: Sequence[Tensor],
    metadata: Mapping[str, str],
    header: Callable[[Mapping[str, str]], bytes],
) -> dict[str, str]:
    """sd-scripts' two hashes of a file whose tensors follow one another in this order.

    sd-scripts hashes a copy that carries only the ss_* metadata: ``sshs_model_hash`` is the
    sha256 of everything after its header, ``sshs_legacy_hash`` the first eight hex digits of the
    sha256 of its bytes 0x100000 to 0x110000. ``header(metadata)`` gives that copy's header bytes.
    """
    import hashlib

    kept = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    prefix = header(kept)
    model, legacy = hashlib.sha256(), hashlib.sha256()
    legacy.update(prefix[_LEGACY_START:_LEGACY_STOP])
    at = len(prefix)
    for tensor in tensors:
        for block in _blocks(tensor.parts):
            model.update(block)
            low, high = max(_LEGACY_START - at, 0), _LEGACY_STOP - at
            if high > 0 and low < len(block):
                legacy.update(block[low:high])
            at += len(block)
    return {
        "sshs_model_hash": model.hexdigest(),
        "sshs_legacy_hash": legacy.hexdigest()[:8],
    }


def _blocks(parts: Iterable[Part], size: int = 1 << 22) -> Iterable[bytes]:
    for part in parts:
        for start in range(0, part.nbytes, size):
            yield part.window(start, min(start + size, part.nbytes)).read()
