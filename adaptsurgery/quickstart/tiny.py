"""A small language model, trained on the spot: it reads bytes and tells the next one.

Its text comes with every Python: English from the docstrings of the standard library, and the
standard library's code, which the model has not read, for the adapters to learn.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update
from adaptsurgery.quickstart import students

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


class Student(students.Student):
    """The tiny model, which knows English, as it learns code."""

    unit = "bits per byte"
    task = "tell the next byte of Python code"
    steps, rate = 40, 6e-3
    tuning_steps, tuning_rate = 60, 2e-3
    budget = 24_000  # of the model's 137,000

    def __init__(self, module: TinyModel, text: Tensor | None = None) -> None:
        super().__init__(module)
        self.text = code() if text is None else text

    @classmethod
    def read(cls, path: Path) -> Student:
        model = TinyModel()
        stored = read_safetensors(path).tensors
        model.load_state_dict({name: to_torch(tensor) for name, tensor in stored.items()})
        return cls(model.requires_grad_(False))

    def layers(self) -> dict[str, Layer]:
        """Every linear layer but the head, and the convolution."""
        return {
            path: Layer.from_module(module)
            for path, module in self.module.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv1d)) and path != "head"
        }

    def loss(self, generator: torch.Generator) -> Tensor:
        return loss(self.module, pieces(self.text, 16, generator))

    def measured(self, updates: Mapping[str, Update]) -> float:
        with students.adapted(self.module, updates):
            return measured(self.module, unseen_code())

    def example(self, count: int) -> tuple[Tensor, ...]:
        drawn = pieces(unseen_code(), count, torch.Generator().manual_seed(0))
        return (drawn[:, :-1].contiguous(),)


def trained(steps: int, seed: int) -> TinyModel:
    """A model that has read English for some steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyModel()
    reader = Student(model, prose())
    reader.teach(list(model.parameters()), {}, steps, seed, rate=4e-3)
    return model.requires_grad_(False)


def loss(model: nn.Module, text: Tensor) -> Tensor:
    """Bits that the model needs for each next byte."""
    logits = model(text[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def measured(model: nn.Module, text: Tensor) -> float:
    """Bits per byte over a fixed sample of a text."""
    return float(loss(model, pieces(text, 64, torch.Generator().manual_seed(0))))


def pieces(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text (count, WINDOW + 1), from random places."""
    starts = torch.randint(len(text) - WINDOW - 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(WINDOW + 1)]


# -- Text ------------------------------------------------------------------------------------------


@cache
def prose() -> Tensor:
    """The docstrings of the standard library."""
    return _encoded(
        "\n\n".join(doc for name in _PROSE for doc in _docstrings(students.source(name)))
    )


@cache
def code() -> Tensor:
    """Code of the standard library, to learn from."""
    return _encoded("\n\n".join(map(students.source, _CODE)))


@cache
def unseen_code() -> Tensor:
    """Other code of the standard library, to measure on."""
    return _encoded("\n\n".join(map(students.source, _UNSEEN_CODE)))


def _encoded(text: str) -> Tensor:
    if len(text) < 20 * WINDOW:
        raise students.no_text()
    return torch.tensor(list(text.encode("ascii", "replace")))


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (doc := ast.get_docstring(node)):
            yield doc
