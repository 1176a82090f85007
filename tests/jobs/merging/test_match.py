"""Adapters on bases that are headers alone: which rows of which tensors they change, or why not."""

from __future__ import annotations

from typing import Any

import pytest

from adaptsurgery.checkpoint.base import Base, BaseFile, assemble
from adaptsurgery.jobs.merging.match import match
from adaptsurgery.jobs.merging.matched import Change, Matched
from adaptsurgery.jobs.merging.tying import settle_ties
from adaptsurgery_formats import AdapterState, ModuleState
from adaptsurgery_formats.errors import SurgeryError
from adaptsurgery_formats.names import table
from adaptsurgery_formats.tensors import Literal, Tensor


def base_of(
    config: dict[str, Any] | None = None, dtype: str = "F32", **shapes: tuple[int, ...]
) -> Base:
    named = {k.replace("__", "."): s for k, s in shapes.items()}
    return base_from(named, config, dtype)


def base_from(
    shapes: dict[str, tuple[int, ...]],
    config: dict[str, Any] | None = None,
    dtype: str = "F32",
    component: str = "",
) -> Base:
    tensors = {name: Tensor(dtype, shape, ()) for name, shape in shapes.items()}
    file = BaseFile("model.safetensors", component, tensors, {})
    return assemble("base", [file], configs={component: config} if config else {})


def lora(
    path: str, out: int, into: int, *kernel: int, naming: str = "base", **more: Any
) -> ModuleState:
    up, down = Tensor("F32", (out, 2), ()), Tensor("F32", (2, into, *kernel), ())
    if kernel:
        up = Tensor("F32", (out, 2, *(1,) * len(kernel)), ())
    return ModuleState(
        path,
        "lora",
        {"up": up, "down": down},
        2.0,
        "alpha/r",
        2,
        naming=naming,
        keys=(path,),
        **more,
    )


def hra(path: str, into: int) -> ModuleState:
    return ModuleState(
        path, "hra", {"u": Tensor("F32", (into, 2), ())}, keys=(path,), naming="base"
    )


def found(base: Base, *modules: ModuleState, **options: Any) -> Matched:
    return match(base, [AdapterState("peft", list(modules))], **options)


def spans(result: Matched) -> dict[str, list[tuple[int, int, int]]]:
    """Parameter → (first row there, rows, first row of the module)."""
    return {
        name: [(c.at, c.rows, c.first) for c in changes]
        for (_, name), changes in result.changes.items()
    }


def only(result: Matched) -> Change:
    ((change,),) = result.changes.values()
    return change


def code(base: Base, *modules: ModuleState, **options: Any) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        found(base, *modules, **options)
    return caught.value


# Names


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("model.layers.0.fc", "layers.0.fc"),
        ("layers.0.fc", "model.layers.0.fc"),
        ("bert.encoder.0.fc", "encoder.0.fc"),
        ("h.0.attn.fc", "transformer.h.0.attn.fc"),
    ],
)
def test_leading_segments_may_differ(stored: str, named: str) -> None:
    base = base_from({f"{stored}.weight": (6, 4)})
    result = found(base, lora(named, 6, 4))
    assert spans(result) == {f"{stored}.weight": [(0, 6, 0)]}
    assert [n.code for n in result.notes] == ["aligned-names"]


def test_flat_names_are_aligned_too() -> None:
    base = base_from({"model.layers.0.self_attn.q_proj.weight": (6, 4)})
    result = found(base, lora("layers_0_self_attn_q_proj", 6, 4, naming="flat"))
    assert list(spans(result)) == ["model.layers.0.self_attn.q_proj.weight"]


def test_two_alignments_are_an_error_unless_shapes_tell() -> None:
    towers = {"text.layers.0.fc.weight": (6, 4), "vision.layers.0.fc.weight": (6, 4)}
    assert code(base_from(towers), lora("layers.0.fc", 6, 4)).code == "ambiguous-alignment"
    towers["vision.layers.0.fc.weight"] = (8, 4)
    assert list(spans(found(base_from(towers), lora("layers.0.fc", 6, 4)))) == [
        "text.layers.0.fc.weight"
    ]


