"""PEFT's names and shapes for an adapter's tensors in a live model.

    q_proj.lora_A.default.weight    (r, i[, *k])      q_proj.hada_w1_a.default    (o, r)
    q_proj.lora_B.default.weight    (o, r[, 1, …])    conv.lokr_w2.default        (b, d, *k)
    embed.lora_embedding_A.default  (r, vocab)        fc.hra_u.default            (i·∏k, r)

The name after the slot is the adapter's; files have the same names without it.
"""

from __future__ import annotations

from torch import Tensor, nn

from adaptsurgery_formats.peft import SUFFIXES

_EMBEDDING = "lora_embedding_"


def suffixes(algorithm: str, embedding: bool) -> dict[str, str]:
    """Slot → PEFT's suffix for it in a state dict, without the adapter's name."""
    names: dict[str, str] = {}
    for suffix, (owner, slot) in SUFFIXES.items():
        plain = slot in ("up", "down") and suffix.startswith(_EMBEDDING) != embedding
        if owner == algorithm and not plain:
            names[slot] = suffix  # of the two spellings of a magnitude, the one in a model is last
    return names


def as_peft(slot: str, tensor: Tensor, dims: int) -> Tensor:
    """A slot's tensor in the shape that PEFT keeps it in, for a layer with ``dims`` kernel dims."""
    if slot == "magnitude":
        return tensor.reshape(1, -1, *(1,) * dims) if dims else tensor.flatten()
    return tensor.unsqueeze(-1) if _lengthened(slot, dims) else tensor


def as_slot(slot: str, tensor: Tensor, dims: int) -> Tensor:
    """The inverse of ``as_peft``: a magnitude (o, 1, …), a Conv1d's Tucker core (r, r, k)."""
    if slot == "magnitude":
        return tensor.reshape(-1, *(1,) * (dims + 1))
    return tensor.squeeze(-1) if _lengthened(slot, dims) else tensor


def _lengthened(slot: str, dims: int) -> bool:
    """PEFT writes a Conv1d's Tucker cores (r, r, k, 1)."""
    return dims == 1 and slot in ("t1", "t2")


class Bank(nn.Module):
    """What a layer holds of one slot, by adapter: ``hada_w1_a.<adapter>``, ``lora_A.<adapter>.weight``.

    Plain parameters of plain modules, so that DataParallel's replicas have them too.
    """


def put(layer: nn.Module, suffix: str, adapter: str, tensor: Tensor) -> None:
    """Register a tensor of ``adapter`` in ``layer`` under PEFT's suffix."""
    bank, _, leaf = suffix.partition(".")
    home = _child(layer, bank)
    home = _child(home, adapter) if leaf else home
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    home._parameters[leaf or adapter] = parameter  # its name was checked


def place(layer: nn.Module, suffix: str, adapter: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor of ``adapter`` under PEFT's suffix, and its name there."""
    bank, _, leaf = suffix.partition(".")
    home = layer._modules[bank]
    assert home is not None
    holder = home._modules[adapter] if leaf else home
    assert holder is not None
    return holder, leaf or adapter


def take(layer: nn.Module, suffix: str, adapter: str) -> Tensor:
    """The tensor of ``adapter`` under PEFT's suffix."""
    return own_parameter(*place(layer, suffix, adapter))


def drop(layer: nn.Module, suffix: str, adapter: str) -> None:
    """Take a tensor away, and the bank with its last one."""
    bank, _, leaf = suffix.partition(".")
    home = layer._modules[bank] if bank in layer._modules else None
    if home is None:
        return
    held = home._modules if leaf else home._parameters
    held.pop(adapter, None)
    if not held:
        del layer._modules[bank]


def _child(module: nn.Module, name: str) -> nn.Module:
    if name not in module._modules:
        module._modules[name] = Bank()
    child = module._modules[name]
    assert child is not None
    return child


def own_parameter(module: nn.Module, name: str) -> Tensor:
    """A module's parameter itself, where a symbolic trace would give its proxy for the attribute."""
    held = module._parameters.get(name)
    tensor = getattr(module, name) if held is None else held
    assert isinstance(tensor, Tensor)
    return tensor
