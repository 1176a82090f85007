"""Write the bundled module tables from the model classes of diffusers and transformers.

    python tools/module_tables.py            write formats/adaptsurgery_formats/names/*.json
    python tools/module_tables.py --check    exit 1 if a table on disk is not what would be written

Each model is built on torch's meta device from its published config, so no weight is made. What a
table holds beside the modules (kohya's prefixes, which original repository) is stated here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "formats"))

from adaptsurgery_formats.names.native import RULES

OUT = Path(__file__).resolve().parent.parent / "formats" / "adaptsurgery_formats" / "names"
Tree = dict[str, Any]

CLIP_L = {
    "class": "transformers.CLIPTextModel",
    "config": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
        "projection_dim": 768,
    },
    "kohya_naming": "diffusers",
    "dropped_prefix": "text_model.",
}  # fmt: skip
OPENCLIP_H = {
    **CLIP_L,
    "config": {
        "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 23, "num_attention_heads": 16, "max_position_embeddings": 77,
        "projection_dim": 512,
    },
}  # fmt: skip
CLIP_G = {
    **CLIP_L,
    "class": "transformers.CLIPTextModelWithProjection",
    "config": {
        "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120,
        "num_hidden_layers": 32, "num_attention_heads": 20, "max_position_embeddings": 77,
        "projection_dim": 1280,
    },
}  # fmt: skip
T5_XXL = {
    "class": "transformers.T5EncoderModel",
    "config": {
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
        "num_heads": 64, "feed_forward_proj": "gated-gelu",
    },
    "kohya_naming": "diffusers",
    # The two are tied, and a file may store either or both.
    "optional": ["shared", "encoder.embed_tokens"],
}  # fmt: skip
UNET = {
    "class": "diffusers.UNet2DConditionModel",
    "native": "ldm",
    "kohya_prefixes": ["lora_unet"],
    "open_inputs": ["conv_in"],  # inpainting and depth models take more channels
}
SD_BLOCKS = {
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
}

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {
            **UNET,
            "config": {**SD_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
            "kohya_naming": "diffusers",
        },
        "text_encoder": {**CLIP_L, "kohya_prefixes": ["lora_te"]},
    },
    "sd2": {
        "unet": {
            **UNET,
            "config": {
                **SD_BLOCKS, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            },
            "kohya_naming": "diffusers",
        },
        "text_encoder": {**OPENCLIP_H, "kohya_prefixes": ["lora_te"]},
    },
    "sdxl": {
        "unet": {
            **UNET,
            "config": {
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
                "in_channels": 4, "out_channels": 4, "cross_attention_dim": 2048,
                "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
                "use_linear_projection": True, "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
            },
            "kohya_naming": "native",
        },
        "text_encoder": {**CLIP_L, "kohya_prefixes": ["lora_te1"]},
        "text_encoder_2": {**CLIP_G, "kohya_prefixes": ["lora_te2"]},
    },
    "flux": {
        "transformer": {
            "class": "diffusers.FluxTransformer2DModel",
            "config": {
                "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
                "num_attention_heads": 24, "in_channels": 64, "joint_attention_dim": 4096,
                "pooled_projection_dim": 768, "guidance_embeds": True,
            },
            "native": "flux",
            # OneTrainer writes lora_transformer, with diffusers names.
            "kohya_prefixes": ["lora_unet", "lora_transformer"],
            "kohya_naming": "native",
            "open_inputs": ["x_embedder"],  # Flux Fill, Canny and Depth take more channels
            # Flux-schnell has no guidance.
            "optional": [f"time_text_embed.guidance_embedder.linear_{i}" for i in (1, 2)],
        },
        "text_encoder": {**CLIP_L, "kohya_prefixes": ["lora_te1"]},
        # kohya numbers T5 as SD3 does; some trainers count it as the second encoder.
        "text_encoder_2": {**T5_XXL, "kohya_prefixes": ["lora_te3", "lora_te2"]},
    },
}  # fmt: skip


def modules_of(component: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Module path → shape of its weight, of the real model on the meta device, in its own order."""
    import torch

    library, name = component["class"].split(".")
    model_class = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        if library == "diffusers":
            model = model_class(**component["config"])
        else:
            model = model_class(model_class.config_class(**component["config"]))
    prefix = component.get("dropped_prefix", "")
    classic = any(path.startswith(prefix) for path, _ in model.named_modules())
    return {
        path if classic else prefix + path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }


def nested(modules: dict[str, tuple[int, ...]]) -> Tree:
    """{"a.b": (4, 8)} as {"a": {"b": [4, 8]}}."""
    tree: Tree = {}
    for path, shape in modules.items():
        *above, last = path.split(".")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = list(shape)
    return tree


def folded(tree: Tree) -> Tree:
    """The tree with equal neighbours under one range key, and only children joined to parents."""
    runs: list[tuple[str, str, Any]] = []
    for key, value in tree.items():
        value = folded(value) if isinstance(value, dict) else value
        follows = (
            runs and key.isdigit() and runs[-1][1].isdigit() and int(key) == int(runs[-1][1]) + 1
        )
        if follows and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], key, value)
        else:
            runs.append((key, key, value))
    return dict(_joined(a if a == b else f"{a}-{b}", value) for a, b, value in runs)


def _joined(key: str, value: Any) -> tuple[str, Any]:
    if isinstance(value, dict) and len(value) == 1:
        ((child, below),) = value.items()
        if not ("-" in key and "-" in child):
            return f"{key}.{child}", below
    return key, value


def dumped(value: Any, indent: str = "") -> str:
    """JSON with one key a line, but lists on one line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    deeper = indent + " "
    lines = (f"{deeper}{json.dumps(k)}: {dumped(v, deeper)}" for k, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def heads(component: dict[str, Any], modules: dict[str, tuple[int, ...]]) -> list[str]:
    """The first segments of all names that a component's modules have, in any naming."""
    dropped, rule = component.get("dropped_prefix", ""), component.get("native", "")
    names = [*modules, *(RULES[rule](modules) if rule else ())]
    names += [name.removeprefix(dropped) for name in modules]
    return sorted({name.partition(".")[0] for name in names})


def table_text(components: dict[str, dict[str, Any]]) -> str:
    filled = {}
    for name, component in components.items():
        modules = modules_of(component)
        entry = {**component, "heads": heads(component, modules)}
        filled[name] = {**entry, "modules": folded(nested(modules))}
    header = "tools/module_tables.py; shapes are those of the weights; 0-2 counts 0, 1 and 2"
    return dumped({"written by": header, "components": filled}) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    stale = []
    for name, components in MODELS.items():
        path, text = OUT / f"{name}.json", table_text(components)
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, "utf-8")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