def test_no_layer_is_taken_for_another() -> None:
    base = base_from({f"model.layers.{i}.fc.weight": (6, 4) for i in (1, 2)})
    error = code(base, lora("layers.0.fc", 6, 4))
    assert error.code == "nothing-matched"


def test_unmatched_modules_are_all_named_with_the_nearest() -> None:
    base = base_of(a__q_proj__weight=(6, 4), a__v_proj__weight=(6, 4))
    modules = [lora("a.q_proj", 6, 4), lora("a.vproj", 6, 4), lora("b.o", 6, 4)]
    error = code(base, *modules)
    assert error.code == "unmatched-modules"
    assert "`a.vproj`" in error.seen and "`b.o`" in error.seen and "a.v_proj" in error.next
    result = found(base, *modules, allow_unmatched=True)
    assert result.modules == 1 and result.unmatched == ["a.vproj", "b.o"]
    assert any(n.code == "unmatched-modules" for n in result.notes)


def test_an_adapter_that_matches_nothing_is_an_error_whatever_is_allowed() -> None:
    base = base_of(a__q_proj__weight=(6, 4))
    assert code(base, lora("z.other", 6, 4), allow_unmatched=True).code == "nothing-matched"


def test_a_module_named_twice_is_an_error() -> None:
    base = base_from({"h.mlp.experts.0.w1.weight": (6, 4)})
    twice = [lora("h.mlp.experts.0.w1", 6, 4), lora("h.mlp.experts.0.gate_proj", 6, 4)]
    assert code(base, *twice).code == "duplicate-module"


def test_shapes_that_do_not_fit() -> None:
    assert code(base_of(a__weight=(6, 4)), lora("a", 7, 4)).code == "bad-shape"


# Fused and split


def test_split_adapters_on_a_fused_qkv_with_gqa() -> None:
    base = base_of(self_attn__qkv_proj__weight=(16, 8))
    q, k, v = (lora(f"self_attn.{p}_proj", n, 8) for p, n in (("q", 8), ("k", 4), ("v", 4)))
    everything = {"self_attn.qkv_proj.weight": [(0, 8, 0), (8, 4, 0), (12, 4, 0)]}
    assert spans(found(base, q, k, v)) == everything
    name = "self_attn.qkv_proj.weight"
    assert spans(found(base, q, v)) == {name: [(0, 8, 0), (12, 4, 0)]}
    assert spans(found(base, v)) == {name: [(12, 4, 0)]}
    assert spans(found(base, k)) == {name: [(8, 4, 0)]}
    assert code(base, lora("self_attn.q_proj", 9, 8), v).code == "fused-cuts"


def test_hra_on_a_part_needs_the_configs_heads() -> None:
    shapes = {"self_attn.qkv_proj.weight": (16, 8)}
    assert code(base_from(shapes), hra("self_attn.q_proj", 8)).code == "fused-cuts"
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    result = found(base_from(shapes, config), hra("self_attn.v_proj", 8))
    assert spans(result) == {"self_attn.qkv_proj.weight": [(12, 4, 0)]}


def test_gate_and_up_are_halves() -> None:
    base = base_of(mlp__gate_up_proj__weight=(12, 4))
    result = found(base, lora("mlp.up_proj", 6, 4))
    assert spans(result) == {"mlp.gate_up_proj.weight": [(6, 6, 0)]}


def test_torchs_multi_head_attention() -> None:
    base = base_of(attn__in_proj_weight=(12, 4), attn__in_proj_bias=(12,))
    module = lora("attn.k_proj", 4, 4)
    biased = module.with_tensors(up_bias=Tensor("F32", (4,), ()))
    assert spans(found(base, biased)) == {
        "attn.in_proj_weight": [(4, 4, 0)],
        "attn.in_proj_bias": [(4, 4, 0)],
    }


