"""What an adapter_config.json says, as one dataclass an algorithm; PEFT's names, defaults and checks.

The table of fields, and which values are carried, stand in adaptsurgery_formats.peft_config. Here
are the classes' common part and the step from a config to an Update: ``shapes`` of the tensors,
``blank`` with nothing in them yet, ``fresh`` with their initial values.
"""

from __future__ import annotations

import json
import math
import warnings
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsurgery.checkpoint import system
from adaptsurgery.core.exporting import plain_operations
from adaptsurgery.core.geometry import KERNEL_DIMS
from adaptsurgery.core.update import Update
from adaptsurgery_formats import peft_config
from adaptsurgery_formats.errors import FileError, ShapeError, ValueRefused, nearest
from adaptsurgery_formats.traits import traits_of

FILE = "adapter_config.json"
TASKS = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
Shapes = dict[str, tuple[int, ...]]
Names = str | Collection[str] | None
C = TypeVar("C")
# A name that another algorithm, or another library, has for the same thing.
_TWINS = {
    "lora_alpha": "alpha", "alpha": "lora_alpha", "rank": "r", "lora_rank": "r", "dim": "r",
    "init_weights": "init_lora_weights", "init_lora_weights": "init_weights",
    "dropout": "lora_dropout", "targets": "target_modules", "apply_gs": "apply_GS",
}  # fmt: skip


