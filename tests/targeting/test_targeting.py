"""Which modules a config means: as the real PEFT has it, and louder where PEFT says nothing."""

from __future__ import annotations

import time
import warnings
from typing import Any

import peft
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import utils as peft_utils
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptsurgery.algorithms import AdapterConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig
from adaptsurgery.targeting import DEFAULTS, Targets, find_targets
from adaptsurgery_formats.errors import LayoutError, NameLookupError, SurgeryError, ValueRefused

KINDS = ((nn.Linear, "linear"), (Conv1D, "linear"), (nn.Conv1d, "conv1d"), (nn.Conv2d, "conv2d"),
         (nn.Conv3d, "conv3d"), (nn.Embedding, "embedding"))  # fmt: skip


def kinds_of(model: nn.Module) -> dict[str, str]:
    return {
        name: next((kind for known, kind in KINDS if isinstance(module, known)), "")
        for name, module in model.named_modules()
    }


def linears(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "linear")


def found(modules: dict[str, str], config: AdapterConfig, **how: Any) -> list[str]:
    """The targets' names; none where that is an error."""
    try:
        return list(find_targets(modules, config, **how).names)
    except NameLookupError as error:
        assert error.code == "no-targets"
        return []


# --- PEFT's public examples ------------------------------------------------------------------------

