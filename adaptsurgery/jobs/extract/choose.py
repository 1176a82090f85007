"""Which candidate each layer gets, and the adapter that they make.

LyCORIS's and kohya's files hold any algorithm on any layer, so each gets its best. PEFT holds one
algorithm, for LoKr with one decompose_factor: the one whose error over all layers is the least,
or, where an error was asked for, the one with the fewest parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptsurgery.checkpoint.bridge import computed
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.jobs.extract.fitting import FittedLayer, Measured, number_of
from adaptsurgery.jobs.extract.plan import ExtractPlan, LayerJob
from adaptsurgery.jobs.extract.recipe import DTYPES
from adaptsurgery.jobs.extract.run import METADATA, PartialExtract, Results, Runner
from adaptsurgery.jobs.extract.selection import Dense
from adaptsurgery_formats import AdapterState, ModuleState, peft_config
from adaptsurgery_formats.errors import InexactError, ValueRefused
from adaptsurgery_formats.reading import texts, typed
from adaptsurgery_formats.tensors import Tensor

_Kind = tuple[str, int | None]  # algorithm and factor


@dataclass
class Outcome:
    """A layer with what was measured, and the number of the candidate that it gets; -1 for none."""

    layer: LayerJob
    measured: Measured
    number: int = -1
    reason: str = ""

    @property
    def found(self) -> FittedLayer | None:
        return self.measured.found[self.number] if self.number >= 0 else None

    @property
    def error(self) -> float:
        """‖D − D̂‖/‖D‖, 1 where it is left out."""
        return self.found.error if self.found else 1.0

    @property
    def missing(self) -> float:
        """‖D − D̂‖."""
        return self.error * self.measured.norm


def outcomes(plan: ExtractPlan, results: Results) -> list[Outcome]:
    """Every layer with its candidate, in the plan's order.

    Raises ValueRefused ("out-of-reach") with all layers on which no candidate meets the goal, or
    for PEFT not the one candidate that does on most.
    """
    made = [Outcome(layer, Measured.from_dict(data)) for layer, data in zip(plan.layers, results)]
    changed = [o for o in made if o.measured.found]
    _check_reached(plan, changed)
    wanted = _one_kind(plan, changed) if plan.options.to == "peft" and changed else None
    if wanted is not None and plan.options.exact_goal:
        _check_factor(plan, changed, wanted)
    for outcome in changed:
        _settle(outcome, wanted, plan.options.exact_goal)
    return made


def _check_reached(plan: ExtractPlan, changed: Sequence[Outcome]) -> None:
    beyond: dict[str, str] = {}
    for outcome in changed:
        kept = [f for f in outcome.measured.found if not f.compared]
        if all(f.failed for f in kept):
            beyond[outcome.layer.label] = kept[0].failed
    if beyond:
        factor = "another --factor, " if plan.options.factor is not None else ""
        names = " or ".join(
            dict.fromkeys(c.algorithm for c in plan.layers[0].candidates if not c.compared)
        )
        raise ValueRefused(
            f"{len(beyond)} of {len(changed)} changed layers: no {names} meets the goal",
            where=plan.tuned,
            items=[f"`{label}`: {why}" for label, why in beyond.items()],
            next=f"another goal, {factor}another --algorithm, or --exclude them",
            code="out-of-reach",
        )


def _check_factor(plan: ExtractPlan, changed: Sequence[Outcome], wanted: _Kind) -> None:
    """Each layer has a factor that meets the goal, and PEFT has one for all."""
    beyond = {
        o.layer.label: next((f.failed for f in o.measured.found if _kind(f) == wanted), "")
        for o in changed
        if not any(_kind(f) == wanted and not f.failed for f in o.measured.found)
    }
    if not beyond:
        return
    algorithm, factor = wanted
    raise ValueRefused(
        f"{len(beyond)} of {len(changed)} changed layers are beyond the goal at decompose_factor "
        f"{factor}, the best of those that were tried, and PEFT has one for all",
        where=plan.tuned,
        items=[f"`{label}`: {why or f'no {algorithm} on it'}" for label, why in beyond.items()],
        next="--to lycoris or kohya, where each layer has its own; or a larger error, "
        "another --algorithm, or --exclude them",
        code="out-of-reach",
    )


def _kind(fit: FittedLayer) -> _Kind | None:
    return None if fit.compared else (fit.algorithm, fit.factor)


def _settle(outcome: Outcome, wanted: _Kind | None, fewest: bool) -> None:
    good = [
        (_price(f, fewest), number)
        for number, f in enumerate(outcome.measured.found)
        if not f.compared and not f.failed and wanted in (None, (f.algorithm, f.factor))
    ]
    if good:
        outcome.number = min(good)[1]
    else:
        failed = [f.failed for f in outcome.measured.found if (f.algorithm, f.factor) == wanted]
        outcome.reason = next(iter(failed), "") or f"no {wanted[0] if wanted else 'adapter'} on it"


def _price(fit: FittedLayer, fewest: bool) -> tuple[float, float]:
    size = float(fit.parameters)
    return (size, fit.error) if fewest else (fit.error, size)


def _one_kind(plan: ExtractPlan, changed: Sequence[Outcome]) -> _Kind:
    kinds: dict[_Kind, list[FittedLayer]] = {}
    for outcome in changed:
        for fit in outcome.measured.found:
            if not fit.compared and not fit.failed:
                kinds.setdefault((fit.algorithm, fit.factor), []).append(fit)
    totals = {kind: _total(kind, changed, plan.options.exact_goal) for kind in kinds}
    return min(kinds, key=lambda kind: totals[kind])


def _total(kind: _Kind, changed: Sequence[Outcome], fewest: bool) -> tuple[float, ...]:
    """How a kind compares over all layers, the less the better."""
    missing, parameters, without = 0.0, 0.0, 0
    for outcome in changed:
        good = [
            f
            for f in outcome.measured.found
            if (f.algorithm, f.factor) == kind and not f.compared and not f.failed
        ]
        if good:
            missing += (good[0].error * outcome.measured.norm) ** 2
            parameters += good[0].parameters
        else:
            missing += outcome.measured.norm**2
            without += 1
    return (without, parameters, missing) if fewest else (missing, parameters)


# -- The adapter -----------------------------------------------------------------------------------


def chosen_state(
    plan: ExtractPlan,
    place: PartialExtract,
    runner: Runner,
    made: Sequence[Outcome],
    results: Results,
) -> AdapterState:
    """The adapter by reference: factors in the partial output, parameters in the fine-tuned model.

    Raises ValueRefused ("zero-delta") where nothing changed that an adapter could hold.
    """
    state = AdapterState("memory", [], where=plan.tuned)
    for number, outcome in enumerate(made):
        if outcome.found is not None:
            tensors = read_safetensors(place.tensors(number)).tensors
            state.modules.append(_module(outcome, tensors))
    _even_out(state)
    norms = {k: v for group in results[len(plan.layers) :] for k, v in group.items()}
    kept = [d for group in plan.dense for d in group if d.slot]
    _add_dense(state, plan, runner, kept, norms)
    if not state.modules:
        raise _zero(plan, norms)
    state.metadata[METADATA] = plan.identity
    return state


def _zero(plan: ExtractPlan, norms: Mapping[str, Mapping[str, float]]) -> ValueRefused:
    elsewhere = [label for label, n in norms.items() if n["norm"]]
    seen = f"what changed is {', '.join(elsewhere[:4])}" if elsewhere else ""
    return ValueRefused(
        f"none of {len(plan.layers)} layers differs between the two: an empty adapter",
        where=plan.tuned,
        seen=seen or "every tensor is the same, to the bit",
        next="PEFT has these only beside an adapter: --to lycoris or kohya, or --allow-empty for one "
        "of zeros"
        if elsewhere and plan.options.to == "peft" and plan.options.dense
        else "is the second one the fine-tuned model? --allow-empty writes zeros",
        code="zero-delta",
    )


def _module(outcome: Outcome, tensors: Mapping[str, Tensor]) -> ModuleState:
    layer, fit = outcome.layer, outcome.found
    assert fit is not None
    prefix = f"{outcome.number}."
    slots = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    settings = dict(fit.module)
    options = dict(settings["options"])
    if layer.turned and layer.kind != "embedding":
        options["fan_in_fan_out"] = True
    return ModuleState(
        layer.path,
        fit.algorithm,
        slots,
        settings["alpha"],
        settings["rule"],
        settings["rank"],
        layer.component,
        kind="embedding" if layer.kind == "embedding" else "",
        options=options,
    )


def _even_out(state: AdapterState) -> None:
    """PEFT's HRA has one rank for all: equal pairs of reflections, which undo each other, are added."""
    ranks = [m.rank or 0 for m in state.modules if m.algorithm == "hra"]
    most = max(ranks, default=0)
    if len(set(ranks)) < 2:
        return
    if any((most - rank) % 2 for rank in ranks):
        raise InexactError(
            "the layers' ranks are even and odd, and PEFT's HRA has one for all",
            seen=", ".join(map(str, sorted(set(ranks)))),
            next="an even --rank",
            code="hra-ranks",
        )
    state.modules = [_padded(m, most) for m in state.modules]


