"""The examples of PEFT's own pages on LoHa, LoKr and HRA, on models built from their configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_nets import logits, tiny

from adaptsurgery import (
    HRAConfig,
    HRAModel,
    LoHaConfig,
    LoHaModel,
    LoKrConfig,
    LoKrModel,
    SurgeryError,
    get_peft_model,
)

TEXT = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


class Pipe:
    """What a diffusion pipeline holds."""

    def __init__(self) -> None:
        (self.text_encoder, self.text), (self.unet, self.noise) = tiny("clip"), tiny("unet")

    def __call__(self) -> torch.Tensor:
        hidden = logits(self.text_encoder(**self.text))[:1]
        return logits(self.unet(**{**self.noise, "encoder_hidden_states": hidden}))


@pytest.mark.parametrize(
    "model, config, text, unet",
    [
        (
            LoHaModel, LoHaConfig,
            {"rank_dropout": 0.0, "module_dropout": 0.0},
            {"rank_dropout": 0.0, "use_effective_conv2d": True},
        ),
        (
            LoKrModel, LoKrConfig,
            {"rank_dropout": 0.0, "module_dropout": 0.0},
            {"rank_dropout": 0.0, "use_effective_conv2d": True},
        ),
        (HRAModel, HRAConfig, {"init_weights": True}, {"init_weights": True}),
    ],
)  # fmt: skip
def test_a_diffusion_pipeline(model: Any, config: Any, text: Any, unet: Any) -> None:
    pipe = Pipe()
    keys, before = list(pipe.unet.state_dict()), pipe()
    config_te, config_unet = (
        config(r=8, target_modules=TEXT, **text),
        config(r=8, target_modules=UNET, **unet),
    )
    pipe.text_encoder = model(pipe.text_encoder, config_te, "default").eval()
    pipe.unet = model(pipe.unet, config_unet, "default").eval()
    assert pipe.unet.peft_config["default"].r == 8 and pipe.unet.model is not None
    torch.testing.assert_close(pipe(), before, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in (pipe.text_encoder, pipe.unet):
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
    adapted = pipe()
    assert not torch.allclose(adapted, before, atol=1e-3)
    pipe.text_encoder, pipe.unet = (
        pipe.text_encoder.merge_and_unload(),
        pipe.unet.merge_and_unload(),
    )
    torch.testing.assert_close(pipe(), adapted, rtol=1e-3, atol=1e-4)
    assert list(pipe.unet.state_dict()) == keys


def test_llama_s_examples(tmp_path: Path) -> None:
    base, given = tiny("llama")
    four = LoHaConfig(r=8, alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert len(get_peft_model(base, four).get_layer_status()) == 8
    base, _ = tiny("llama")
    config = LoHaConfig(
        target_modules="all-linear", exclude_modules=["up_proj"], task_type="CAUSAL_LM"
    )
    names = {layer.name for layer in get_peft_model(base, config).get_layer_status()}
    assert len(names) == 12 and not any("up_proj" in n or "lm_head" in n for n in names)
    base, _ = tiny("llama")
    config = LoHaConfig(
        r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers",
        modules_to_save=["lm_head"], rank_pattern={r"^model.layers.1.*v_proj": 2},
        alpha_pattern={"q_proj": 12},
    )  # fmt: skip
    model = get_peft_model(base, config)
    names = [layer.name for layer in model.get_layer_status()]
    assert names == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "lm_head",
    ]
    q, v = (model.base_model.update(name, "default") for name in names[:2])
    assert (q.rank, v.rank, q.scale, v.scale) == (4, 2, 3.0, 4.0)
    model.save_pretrained(tmp_path)
    logits(model(**given)).sum().backward()


def test_the_documents_own_mistakes_are_answered() -> None:
    with pytest.raises(SurgeryError, match="alpha"):
        LoHaConfig(lora_alpha=32)
    with pytest.raises(SurgeryError, match=r"(?s)regex.*string|string.*regex"):
        get_peft_model(tiny("llama")[0], LoHaConfig(target_modules=[r".*\.q_proj$"]))


def test_the_readme_s_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    block = next(b for b in readme.split("```python\n")[1:] if "get_peft_model(base" in b).split(
        "```"
    )[0]
    monkeypatch.chdir(tmp_path)
    base, given = tiny("llama")

    class Tensors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits(self.net(x))

    exec(compile(block, "README.md", "exec"), {"base": Tensors(), "inputs": given["input_ids"]})
