"""What the layouts with dotted module paths share: LoRA under PEFT's tensor names, hybrids of them.

<module path>.lora_A.weight (r, i[, *k])   .lora_B.weight (o, r[, 1, 1])   .alpha
<module path>.lora.down.weight             .lora.up.weight                 (old diffusers)
<module path>.lora_down.weight             .lora_up.weight                 (trainers' hybrids)
"""

from __future__ import annotations

from adaptsurgery_formats import lycoris_keys
from adaptsurgery_formats.errors import LayoutError
from adaptsurgery_formats.files import Rewriting
from adaptsurgery_formats.names import Names
from adaptsurgery_formats.state import AdapterState
from adaptsurgery_formats.tensors import Tensor

SUFFIXES = lycoris_keys.SUFFIXES | {
    "lora_A.weight": ("lora", "down"),
    "lora_B.weight": ("lora", "up"),
    "lora_B.bias": ("lora", "up_bias"),
    "lora_A.default.weight": ("lora", "down"),
    "lora_B.default.weight": ("lora", "up"),
    "lora.down.weight": ("lora", "down"),
    "lora.up.weight": ("lora", "up"),
    "lora_magnitude_vector": ("", "magnitude"),
    "lora_magnitude_vector.weight": ("", "magnitude"),
}


def shaped_magnitudes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's magnitude vectors (o,) and (1, o, 1, …) in the canonical shape (o, 1, …)."""
    return {
        key: _column(tensor) if ".lora_magnitude_vector" in key else tensor
        for key, tensor in tensors.items()
    }


def _column(magnitude: Tensor) -> Tensor:
    if len(magnitude.shape) == 1:
        return magnitude.reshape(magnitude.shape[0], 1)
    return magnitude.reshape(magnitude.numel, *[1] * (len(magnitude.shape) - 1))


def read_only(state: AdapterState, names: Names | None) -> list[Rewriting]:
    raise LayoutError(
        "this layout is read but not written",
        where=state.where,
        next="--to peft, lycoris or kohya",
        code="read-only-layout",
    )
