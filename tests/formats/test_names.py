"""Module names: every name of every table is found again, and the tables are the real models'."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptsurgery_formats
from adaptsurgery_formats.errors import NameLookupError
from adaptsurgery_formats.names import (
    TABLES,
    Component,
    flatten,
    from_modules,
    names_of_base,
    recognise,
    table,
)
from adaptsurgery_formats.names.tables import expand

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "formats" / "golden"
DATA = Path(adaptsurgery_formats.__file__).parent / "names"

COMPONENTS = [(model, name) for model in TABLES for name in table(model).components]


def golden(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / name).read_text())["tensors"]


def shapes_of(model: str, naming: str = "diffusers") -> dict[str, dict[str, tuple[int, ...]]]:
    """A base as the checkpoint room would list it: component → module → shape."""
    return {c.name: shapes_in(c, naming) for c in table(model).components.values()}


def shapes_in(component: Component, naming: str) -> dict[str, tuple[int, ...]]:
    if naming == "native" and component.native:
        return {path: component.shape(path, "native") for path in component.native}
    if naming == "short" and component.aliases:
        return {p.removeprefix("text_model."): s for p, s in component.modules.items()}
    return dict(component.modules)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """tools/module_tables.py, which is no package."""
    spec = importlib.util.spec_from_file_location("t", ROOT / "tools" / "module_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Every name comes back


@pytest.mark.parametrize("model, name", COMPONENTS)
def test_every_name_flattens_and_comes_back(model, name):
    component = table(model).components[name]
    wanted = [("diffusers", p) for p in component.modules]
    wanted += [("native", p) for p in component.native]
    for naming, path in wanted:
        assert component.find(flatten(path)) == [(naming, path)]
        assert component.locate(path) == (naming, path)
        assert component.shape(path, naming)


@pytest.mark.parametrize("model, name", COMPONENTS)
def test_native_segments_tile_the_diffusers_modules(model, name):
    component = table(model).components[name]
    rows = {}
    for segments in component.native.values():
        for s in segments:
            rows.setdefault(s.name, []).append((s.start, s.stop))
    for path, pieces in rows.items():
        ends = [0] + [stop for _, stop in sorted(pieces)]
        assert [start for start, _ in sorted(pieces)] == ends[:-1], path
        assert ends[-1] == component.modules[path][0], path
    unnamed = set(component.modules) - set(rows) if component.native else set()
    # Flux stores its RMSNorms as `scale`, not `weight`: they are no native modules here.
    assert all(path.rsplit(".", 1)[1].startswith("norm_") for path in unnamed)


@pytest.mark.parametrize(
    "model, prefix, flat, naming, path, shape",
    [
        ("sd15", "lora_unet", "down_blocks_0_attentions_0_proj_in", "diffusers",
         "down_blocks.0.attentions.0.proj_in", (320, 320, 1, 1)),
        ("sd15", "lora_unet", "output_blocks_2_1_conv", "native",
         "output_blocks.2.1.conv", (1280, 1280, 3, 3)),
        ("sd2", "lora_te", "text_model_encoder_layers_22_mlp_fc1", "diffusers",
         "text_model.encoder.layers.22.mlp.fc1", (4096, 1024)),
        ("sdxl", "lora_unet", "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0", "native",
         "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0", (640, 640)),
        ("sdxl", "lora_unet", "middle_block_1_proj_in", "native",
         "middle_block.1.proj_in", (1280, 1280)),
        ("sdxl", "lora_unet", "label_emb_0_0", "native", "label_emb.0.0", (1280, 2816)),
        ("sdxl", "lora_te2", "text_model_encoder_layers_31_mlp_fc2", "diffusers",
         "text_model.encoder.layers.31.mlp.fc2", (1280, 5120)),
        ("flux", "lora_unet", "single_blocks_37_linear1", "native",
         "single_blocks.37.linear1", (21504, 3072)),
        ("flux", "lora_unet", "final_layer_adaLN_modulation_1", "native",
         "final_layer.adaLN_modulation.1", (6144, 3072)),
        ("flux", "lora_transformer", "transformer_blocks_0_attn_to_out_0", "diffusers",
         "transformer_blocks.0.attn.to_out.0", (3072, 3072)),
        ("flux", "lora_te3", "encoder_block_0_layer_1_DenseReluDense_wi_0", "diffusers",
         "encoder.block.0.layer.1.DenseReluDense.wi_0", (10240, 4096)),
    ],
)  # fmt: skip
def test_known_names(model, prefix, flat, naming, path, shape):
    component = table(model).by_prefix[prefix]
    assert component.find(flat) == [(naming, path)]
    assert component.shape(path, naming) == shape


@pytest.mark.parametrize(
    "model, written, read",
    [
        ("sd15", {"unet": "lora_unet", "text_encoder": "lora_te"}, set()),
        ("sd2", {"unet": "lora_unet", "text_encoder": "lora_te"}, set()),
        ("sdxl", {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
         set()),
        ("flux", {"transformer": "lora_unet", "text_encoder": "lora_te1",
                  "text_encoder_2": "lora_te3"}, {"lora_te2", "lora_transformer"}),
    ],
)  # fmt: skip
def test_kohya_prefixes(model, written, read):
    names = table(model)
    assert {c.name: c.kohya_prefixes[0] for c in names.components.values()} == written
    assert set(names.by_prefix) == set(written.values()) | read
    native = model in ("sdxl", "flux")
    main = next(iter(names.components.values()))
    assert main.kohya_naming == ("native" if native else "diffusers")


def test_short_clip_names_are_read_as_the_classic_ones():
    component = table("flux").components["text_encoder"]
    classic = "text_model.encoder.layers.3.self_attn.out_proj"
    assert component.find("encoder_layers_3_self_attn_out_proj") == [("diffusers", classic)]
    assert component.locate("encoder.layers.3.self_attn.out_proj") == ("diffusers", classic)


# Files from the wild


@pytest.mark.parametrize(
    "file, strip, naming",
    [
        ("flux-lora-kohya.json", "lora_unet_", "native"),
        ("flux-lora-aitoolkit-bfl-names.json", "diffusion_model.", "native"),
        ("flux-lora-diffusers.json", "transformer.", "diffusers"),
    ],
)
def test_goldens_resolve_and_fit(file, strip, naming):
    component = table("flux").components["transformer"]
    count = 0
    for key, shape in golden(file).items():
        if key.endswith(".alpha"):
            continue
        assert key.startswith(strip)
        name, slot, _ = key.removeprefix(strip).rsplit(".", 2)
        found = component.find(name) if "." not in name else [component.locate(name)]
        assert len(found) == 1 and found[0][0] == naming
        o, i = component.shape(found[0][1], naming)
        assert (shape[1] == i) if slot in ("lora_A", "lora_down") else (shape[0] == o), key
        count += 1
    assert count > 200


# Which base is this?


@pytest.mark.parametrize("naming", ["diffusers", "native", "short"])
@pytest.mark.parametrize("model", TABLES)
def test_recognise_whole_pipelines(model, naming):
    assert recognise(shapes_of(model, naming)) == model


@pytest.mark.parametrize("naming", ["diffusers", "native"])
@pytest.mark.parametrize("model", TABLES)
def test_recognise_a_lone_main_component(model, naming):
    name, shapes = next(iter(shapes_of(model, naming).items()))
    assert recognise({name: shapes}) == model
    assert recognise({"": shapes}) == model
    assert recognise({name: shapes, "vae": {"encoder.conv_in": (128, 3, 3, 3)}}) == model


def test_recognise_refuses_what_does_not_fit():
    base = shapes_of("sdxl")
    assert recognise({}) == ""
    assert recognise({"unet": {}}) == ""
    assert recognise({"text_encoder": base["text_encoder"]}) == ""  # CLIP-L: three models have it
    assert recognise({**base, "text_encoder": shapes_of("sd2")["text_encoder"]}) == ""
    assert recognise({"unet": {**base["unet"], "conv_out": (8, 320, 3, 3)}}) == ""
    assert recognise({"unet": {**base["unet"], "extra": (1, 1)}}) == ""
    assert recognise({"unet": {k: v for k, v in base["unet"].items() if k != "conv_out"}}) == ""


def test_recognise_variants_of_a_model():
    inpainting = shapes_of("sd15")
    inpainting["unet"]["conv_in"] = (320, 9, 3, 3)
    assert recognise(inpainting) == "sd15"
    names = names_of_base(inpainting, "base")
    assert names.components["unet"].shape("input_blocks.0.0", "native") == (320, 9, 3, 3)
    schnell = {k: v for k, v in shapes_of("flux")["transformer"].items() if "guidance" not in k}
    assert recognise({"transformer": schnell}) == "flux"
    tied = {k: v for k, v in shapes_of("flux")["text_encoder_2"].items() if k != "shared"}
    assert recognise({"transformer": schnell, "text_encoder_2": tied}) == "flux"


def test_names_of_base_keeps_the_table_and_knows_the_bases_own_names():
    names = names_of_base(shapes_of("sd15", "short"), "/some/base")
    assert names.model == "sd15"
    encoder = names.components["text_encoder"]
    classic = "text_model.encoder.layers.0.mlp.fc1"
    assert encoder.find(flatten(classic)) == [("diffusers", classic)]
    assert encoder.called(classic) == "encoder.layers.0.mlp.fc1"
    assert encoder.stored == "diffusers"
    assert names.components["unet"].called("conv_in") == "conv_in"
    assert table("sd15").components["text_encoder"].called(classic) == classic


def test_names_of_base_tells_how_a_base_is_stored():
    assert names_of_base(shapes_of("sdxl", "native"), "b").components["unet"].stored == "native"
    lone = names_of_base({"": shapes_of("flux", "native")["transformer"]}, "b")
    assert lone.components["transformer"].stored == "native"
    assert lone.components["text_encoder"].stored == ""
    other = names_of_base({"": {"fc": (2, 3)}}, "b")
    assert (other.model, other.components[""].stored) == ("", "base")


# A base's own list


@pytest.mark.parametrize(
    "components, prefixes",
    [
        ([""], {"": ("lora_unet",)}),
        (["unet", "text_encoder"], {"unet": ("lora_unet",), "text_encoder": ("lora_te",)}),
        (
            ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3"],
            {
                "transformer": ("lora_unet", "lora_transformer"),
                "text_encoder": ("lora_te1", "lora_te"),
                "text_encoder_2": ("lora_te2",),
                "text_encoder_3": ("lora_te3",),
            },
        ),
        (["prior"], {"prior": ("lora_prior",)}),
    ],
)
def test_from_modules_prefixes(components, prefixes):
    names = from_modules({c: {"fc": (2, 3)} for c in components}, "base")
    assert {c.name: c.kohya_prefixes for c in names.components.values()} == prefixes
    assert {c.kohya_naming for c in names.components.values()} == {"base"}


segments = st.text(alphabet="ab_0", min_size=1, max_size=4)
paths = st.lists(segments, min_size=1, max_size=4).map(".".join)


@given(st.sets(paths, min_size=1, max_size=12))
def test_a_flat_name_finds_exactly_the_modules_that_flatten_to_it(known):
    names = from_modules({"": dict.fromkeys(known, (1, 1))}, "base")
    for path in known:
        twins = {p for p in known if flatten(p) == flatten(path)}
        assert {p for _, p in names.components[""].find(flatten(path))} == twins


# Errors


def test_unknown_table():
    with pytest.raises(NameLookupError, match="unknown-model"):
        table("sd51")


# The tables on disk


def test_tables_are_listed_and_small(generator):
    assert sorted(f"{name}.json" for name in TABLES) == sorted(p.name for p in DATA.glob("*.json"))
    assert tuple(generator.MODELS) == TABLES
    assert sum(p.stat().st_size for p in DATA.glob("*.json")) < 120_000


def test_a_table_loads_fast_and_without_torch():
    code = (
        "import sys, time\n"
        "from adaptsurgery_formats import names\n"
        "for name in names.TABLES:\n"
        "    start = time.process_time(); names.table(name)\n"
        "    print(time.process_time() - start)\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not any(m.split('.')[0] == 'adaptsurgery' for m in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(float, run.stdout.split())) < 0.03  # 2 to 4 ms when measured


@given(
    cases=st.dictionaries(
        st.lists(st.sampled_from("ab012"), min_size=1, max_size=4).map(".".join),
        st.sampled_from([(1,), (2, 3)]),
        max_size=20,
    )
)
def test_folding_a_tree_is_undone_by_expanding_it(generator, cases):
    modules = {}
    for path, shape in cases.items():
        clash = any(
            p == path or p.startswith(path + ".") or path.startswith(p + ".") for p in modules
        )
        if not clash:
            modules[path] = shape
    tree = generator.folded(generator.nested(modules))
    assert dict(expand(tree)) == modules
    assert json.loads(generator.dumped(tree)) == tree


@pytest.mark.slow
@pytest.mark.parametrize("model", TABLES)
def test_tables_are_the_real_models(generator, model):
    assert (DATA / f"{model}.json").read_text() == generator.table_text(generator.MODELS[model])
    for name, spec in generator.MODELS[model].items():
        component = table(model).components[name]
        assert list(component.modules.items()) == list(generator.modules_of(spec).items())


@pytest.mark.slow
@pytest.mark.parametrize("model", TABLES)
def test_the_live_pipelines_names_are_recognised(generator, model):
    """Whatever the installed transformers calls CLIP's modules, the table knows them."""
    live = {
        name: generator.modules_of({**spec, "dropped_prefix": ""})
        for name, spec in generator.MODELS[model].items()
    }
    assert recognise(live) == model
    names = names_of_base(live, "live")
    for name, component in names.components.items():
        assert {component.called(path) for path in component.modules} == set(live[name])


