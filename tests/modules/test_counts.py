"""The same number of trainable parameters as the real PEFT's, over random configs and architectures."""

from __future__ import annotations

import copy
import random
from typing import Any

import peft
import pytest
import torch
from live_nets import configs, tiny

from adaptsurgery import LoKrConfig, get_peft_model

MODULES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2", "classifier"],
    "bert": ["query", "value", "key", "output.dense", "pooler.dense"],
    "clip": ["q_proj", "out_proj", "fc1", "fc2"],
    "unet": ["to_q", "to_out.0", "conv1", "conv2", "conv_shortcut", "proj_in", "ff.net.2"],
}
HEADS = {
    "llama": "lm_head",
    "vit": "classifier",
    "bert": "classifier",
    "clip": "final_layer_norm",
    "unet": "conv_out",
}


def drawn(seed: int) -> tuple[str, str, dict[str, Any]]:
    """An architecture, an algorithm and a config's fields, by chance."""
    chance = random.Random(seed)
    name, algorithm = list(MODULES)[seed % 5], ("lora", "loha", "lokr", "hra")[seed // 5 % 4]
    said: dict[str, Any] = {"r": chance.choice([2, 4, 6, 8]), "alpha": chance.choice([4, 7.5, 16])}
    targets = chance.sample(MODULES[name], chance.randint(1, 4))
    said["target_modules"] = chance.choice([targets, targets, "all-linear"])
    if chance.random() < 0.4 and HEADS[name] not in targets:
        said["modules_to_save"] = [HEADS[name]]
    if chance.random() < 0.3 and len(targets) > 1:
        said["exclude_modules"] = targets[:1]
    if chance.random() < 0.3 and said["target_modules"] == targets and name != "unet":
        said["layers_to_transform"] = [1]
    if algorithm != "hra" and chance.random() < 0.5:
        said["rank_pattern"] = {targets[-1]: 3}
    if algorithm in ("loha", "lokr"):
        said["use_effective_conv2d"] = chance.random() < 0.5
    if algorithm == "lokr":
        said |= {
            "decompose_both": chance.random() < 0.5,
            "decompose_factor": chance.choice([-1, 2, 4]),
        }
    if algorithm == "lora":
        said |= {
            "use_dora": chance.random() < 0.3,
            "bias": chance.choice(["none", "all", "lora_only"]),
        }
    if algorithm == "hra":
        said["bias"] = chance.choice(["none", "all", "hra_only"])
    return name, algorithm, said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(40))
def test_trainable_and_total_counts(seed: int) -> None:
    name, algorithm, said = drawn(seed)
    model, _ = tiny(name)
    ours, theirs = configs(algorithm, init=True, **said)
    try:
        peer = peft.get_peft_model(copy.deepcopy(model), theirs)
    except (ValueError, NotImplementedError, TypeError, KeyError) as error:
        pytest.skip(f"PEFT refuses it: {type(error).__name__}")
    mine = get_peft_model(model, ours)
    assert mine.get_nb_trainable_parameters() == peer.get_nb_trainable_parameters()


def test_the_vit_of_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-base, 101 labels, LoKr r = 16 on the queries and values: built without numbers."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=101))
    config = LoKrConfig(
        r=16, alpha=16, target_modules=["q_proj", "v_proj"], module_dropout=0.1,
        modules_to_save=["classifier"],
    )  # fmt: skip
    get_peft_model(model, config).print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 116,069 || all params: ")
