"""Sites are found with the names that named_modules() has, all that were called, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from strategies import Conv1D
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import symbolic_trace

from adaptsurgery import graph
from adaptsurgery.algorithms.lora import LoRA
from adaptsurgery.algorithms.lora_config import LoraConfig
from adaptsurgery.core.geometry import Layer
from adaptsurgery.graph.find import FAST_PATH, find_sites
from adaptsurgery.graph.sites import Site
from adaptsurgery_formats.errors import ValueRefused

KINDS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d", nn.Linear: "linear"}
# Linear maps by parameters of modules that are no Linear: named by their owner.
FUNCTIONS = {
    "mixtral": {"model.layers.0.mlp.gate"},
    "encoder": {f"encoder.layers.0.self_attn{end}" for end in ("", ".out_proj")},
    "attention": {"attn", "attn.out_proj"},
}

# Several matrices in one parameter: listed, and no place for an adapter.
STACKED = {"mixtral": {"model.layers.0.mlp.experts"}}


def called(model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Path → kind, canonical shape and number of calls, as hooks on the live modules see them."""
    seen: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def note(path: str, module: nn.Module) -> Any:
        turned = type(module).__name__ == "Conv1D"
        kind = "linear" if turned else KINDS[next(k for k in KINDS if isinstance(module, k))]
        shape = tuple(module.weight.t().shape if turned else module.weight.shape)

        def hook(*_: Any) -> None:
            seen[path] = (kind, shape, seen.get(path, ("", (), 0))[2] + 1)

        return module.register_forward_hook(hook)

    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, tuple(KINDS)) or type(module).__name__ == "Conv1D"
    ]
    hooks = [note(path, module) for path, module in layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def table(sites: list[Site]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    assert len({site.path for site in sites}) == len(sites)
    return {site.path: (site.kind, site.shape, len(site.calls)) for site in sites}


def rows(sites: list[Site]) -> list[tuple[Any, ...]]:
    return [(s.path, s.kind, s.shape, len(s.calls), s.weight, s.bias, s.reason) for s in sites]


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_called_layer_of_the_zoo_is_found(name: str) -> None:
    found = zoo.entry(name)
    listed = find_sites(zoo.program(name))
    functions = FUNCTIONS.get(name, set())
    sites = [site for site in listed if site.adaptable]
    assert {site.path for site in listed if site.reason} == STACKED.get(name, set())
    got = table(sites)
    assert {p: v for p, v in got.items() if p not in functions} == called(found.model, found.inputs)
    assert functions <= got.keys() <= dict(found.model.named_modules()).keys()
    names = dict(found.model.state_dict(keep_vars=True))
    for site in sites:
        if site.weight:
            stored = tuple(names[site.weight].shape)
            assert site.shape == (stored[::-1] if site.transposed else stored)
            assert not site.bias or names[site.bias].shape == site.shape[:1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.MODELS if n not in ("sdxl", "flux", "vae")])
def test_the_same_sites_in_a_module_and_in_a_decomposed_program(name: str) -> None:
    program = zoo.program(name)
    wanted = rows(find_sites(program))
    assert rows(find_sites(program.module())) == wanted
    assert rows(find_sites(program.run_decompositions())) == wanted


def program_of(
    model: nn.Module, *inputs: Tensor, strict: bool = False, open_: bool = True
) -> ExportedProgram:
    sizes = tuple({0: Dim.AUTO} if open_ else None for _ in inputs)
    return export(model.eval(), inputs, dynamic_shapes=sizes, strict=strict)


def one(sites: list[Site], path: str) -> Site:
    return next(site for site in sites if site.path == path)


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lm_head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.emb(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_tied_head_is_named_by_its_module(strict: bool) -> None:
    program = program_of(Tied(), torch.randint(0, 11, (2, 5)), strict=strict)
    for g in (program, program.module(), program.run_decompositions()):
        (site,) = find_sites(g)
        assert (site.path, site.kind, site.shares) == ("lm_head", "linear", ("emb",))
        assert site.weight in ("emb.weight", "lm_head.weight")


class TwoNames(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=bias)
        self.b = self.a
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=bias)] * 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.b(x))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_module_under_two_names_is_one_site(strict: bool, bias: bool) -> None:
    """A strict trace calls both uses `b`, and without a bias nothing tells that `a` is no embedding."""
    program = program_of(TwoNames(bias), torch.randn(2, 8), strict=strict)
    first, other = ("b", "a") if strict and not bias else ("a", "b")
    got = find_sites(program)
    assert [(s.path, len(s.calls), s.aliases, s.shares) for s in got] == [
        (first, 2, (other,), ()),
        ("blocks.0", 3, ("blocks.1", "blocks.2"), ()),
    ]
    assert [len(s.calls) for s in find_sites(program.module())] == [2, 3]