# name, target_modules, layers_to_transform, layers_pattern → targeted?
Q, H = "transformer.h.1.attn.attention.q_proj", ["h"]
EXAMPLES: list[tuple[str, Any, Any, Any, bool]] = [
    ("foo", [], None, None, False), ("foo", ["foo"], None, None, True), ("foo", ["bar"], None, None, False),
    ("foo", ["foo", "bar"], None, None, True), ("foo", "foo", None, None, True), ("foo", ".*oo", None, None, True),
    ("foo", "fo.*", None, None, True), ("foo", ".*bar.*", None, None, False), ("foobar", ".*oba.*", None, None, True),
    *(("foo.bar.1.baz", ["baz"], n, ["bar"], 1 in n) for n in ([1], [0], [2], [0, 1, 2])),
    *(("foo.bar.10.baz", ["baz"], n, ["bar"], False) for n in ([0], [1])),
    *(("foo.bar.1.baz", ["baz", "spam"], n, ["bar"], True) for n in ([1], [0, 1, 2])),
    *(("foo.whatever.1.baz", ["baz"], [n], p, n == 1) for n in (0, 1) for p in ([], "", None)),
    (Q + ".foo", ["q_proj"], None, [], False), (Q, [], None, [], False), (Q, ["q_proj"], None, [], True),
    (Q, ["q_proj", "v_proj"], None, [], True), (Q, ["q_proj"], [1], H, True), (Q, ["q_proj"], [0], H, False),
    ("transformer.h.1.attn.attention.resid_dropout", ["q_proj", "v_proj"], None, [], False),
    (Q, ["q_proj"], [2], H, False), (Q, ["q_proj", "v_proj"], [0, 1, 2], H, True),
    ("foo.bar.q_proj", ["q_proj"], None, [], True), ("foo.bar.1.baz", ["baz"], [1], ["foo"], False),
    ("foo.bar.1.baz", ["baz"], [1], ["baz"], False), ("bar.1.baz", ["baz"], [1], ["bar"], True),
    ("foo.bar.001.baz", ["baz"], [1], ["bar"], True), ("foo.bar.1.spam.2.baz", ["baz"], [1], ["bar"], True),
    ("foo.bar.2.spam.1.baz", ["baz"], [1], ["bar"], False), ("blocks.1.bias", ["weight"], [1], ["blocks"], False),
    ("blocks.1.weight", ["weight"], [1], ["blocks"], True), ("mlp.blocks.1.weight", ["weight"], [1], ["blocks"], True),
    ("mlp.blocks.1.bias", ["weight"], [1], ["blocks"], False),
    ("model.layers.1.mlp.experts.0.down_proj", ["down_proj"], [0], None, False),
    ("model.layers.1.mlp.experts.0.down_proj", ["down_proj"], [1], None, True),
    ("model.layers.1.mlp.experts.0.down_proj", ["down_proj"], [1], ["layers"], True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target", "layers", "pattern", "wanted"), EXAMPLES, ids=str)
def test_pefts_examples(name: str, target: Any, layers: Any, pattern: Any, wanted: bool) -> None:
    options = {"target_modules": target, "layers_to_transform": layers}
    if layers is not None:
        options["layers_pattern"] = pattern
    theirs = peft.LoraConfig(**options)
    assert bool(check_target_module_exists(theirs, name)) == wanted, "the installed PEFT differs"
    assert (found(linears(name), LoraConfig(**options)) == [name]) == wanted


# --- any names, any config, against the real PEFT --------------------------------------------------

segments = st.sampled_from(["q_proj", "fc", "layers", "h", "0", "1", "10", "01", "a", "to_out", "head"])  # fmt: skip
paths = st.lists(segments, min_size=1, max_size=5).map(".".join)
items = st.lists(st.lists(segments, min_size=1, max_size=2).map(".".join), max_size=3, unique=True)
regexes = st.sampled_from([r".*\.fc", ".*proj", "fc", r".*layers\.\d+\..*", "(a|h).*", ".*"])


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    target = draw(items | regexes)
    given: dict[str, Any] = {"target_modules": target}
    given["exclude_modules"] = draw(st.none() | items | regexes)
    given["modules_to_save"] = draw(st.none() | st.lists(segments, max_size=1))
    if isinstance(target, list) and draw(st.booleans()):
        given["layers_to_transform"] = draw(st.sampled_from([[0], 1, [0, 1], [10], []]))
        given["layers_pattern"] = draw(
            st.sampled_from([None, "layers", ["h", "layers"], "(h|layers)", "l.yers", []])
        )
    given["rank_pattern"] = draw(st.dictionaries(st.sampled_from(["fc", "^a", "h.0", r".*\.1\..*"]), st.integers(1, 9)))  # fmt: skip
    given["alpha_pattern"] = draw(st.dictionaries(st.sampled_from(["head", "^fc", "fc$"]), st.integers(1, 9)))  # fmt: skip
    return given


@given(names=st.lists(paths, min_size=1, max_size=12, unique=True), given_=configs())
def test_any_names_and_config(names: list[str], given_: dict[str, Any]) -> None:
    theirs = peft.LoraConfig(**given_)
    wanted = [n for n in names if check_target_module_exists(theirs, n)]
    config = LoraConfig(**given_)
    assert found(linears(*names), config) == wanted
    if not wanted:
        return
    for target in find_targets(linears(*names), config).chosen:
        rank_key = get_pattern_key(list(theirs.rank_pattern), target.name)
        alpha_key = get_pattern_key(list(theirs.alpha_pattern), target.name)
        assert target.rank == theirs.rank_pattern.get(rank_key, theirs.r)
        assert target.alpha == theirs.alpha_pattern.get(alpha_key, theirs.lora_alpha)


# --- real models -----------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 24,
}  # fmt: skip


def tiny(which: str) -> nn.Module:
    if which == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    if which == "llama-seq-cls":
        return transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**TINY, pad_token_id=0)
        )
    if which == "bert-seq-cls":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))
    if which == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TINY))
    if which == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
        )
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=32)
    )