def _padded(module: ModuleState, rank: int) -> ModuleState:
    import torch

    from adaptsurgery.checkpoint.bridge import to_torch

    u = module.tensors["u"]
    more = rank - u.shape[1]

    def wide() -> torch.Tensor:
        extra = torch.zeros(u.shape[0], more)
        extra[0] = 1
        return torch.cat([to_torch(u), extra], dim=1)

    tensor = computed(u.dtype, (u.shape[0], rank), wide)
    return module.changed(tensors={"u": tensor}, rank=rank)


def _add_dense(
    state: AdapterState,
    plan: ExtractPlan,
    runner: Runner,
    kept: Sequence[Dense],
    norms: Mapping[str, Mapping[str, float]],
) -> None:
    if plan.options.to == "peft":
        _add_saved(state, runner, kept, norms)
        return
    groups: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    moved = {d.pair for d in kept if norms[d.pair.label]["norm"]}
    # LyCORIS's loader knows a norm by its w_norm, so a b_norm never comes without one, of zeros if need be.
    shifted = {(d.pair.component, d.path) for d in kept if d.pair in moved and d.slot == "b_norm"}
    changed = [
        d
        for d in kept
        if d.pair in moved or (d.slot == "w_norm" and (d.pair.component, d.path) in shifted)
    ]
    if plan.options.to == "lycoris":
        _note_lycoris(state, changed, kept)
    for one in changed:
        algorithm = "norm" if one.slot.endswith("_norm") else "full"
        slots = groups.setdefault((one.pair.component, one.path, algorithm), {})
        slots[one.slot] = _difference(one, runner, DTYPES[plan.options.dtype])
    state.modules += [
        ModuleState(path, algorithm, slots, component=component)
        for (component, path, algorithm), slots in groups.items()
    ]