# Native names against diffusers' converters


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sd2", "sdxl"])
def test_ldm_names_are_diffusers_own(generator, model):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    component = table(model).components["unet"]
    config = generator.MODELS[model]["unet"]["config"]
    kinds = ("weight", "bias")
    checkpoint = {f"model.diffusion_model.{p}.{k}": (p, k) for p in component.native for k in kinds}
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    assert converted == {
        f"{segment.name}.{k}": (path, k)
        for path, (segment,) in component.native.items()
        for k in kinds
    }


@pytest.mark.slow
def test_flux_names_cuts_and_swaps_are_diffusers_own():
    """Each native row carries a number of its own; the converter shows where it goes."""
    import torch
    from diffusers.loaders.single_file_utils import (
        convert_flux_transformer_checkpoint_to_diffusers as convert,
    )

    component = table("flux").components["transformer"]
    checkpoint, at = {}, 0
    for path in component.native:
        rows = component.shape(path, "native")[0]
        checkpoint[f"{path}.weight"] = torch.arange(at, at + rows)
        checkpoint[f"{path}.bias"] = checkpoint[f"{path}.weight"]
        at += rows
    for i in range(19):
        for stream in ("img", "txt"):
            for norm in ("query", "key"):
                checkpoint[f"double_blocks.{i}.{stream}_attn.norm.{norm}_norm.scale"] = None
    for i in range(38):
        for norm in ("query", "key"):
            checkpoint[f"single_blocks.{i}.norm.{norm}_norm.scale"] = None
    expected = {}
    for path, segments in component.native.items():
        at = int(checkpoint[f"{path}.weight"][0])
        for s in segments:
            whole = component.modules[s.name][0]
            target = expected.setdefault(s.name, torch.empty(whole, dtype=torch.int64))
            target[s.start : s.stop] = torch.arange(at, at + s.stop - s.start)
            at += s.stop - s.start
    converted = {k: v for k, v in convert(checkpoint).items() if v is not None}
    assert set(converted) == {f"{p}.{kind}" for p in expected for kind in ("weight", "bias")}
    assert all(torch.equal(converted[f"{p}.weight"], rows) for p, rows in expected.items())


def test_finding_is_quick():
    component = table("sdxl").components["unet"]
    component.find("x")
    start = time.process_time()
    for path in component.native:
        component.find(flatten(path))
    assert time.process_time() - start < 0.05
