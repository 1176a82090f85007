"""The term that keeps HRA's reflection planes orthogonal in training (arXiv 2405.17484, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptsurgery.algorithms import HRA
from adaptsurgery.modules.layer import AdaptedLayer
from adaptsurgery_formats.errors import ValueRefused


def orthogonality(model: nn.Module) -> Tensor:
    """Σ ‖I − UᵀU‖²_F over the active HRA adapters of a model's layers, U with unit columns.

    Add it to the loss with the paper's λ. 0 says that all planes of a layer stand apart; PEFT's
    initial value, columns in equal pairs, gives r a layer. Raises ValueRefused where no HRA is active.
    """
    terms = []
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            for name in layer.active:
                if name in layer.settings and isinstance(update := layer.update(name), HRA):
                    terms.append(_gap(update.u))
    if not terms:
        raise ValueRefused("no layer has an active HRA", next="set_adapter(…)", code="no-hra")
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def _gap(u: Tensor) -> Tensor:
    unit = u / torch.linalg.vector_norm(u, dim=0)
    one = torch.eye(unit.shape[1], dtype=u.dtype, device=u.device)
    gap: Tensor = (one - unit.t() @ unit).square().sum()
    return gap