def _note_lycoris(state: AdapterState, changed: Sequence[Dense], kept: Sequence[Dense]) -> None:
    """What LyCORIS's own loader makes of differences beside the adapter, where it is not what they are."""
    biased = {(d.pair.component, d.path) for d in kept if d.slot == "b_norm"}
    refused = [
        d
        for d in changed
        if d.kind == "embedding"
        or (d.slot == "w_norm" and (d.pair.component, d.path) not in biased)
    ]
    ignored = [d for d in changed if d.slot == "diff_b"]
    texts: list[str] = []
    if refused:
        names = f"`{refused[0].pair.label}` first"
        texts.append(
            f"refuses a file with differences of embeddings and of norms without a bias, "
            f"{len(refused)} here, {names}"
        )
    if ignored:
        texts.append(f"leaves the differences of {len(ignored)} biases out")
    if texts:
        text = f"right by its definition, but LyCORIS's own loader {', and '.join(texts)}; "
        state.note("lycoris-loader", state.where, text + "--no-dense writes none of them")


def _difference(one: Dense, runner: Runner, dtype: str) -> Tensor:
    import torch

    from adaptsurgery.checkpoint.bridge import torch_dtype

    def change() -> torch.Tensor:
        base, tuned = (number_of(runner.read(s, one.pair), one.pair, s) for s in ("base", "tuned"))
        return (tuned - base).to(torch_dtype(dtype))

    return computed(dtype, one.pair.base.shape, change)