class TwoModules(nn.Module):
    def __init__(self, first: bool = True, second: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=first), nn.Linear(8, 8, bias=second)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("strict", [False, True])
def test_two_modules_of_one_weight_are_two_sites(strict: bool) -> None:
    sites = find_sites(program_of(TwoModules(), torch.randn(2, 8), strict=strict))
    assert [(s.path, s.shares) for s in sites] == [("a", ("b",)), ("b", ("a",))]


@pytest.mark.parametrize("how", [False, True, "symbolic"])
def test_of_two_modules_of_one_weight_only_one_has_a_bias(how: Any) -> None:
    model, x = TwoModules(second=False).eval(), torch.randn(2, 3, 8)
    g: Any = symbolic_trace(model) if how == "symbolic" else program_of(model, x, strict=how)
    graphs = [g] if how == "symbolic" else [g, g.module(), g.run_decompositions()]
    for one_of in graphs:
        got = [(s.path, s.bias, s.shares) for s in find_sites(one_of)]
        assert got == [("a", "a.bias", ("b",)), ("b", "", ("a",))]


def lora(shape: tuple[int, int], seed: int) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    o, i = shape
    return LoRA(torch.randn(o, 2, generator=generator), torch.randn(2, i, generator=generator))


@pytest.mark.parametrize("kind", ["strict", "symbolic"])
def test_of_two_modules_of_one_weight_the_one_that_is_named_is_adapted(kind: str) -> None:
    model, x = TwoModules(False, False).eval(), torch.randn(2, 8)
    g: Any = symbolic_trace(model) if kind == "symbolic" else program_of(model, x, strict=True)
    assert [(s.path, s.names) for s in find_sites(g)] == [("a", ()), ("b", ())]
    update = lora((8, 8), 1)
    h = graph.attach(g, {"b": update})
    got = (h if kind == "symbolic" else h.module())(x)
    hidden = model.a(x).relu()
    torch.testing.assert_close(got, update.apply(hidden, Layer.from_module(model.b)))
    merged = graph.merge(h)
    torch.testing.assert_close((merged if kind == "symbolic" else merged.module())(x), got)


def test_where_nothing_tells_two_modules_from_one_an_adapter_for_a_part_is_refused() -> None:
    """Without a bias, in a non-strict trace: all of the names, or a strict trace."""
    model, x = TwoModules(False, False).eval(), torch.randn(2, 8)
    program = program_of(model, x)
    (site,) = find_sites(program)
    assert (site.path, site.names, len(site.calls)) == ("a", ("a", "b"), 2)
    one_for_both = lora((8, 8), 1)
    for given in (
        {"a": one_for_both},
        {"b": one_for_both},
        {"a": one_for_both, "b": lora((8, 8), 2)},
    ):
        with pytest.raises(ValueRefused, match=r"`a`, `b` are one module or several") as caught:
            graph.attach(program, given)
        assert caught.value.code == "untold-modules" and "strict=True" in caught.value.next
    for config in (
        LoraConfig(r=2, target_modules=["a"]),
        LoraConfig(r=2, target_modules=["b"]),
        LoraConfig(r=2, target_modules=["a", "b"], rank_pattern={"b": 3}),
    ):
        with pytest.raises(ValueRefused, match=r"one module or several.*strict=True") as caught:
            graph.attach(program, config)
        assert caught.value.code == "unsupported-site"
    hidden = one_for_both.apply(x, Layer.from_module(model.a)).relu()
    wanted = one_for_both.apply(hidden, Layer.from_module(model.b))
    both = graph.attach(program, {"a": one_for_both, "b": one_for_both})
    torch.testing.assert_close(both.module()(x), wanted)
    assert len(graph.plan(program, LoraConfig(r=2, target_modules=["a", "b"])).placed) == 1


