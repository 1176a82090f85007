"""What a .pt2 may hold: tensors, names, numbers and arithmetic. All else is refused before torch reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptsurgery import SurgeryError
from adaptsurgery.checkpoint.expressions import Unsafe, check_expression, check_guard
from adaptsurgery.checkpoint.programs import check_program
from adaptsurgery.cli import run
from adaptsurgery.jobs.rewrite import read_program, rewrite

Items = dict[str, bytes]
MODEL, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).reshape(x.shape[0] // 2, -1)


@pytest.fixture(scope="module")
def good() -> Items:
    sizes = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Net(), (torch.ones(4, 6),), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archive(path: Path, items: Items | list[tuple[str, bytes]], packing: int = 0) -> Path:
    pairs = items.items() if isinstance(items, dict) else items
    with zipfile.ZipFile(path, "w", packing) as out:
        for name, data in pairs:
            out.writestr(f"m/{name}", data)
    return path


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def saved(thing: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def edited(name: str, change: Callable[[Any, str], None]) -> Callable[[Items, str], None]:
    def apply(items: Items, mark: str) -> None:
        value = json.loads(items[name])
        change(value, mark)
        items[name] = json.dumps(value).encode()

    return apply


def text(pattern: str, new: str) -> Callable[[Items, str], None]:
    """The description with one text replaced by code that leaves a mark."""

    def apply(items: Items, mark: str) -> None:
        code = json.dumps(new.replace("MARK", mark))[1:-1]
        before = items[MODEL].decode()
        items[MODEL] = re.sub(pattern, lambda m: m[1] + code + m[2], before, count=1).encode()
        assert items[MODEL].decode() != before

    return apply


def pickled_weight(items: Items, mark: str) -> None:
    config = json.loads(items[WEIGHTS])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    items[f"data/weights/{first['path_name']}"] = saved(Evil(mark))
    items[WEIGHTS] = json.dumps(config).encode()


def constant(name: str, data: Callable[[Any], bytes]) -> Callable[[Items, str], None]:
    def apply(items: Items, mark: str) -> None:
        held = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
        items[CONSTANTS] = json.dumps({"config": {"c": held}}).encode()
        items[f"data/constants/{name}"] = data(Evil(mark))

    return apply


def record(name: str, data: Callable[[Any], bytes] = saved) -> Callable[[Items, str], None]:
    def apply(items: Items, mark: str) -> None:
        items[name] = data(Evil(mark))

    return apply


def node(value: Any, _: str) -> None:
    value["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


def graph_name(value: Any, mark: str) -> None:
    name = f"x=__import__('os').system('touch {mark}')"
    graph = value["graph_module"]["graph"]
    graph["tensor_values"][name] = graph["tensor_values"].pop("x")
    graph["inputs"][-1]["as_tensor"]["name"] = name


def guard(value: Any, mark: str) -> None:
    value["guards_code"] = [f"__import__('os').system('touch {mark}') == 0"]


def default_factory(value: Any, _: str) -> None:
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}  # fmt: skip
    leaf = {"type": None, "context": None, "children_spec": []}
    tree = {"type": "collections.defaultdict", "context": context, "children_spec": [leaf]}
    value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, tree])


def enumeration(value: Any, _: str) -> None:
    keys = json.dumps([{"__enum__": True, "fqn": "antigravity:X", "name": "A"}])
    leaf = {"type": None, "context": None, "children_spec": []}
    tree = {"type": "builtins.dict", "context": keys, "children_spec": [leaf]}
    value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, tree])


def keyword_argument(value: Any, mark: str) -> None:
    names = [f"a=__import__('os').system('touch {mark}')"]
    value["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = names


def counted_symbol(value: Any, _: str) -> None:
    value["range_constraints"]["u9999999999"] = {"min_val": 0, "max_val": 5}


EXPR = r'("expr_str": ")[^"]*(")'
RUNS: dict[str, tuple[Callable[[Items, str], None], str]] = {
    "a pickled weight": (pickled_weight, "unsafe-pickle"),
    "weights of old": (record("data/weights/model.pt"), "unsafe-pickle"),
    "constants of old": (record("data/constants/model.pt"), "unsafe-pickle"),
    "sample inputs": (record(SAMPLES), "unsafe-pickle"),
    "sample inputs as a bare pickle": (record(SAMPLES, pickle.dumps), "unsafe-pickle"),
    "a pickled constant": (constant("tensor_0", saved), "unsafe-pickle"),
    "an opaque constant": (constant("opaque_obj_0", pickle.dumps), "unsafe-pickle"),
    "a custom constant": (constant("custom_obj_0", pickle.dumps), "unsafe-pickle"),
    "compiled code": (record("data/aotinductor/model/x.so", pickle.dumps), "unsafe-program"),
    "a record of no program": (record("code/x.py", pickle.dumps), "unsafe-program"),
    "a call": (text(EXPR, "__import__('os').system('touch MARK')"), "unsafe-program"),
    "an attribute": (text(EXPR, "Integer(1).__class__"), "unsafe-program"),
    "a text in a formula": (text(EXPR, "Max('__import__(\"os\").system(\"touch MARK\")')"), "unsafe-program"),
    "an operator": (edited(MODEL, node), "unsafe-program"),
    "a name": (edited(MODEL, graph_name), "unsafe-program"),
    "a guard": (edited(MODEL, guard), "unsafe-program"),
    "a default": (edited(MODEL, default_factory), "unsafe-program"),
    "an enumeration": (edited(MODEL, enumeration), "unsafe-program"),
    "a keyword": (edited(MODEL, keyword_argument), "unsafe-program"),
    "a symbol to count to": (edited(MODEL, counted_symbol), "unsafe-program"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_what_would_run_is_refused(
    kind: str, good: Items, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, code = RUNS[kind]
    items, mark = dict(good), tmp_path / "mark"
    change(items, str(mark))
    path = archive(tmp_path / "m.pt2", items)
    for call in (check_program, read_program, rewrite):
        with pytest.raises(SurgeryError) as caught:
            call(path)
        assert caught.value.code == code and "--trust" in caught.value.next
    assert run(["rewrite", str(path), "--table"]) == 1
    assert run(["rewrite", str(path), "--adapter", "x", "--dry-run"]) == 1
    assert f"error[{code}]" in capsys.readouterr().err
    assert not mark.exists() and "antigravity" not in sys.modules


def test_trust_lets_ones_own_through_and_says_so(good: Items, tmp_path: Path) -> None:
    items, mark = dict(good), tmp_path / "mark"
    constant("opaque_obj_0", pickle.dumps)(items, str(mark))
    report = rewrite(archive(tmp_path / "m.pt2", items), trust=True)
    assert mark.exists() and [note.code for note in report.notes] == ["trusted"]
    assert "unpickles" in report.notes[0].text
    assert rewrite(archive(tmp_path / "g.pt2", good)).notes == []


def test_an_archive_is_one_program(good: Items, tmp_path: Path) -> None:
    pairs = list(good.items())
    cases = {
        "a second program": [*pairs, ("models/other.json", good[MODEL])],
        "in capitals": [*pairs, ("models/MODEL.json", good[MODEL])],
        "capitals of a weight": [*pairs, ("data/weights/Weight_0", b"")],
    }
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(tmp_path / "twice.pt2", [*pairs, (MODEL, b"{}")])
    paths = [archive(tmp_path / f"{n}.pt2", items) for n, items in cases.items()]
    for path in [*paths, tmp_path / "twice.pt2"]:
        with pytest.raises(SurgeryError) as caught:
            read_program(path)
        assert caught.value.code == "ambiguous-archive", path


def test_two_lists_of_records_are_not_an_archive(good: Items, tmp_path: Path) -> None:
    """zipfile looks for the list before the end record, torch where the record points."""
    data = archive(tmp_path / "m.pt2", good).read_bytes()
    other = bytearray(data)
    at = data.index(b"PK\1\2")
    name = data.index(b"m/models/model.json", at)
    other[name : name + 19] = b"m/models/fodel.json"
    for bad in (b"PK\3\4" + data, data + b"tail", bytes(other), data[: len(data) // 2]):
        (tmp_path / "bad.pt2").write_bytes(bad)
        with pytest.raises(SurgeryError) as caught:
            read_program(tmp_path / "bad.pt2")
        assert caught.value.code == "truncated"


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("kind", ["unknown", "nodes", "fields", "deep", "empty"])
def test_padding_costs_little(kind: str, good: Items, tmp_path: Path) -> None:
    """30 MB of empty lists would be 640 MB of Python's: they are never all there."""
    before, many = good[MODEL].decode(), 10_000_000
    texts = {
        "unknown": lambda: before[:-1] + ',"x":[' + "[]," * many + "1]}",
        "nodes": lambda: before.replace('"nodes": [', '"nodes": [' + "[]," * many),
        "fields": lambda: before[:-1] + "".join(f',"k{n}":1' for n in range(100_000)) + "}",
        "deep": lambda: before[:-1] + ',"x":' + "[" * many,
        "empty": lambda: before.replace('"nodes": [', '"nodes": [' + "{}," * many),
    }
    path = archive(tmp_path / "m.pt2", {**good, MODEL: texts[kind]().encode()})
    code = (
        "import resource, sys\n"
        "from adaptsurgery.checkpoint.programs import check_program\n"
        "with open('/proc/self/statm') as f: own = int(f.read().split()[0]) * 4096\n"
        f"limit = own + {5 * path.stat().st_size + (50 << 20)}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: check_program(sys.argv[1])\n"
        "except Exception as e: print(getattr(e, 'code', type(e).__name__))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.strip() == "not-a-program", done.stderr


def test_packed_records_are_read_within_bounds(good: Items, tmp_path: Path) -> None:
    packed = archive(tmp_path / "p.pt2", good, zipfile.ZIP_DEFLATED)
    assert len(rewrite(packed).facts["sites"]) == 1
    bomb = archive(tmp_path / "b.pt2", {**good, "extra/x": bytes(60 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(SurgeryError) as caught:
        read_program(bomb)
    assert caught.value.code == "absurd-size"


@pytest.mark.parametrize("change", [
    lambda meta: meta.update(sizes=[{"as_int": 10**6}, {"as_int": 10**6}]),
    lambda meta: meta.update(sizes=[{"as_int": -6}]),
    lambda meta: meta.update(dtype=99),
    lambda meta: meta.update(sizes=[{"as_expr": {"expr_str": "s0"}}]),
], ids=["huge", "negative", "dtype", "symbol"])  # fmt: skip
def test_tensors_fit_their_records(
    change: Callable[[Any], None], good: Items, tmp_path: Path
) -> None:
    items = dict(good)
    edited(WEIGHTS, lambda v, _: change(v["config"]["fc.weight"]["tensor_meta"]))(items, "")
    with pytest.raises(SurgeryError) as caught:
        read_program(archive(tmp_path / "m.pt2", items))
    assert caught.value.code in ("absurd-size", "not-a-program")


WRITTEN = [
    "Symbol('s77', positive=True, integer=True)", "s0 + 2*s1", "Integer(-3)",
    "Add(FloorDiv(Add(Symbol('s0', integer=True), Integer(-3)), Integer(2)), Integer(1))",
    "TruncToInt(Mul(Float('1.5', precision=53), ToFloat(Symbol('s77', integer=True))))",
    "Max(Integer(1), Pow(Symbol('s0'), Integer(2)))", "StrictLessThan(Symbol('u0'), Integer(4))",
    "Piecewise(ExprCondPair(Integer(1), Equality(Symbol('s0'), Integer(2))))", "s0 >= 2", "int_oo",
]  # fmt: skip
HOSTILE = [
    "exec('1')", "(1).real", "s0.func", "Max.__init__", "[1]", "{1}", "s0[0]", "lambda: 1", "f'{1}'",
    "'a'", "Integer('1')", "Symbol('a b')", "Symbol('__x__')", "Symbol(**{})", "Lambda(s0, s0)",
    "9**9**9", "2**1000", "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "1e99999", "1" * 50,
    "Float('1e99999')", "LShift(Integer(1), Integer(99999))", "__import__", "s0; s1", "s0\n", "(" * 300,
    "Pow(Add(Symbol('s0'), Symbol('s1')), Integer(10000))", "s0 if s0 else exec", "(yield)", "x := 1",
    "abs(s0)", "-" * 5000 + "1",
]  # fmt: skip


@pytest.mark.parametrize("formula", WRITTEN)
def test_formulas_that_torch_writes(formula: str) -> None:
    check_expression(formula)


@pytest.mark.parametrize("formula", [f for f in HOSTILE if f != "s0 if s0 else exec"])
def test_formulas_that_are_more(formula: str) -> None:
    with pytest.raises(Unsafe):
        check_expression(formula)


def test_guards() -> None:
    for text in ("L['x'].size()[0] % 2 == 0", "max(1, L['a']['b c'][0].stride()[1] // 4) <= 3 and 1 < 2",
                 "L['x'].size()[0]**2 < 2**L['x'].size()[1]"):  # fmt: skip
        check_guard(text)
    for text in ("L['x'].data", "L['x'].size().__class__", "open('x')", "L['it\\'s']", "L[f()]",
                 "math.__loader__", "torch.os.system('x')", "(lambda: 1)()", "x('\"')",
                 "10**10**10 > 1", "9**9**9 == L['x'].size()[0]", "1 << (10**10)", "10**int(10**10) > 1",
                 "math.factorial(10**9) > 1", "math.comb(10**8, 10**7) > 1"):  # fmt: skip
        with pytest.raises(Unsafe):
            check_guard(text)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_full_disk_is_an_error(good: Items, tmp_path: Path) -> None:
    """torch's own writer ends the process there."""
    path, out = archive(tmp_path / "m.pt2", good), tmp_path / "o.pt2"
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["fc"]}')
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "from adaptsurgery.cli import run\n"
        f"sys.exit(run(['rewrite', {str(path)!r}, '--config', {str(config)!r}, '-o', {str(out)!r}]))"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "error[no-space]" in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "m.pt2"]


def test_a_seed_has_64_bits(good: Items, tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt2", good)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(SurgeryError) as caught:
            rewrite(path, tmp_path / "o.pt2", config=tmp_path / "c.json", seed=seed)
        assert caught.value.code == "bad-seed"