def test_a_fused_adapter_on_split_weights() -> None:
    shapes = {f"a.{p}_proj.weight": (n, 4) for p, n in (("q", 8), ("k", 2), ("v", 2))}
    assert spans(found(base_from(shapes), lora("a.qkv_proj", 12, 4))) == {
        "a.q_proj.weight": [(0, 8, 0)],
        "a.k_proj.weight": [(0, 2, 8)],
        "a.v_proj.weight": [(0, 2, 10)],
    }


def test_codegens_qkv_proj_is_not_phi3s() -> None:
    shapes = {"transformer.h.0.attn.qkv_proj.weight": (12, 4)}
    named = lora("transformer.h.0.attn.q_proj", 4, 4)
    assert code(base_from(shapes), named).code == "interleaved-weight"
    assert code(base_from(shapes, {"model_type": "codegen"}), named).code == "interleaved-weight"


@pytest.mark.parametrize("fused", ["query_key_value", "wqkv", "Wqkv"])
def test_interleaved_weights_are_refused_by_name(fused: str) -> None:
    base = base_from({f"a.{fused}.weight": (12, 4)})
    error = code(base, lora("a.q_proj", 4, 4))
    assert error.code == "interleaved-weight" and f"a.{fused}.weight" in error.what
    assert spans(found(base, lora(f"a.{fused}", 12, 4)))  # the fused module itself is no trouble


def test_gpt2s_c_attn_is_cut_by_columns() -> None:
    base = base_from({"h.0.attn.c_attn.weight": (4, 12)}, {"model_type": "gpt2"})
    change = only(found(base, lora("h.0.attn.v_proj", 4, 4)))
    assert (change.at, change.rows, change.turned) == (8, 4, True)


# Experts


def test_experts_of_a_stack_by_their_number() -> None:
    stack = {"mlp.experts.gate_up_proj": (4, 12, 8), "mlp.experts.down_proj": (4, 8, 6)}
    base = base_from(stack)
    change = only(found(base, lora("mlp.experts.3.up_proj", 6, 8)))
    assert (change.index, change.at, change.rows, change.turned) == (3, 6, 6, False)
    change = only(found(base, lora("mlp.experts.2.w2", 8, 6)))
    assert (change.index, change.at, change.rows, change.turned) == (2, 0, 8, False)
    assert code(base, lora("mlp.experts.4.up_proj", 6, 8)).code == "nothing-matched"


def test_stacks_stored_the_other_way_round() -> None:
    stack = {"mlp.experts.gate_up_proj": (4, 8, 12), "mlp.experts.down_proj": (4, 6, 8)}
    base = base_from(stack, {"model_type": "llama4_text"})
    change = only(found(base, lora("mlp.experts.1.up_proj", 6, 8)))
    assert (change.index, change.at, change.rows, change.turned) == (1, 6, 6, True)
    oss = base_from(stack, {"model_type": "gpt_oss"})
    assert code(oss, lora("mlp.experts.1.up_proj", 6, 8)).code == "interleaved-weight"


def test_mixtrals_names() -> None:
    base = base_from({"l.block_sparse_moe.experts.0.w3.weight": (6, 4)})
    for name in (
        "l.mlp.experts.0.up_proj",
        "l.block_sparse_moe.experts.0.up_proj",
        "l.mlp.experts.0.w3",
    ):
        assert list(spans(found(base, lora(name, 6, 4)))) == [
            "l.block_sparse_moe.experts.0.w3.weight"
        ]


_OLDER = {
    "language_model.model.layers.0.q_proj": "model.language_model.layers.0.q_proj",
    "language_model.lm_head": "lm_head",
    "vision_tower.vision_model.encoder.layers.0.q_proj": "model.vision_tower.encoder.layers.0.q_proj",
    "multi_modal_projector.linear_1": "model.multi_modal_projector.linear_1",
}
_QWEN = {
    "model.layers.0.q_proj": "model.language_model.layers.0.q_proj",
    "lm_head": "lm_head",
    "visual.blocks.0.attn.proj": "model.visual.blocks.0.attn.proj",
}