class Experts(nn.Module):
    """A matrix for each expert, all in one parameter."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stack = how, nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "bmm":
            return torch.bmm(x.expand(3, -1, -1), self.stack).sum(0)
        if self.how == "turned":
            return torch.matmul(x.expand(3, -1, -1), self.stack.transpose(-1, -2)).sum(0)
        if self.how == "einsum":
            return torch.einsum("ni,eoi->no", x, self.stack)
        if self.how == "apart":
            return sum((F.linear(x, w) for w in self.stack), x)
        ends = torch.tensor([1, 1, 2], dtype=torch.int32)
        grouped = F.grouped_mm(x.bfloat16(), self.stack.bfloat16(), offs=ends)
        return grouped.float()


class Mixture(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.experts, self.out = Experts(how), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts(x))


@pytest.mark.parametrize("how", ["bmm", "turned", "einsum", "apart", "grouped"])
def test_stacked_experts_are_listed_with_a_reason(how: str) -> None:
    program = program_of(Mixture(how), torch.randn(2, 8), open_=False)
    for g in (program, program.module(), program.run_decompositions()):
        *experts, out = find_sites(g)
        assert out.path == "out" and out.adaptable
        assert experts and {site.path for site in experts} == {"experts"}
        assert all("`experts.stack`" in site.reason for site in experts)
        with pytest.raises(ValueRefused, match=r"experts\.stack") as caught:
            graph.attach(g, LoraConfig(r=2, target_modules=["experts", "out"]))
        assert caught.value.code == "unsupported-site"
    linear = graph.plan(program, LoraConfig(r=2, target_modules="all-linear"))
    assert [site.path for site in linear.sites] == ["out"]


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.out = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("ni,io->no", x, self.kernel))


def test_an_einsum_with_a_parameter_is_no_silence() -> None:
    site, out = find_sites(program_of(Summed(), torch.randn(2, 8)))
    assert (site.path, site.shape, out.path) == ("", (8, 8), "out")
    assert "`kernel` goes into `einsum`" in site.reason


def test_albert_has_one_site_a_layer_however_often_it_is_called() -> None:
    sites = [s for s in find_sites(zoo.program("albert")) if "albert_layer_groups" in s.path]
    assert len(sites) == 6 and {len(site.calls) for site in sites} == {2}


class Attention(nn.Module):
    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.attn, self.cross = nn.MultiheadAttention(8, 2, batch_first=True), cross

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x * 2 if self.cross else x, x, need_weights=False)[0]


@pytest.fixture
def no_fast_path() -> Any:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("no_fast_path")
def test_multihead_attention_in_proj_and_out_proj() -> None:
    program = program_of(Attention(False), torch.randn(2, 5, 8))
    for g in (program, program.module(), program.run_decompositions()):
        sites = find_sites(g)
        assert [(s.path, s.shape, s.weight, s.bias, s.reason) for s in sites] == [
            ("attn", (24, 8), "attn.in_proj_weight", "attn.in_proj_bias", ""),
            ("attn.out_proj", (8, 8), "attn.out_proj.weight", "attn.out_proj.bias", ""),
        ]


@pytest.mark.usefixtures("no_fast_path")
def test_parts_of_an_in_proj_are_refused_by_name() -> None:
    sites = find_sites(program_of(Attention(True), torch.randn(2, 5, 8)))
    assert "part of `attn.in_proj_weight`" in one(sites, "attn").reason
    assert one(sites, "attn.out_proj").adaptable


def test_fused_encoder_layers_are_refused_with_the_remedy() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with torch.no_grad():
        sites = find_sites(program_of(model, torch.randn(2, 3, 8), strict=True, open_=False))
    assert [s.path for s in sites[:4]] == [
        "layers.0.self_attn",
        "layers.0.self_attn.out_proj",
        "layers.0.linear1",
        "layers.0.linear2",
    ]
    assert all(
        FAST_PATH in s.reason and "_transformer_encoder_layer_fwd" in s.reason for s in sites
    )


class Nested(nn.Module):
    """A layer in no_grad, in autocast, and in both branches of a cond."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.b(x)
        x = self.a(x.float())
        return torch.cond(
            x.sum() > 0, lambda x: self.c(x), lambda x: self.b(self.c(x)), (x,)
        )  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