MODELS = ["llama", "llama-seq-cls", "bert-seq-cls", "gpt_neox", "gpt2", "t5"]
OPTIONS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-linear", "exclude_modules": ["q_proj", "query", "q", "c_attn"]},
    {"target_modules": None},
    {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_real_models(which: str, options: dict[str, Any]) -> None:
    """The same modules as PEFT's LoraModel adapts, over real architectures."""
    model = tiny(which)
    task = "SEQ_CLS" if which.endswith("seq-cls") else None
    kinds, output = kinds_of(model), model.get_output_embeddings()
    outputs = [name for name, module in model.named_modules() if output and module is output]
    model_type = model.config.model_type
    config = LoraConfig(task_type=task, **options)
    ours = find_targets(kinds, config, model_type=model_type, outputs=outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.LoraModel(model, peft.LoraConfig(task_type=task, **options), "default")
    assert list(ours.names) == theirs.targeted_module_names


def test_the_default_tables_are_pefts() -> None:
    for algorithm in ("LORA", "LOHA", "LOKR", "HRA"):
        table = getattr(peft_utils, f"TRANSFORMERS_MODELS_TO_{algorithm}_TARGET_MODULES_MAPPING")
        plain = {k: v if isinstance(v, str) else list(v) for k, v in DEFAULTS.items()}
        assert plain == table


def test_no_default_for_an_unknown_model() -> None:
    for model_type in (None, "mamba9"):
        with pytest.raises(ValueRefused, match="there is no default"):
            find_targets(linears("fc"), LoHaConfig(), model_type=model_type)


# --- better than PEFT ------------------------------------------------------------------------------

NET = {
    "": "", "embed": "embedding", "layers": "", "layers.0": "", "layers.0.q_proj": "linear", "layers.0.fc": "linear",
    "layers.1": "", "layers.1.q_proj": "linear", "layers.1.fc": "linear", "layers.1.norm": "",
    "head": "linear", "lm_head": "linear", "conv": "conv2d",
}  # fmt: skip


def told(targets: Targets) -> dict[str, str]:
    assert all(note.code == "without-effect" for note in targets.notes)
    return {note.where: note.text for note in targets.notes}


def test_what_was_said_in_vain_is_noted_by_name() -> None:
    config = LoHaConfig(
        target_modules=["q_proj", "q_porj", "layers.0.fc"], exclude_modules=["conv", "layers.0.q_proj"],
        layers_to_transform=[1, 7], layers_pattern=["layers", "blocks"], modules_to_save=["head", "score"],
        rank_pattern={"q_proj": 2, "layers.1.q_proj": 3, "zz": 4}, alpha_pattern={"vv": 1}, use_effective_conv2d=True,
    )  # fmt: skip
    targets = find_targets(NET, config)
    assert targets.names == ("layers.0.fc", "layers.1.q_proj") and targets.saved == ("head",)
    assert [t.rank for t in targets.chosen] == [8, 2]
    notes = told(targets)
    assert set(notes) == {
        "target_modules.q_porj", "target_modules.layers.0.fc", "exclude_modules.conv", "layers_to_transform.7",
        "layers_pattern.blocks", "modules_to_save.score", "rank_pattern.layers.1.q_proj", "rank_pattern.zz",
        "alpha_pattern.vv", "use_effective_conv2d",
    }  # fmt: skip
    assert "`q_proj`" in notes["target_modules.q_porj"]


def test_nothing_is_noted_where_all_was_meant() -> None:
    config = LoKrConfig(
        target_modules=["proj", "q_proj", "fc", "conv"], exclude_modules=r"layers\.0\.fc",
        rank_pattern={"fc": 3}, modules_to_save=["head"], use_effective_conv2d=True,
    )  # fmt: skip
    notes = told(find_targets(NET, config))
    assert set(notes) == {"target_modules.proj"}


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"target_modules": ["q_porj"]}, "`q_proj`"),
        ({"target_modules": "q_proj"}, "['q_proj'] takes names that end so"),
        ({"target_modules": r"foo\..*"}, "named_modules"),
        ({"target_modules": ["fc"], "exclude_modules": ["fc"]}, "exclude_modules"),
        ({"target_modules": ["fc"], "layers_to_transform": 9}, "layers_to_transform"),
        ({"target_modules": []}, "named_modules"),
    ],
    ids=str,
)
def test_zero_matches_is_an_error(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(NameLookupError) as refusal:
        find_targets(NET, LoraConfig(**options))
    assert refusal.value.code == "no-targets" and hint in str(refusal.value)


@pytest.mark.parametrize("target", [[r".*\.fc"], ["q_proj", "layers.*.fc"], [r".*(q|v)_proj$"]])
def test_a_regex_in_a_list(target: list[str]) -> None:
    """PEFT takes it for a name, and matches nothing without a word."""
    with pytest.raises(ValueRefused, match="a regex goes in a string") as refusal:
        find_targets(NET, LoHaConfig(target_modules=target))
    assert refusal.value.code == "regex-in-list"


def test_layers_the_algorithm_does_not_take() -> None:
    for target in (["norm"], ["layers.1"], ["embed"]):
        with pytest.raises(ValueRefused) as refusal:
            find_targets(NET, HRAConfig(target_modules=["fc", *target]))
        assert refusal.value.code == "unsupported-layer" and target[0] in str(refusal.value)
    assert find_targets(NET, LoraConfig(target_modules=["embed"])).names == ("embed",)


def test_modules_to_save_by_whole_segments() -> None:
    """PEFT's bare endswith also wraps lm_head for `head`."""
    targets = find_targets(NET, LoraConfig(target_modules=["fc", "lm_head"], modules_to_save=["head"]))  # fmt: skip
    assert targets.saved == ("head",) and "lm_head" in targets.names
    base = nn.ModuleDict({"fc": nn.Linear(2, 2), "head": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})  # fmt: skip
    config = peft.LoraConfig(target_modules=["fc"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(base, config)
    assert any("lm_head.modules_to_save" in name for name, _ in wrapped.named_parameters())


def test_nested_modules_to_save_are_saved_once() -> None:
    modules = linears("fc", "head", "head.inner", "head.inner.head", "x.head")
    targets = find_targets(modules, LoraConfig(target_modules=["fc"], modules_to_save=["head", "inner"]))  # fmt: skip
    assert targets.saved == ("head", "x.head") and targets.names == ("fc",)


def test_all_linear_means_full_names() -> None:
    """PEFT turns it into a list, so that a convolution whose name ends as a linear's is taken too."""
    modules = {"proj": "linear", "patch.proj": "conv2d", "lm_head": "linear", "x.lm_head": "linear"}
    config = LoraConfig(target_modules="all-linear")
    assert find_targets(modules, config, outputs=["lm_head"]).names == ("proj", "x.lm_head")


def test_hostile_patterns_do_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptsurgery_formats.patterns.TIMEOUT_SECONDS", 0.5)
    modules = linears("a" * 60 + "b", "fc")
    evil = "(a+)+$"
    for options in (
        {"target_modules": evil}, {"target_modules": ["fc"], "exclude_modules": evil},
        {"target_modules": ["fc"], "rank_pattern": {"(.*)*.*(f+c+)+x": 1}},
        {"target_modules": ["fc"], "layers_to_transform": [1], "layers_pattern": "(a+)+b?(a+)+"},
    ):  # fmt: skip
        start = time.monotonic()
        try:
            find_targets(modules, LoraConfig(**options))  # type: ignore[arg-type]
        except SurgeryError as error:
            assert error.code in ("slow-pattern", "no-targets")
        assert time.monotonic() - start < 5
    with pytest.raises(LayoutError, match="not a regex"):
        find_targets(modules, LoraConfig(target_modules="(fc"))


# --- growth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("escaped", [False, True])
def test_9600_modules_with_a_rank_each_in_under_a_second(escaped: bool) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = [f"model.layers.{n}.self_attn.{kind}" for n in range(2400) for kind in kinds]
    ranks = {("^" + n.replace(".", r"\.") if escaped else n): 1 + i % 7 for i, n in enumerate(names)}  # fmt: skip
    modules = {"model": "", **{f"model.layers.{n}": "" for n in range(2400)}, **linears(*names)}
    best = 9.0
    for target in ([*names], [*kinds], "all-linear"):
        config = LoKrConfig(target_modules=target, rank_pattern=ranks, alpha_pattern=ranks)
        start = time.process_time()
        targets = find_targets(modules, config)
        best = min(best, time.process_time() - start)
        assert [t.rank for t in targets.chosen] == [*ranks.values()] and not targets.notes
        assert time.process_time() - start < 3  # a busy machine; the bench has the figure
    assert best < 1
