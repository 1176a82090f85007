"""A small language model, trained on the spot: it reads bytes and tells the next one.

Its text comes with every Python: English from the docstrings of the standard library, and the
standard library's code, which the model has not read, for the adapters to learn.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update
from adaptsurgery_formats.errors import FileError

WIDTH, HEADS, WINDOW, BYTES = 64, 4, 64, 128
# Modules that have been in the standard library for long, with much to read.
_PROSE = """argparse calendar datetime decimal difflib doctest functools heapq inspect optparse
    pickle random statistics string textwrap threading turtle""".split()
_CODE = "dataclasses mailbox shutil subprocess tarfile zipfile".split()
_UNSEEN_CODE = "configparser fractions tempfile uuid".split()  # to measure on


class Block(nn.Module):
    """Attention to what came before, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            torch.unflatten(layer(normed), -1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(seen.transpose(1, 2).flatten(2))
        fed: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + fed


class TinyModel(nn.Module):
    """Bytes (n, t) → logits of each next byte (n, t, 128); one convolution and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 5)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        x = x + self.conv(F.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def adapted(self) -> dict[str, Layer]:
        """The layers that adapters are put on, by path: every linear but the head, and the conv."""
        return {
            path: Layer.from_module(module)
            for path, module in self.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv1d)) and path != "head"
        }


@contextmanager
def adapted(model: nn.Module, updates: Mapping[str, Update]) -> Iterator[None]:
    """The model with an update on each of some layers, as long as the block lasts."""
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in updates}
    for path, module in modules.items():
        module.forward = partial(_apply, updates[path], Layer.from_module(module))
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _apply(update: Update, layer: Layer, x: Tensor) -> Tensor:
    return update.apply(x, layer)


def trained(steps: int, seed: int) -> TinyModel:
    """A model that has read English for some steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyModel()
    teach(model, list(model.parameters()), {}, prose(), steps, seed, rate=4e-3)
    return model.requires_grad_(False)


def teach(
    model: TinyModel,
    parameters: list[Tensor],
    updates: Mapping[str, Update],
    text: Tensor,
    steps: int,
    seed: int,
    rate: float,
) -> None:
    """Train ``parameters`` (the model's own, or those of its updates) on random pieces of a text."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_pace, steps=steps))
    with adapted(model, updates):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, pieces(text, 16, generator)).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


def _pace(step: int, steps: int) -> float:
    """The learning rate's course: up over ten steps, then down to nothing."""
    return min(1.0, (step + 1) / 10) * (1 - step / steps)


def loss(model: TinyModel, text: Tensor) -> Tensor:
    """Bits that the model needs for each next byte."""
    logits = model(text[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def measured(model: TinyModel, text: Tensor, updates: Mapping[str, Update]) -> float:
    """Bits per byte over a fixed sample of a text."""
    sample = pieces(text, 64, torch.Generator().manual_seed(0))
    with adapted(model, updates):
        return float(loss(model, sample))


def pieces(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text (count, WINDOW + 1), from random places."""
    starts = torch.randint(len(text) - WINDOW - 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(WINDOW + 1)]


# -- Text ------------------------------------------------------------------------------------------


@cache
def prose() -> Tensor:
    """The docstrings of the standard library."""
    return _encoded("\n\n".join(doc for name in _PROSE for doc in _docstrings(_source(name))))


@cache
def code() -> Tensor:
    """Code of the standard library, to learn from."""
    return _encoded("\n\n".join(map(_source, _CODE)))


@cache
def unseen_code() -> Tensor:
    """Other code of the standard library, to measure on."""
    return _encoded("\n\n".join(map(_source, _UNSEEN_CODE)))


def _encoded(text: str) -> Tensor:
    if len(text) < 20 * WINDOW:
        raise FileError(
            "this Python has no sources of its standard library to learn from",
            next="--base MODEL takes a model of your own",
            code="no-text",
        )
    return torch.tensor(list(text.encode("ascii", "replace")))


def _source(name: str) -> str:
    spec = find_spec(name)
    read = getattr(spec.loader, "get_source", None) if spec else None
    return (read(name) if read else None) or ""


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (doc := ast.get_docstring(node)):
            yield doc