@pytest.mark.parametrize("names", [_OLDER, _QWEN])
@pytest.mark.parametrize("turned", [False, True])
def test_names_of_a_language_model_and_its_eyes_then_and_now(
    names: dict[str, str], turned: bool
) -> None:
    """All parts at once, though each was renamed in its own way; either may be the base's."""
    pairs = [(new, old) if turned else (old, new) for old, new in names.items()]
    base = base_from({f"{stored}.weight": (6, 4) for stored, _ in pairs})
    result = found(base, *(lora(named, 6, 4) for _, named in pairs))
    assert list(spans(result)) == [f"{stored}.weight" for stored, _ in pairs]
    assert not result.notes


def test_an_adapter_of_llavas_language_model_alone() -> None:
    stored = ("language_model.model.layers.0.q_proj", "vision_tower.layers.0.q_proj")
    base = base_from({f"{name}.weight": (6, 4) for name in stored})
    for named in ("model.layers.0.q_proj", "language_model.layers.0.q_proj"):
        assert list(spans(found(base, lora(named, 6, 4)))) == [f"{stored[0]}.weight"]
    assert code(base, lora("layers.0.q_proj", 6, 4)).code == "ambiguous-alignment"


# Storage


@pytest.mark.parametrize(
    ("config", "beside", "turned"),
    [
        ({"model_type": "gpt2"}, {}, True),
        ({"model_type": "gpt_bigcode"}, {"h.0.attn.c_attn.weight": (24, 8)}, False),
        ({}, {"h.0.attn.c_attn.weight": (8, 24)}, True),
        ({}, {"h.0.mlp.c_fc.weight": (8, 32)}, True),
        ({}, {"h.0.attn.c_attn.weight": (24, 8)}, False),
        ({}, {}, False),
    ],
)
def test_square_conv1d(
    config: dict[str, str], beside: dict[str, tuple[int, ...]], turned: bool
) -> None:
    base = base_from({"h.0.attn.c_proj.weight": (8, 8), **beside}, config)
    assert only(found(base, lora("h.0.attn.c_proj", 8, 8))).turned is turned


def test_embeddings_and_oblong_conv1d_by_shape() -> None:
    base = base_of(wte__weight=(20, 8), h__c_fc__weight=(8, 32))
    table_module = lora("wte", 8, 20, kind="embedding")
    assert only(found(base, table_module)).turned
    assert only(found(base, lora("h.c_fc", 32, 8))).turned
    square = base_of(wte__weight=(8, 8))
    assert only(found(square, lora("wte", 8, 8, kind="embedding"))).turned


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_weights_are_refused_by_name(dtype: str) -> None:
    error = code(base_of(a__weight=(6, 4), dtype=dtype), lora("a", 6, 4))
    assert error.code == "quantised-weight" and "`a.weight`" in error.what


def test_gptq_is_told_as_such() -> None:
    base = base_from({"a.qweight": (3, 4)}, dtype="I32")
    assert code(base, lora("a", 6, 4)).code == "quantised-weight"


def test_a_bias_that_the_base_lacks() -> None:
    base = base_of(a__weight=(6, 4))
    bias = Tensor("F32", (6,), (Literal(b"\0" * 23 + b"\x3f"),))
    assert code(base, lora("a", 6, 4).with_tensors(up_bias=bias)).code == "no-bias"
    zeros = Tensor("F32", (6,), (Literal(bytes(24)),))
    result = found(base, lora("a", 6, 4).with_tensors(up_bias=zeros))
    assert list(spans(result)) == ["a.weight"]


def test_more_rows_than_the_base_has() -> None:
    error = code(base_of(wte__weight=(20, 8)), lora("wte", 8, 24, kind="embedding"))
    assert error.code == "bad-shape"


# Tied tables


