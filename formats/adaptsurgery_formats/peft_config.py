"""adapter_config.json: what its fields mean, which are checked, and how one is written.

Only ``peft_type`` is required. Rank and alpha of a module come from ``r`` and ``lora_alpha`` or
``alpha``, unless a key of ``rank_pattern`` or ``alpha_pattern`` matches the module's name. Fields
that would change what ΔW means in ways not carried here are refused by name; fields that are not
known are kept and named. Source: PEFT 0.21, read and run.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.patterns import Matcher, exact_pattern, is_targeted
from adaptsurgery_formats.reading import json_object
from adaptsurgery_formats.state import (
    ALPHA_OVER_R,
    ALPHA_OVER_SQRT_R,
    UNSCALED,
    ModuleState,
    scale_of,
)
from adaptsurgery_formats.traits import Column, traits_of

MAX_CONFIG = 64 << 20  # bytes of an adapter_config.json, with patterns for every module
_COMMON = {
    "task_type": None, "peft_type": None, "auto_mapping": None, "peft_version": None,
    "base_model_name_or_path": None, "revision": None, "inference_mode": True,
    "target_modules": None, "exclude_modules": None, "layers_to_transform": None,
    "layers_pattern": None, "modules_to_save": None,
}  # fmt: skip
# The fields that are written, with PEFT's defaults.
FIELDS: Mapping[str, dict[str, Any]] = Column(
    lambda row: {n: v for n, v in _COMMON.items() if n not in row.peft_lacks} | {**row.peft_fields},
    lambda row: bool(row.peft_type),
)
# Fields of newer or rarer features: harmless at these values, refused at any other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None,), "target_parameters": (None, []), "use_qalora": (None, False),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "arrow_config": (None,), "use_bdlora": (None, False), "kasa_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,),
}  # fmt: skip
# Fields that only steer training or loading, with PEFT's defaults.
IGNORED: dict[str, Any] = {
    "loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False}, "ensure_weight_tying": False,
}  # fmt: skip
# PEFT's fields that are not written.
OTHERS = frozenset(_NEUTRAL) | frozenset(IGNORED)
# Initial values that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and others change it.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "lycoris", None)


def alpha_field(algorithm: str) -> str:
    return "lora_alpha" if "lora_alpha" in FIELDS[algorithm] else "alpha"


def algorithm_of(config: Mapping[str, Any], where: str) -> str:
    """The algorithm of a config that has passed the checks of ``check_config``."""
    peft_type = config.get("peft_type")
    types = peft_types()
    if not isinstance(peft_type, str) or peft_type.upper() not in types:
        raise LayoutError(
            f"peft_type {peft_type!r} is not carried",
            where=where,
            next=f"{', '.join(types)} are; others keep their own layouts",
            code="unsupported-algorithm",
        )
    return types[peft_type.upper()]


def peft_types() -> dict[str, str]:
    """peft_type → the algorithm that it stands for."""
    return {traits_of(name).peft_type: name for name in FIELDS}


def parsed_config(data: bytes, where: str) -> dict[str, Any]:
    """The bytes of an adapter_config.json as an object of finite numbers; FileError ``bad-config``."""
    return json_object(data, where, "bad-config", finite=True)


def check_config(config: Mapping[str, Any], where: str) -> list[str]:
    """The names of fields that are not known; raises LayoutError for any that cannot be honoured."""
    algorithm = algorithm_of(config, where)
    for name, wanted in _types(algorithm).items():
        value = config.get(name, FIELDS[algorithm].get(name))
        if not wanted(value):
            raise LayoutError(f"`{name}` is {value!r}", where=where, code="bad-config")
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise LayoutError(
                f"`{name}` changes what the adapter means and is not carried",
                where=where, seen=f"{name} = {str(config[name])[:80]}", code="unsupported-option",
            )  # fmt: skip
    name = "init_lora_weights" if "init_lora_weights" in FIELDS[algorithm] else "init_weights"
    init = config.get("init_lora_weights", config.get("init_weights", True))
    if init not in _PLAIN_INITS:
        raise LayoutError(
            f"initial values {init!r} change the base model, so ΔW is relative to another base",
            where=where,
            seen=f"{name} = {init!r}",
            next="save it from PEFT with path_initial_model_for_weight_conversion first",
            code="unsupported-option",
        )
    return sorted(config.keys() - FIELDS[algorithm].keys() - OTHERS)


def _types(algorithm: str) -> dict[str, Any]:
    """Field → test of its value."""
    own = FIELDS[algorithm]
    tests: dict[str, Any] = {"r": _is_rank} if "r" in own else {}
    tests |= {
        "target_modules": _is_target,
        "exclude_modules": _is_target,
        "modules_to_save": _is_names,
    }
    tests["layers_to_transform"] = _is_indexes
    tests["layers_pattern"] = lambda v: v is None or isinstance(v, str) or _is_names(v)
    if traits_of(algorithm).scaled:
        tests[alpha_field(algorithm)] = _is_number
        tests["rank_pattern"] = lambda v: _is_pattern(v, _is_rank)
        tests["alpha_pattern"] = lambda v: _is_pattern(v, _is_number)
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        tests[name] = lambda v: v is None or isinstance(v, bool)
    for name in ("use_effective_conv2d", "decompose_both", "apply_GS"):
        tests[name] = lambda v: v is None or isinstance(v, bool)
    if "decompose_factor" in own:
        tests["decompose_factor"] = lambda v: isinstance(v, int) and not isinstance(v, bool)
    return tests


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # an int may be larger than any float; NaN is not


def _is_pattern(value: Any, test: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(test(v) for v in value.values()))


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_target(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_indexes(value: Any) -> bool:
    whole = [value] if not isinstance(value, list) else value
    return value is None or all(isinstance(v, int) and not isinstance(v, bool) for v in whole)


@dataclass(frozen=True)
class ModuleScale:
    """What a config says of one module."""

    rank: int | None
    alpha: float | None
    rule: str

    @property
    def scale(self) -> float:
        return scale_of(self.rule, self.alpha, self.rank)


def rule_of(algorithm: str, use_rslora: bool) -> str:
    """How a scale follows from alpha and rank."""
    if not traits_of(algorithm).scaled:
        return UNSCALED
    return ALPHA_OVER_SQRT_R if use_rslora else ALPHA_OVER_R


def settings(config: Mapping[str, Any], matcher: Matcher, where: str) -> dict[str, ModuleScale]:
    """Rank, alpha and scale rule of each of the matcher's names."""
    algorithm = algorithm_of(config, where)
    rank = config.get("r", 8) if "r" in FIELDS[algorithm] else None
    if not traits_of(algorithm).scaled:
        return {name: ModuleScale(rank, None, UNSCALED) for name in matcher.names}
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank_keys, alpha_keys = matcher.first_keys(ranks), matcher.first_keys(alphas)
    alpha = config.get(alpha_field(algorithm), 8)
    rule = rule_of(algorithm, bool(config.get("use_rslora")))
    return {
        name: ModuleScale(
            ranks[rank_keys[name]] if name in rank_keys else rank,
            float(alphas[alpha_keys[name]] if name in alpha_keys else alpha),
            rule,
        )
        for name in matcher.names
    }


