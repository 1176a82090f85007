"""Native ↔ diffusers: what is cut stacks again to the same bytes, and ΔW is the same throughout."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptsurgery_formats.errors import (
    InexactError,
    LayoutError,
    NameLookupError,
    ShapeError,
)
from adaptsurgery_formats.names import Component, Rows, table, to_diffusers, to_native
from adaptsurgery_formats.names.renaming import PaddedRows, Zeros
from adaptsurgery_formats.state import (
    ALPHA_OVER_R,
    ALPHA_OVER_SQRT_R,
    BOTH_FULL,
    NO_ALPHA,
    UNSCALED,
    ZERO_ALPHA,
    ModuleState,
    check_complete,
    check_shapes,
    module_rank,
)
from adaptsurgery_formats.tensors import Literal, Tensor, concat_rows

# A Flux in small: an alias, unequal stacks (as with GQA or linear1), and swapped halves.
INPUTS = 6
MODULES = {"embed": (4, 6), "q": (8, 6), "k": (4, 6), "v": (4, 6), "mlp": (16, 6), "last": (12, 6)}
NATIVE = {
    "img_in": (Rows("embed", 0, 4),),
    "qkvm": (
        Rows("q", 0, 8),
        Rows("k", 0, 4),
        Rows("v", 0, 4),
        Rows("mlp", 0, 16),
    ),
    "ada": (Rows("last", 6, 12), Rows("last", 0, 6)),
}
SMALL = Component("transformer", MODULES, NATIVE, ("lora_unet",), "native")
FLUX = table("flux").components["transformer"]

NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


# Numbers in, numbers out


def tensor(array: np.ndarray, dtype: str = "F64", pieces: int = 1) -> Tensor:
    """A lazy tensor of the array's numbers, its bytes split into a few parts."""
    data = np.ascontiguousarray(array.astype(NUMPY[dtype])).tobytes()
    cuts = [len(data) * i // pieces for i in range(pieces + 1)]
    parts = tuple(Literal(data[a:b]) for a, b in pairwise(cuts))
    return Tensor(dtype, array.shape, parts)


def numbers(t: Tensor) -> np.ndarray:
    return np.frombuffer(t.read(), NUMPY[t.dtype]).reshape(t.shape).astype(np.float64)


def delta(m: ModuleState) -> np.ndarray:
    """s·ΔW as a matrix (o, i), from the definition; HRA gives u, a norm its change as a column."""
    t = {slot: numbers(x) for slot, x in m.tensors.items()}
    if m.algorithm == "lora":
        return m.scale * t["up"] @ t["down"]
    if m.algorithm == "loha":
        return m.scale * (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    if m.algorithm == "lokr":
        w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
        w2 = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]
        return m.scale * np.kron(w1, w2)
    if m.algorithm == "hra":
        return t["u"]
    if m.algorithm == "full":
        return t["diff"]
    return t["w_norm"][:, None]


def native_rows(path: str, parts: dict[str, np.ndarray], columns: int = INPUTS) -> np.ndarray:
    """The native matrix that diffusers matrices make up; zeros where one is not given."""
    rows = [
        parts[s.name][s.start : s.stop]
        if s.name in parts
        else np.zeros((s.stop - s.start, columns))
        for s in NATIVE[path]
    ]
    return np.concatenate(rows)


def contents(m: ModuleState) -> tuple:
    """All of a module that a law compares: bytes, not parts."""
    tensors = {slot: (t.dtype, t.shape, t.read()) for slot, t in sorted(m.tensors.items())}
    plain = replace(m, tensors={})
    return plain, tensors


# Modules at random


def random_module(
    rng: np.random.Generator,
    algorithm: str,
    path: str,
    rows: int,
    *,
    naming: str = "diffusers",
    dtype: str = "F64",
    rank: int = 2,
    alpha: float | None = 3.0,
    rule: str = ALPHA_OVER_R,
    lokr: tuple[int, str] = (2, "w1 w2"),
    extras: bool = False,
) -> ModuleState:
    """A module of (rows, INPUTS); a LoKr's b and stored factors are ``lokr``."""

    def draw(*shape: int) -> Tensor:
        return tensor(rng.standard_normal(shape), dtype, pieces=int(rng.integers(1, 4)))

    o, i, r = rows, INPUTS, rank
    b, stored = lokr
    shapes = {
        "lora": {"up": (o, r), "down": (r, i)},
        "loha": {"w1_a": (o, r), "w1_b": (r, i), "w2_a": (o, r), "w2_b": (r, i)},
        "lokr": {
            "w1": (o // b, 3), "w1_a": (o // b, r), "w1_b": (r, 3),
            "w2": (b, 2), "w2_a": (b, r), "w2_b": (r, 2),
        },
        "hra": {"u": (i, r)},
        "full": {"diff": (o, i)},
        "norm": {"w_norm": (o,), "b_norm": (o,)},
    }[algorithm]  # fmt: skip
    if algorithm == "lokr":
        shapes = {slot: shapes[slot] for slot in stored.split()}
        rule = BOTH_FULL if stored == "w1 w2" else rule
    if extras and algorithm in ("lora", "loha", "lokr"):
        shapes["magnitude"] = (o, 1)
    if extras and algorithm == "lora":
        shapes["up_bias"] = (o,)
    if extras and algorithm == "full":
        shapes["diff_b"] = (o,)
    tensors = {slot: draw(*shape) for slot, shape in shapes.items()}
    if algorithm in ("hra", "full", "norm"):
        alpha, rule = None, UNSCALED
    options = {"apply_gs": True} if algorithm == "hra" else {}
    module = ModuleState(path, algorithm, tensors, alpha, rule, None, "transformer", naming,
                         keys=(f"{path}.x",), options=options)  # fmt: skip
    return replace(module, rank=module_rank(module))


def checked(module: ModuleState) -> ModuleState:
    check_complete(module, "")
    check_shapes(module, "")
    assert module.rank == module_rank(module)
    return module


algorithms = st.sampled_from(["lora", "loha", "lokr", "hra", "full", "norm"])
stored_lokr = st.sampled_from(["w1 w2", "w1 w2_a w2_b", "w1_a w1_b w2", "w1_a w1_b w2_a w2_b"])
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
scales = st.sampled_from([(3.0, ALPHA_OVER_R), (0.5, ALPHA_OVER_SQRT_R), (None, NO_ALPHA)])


@st.composite
def native_modules(draw) -> ModuleState:
    path = draw(st.sampled_from(sorted(NATIVE)))
    alpha, rule = draw(scales)
    return random_module(
        draw(seeds),
        draw(algorithms),
        path,
        sum(s.stop - s.start for s in NATIVE[path]),
        naming="native",
        dtype=draw(st.sampled_from(sorted(NUMPY))),
        rank=draw(st.integers(1, 4)),
        alpha=alpha,
        rule=rule,
        lokr=(draw(st.sampled_from([1, 2])), draw(stored_lokr)),
        extras=draw(st.booleans()),
    )


# The laws


@settings(max_examples=300)
@given(native_modules())
def test_what_is_cut_stacks_again_to_the_same_bytes(module):
    parts = to_diffusers(module, SMALL)
    (back,) = to_native(parts, SMALL)
    assert contents(back) == contents(module)


@settings(max_examples=300)
@given(native_modules())
def test_the_parts_of_a_native_module_hold_its_rows(module):
    parts = [checked(m) for m in to_diffusers(module, SMALL)]
    segments = NATIVE[module.path]
    assert [m.path for m in parts] == list(dict.fromkeys(s.name for s in segments))
    assert {(m.naming, m.component, m.keys) for m in parts} == {
        ("diffusers", "transformer", module.keys)
    }
    if module.algorithm == "hra":
        assert all(m.tensors == module.tensors and m.options == module.options for m in parts)
        return
    columns = {m.path: delta(m) for m in parts}
    np.testing.assert_array_equal(native_rows(module.path, columns), delta(module))
    for slot in ("magnitude", "up_bias", "diff_b", "b_norm"):
        if slot in module.tensors:
            pieces = {m.path: numbers(m.tensors[slot]).reshape(-1, 1) for m in parts}
            whole = numbers(module.tensors[slot]).reshape(-1, 1)
            np.testing.assert_array_equal(native_rows(module.path, pieces), whole)


@settings(max_examples=200)
@given(
    seeds,
    st.lists(st.sampled_from(["q", "k", "v", "mlp"]), min_size=1, unique=True),
    st.sampled_from([(1.0, 1.0), (0.5, 1.5)]),
    st.booleans(),
)
def test_loras_with_downs_of_their_own_stack_block_diagonally(rng, paths, scale, bias):
    ranks = {path: int(rng.integers(1, 5)) for path in paths}
    modules = [
        random_module(rng, "lora", p, MODULES[p][0], rank=ranks[p], alpha=scale[0] * ranks[p])
        for p in paths
    ]
    if bias:
        modules[0] = modules[0].with_tensors(
            up_bias=tensor(rng.standard_normal(MODULES[paths[0]][0]))
        )
    (fused,) = to_native(modules, SMALL)
    checked(fused)
    assert fused.rank == sum(ranks.values()) and fused.rule == ALPHA_OVER_R
    assert fused.alpha == scale[0] * fused.rank
    wanted = native_rows("qkvm", {m.path: delta(m) for m in modules})
    np.testing.assert_allclose(delta(fused), wanted, rtol=1e-12, atol=1e-14)
    assert set(fused.keys) == {key for m in modules for key in m.keys}
    for part in to_diffusers(fused, SMALL):
        original = next((delta(m) for m in modules if m.path == part.path), 0.0)
        np.testing.assert_allclose(delta(part), original + 0 * delta(part), rtol=1e-12, atol=1e-14)


@settings(max_examples=200)
@given(native_modules(), st.data())
def test_missing_parts_become_rows_of_zeros(module, data):
    module = module.with_tensors(magnitude=None) if "magnitude" in module.tensors else module
    parts = to_diffusers(module, SMALL)
    kept = data.draw(st.lists(st.sampled_from(parts), min_size=1, unique_by=lambda m: m.path))
    if module.algorithm == "hra" and len(kept) < len(parts):
        with pytest.raises(InexactError, match="fused-mixed"):
            to_native(kept, SMALL)
        return
    (fused,) = to_native(kept, SMALL)
    checked(fused)
    assert (fused.alpha, fused.rule, fused.rank) == (module.alpha, module.rule, module.rank)
    if module.algorithm != "hra":
        columns = delta(module).shape[1]
        wanted = native_rows(module.path, {m.path: delta(m) for m in kept}, columns)
        np.testing.assert_array_equal(delta(fused), wanted)


@given(seeds, st.sampled_from(["q", "k", "v"]))
def test_parts_that_share_a_down_are_stacked_once(rng, loner):
    """Two of the parts share their down: they share its place in the wide one."""
    modules = [random_module(rng, "lora", p, MODULES[p][0], alpha=2.0) for p in "qkv"]
    shared = next(m for m in modules if m.path != loner).tensors["down"]
    modules = [m if m.path == loner else m.with_tensors(down=shared) for m in modules]
    (fused,) = to_native(modules, SMALL)
    assert fused.rank == 4 and fused.alpha == 4.0
    wanted = native_rows("qkvm", {m.path: delta(m) for m in modules})
    np.testing.assert_allclose(delta(fused), wanted, rtol=1e-12, atol=1e-14)


# By hand


def test_swapped_halves_are_swapped_on_up_alone():
    up, down = np.arange(24.0).reshape(12, 2), np.arange(12.0).reshape(2, 6)
    module = ModuleState("ada", "lora", {"up": tensor(up), "down": tensor(down)}, 2.0,
                         ALPHA_OVER_R, 2, naming="native")  # fmt: skip
    (part,) = to_diffusers(module, SMALL)
    assert part.path == "last"
    np.testing.assert_array_equal(numbers(part.tensors["up"]), np.concatenate([up[6:], up[:6]]))
    np.testing.assert_array_equal(numbers(part.tensors["down"]), down)


def test_an_alias_is_renamed_and_nothing_else():
    module = random_module(np.random.default_rng(0), "loha", "img_in", 4, naming="native")
    (part,) = to_diffusers(module, SMALL)
    assert part == replace(module, path="embed", naming="diffusers")
    assert to_native([part], SMALL) == [module]


def test_other_namings_pass_through():
    module = random_module(np.random.default_rng(0), "lora", "q", 8)
    assert to_diffusers(module, SMALL) == [module]
    base = replace(module, naming="base")
    unnamed = Component("", {"q": (8, 6)}, naming="base")
    assert to_diffusers(base, unnamed) == [base] and to_native([base], unnamed) == [base]
    fused = random_module(np.random.default_rng(0), "lora", "qkvm", 32, naming="native")
    assert to_native([fused], SMALL) == [fused]


def test_order_is_that_of_first_appearance():
    rng = np.random.default_rng(0)
    modules = [random_module(rng, "lora", p, MODULES[p][0]) for p in ("last", "v", "embed", "q")]
    assert [m.path for m in to_native(modules, SMALL)] == ["ada", "qkvm", "img_in"]


def test_a_tucker_lora_is_cut_with_its_mid():
    rng = np.random.default_rng(0)
    shapes = {"up": (32, 2, 1, 1), "down": (2, 6, 1, 1), "mid": (2, 2, 3, 3)}
    tensors = {slot: tensor(rng.standard_normal(shape)) for slot, shape in shapes.items()}
    module = ModuleState("qkvm", "lora", tensors, 1.0, ALPHA_OVER_R, 2, naming="native")
    parts = to_diffusers(module, SMALL)
    assert [checked(m).tensors["up"].shape for m in parts] == [
        (8, 2, 1, 1), (4, 2, 1, 1), (4, 2, 1, 1), (16, 2, 1, 1)
    ]  # fmt: skip
    assert all(m.tensors["mid"] is module.tensors["mid"] for m in parts)
    assert contents(to_native(parts, SMALL)[0]) == contents(module)
    other = parts[1].with_tensors(mid=tensor(rng.standard_normal((2, 2, 3, 3))))
    with pytest.raises(InexactError, match="fused-mixed"):
        to_native([parts[0], other], SMALL)


def test_a_dora_norm_per_input_survives_the_swap_but_no_cut():
    rng = np.random.default_rng(0)
    norm = tensor(rng.standard_normal((1, 6)))
    swapped = random_module(rng, "lora", "ada", 12, naming="native").with_tensors(magnitude=norm)
    (part,) = to_diffusers(swapped, SMALL)
    assert part.tensors["magnitude"] is norm
    assert contents(to_native([part], SMALL)[0]) == contents(swapped)
    stacked = random_module(rng, "lora", "qkvm", 32, naming="native").with_tensors(magnitude=norm)
    with pytest.raises(InexactError, match="per input"):
        to_diffusers(stacked, SMALL)
    parts = [
        random_module(rng, "lora", p, MODULES[p][0]).with_tensors(magnitude=norm)
        for p in ("q", "k", "v", "mlp")
    ]
    with pytest.raises(InexactError, match="per input"):
        to_native(parts, SMALL)


# Scales


@pytest.mark.parametrize(
    "spelled, alpha, rule",
    [
        ([(None, NO_ALPHA), (None, NO_ALPHA)], None, NO_ALPHA),
        ([(0.0, ZERO_ALPHA), (0.0, ZERO_ALPHA)], 0.0, ZERO_ALPHA),
        ([(None, NO_ALPHA), (3.0, ALPHA_OVER_R)], 5.0, ALPHA_OVER_R),
        ([(2.0, ALPHA_OVER_R), (3.0, ALPHA_OVER_R)], 5.0, ALPHA_OVER_R),
        ([(math.sqrt(2), ALPHA_OVER_SQRT_R), (math.sqrt(3), ALPHA_OVER_SQRT_R)],
         5.0, ALPHA_OVER_R),
    ],
)  # fmt: skip
def test_equal_scales_however_spelled_add_up(spelled, alpha, rule):
    """Parts of rank 2 and 3, both of scale 1."""
    rng = np.random.default_rng(0)
    modules = [
        random_module(rng, "lora", path, MODULES[path][0], rank=rank, alpha=a, rule=how)
        for path, rank, (a, how) in zip("qk", (2, 3), spelled)
    ]
    (fused,) = to_native(modules, SMALL)
    assert (fused.alpha, fused.rule, fused.scale) == (alpha, rule, 1.0)


@given(st.floats(1e-3, 1e3), st.integers(1, 64), st.integers(1, 4))
def test_the_mediant_keeps_an_awkward_scale_exactly(alpha, rank, count):
    rng = np.random.default_rng(0)
    alpha = float(np.float16(alpha))
    modules = [
        random_module(rng, "lora", p, MODULES[p][0], rank=rank, alpha=alpha)
        for p in ("q", "k", "v", "mlp")[:count]
    ]
    (fused,) = to_native(modules, SMALL)
    assert fused.scale == modules[0].scale


# Refusals


def refused(modules, code: str, *words: str) -> None:
    with pytest.raises(InexactError) as caught:
        to_native(modules, SMALL)
    assert caught.value.code == code
    assert "--as lora" in caught.value.next
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_different_scales_are_refused():
    rng = np.random.default_rng(0)
    modules = [
        random_module(rng, "lora", p, MODULES[p][0], alpha=a) for p, a in (("q", 2), ("k", 4))
    ]
    refused(modules, "fused-scales", "`q` 1", "`k` 2")


def test_different_algorithms_factors_and_dtypes_are_refused():
    rng = np.random.default_rng(0)
    q = random_module(rng, "lora", "q", 8)
    refused([q, random_module(rng, "loha", "k", 4)], "fused-mixed", "loha and lora")
    refused(
        [q, random_module(rng, "lora", "k", 4, dtype="F16")], "fused-mixed", "F16 of 2", "F64 of 2"
    )
    conv = random_module(rng, "lora", "k", 4)
    conv = conv.with_tensors(up=conv.tensors["up"].reshape(4, 2, 1, 1))
    refused([q, conv], "fused-mixed", "F64 of 2", "F64 of 4")
    for algorithm in ("loha", "lokr"):
        parts = [random_module(rng, algorithm, p, MODULES[p][0]) for p in "qk"]
        refused(parts, "fused-mixed", "w2")
    parts = [random_module(rng, "hra", p, MODULES[p][0]) for p in ("q", "k", "v", "mlp")]
    refused(parts, "fused-mixed", "u differ")
    parts = [m.with_tensors(u=parts[0].tensors["u"]) for m in parts]
    (fused,) = to_native(
        [replace(m, options={**m.options, "prefix": m.path}) for m in parts], SMALL
    )
    assert fused.tensors == parts[0].tensors
    parts[1] = replace(parts[1], options={"apply_gs": False})
    refused(parts, "fused-mixed", "u differ")


def test_a_dora_of_some_parts_alone_is_refused():
    rng = np.random.default_rng(0)
    dora = random_module(rng, "lora", "q", 8, extras=True)
    refused([dora], "fused-mixed", "1 of the 4")
    refused([dora, random_module(rng, "lora", "k", 4)], "fused-mixed", "1 of the 4")


def test_a_lokr_is_cut_at_multiples_of_b_alone():
    module = random_module(np.random.default_rng(0), "lokr", "qkvm", 32, naming="native",
                           lokr=(8, "w1 w2"))  # fmt: skip
    with pytest.raises(InexactError) as caught:
        to_diffusers(module, SMALL)
    assert caught.value.code == "fused-lokr"
    assert caught.value.seen == "b = 8, cuts at rows 8, 12, 16"
    assert "`qkvm`" in caught.value.what or "transformer.qkvm" in caught.value.what
    assert "--as lora" in caught.value.next
    part = random_module(np.random.default_rng(0), "lokr", "q", 8, lokr=(8, "w1 w2"))
    refused([part], "fused-lokr", "b = 8")


def test_a_tucker_loha_is_not_cut():
    shapes = {"w1_a": (2, 32), "w2_a": (2, 32), "w1_b": (2, 6), "w2_b": (2, 6),
              "t1": (2, 2, 3, 3), "t2": (2, 2, 3, 3)}  # fmt: skip
    tensors = {slot: tensor(np.zeros(shape)) for slot, shape in shapes.items()}
    module = ModuleState("qkvm", "loha", tensors, 1.0, ALPHA_OVER_R, 2, naming="native")
    with pytest.raises(InexactError, match="tucker"):
        to_diffusers(module, SMALL)


def test_names_and_shapes_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ShapeError, match="30 output rows, but 32"):
        to_diffusers(random_module(rng, "lora", "qkvm", 30, naming="native"), SMALL)
    with pytest.raises(ShapeError, match="5 output rows, but 4"):
        to_native([random_module(rng, "lora", "k", 5)], SMALL)
    with pytest.raises(NameLookupError, match="`img_in`"):
        to_diffusers(random_module(rng, "lora", "img_inn", 4, naming="native"), SMALL)
    with pytest.raises(NameLookupError, match="no-native-name"):
        to_native([random_module(rng, "norm", "attn.norm_q", 4)], SMALL)


def test_one_module_twice_is_refused():
    rng = np.random.default_rng(0)
    q = random_module(rng, "lora", "q", 8)
    fused = random_module(rng, "lora", "qkvm", 32, naming="native")
    for modules in ([q, q], [q, fused], [fused, q], [fused, fused]):
        with pytest.raises(LayoutError, match="duplicate-module"):
            to_native(modules, SMALL)


# The real Flux


def flux_lora(path: str, rank: int, naming: str) -> ModuleState:
    o, i = FLUX.shape(path, naming)
    rng = np.random.default_rng(len(path))
    tensors = {
        "up": tensor(rng.standard_normal((o, rank)), "F16"),
        "down": tensor(rng.standard_normal((rank, i)), "F16"),
    }
    return ModuleState(path, "lora", tensors, 8.0, ALPHA_OVER_R, rank, "transformer", naming)


@pytest.mark.parametrize(
    "path, parts",
    [
        ("single_blocks.3.linear1", {"attn.to_q": (3072, 4), "attn.to_k": (3072, 4),
                                     "attn.to_v": (3072, 4), "proj_mlp": (12288, 4)}),
        ("double_blocks.0.txt_attn.qkv", {"attn.add_q_proj": (3072, 4),
                                          "attn.add_k_proj": (3072, 4),
                                          "attn.add_v_proj": (3072, 4)}),
        ("final_layer.adaLN_modulation.1", {"linear": (6144, 4)}),
        ("double_blocks.18.img_mlp.0", {"proj": (12288, 4)}),
    ],
)  # fmt: skip
def test_flux_modules_there_and_back(path, parts):
    module = flux_lora(path, 4, "native")
    cut = to_diffusers(module, FLUX)
    assert [m.tensors["up"].shape for m in cut] == list(parts.values())
    assert all(m.path.endswith(name) for m, name in zip(cut, parts))
    assert contents(to_native(cut, FLUX)[0]) == contents(module)


def test_flux_attention_of_three_loras_at_once():
    """q, k and v with downs of their own and no mlp, as diffusers files have them."""
    block = "single_transformer_blocks.0"
    modules = [flux_lora(f"{block}.attn.to_{x}", 4, "diffusers") for x in "qkv"]
    distinct = [
        m.with_tensors(down=tensor(np.full((4, 3072), float(n)), "F16"))
        for n, m in enumerate(modules)
    ]
    (fused,) = to_native(distinct, FLUX)
    assert fused.path == "single_blocks.0.linear1"
    assert fused.tensors["up"].shape == (21504, 12) and fused.tensors["down"].shape == (12, 3072)
    assert (fused.alpha, fused.scale) == (24.0, 2.0)
    up = numbers(fused.tensors["up"])
    for n, m in enumerate(distinct):
        np.testing.assert_array_equal(
            up[3072 * n : 3072 * (n + 1), 4 * n : 4 * n + 4], numbers(m.tensors["up"])
        )
    assert np.count_nonzero(up) == sum(np.count_nonzero(numbers(m.tensors["up"])) for m in distinct)


# Lazy parts


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.data())
def test_padded_rows_are_read_in_windows(rows, width, left, right, data):
    body = bytes(range(1, rows * width + 1))
    part = PaddedRows((Literal(body[:2]), Literal(body[2:])), width, left, right)
    whole = b"".join(
        bytes(left) + body[i : i + width] + bytes(right) for i in range(0, len(body), width)
    )
    assert part.read() == whole and part.nbytes == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    window = part.window(start, stop)
    assert window.read() == whole[start:stop] and window.nbytes == stop - start
    half = window.nbytes // 2
    assert window.window(half, window.nbytes).read() == whole[start + half : stop]


def test_nothing_is_read_when_names_change():
    class Untouchable(Zeros):
        def window(self, start, stop):
            return Untouchable(stop - start)

        def read(self):
            raise AssertionError("a number was read")

    shapes = {"up": (32, 2), "down": (2, 6)}
    tensors = {s: Tensor("F32", x, (Untouchable(math.prod(x) * 4),)) for s, x in shapes.items()}
    module = ModuleState("qkvm", "lora", tensors, 1.0, ALPHA_OVER_R, 2, naming="native")
    parts = to_diffusers(module, SMALL)
    (back,) = to_native(parts, SMALL)
    assert back.tensors["up"].shape == (32, 2)
    assert concat_rows([m.tensors["up"] for m in parts]).nbytes == 32 * 2 * 4