@pytest.mark.parametrize(
    ("config", "shapes", "untied", "notes"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, {""}, ["untied"]),
        ({"architectures": ["LlamaForCausalLM"]}, {"lm_head.weight": (20, 8)}, set(), []),
        ({"architectures": ["GPTNeoXForCausalLM"]}, {"embed_out.weight": (20, 8)}, set(), []),
        ({"architectures": ["LlamaModel"]}, {}, set(), []),
        (
            {"architectures": ["WhisperForConditionalGeneration"], "tie_word_embeddings": True},
            {}, set(), ["tied-table"],
        ),
    ],
)  # fmt: skip
def test_only_what_is_tied_is_untied(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], untied: set[str], notes: list[str]
) -> None:
    base = base_from({"model.embed_tokens.weight": (20, 8), **shapes}, config)
    adapters = [AdapterState("peft", [lora("model.embed_tokens", 8, 20, kind="embedding")])]
    result = match(base, adapters)
    assert settle_ties(base, adapters, result) == untied
    assert [n.code for n in result.notes] == notes


# Bundled tables


def flux_shapes(native: bool) -> dict[str, tuple[int, ...]]:
    part = table("flux").components["transformer"]
    if not native:
        return {f"{p}.weight": s for p, s in part.modules.items()}
    return {f"{p}.weight": part.shape(p, "native") or () for p in part.native}


def test_diffusers_names_on_flux_native_weights() -> None:
    base = base_from(flux_shapes(native=True))
    h = 3072
    result = found(base, lora("single_transformer_blocks.1.proj_mlp", 4 * h, h))
    assert spans(result) == {"single_blocks.1.linear1.weight": [(3 * h, 4 * h, 0)]}
    swapped = found(base, lora("norm_out.linear", 2 * h, h))
    assert spans(swapped) == {"final_layer.adaLN_modulation.1.weight": [(h, h, 0), (0, h, h)]}


def test_native_names_on_flux_diffusers_weights() -> None:
    base = base_from(flux_shapes(native=False))
    h = 3072
    flat = lora(
        "double_blocks_0_img_attn_qkv", 3 * h, h, naming="flat", options={"prefix": "lora_unet"}
    )
    stem = "transformer_blocks.0.attn.to_"
    assert spans(found(base, flat)) == {
        f"{stem}q.weight": [(0, h, 0)],
        f"{stem}k.weight": [(0, h, h)],
        f"{stem}v.weight": [(0, h, 2 * h)],
    }


def test_open_clip_in_a_single_file_pipeline() -> None:
    part = table("sdxl").components["unet"]
    shapes = {
        f"model.diffusion_model.{p}.weight": part.shape(p, "native") or () for p in part.native
    }
    block = "conditioner.embedders.1.model.transformer.resblocks.3."
    shapes |= {f"{block}attn.in_proj_weight": (24, 8), f"{block}mlp.c_fc.weight": (32, 8)}
    base = base_from(shapes)
    te2 = {"naming": "flat", "options": {"prefix": "lora_te2"}}
    stem = "text_model_encoder_layers_3_"
    unet = lora(
        "input_blocks_1_1_proj_in", 320, 320, naming="flat", options={"prefix": "lora_unet"}
    )
    if part.shape("input_blocks.1.1.proj_in", "native") is None:
        unet = lora(
            "input_blocks_4_1_proj_in", 640, 640, naming="flat", options={"prefix": "lora_unet"}
        )
    result = found(
        base,
        unet,
        lora(f"{stem}self_attn_k_proj", 8, 8, **te2),
        lora(f"{stem}mlp_fc1", 32, 8, **te2),
    )
    places = {(c, n): spans(result)[n] for c, n in result.changes}
    assert places["text_encoder_2", "transformer.resblocks.3.attn.in_proj_weight"] == [(8, 8, 0)]
    assert ("text_encoder_2", "transformer.resblocks.3.mlp.c_fc.weight") in places
    assert any(component == "unet" for component, _ in places)


def test_thousands_of_modules_take_a_second() -> None:
    import time

    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2400) for p in "qkvo"]
    base = base_from({f"{n}.weight": (4, 4) for n in names})
    modules = [lora(n.removeprefix("model."), 4, 4) for n in names]
    start = time.process_time()
    assert found(base, *modules).modules == 9600
    assert time.process_time() - start < 2.5