def test_layers_in_no_grad_autocast_and_cond(strict: bool) -> None:
    program = program_of(Nested(), torch.randn(2, 8), strict=strict)
    for g in (program, program.module()):
        sites = find_sites(g)
        assert [(s.path, s.reason) for s in sites] == [("a", ""), ("b", ""), ("c", "")]
        assert [len(s.calls) for s in sites] == [2, 2, 2]
        a, b, c = sites
        assert [len(call.graph) for call in a.calls] == [1, 0]
        assert [len(call.graph) for call in (*b.calls, *c.calls)] == [1, 1, 1, 1]
        assert [s.weight for s in sites] == ["a.weight", "b.weight", "c.weight"]
        assert all(len(call.graph) == len(call.hops) for s in sites for call in s.calls)


class Int8(nn.Module):
    """Weight-only int8: the scales come after the product."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-99, 99, (6, 8), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scales


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.fc = Int8(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.q(self.q(torch.cat([x, x], -1)).repeat(1, 1, 2)[..., :8]).tanh())


def test_int8_weights_are_found_by_their_modules_boundary() -> None:
    program = program_of(Quantised(), torch.randn(2, 3, 4))
    for g in (program, program.module(), program.run_decompositions()):
        q = one(find_sites(g), "q")
        assert (q.kind, q.shape, q.weight, q.reason, len(q.calls)) == ("linear", (6, 8), "", "", 2)
        nodes = {n.name: n for n in (g if isinstance(g, torch.fx.GraphModule) else g.graph_module).graph.nodes}  # fmt: skip
        for call in q.calls:
            assert "mul" in str(nodes[call.output].target), "the scales are outside"
            assert not call.weight


class Ambiguous(nn.Module):
    """An int8 layer of two inputs: the boundary does not tell which is the layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.q = TwoInputs()

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.q(x, gate)


class TwoInputs(Int8):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


def test_an_ambiguous_boundary_is_refused_by_its_nodes() -> None:
    (site,) = find_sites(program_of(Ambiguous(), torch.randn(2, 8), torch.randn(2, 6)))
    assert site.path == "q" and "ambiguous: inputs `x`, `gate`" in site.reason


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2))
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).transpose(1, 2))


def test_weight_norm_shows_its_computed_weight() -> None:
    program = program_of(Norms(), torch.randn(2, 4, 7))
    for g in (program, program.module(), program.run_decompositions()):
        conv, fc = find_sites(g)
        assert (conv.path, conv.shape, conv.groups, conv.weight) == ("conv", (6, 2, 3), 2, "")
        assert (fc.path, fc.shape, fc.weight, fc.bias) == ("fc", (6, 6), "", "fc.bias")
        assert not conv.reason and not fc.reason
        assert all(call.weight for site in (conv, fc) for call in site.calls)


CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "dilated": (nn.Conv2d(4, 6, (3, 2), dilation=(2, 3)), (2, 4, 9, 9)),
    "asymmetric": (nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0)), (2, 4, 7, 7)),
    "pointwise": (nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    "same": (nn.Conv1d(4, 6, 4, padding="same", dilation=2), (2, 4, 9)),
    "valid": (nn.Conv3d(4, 6, (1, 2, 3), padding="valid"), (2, 4, 4, 4, 4)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "reflect": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 5)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("how", ["program", "decomposed", "symbolic"])
def test_convolutions_of_every_setting(name: str, how: str) -> None:
    """The site's own geometry, over what the graph has at its input, is the module's output."""
    conv, shape = CONVS[name]
    model, x = nn.Sequential(nn.Identity(), conv).eval(), torch.randn(shape)
    if how == "symbolic":
        g: Any = torch.fx.symbolic_trace(model)
    else:
        g = program_of(model, x)
        g = g.run_decompositions() if how == "decomposed" else g
    (site,) = find_sites(g)
    assert (site.path, site.shape, site.weight) == ("1", tuple(conv.weight.shape), "1.weight")
    assert site.groups == conv.groups and site.bias == "1.bias"
    runner = torch.fx.Interpreter(g) if how == "symbolic" else None
    if runner is None:
        values = recorded(g, x)
    else:
        runner.garbage_collect_values = False
        runner.run(x)
        values = {node.name: value for node, value in runner.env.items()}
    (call,) = site.calls
    got = site.layer(conv.weight, conv.bias).forward(values[call.input])
    torch.testing.assert_close(got, values[call.output])


def recorded(program: ExportedProgram, x: Tensor) -> dict[str, Any]:
    """What every node of a program gives for an input."""
    runner = torch.fx.Interpreter(program.graph_module)
    runner.garbage_collect_values = False
    lifted = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
    }
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    runner.run(*[program.state_dict[lifted[n]] if n in lifted else x for n in names])
    return {node.name: value for node, value in runner.env.items()}


class Scaled(nn.Linear):
    """A subclass, which a symbolic trace goes through."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 0.5


class Symbolic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.sub, self.gpt = nn.Linear(8, 8), Scaled(8, 8), Conv1D(6, 8)
        self.attn = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gpt(self.sub(self.fc(self.fc(x))))
        return self.attn(x, x, x)[0]


def test_a_symbolic_trace() -> None:
    sites = find_sites(torch.fx.symbolic_trace(Symbolic()))
    assert [(s.path, s.kind, s.transposed, len(s.calls)) for s in sites] == [
        ("fc", "linear", False, 2),
        ("sub", "linear", False, 1),
        ("gpt", "linear", True, 1),
        ("attn.out_proj", "linear", False, 1),
    ]
    assert "which the trace left whole: use torch.export" in sites[3].reason
    assert not any(s.reason for s in sites[:3])


class Functions(nn.Module):
    """Products that are no layer: of two activations, and with a vector of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freq", torch.rand(4))
        self.fc, self.up = nn.Linear(8, 8), nn.ConvTranspose2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        angle = self.freq[None, :, None].expand(x.shape[0], -1, 1) @ x[:, None, :, 0]
        scores = self.fc(x) @ x.transpose(1, 2)
        return self.up((scores + angle.sum())[:, None].expand(-1, 2, -1, -1))


def test_products_of_activations_are_no_sites() -> None:
    program = program_of(Functions(), torch.randn(2, 5, 8))
    for g in (program, program.module(), program.run_decompositions()):
        assert [site.path for site in find_sites(g)] == ["fc"]


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[1:]:
            x = layer(x)
        return x


@pytest.mark.parametrize("strict", [False, True])
def test_layers_of_a_sliced_list_keep_their_names(strict: bool) -> None:
    program = program_of(Sliced(), torch.randn(2, 8), strict=strict)
    assert [site.path for site in find_sites(program)] == ["layers.1", "layers.2"]


def test_a_loaded_program_has_the_same_sites(tmp_path: Any) -> None:
    program = program_of(Nested(), torch.randn(2, 8))
    torch.export.save(program, tmp_path / "model.pt2")
    assert find_sites(torch.export.load(tmp_path / "model.pt2")) == find_sites(program)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(ValueRefused, match=r"Linear is not a graph .*\n.*ExportedProgram"):
        find_sites(nn.Linear(2, 2))  # type: ignore[arg-type]