class _Checked(ABCMeta):
    """Sorts a constructor's names: fields, PEFT's other fields (kept in ``extra``), and strangers."""

    def __call__(cls: type[C], *args: Any, **given: Any) -> C:
        assert issubclass(cls, AdapterConfig)
        if args:
            raise ValueRefused(f"{cls.__name__} takes its fields by name", code="unknown-field")
        own = {f.name for f in fields(cls)}
        others = {name: given.pop(name) for name in [*given] if name not in own}
        if strange := sorted(others.keys() - peft_config.OTHERS):
            raise cls._stranger(strange[0], own)
        given["extra"] = {**given.get("extra", {}), **others}
        return type.__call__(cls, **given)  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class AdapterConfig(ABC, metaclass=_Checked):
    """The fields that all of PEFT's adapter configs share.

    Lists of target and excluded names become sets. ``extra`` holds what a file said beyond the
    fields: it is written again as it was, and ``unknown`` names the part of it that nothing here
    reads. Raises ValueRefused or LayoutError for a field or value that is not carried.
    """

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    peft_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    algorithm: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset(KERNEL_DIMS) - {"embedding"}
    inits: ClassVar[tuple[Any, ...]] = (True, False)
    biases: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[dict[str, type[AdapterConfig]]] = {}

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "algorithm"):
            AdapterConfig.known[cls.algorithm] = cls

    def __post_init__(self) -> None:
        self.target_modules, self.exclude_modules = map(
            _as_set, (self.target_modules, self.exclude_modules)
        )
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern"):
            setattr(self, name, _as_list(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            if hasattr(self, name):
                setattr(self, name, dict(getattr(self, name) or {}))
        self.task_type = getattr(self.task_type, "value", self.task_type)
        given, own = getattr(self.peft_type, "value", self.peft_type), self._type()
        if given not in (None, own):
            raise self._refused("peft_type", given, f"{type(self).__name__} is {own}")
        self.peft_type = own
        self.check()

    def check(self) -> None:
        """Raise for values that mean nothing, or that this house does not carry; see the class."""
        peft_config.check_config(self.to_dict(), type(self).__name__)
        self._check_layers()
        if self.task_type is not None and self.task_type not in TASKS:
            hint = nearest(str(self.task_type), TASKS) or f"one of {', '.join(TASKS)}"
            raise self._refused("task_type", self.task_type, hint)
        self._check_choice(self._init_field, self.inits)
        if self.biases:
            self._check_choice("bias", self.biases)
        for name in ("rank_dropout", "module_dropout", "lora_dropout"):
            if not _is_share(getattr(self, name, 0.0)):
                raise self._refused(name, getattr(self, name), "a number from 0 to 1")
        self._warn()

    def _check_layers(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise self._refused(
                "layers_pattern", self.layers_pattern, "say layers_to_transform with it"
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueRefused(
                    f"`{name}` has no meaning beside a string in target_modules",
                    where=type(self).__name__,
                    seen=f"target_modules {self.target_modules!r}, {name} {getattr(self, name)!r}",
                    next="give the names as a list, or put the layers into the regex",
                    code="option-without-effect",
                )

    def _check_choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            raise self._refused(name, value, f"one of {', '.join(map(repr, allowed))}")

    def _refused(self, name: str, value: Any, hint: str) -> ValueRefused:
        return ValueRefused(
            f"`{name}` is {value!r}", where=type(self).__name__, next=hint, code="bad-config"
        )

    @classmethod
    def _stranger(cls, name: str, own: set[str]) -> ValueRefused:
        twin = _TWINS.get(name)
        others = [a for a, known in peft_config.FIELDS.items() if name in known]
        if twin in own:
            hint = f"it is `{twin}` here"
        elif others:
            hint = f"{', '.join(others)} have it; {cls.algorithm} has none"
        else:
            hint = nearest(name, own) or f"its fields are {', '.join(sorted(own - {'extra'}))}"
        return ValueRefused(
            f"{cls.__name__} has no field `{name}`", next=hint, code="unknown-field"
        )

    def _warn(self) -> None:
        for names, reason in ((self.unknown, "not known"), (self.idle, "without effect here")):
            if names:
                text = f"{type(self).__name__}: kept, but {reason}: {', '.join(names)}"
                warnings.warn(text, stacklevel=5)

    @classmethod
    def _type(cls) -> str:
        return traits_of(cls.algorithm).peft_type

    @property
    def _init_field(self) -> str:
        return "init_weights"

    @property
    def options(self) -> dict[str, Any]:
        """What an Update of this config takes beside its tensors and scale."""
        return {}

    @property
    def unknown(self) -> list[str]:
        """The names in ``extra`` that nothing here reads."""
        return sorted(self.extra.keys() - peft_config.OTHERS)

    @property
    def idle(self) -> list[str]:
        """The names in ``extra`` that are PEFT's, have another value than its default, and no effect here."""
        others = peft_config.IGNORED.items()
        return [n for n, default in others if self.extra.get(n) not in (None, default)]

    @property
    def common_alpha(self) -> float | None:
        """alpha where alpha_pattern says no other; None for a rotation, which has none."""
        value = getattr(self, peft_config.alpha_field(self.algorithm), None)
        return None if value is None else float(value)

    def scale(self, rank: int, alpha: float | None) -> float:
        """s of W + s·Δ from a module's rank and alpha, by the config's rule."""
        rule = peft_config.rule_of(self.algorithm, getattr(self, "use_rslora", False))
        return peft_config.ModuleScale(rank, alpha, rule).scale

    # --- the file --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON has it: sets as sorted lists, ``extra`` among the fields."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        plain = {n: sorted(v, key=str) if isinstance(v, set) else v for n, v in held.items()}
        return {**self.extra, **plain}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], where: str = FILE) -> Self:
        """The config of what an adapter_config.json says; of the class of its peft_type.

        Unknown fields are kept and warned of by name. Raises LayoutError for a peft_type or value
        that is not carried, ValueRefused for a peft_type of another class than the one called.
        """
        given = {**options, "peft_type": options.get("peft_type", getattr(cls, "algorithm", None))}
        peft_config.check_config(given, where)
        kind = AdapterConfig.known[peft_config.algorithm_of(given, where)]
        if not issubclass(kind, cls):
            raise ValueRefused(
                f"{where}: {given['peft_type']} is for {kind.__name__}, not {cls.__name__}",
                code="bad-config",
            )
        own = {f.name for f in fields(kind)} - {"extra"}
        extra = {name: value for name, value in given.items() if name not in own}
        values = {n: v for n, v in given.items() if n in own and n != "peft_type"}
        config = kind(**values, extra=extra)
        assert isinstance(config, cls)
        return config

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """The config of a local folder with an adapter_config.json, or of that file itself.

        Raises FileError for what is no regular file, too large, or no JSON object of finite numbers.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            text = system.read_file(file, peft_config.MAX_CONFIG)
        except OSError as error:
            raise FileError(f"no config: {error.strerror}", where=str(file)) from None
        options = peft_config.parsed_config(text, str(file))
        return cls.from_dict(options, str(file))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_config.json into ``folder`` as PEFT spells it: sorted, indented by two."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        system.write_text(Path(folder) / FILE, text)

    # --- the tensors -----------------------------------------------------------------------------

    @abstractmethod
    def shapes(self, shape: tuple[int, ...], rank: int, kind: str = "linear") -> Shapes:
        """The shape of every slot, for a canonical weight ``shape`` (o, i, *k)."""

    @abstractmethod
    def assembled(self, tensors: dict[str, Tensor], scale: float, shape: tuple[int, ...]) -> Update:
        """The Update of tensors by slot."""

    @abstractmethod
    def initialise(
        self, tensors: dict[str, Tensor], kind: str, generator: torch.Generator | None
    ) -> None:
        """Give the tensors their initial values, in place. ValueRefused where there are none."""

    def for_module(self, name: str) -> AdapterConfig:
        """The config as it is for the module ``name``, where its name says more than rank and alpha."""
        return self

    def blank(
        self,
        shape: tuple[int, ...],
        *,
        rank: int | None = None,
        alpha: float | None = None,
        kind: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Update:
        """The Update for a canonical weight ``shape``, its tensors without values: to be loaded.

        ``rank`` and ``alpha`` are the module's own, by default the config's. Raises ValueRefused
        for a kind of layer that the algorithm does not take, ShapeError for a shape of another kind.
        """
        rank = self.r if rank is None else rank
        alpha = self.common_alpha if alpha is None else alpha
        self._check_layer(tuple(shape), kind, rank)
        shapes = self.shapes(tuple(shape), rank, kind)
        tensors = {n: torch.empty(s, device=device, dtype=dtype) for n, s in shapes.items()}
        return self.assembled(tensors, self.scale(rank, alpha), tuple(shape))

    def fresh(
        self,
        shape: tuple[int, ...],
        *,
        rank: int | None = None,
        alpha: float | None = None,
        kind: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
    ) -> Update:
        """``blank`` with PEFT's initial values. A DoRA takes its norms from ``weight``, canonical.

        Nothing but ``init_weights`` False (and a value that says so) changes what the layer
        computes; where an option makes that impossible it is a ValueRefused.
        """
        update = self.blank(shape, rank=rank, alpha=alpha, kind=kind, device=device, dtype=dtype)
        with torch.no_grad():
            self.initialise(tensors_of(update), kind, generator)
            self.finish(update, weight)
        return update

    def finish(self, update: Update, weight: Tensor | None) -> None:
        """Give the update those initial values that come from the base's ``weight``."""

    # --- training --------------------------------------------------------------------------------

    def gate(self, outputs: int, like: Tensor) -> Tensor | None:
        """A training step's gate for ``Update.apply``, drawn anew; None where nothing is dropped."""
        return None

    def seen(self, x: Tensor, kind: str = "linear") -> Tensor | None:
        """A training step's input as the update sees it; None where that is ``x``."""
        return None

    def _check_layer(self, shape: tuple[int, ...], kind: str, rank: int) -> None:
        if kind not in self.kinds:
            raise ValueRefused(
                f"{self.algorithm} is not for layers of the kind `{kind}`",
                next=f"it takes {', '.join(sorted(self.kinds))}",
                code="unsupported-layer",
            )
        if len(shape) != 2 + KERNEL_DIMS[kind]:
            raise ShapeError(f"a {kind}'s canonical weight is not {list(shape)}")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise self._refused("r", rank, "a whole number of at least 1")


@dataclass(kw_only=True)
class PatternConfig(AdapterConfig):
    """A config with ranks and alphas by module. Patterns are read by the first key that matches."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class LycorisConfig(PatternConfig):
    """The fields that LoHa's and LoKr's configs share.

    In training ``rank_dropout`` drops rows of Δ and ``module_dropout`` whole updates.
    ``use_effective_conv2d`` gives a convolution with a kernel a Tucker core (FedPara, prop. 3).
    """

    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    inits: ClassVar[tuple[Any, ...]] = (True, False, "lycoris")

    @property
    def dropout_scaled(self) -> bool:
        """Whether what rank_dropout leaves is divided by the share that it left."""
        return False

    def gate(self, outputs: int, like: Tensor) -> Tensor | None:
        """PEFT's dropouts: a row of Δ stays with 1 − rank_dropout, all of it with 1 − module_dropout.

        Where no row stays nothing is added, also if scaled: PEFT divides 0 by 0 there.
        """
        gate = None
        if self.rank_dropout:
            gate = _kept((outputs,), self.rank_dropout, like)
            gate = gate / gate.mean().clamp_min(1 / outputs) if self.dropout_scaled else gate
        if self.module_dropout:
            whole = _kept((), self.module_dropout, like)
            gate = whole if gate is None else gate * whole
        return gate

    def tucker(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight (o, i, *k) gets a Tucker core: not where the kernel is 1."""
        return self.use_effective_conv2d and math.prod(shape[2:]) != 1


def _kept(shape: tuple[int, ...], dropped: float, like: Tensor) -> Tensor:
    """Ones, each 0 with the probability ``dropped``; for export by F.dropout, which can be turned off."""
    if plain_operations():
        ones = torch.ones(shape, dtype=like.dtype, device=like.device)
        return (F.dropout(ones, dropped) != 0).to(like.dtype)
    return (torch.rand(shape, device=like.device) > dropped).to(like.dtype)


def tensors_of(update: Update) -> dict[str, Tensor]:
    """The tensors of an update by slot."""
    return update.tensors()


def kaiming_(tensor: Tensor, generator: torch.Generator | None) -> None:
    """nn.Linear's own initial values: uniform within ±1/√fan-in (arXiv 1502.01852 with a = √5)."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _as_set(names: Names) -> Names:
    return set(names) if isinstance(names, (list, tuple, set, frozenset)) else names


def _as_list(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, (tuple, range)) else value


def _is_share(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= 1