@dataclass(frozen=True, eq=False, repr=False)
class Wanted:
    """What a config must say: rank and scale by module name, and the flags that hold for all."""

    algorithm: str
    ranks: Mapping[str, int | None]
    scales: Mapping[str, float]
    alphas: Mapping[str, float]
    flags: Mapping[str, Any]
    others: frozenset[str]  # modules of the base that must not be adapted, where they are known


def write_config(wanted: Wanted, template: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """A config that says what is wanted: the template where it does already, else written anew.

    From a template that does not, the fields that do not touch on shape, scale or target are kept.
    """
    algorithm = wanted.algorithm
    peft_type = traits_of(algorithm).peft_type
    if template and template.get("peft_type", "").upper() == peft_type:
        if _agrees(template, wanted, where):
            return dict(template)
    else:
        trained = (template or {}).get("bias", "none")
        template = {k: v for k, v in (template or {}).items() if k in _COMMON}
        if trained != "none" and "bias" in FIELDS[algorithm]:
            template["bias"] = "all"  # biases that were trained beside the adapter are in the file
    config = {**FIELDS[algorithm], **template, "peft_type": peft_type, **wanted.flags}
    config["target_modules"] = _targets(wanted)
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    config |= dict.fromkeys(name for name in narrowing if name in FIELDS[algorithm])
    if "r" in FIELDS[algorithm]:
        rank, rank_pattern = _pattern({n: r for n, r in wanted.ranks.items() if r is not None})
        config["r"] = rank
    if traits_of(algorithm).scaled:
        alpha, alpha_pattern = _pattern(wanted.alphas)
        config |= {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        config[alpha_field(algorithm)] = alpha
    return config


def _pattern(values: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the exceptions by a pattern that matches just that module."""
    common = Counter(values.values()).most_common(1)[0][0]
    rest = {exact_pattern(k): _plain(v) for k, v in sorted(values.items()) if v != common}
    return _plain(common), rest


def _plain(value: float) -> int | float:
    """An int where it is one, as PEFT types them."""
    return int(value) if value == int(value) else value


def _targets(wanted: Wanted) -> list[str] | str:
    """The modules' full names, or one regex where a name is also the tail of another module's."""
    names = sorted(wanted.ranks)
    tails = {"." + n for n in names}
    clash = any(
        "." + other[i + 1 :] in tails
        for other in wanted.others | set(names)
        for i in (m.start() for m in re.finditer(r"\.", other))
    )
    return "|".join(re.escape(n) for n in names) if clash else names


def _agrees(template: Mapping[str, Any], wanted: Wanted, where: str) -> bool:
    """Whether the template gives each module its rank and scale, and targets no other."""
    matcher = Matcher([*wanted.ranks, *wanted.others], where)
    given = settings(template, matcher, where)
    for name, rank in wanted.ranks.items():
        setting = given[name]
        if setting.rank != rank or is_targeted(name, template, matcher) is False:
            return False
        if setting.alpha is not None and not math.isclose(
            setting.scale, wanted.scales[name], rel_tol=1e-6
        ):
            return False
    # None: only the model can tell, so the template must have been made for it.
    if any(is_targeted(name, template, matcher) for name in wanted.others):
        return False
    defaults = FIELDS[wanted.algorithm]
    return all(_same(template.get(k, defaults.get(k)), v, k) for k, v in wanted.flags.items())


def _same(value: Any, wanted: Any, name: str) -> bool:
    return name == "use_rslora" or value == wanted


def check_targets(
    config: Mapping[str, Any], modules: Sequence[ModuleState], matcher: Matcher, where: str
) -> None:
    """Raise LayoutError if a module has tensors but the config does not target it.

    PEFT would drop such tensors without a word.
    """
    stray = [m.path for m in modules if is_targeted(m.path, config, matcher) is False]
    if stray:
        raise LayoutError(
            f"the config does not target {len(stray)} of {len(modules)} modules with tensors",
            where=where,
            seen=", ".join(f"`{s}`" for s in stray[:4]),
            next="PEFT would ignore them in silence; mend target_modules in adapter_config.json",
            code="config-disagrees",
        )