def _add_saved(
    state: AdapterState,
    runner: Runner,
    kept: Sequence[Dense],
    norms: Mapping[str, Mapping[str, float]],
) -> None:
    """Parameters that PEFT keeps as they are: whole modules of which anything changed, and biases."""
    changed = {
        (d.pair.component, d.path) for d in kept if norms[d.pair.label]["norm"] or d.pair.new
    }
    adapted = {(m.component, m.path) for m in state.modules}
    whole: dict[str, list[str]] = {}
    for one in kept:
        home = (one.pair.component, one.path)
        if home not in changed:
            continue
        if _heads_table(one, runner):
            text = (
                "kept whole, and the output head is tied to it: PEFT leaves the head as the base has "
                "it, and so does a merge. Give the head this weight after either"
            )
            state.note("tied-head", one.pair.label, text)
        name = one.pair.name
        if home in adapted:
            name = f"{one.path}.base_layer.bias"
        elif one.path not in whole.setdefault(one.pair.component, []):
            whole[one.pair.component].append(one.path)
        state.saved.setdefault(one.pair.component, {})[name] = runner.read("tuned", one.pair)
    for component in state.components:
        state.config[component] = _template(state, component, whole.get(component, []))


def _heads_table(one: Dense, runner: Runner) -> bool:
    """Whether a parameter is an embedding that an output head is tied to, as the config says.

    One that says nothing of it, as transformers before 5 wrote it, means so where no other of the
    table's shape is stored.
    """
    tuned, shape = runner.models["tuned"], one.pair.tuned.shape
    configs = tuned.configs
    config = configs.get(one.pair.component) or (
        next(iter(configs.values())) if len(configs) == 1 else {}
    )
    headed = any(
        kind in name
        for name in texts(config, "architectures")
        for kind in (
            "LMHead",
            "ForCausalLM",
            "ForMaskedLM",
            "ForConditionalGeneration",
            "ForPreTraining",
        )
    )
    rows = config.get("vocab_size")
    held = [p for of in tuned.parameters.values() for p in of.values() if p.shape == shape]
    flag = typed(config, "tie_word_embeddings", bool)
    tied = flag if "tie_word_embeddings" in config else len(held) == 1
    return one.kind == "embedding" and bool(tied) and headed and shape[:1] == (rows,)


def _template(state: AdapterState, component: str, whole: list[str]) -> dict[str, Any]:
    """What a PEFT config has to say beside ranks and targets, which the format finds itself."""
    modules = list(state.of(component))
    biases = any(name.endswith(".base_layer.bias") for name in state.saved.get(component, {}))
    algorithm = modules[0].algorithm if modules else "lora"
    template: dict[str, Any] = {}
    if whole:
        template["modules_to_save"] = whole
    if algorithm == "lora" and any(m.options.get("fan_in_fan_out") for m in modules):
        template |= {"peft_type": "LORA", "target_modules": [], "fan_in_fan_out": True}
    if biases and "bias" in peft_config.FIELDS[algorithm]:
        template["bias"] = f"{algorithm}_only"
    return template
