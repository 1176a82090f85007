"""The house's own rules: who imports whom, what is listed where, and what the documents promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import median

import pytest

import adaptsurgery
import adaptsurgery_formats
from adaptsurgery.algorithms import ALGORITHMS, DoRA, LoraConfig
from adaptsurgery_formats import FORMATS
from adaptsurgery_formats.state import SLOTS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(adaptsurgery.__file__).parent
LEAF = Path(adaptsurgery_formats.__file__).parent

# Room → the rooms that it may import, beside itself. "formats" is adaptsurgery_formats.
MAY_IMPORT = {
    "cli": {"quickstart", "jobs", "adapters", "formats"},
    "quickstart": {"jobs", "adapters", "checkpoint", "algorithms", "core", "formats"},
    "jobs": {
        "adapters", "graph", "nearest", "checkpoint", "algorithms", "targeting", "core", "formats",
    },
    "modules": {"adapters", "checkpoint", "algorithms", "targeting", "core", "formats"},
    "adapters": {"checkpoint", "algorithms", "core", "formats"},
    "graph": {"algorithms", "targeting", "core", "formats"},
    "targeting": {"algorithms", "core", "formats"},
    "algorithms": {"nearest", "core", "formats"},
    "nearest": {"core", "formats"},
    "checkpoint": {"core", "formats"},
    "core": {"formats"},
    "formats": set(),
}  # fmt: skip
# Of the formats, the algebra may know the errors and the table of algorithms alone, and the configs
# what a config file says.
ERRORS_ONLY = ("core", "nearest", "algorithms")
LEAVES = ("adaptsurgery_formats.errors", "adaptsurgery_formats.traits")
CONFIG_FACTS = {
    "config.py": ("adaptsurgery_formats", "adaptsurgery_formats.peft_config"),
    "ia3.py": ("adaptsurgery_formats.peft",),
    "lokr.py": ("adaptsurgery_formats.lokr_cuts",),
}
# What only some systems have: it knows nothing of the house but its errors, so all may ask it.
SYSTEM = "adaptsurgery.checkpoint.system"
# Within the jobs: a folder → what of it the single files may import.
JOB_FOLDERS: dict[str, set[str]] = {
    "combining": set(),
    "merging": {"adaptsurgery.jobs.merging.adapters"},
    "extract": set(),
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top, in a function, or for the type checker."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            # "from adaptsurgery_formats import kohya" names a module as well.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> list[Path]:
    rooms = [p for p in sorted(PACKAGE.glob("*/**/*.py")) if "__pycache__" not in p.parts]
    return [*rooms, PACKAGE / "targeting.py", *sorted(LEAF.rglob("*.py"))]


def room_of_file(path: Path) -> str:
    return (
        "formats"
        if path.is_relative_to(LEAF)
        else path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    )


def room_of_import(module: str) -> str | None:
    """The room that an import leads to; None outside the house, "" for the package itself."""
    if module.split(".")[0] == "adaptsurgery_formats":
        return "formats"
    parts = module.split(".")
    if parts[0] != "adaptsurgery":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def test_every_room_is_known() -> None:
    found = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert found | {"targeting", "formats"} == MAY_IMPORT.keys()


def name_of_file(path: Path) -> str:
    root = LEAF if path.is_relative_to(LEAF) else PACKAGE
    return f"{room_of_file(path)}/{path.relative_to(root).as_posix()}"


def test_nothing_imports_upward() -> None:
    offenders = [
        f"{name_of_file(path)} imports {module}"
        for path in sources()
        for module in imports(path)
        if not _may_import(path, module)
    ]
    assert offenders == []


def test_the_arrows_in_the_documents_are_the_rule() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    section = text.partition("## Who imports whom\n")[2].partition("\n## ")[0]
    arrows = dict(re.findall(r"^    (\w+) +→ (.+)$", section, re.M))
    drawn = {room: set(to.split(", ")) - {"nothing"} for room, to in arrows.items()}
    assert drawn == MAY_IMPORT


def _may_import(path: Path, module: str) -> bool:
    room, target = room_of_file(path), room_of_import(module)
    if target is None or (module == SYSTEM and room != "formats"):
        return True
    if room in ERRORS_ONLY and target == "formats":
        return module.rpartition(".")[0] in (*LEAVES, *CONFIG_FACTS.get(path.name, ()))
    own_version = room in ("cli", "jobs") and module == "adaptsurgery.__version__"
    lazy = path.name == "__init__.py" and module == "adaptsurgery.submodules"
    return target in MAY_IMPORT[room] | {room} or own_version or lazy


def test_the_rule_tells_what_is_forbidden() -> None:
    core, job = PACKAGE / "core" / "update.py", PACKAGE / "jobs" / "convert.py"
    assert _may_import(job, "adaptsurgery.core.update.Update")
    assert not _may_import(core, "adaptsurgery.jobs.convert.convert")
    assert not _may_import(core, "adaptsurgery_formats.peft.FORMAT")
    assert not _may_import(LEAF / "peft.py", SYSTEM)
    assert not _may_import(job, "adaptsurgery.modules.layer.AdaptedLayer")


# -- What every reader counts on: no circle, no room that holds all, functions of one look ----------


def modules() -> dict[str, Path]:
    """Each module of the two packages by its dotted name."""
    named = {}
    for root in (PACKAGE, LEAF):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def edges(path: Path, known: Container[str]) -> set[str]:
    """The modules that a file imports when it runs, at its top or late; not for the checker alone."""
    unseen = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    named = set()
    for node in ast.walk(tree(path)):
        match node:
            case _ if id(node) in unseen:
                continue
            case ast.Import(names=names):
                named |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(home), names=names):
                inside = {f"{home}.{alias.name}" for alias in names}
                named |= {name if name in known else home for name in inside}
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                named |= {name} if ast.unparse(function).endswith("import_module") else set()
    return {name for name in named if name in known}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other, and the nodes that reach themselves at once (Tarjan)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for following in graph[node]:
            if following not in number:
                visit(following)
            if following in stack:
                lowest[node] = min(lowest[node], lowest[following])
        if lowest[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            groups.append(sorted(group))

    for node in graph:
        if node not in number:
            visit(node)
    return [group for group in groups if len(group) > 1 or group[0] in graph[group[0]]]


def test_circles_are_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set(), "f": {"f"}}
    assert sorted(circles(graph)) == [["a", "b", "c"], ["f"]]


def test_no_module_imports_itself_by_a_way_round() -> None:
    """Late imports are no way around it: a reader follows those too."""
    known = modules()
    graph = {name: edges(path, known) - {name} for name, path in known.items()}
    assert sum(map(len, graph.values())) > len(graph), "no imports seen"
    assert circles(graph) == []


def test_no_room_holds_more_than_its_share() -> None:
    lines: Counter[str] = Counter()
    for path in modules().values():
        home = path.relative_to(LEAF if path.is_relative_to(LEAF) else PACKAGE)
        room = "formats" if path.is_relative_to(LEAF) else home.parts[0]
        lines[room] += path.read_text("utf-8").count("\n")
    largest, size = lines.most_common(1)[0]
    assert size / lines.total() <= 0.28, f"{largest} has {size} of {lines.total()} lines"


def test_functions_are_read_in_one_look() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in modules().values()
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    )
    assert median(lengths) <= 7
    assert lengths[int(0.9 * len(lengths))] <= 21


# What stands in the module of that name alone: the calls that only some systems have, and those that
# open in text mode, in another encoding, or wait for a pipe.
SOME_SYSTEMS = set(
    "open fdopen pread preadv pwrite pwritev copy_file_range sendfile fsync fdatasync statvfs link "
    "ftruncate truncate mkfifo fork getuid fchmod fchown sysconf uname sched_getaffinity "
    "posix_fadvise posix_fallocate".split()
)
SOME_MODULES = set("fcntl resource msvcrt ctypes mmap pwd grp termios tty pty syslog".split())
READS = {"read_text", "read_bytes", "write_text", "write_bytes"}


def _of_some_systems(node: ast.AST) -> str:
    """What a piece of code uses that belongs into the one module; empty for nothing."""
    match node:
        case ast.Import(names=names) if found := {a.name for a in names} & SOME_MODULES:
            return f"imports {found}"
        case ast.ImportFrom(module=str(module)) if module in SOME_MODULES:
            return f"imports {module}"
        case ast.Attribute(value=ast.Name(id="os"), attr=name):
            return f"os.{name}" if name in SOME_SYSTEMS or name.startswith("O_") else ""
        case ast.Call(func=ast.Name(id="open")):
            return "open()"
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in READS:
            return "" if isinstance(value, ast.Name) and value.id == "system" else f".{name}()"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="shutil"), attr=name)):
            return f"shutil.{name}()" if name.startswith("copy") else ""
        case ast.Constant(value=str(text)) if text.startswith(("/proc", "/dev/")):
            return repr(text)
    return ""


def test_what_only_some_systems_have_stands_in_one_module() -> None:
    """So does every open, of inputs and of outputs; the leaf reads nothing but its own tables."""
    own = {PACKAGE / "checkpoint" / "system.py", LEAF / "names" / "tables.py"}
    uses = [
        f"{path.name}:{node.lineno} {use}"  # type: ignore[attr-defined]
        for path in (*sources(), PACKAGE / "__main__.py", PACKAGE / "__init__.py")
        if path not in own
        for node in ast.walk(tree(path))
        if (use := _of_some_systems(node))
    ]
    assert uses == []


def test_the_folders_of_jobs_stand_above_the_files() -> None:
    jobs = PACKAGE / "jobs"
    assert {p.name for p in jobs.iterdir() if any(p.glob("*.py"))} == {*JOB_FOLDERS, "options"}
    for path in sorted(jobs.rglob("*.py")):
        home = path.relative_to(jobs).parts[0]
        for folder, open_to_all in JOB_FOLDERS.items():
            prefix = f"adaptsurgery.jobs.{folder}"
            for module in imports(path):
                inside = module == prefix or module.startswith(prefix + ".")
                allowed = home == folder or module.rpartition(".")[0] in open_to_all
                assert not inside or allowed, f"{path.name} imports {module}"


def test_options_stand_below_all_jobs() -> None:
    """They are plain data, which commands read before any job is imported."""
    known = ("adaptsurgery.jobs.options", "adaptsurgery.jobs.values", "adaptsurgery_formats.traits")
    for path in sorted((PACKAGE / "jobs" / "options").glob("*.py")):
        for module in imports(path):
            ours = module.partition(".")[0] in ("adaptsurgery", "adaptsurgery_formats")
            assert not ours or module.startswith(known), f"{path.name} imports {module}"


def test_the_leaf_needs_the_standard_library_alone() -> None:
    for path in sorted(LEAF.rglob("*.py")):
        for module in imports(path):
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names or top == "adaptsurgery_formats", (
                f"{path.name} imports {module}"
            )


def test_no_peer_is_imported() -> None:
    peers = {"peft", "lycoris", "transformers", "diffusers", "onnxruntime", "library", "networks"}
    for path in sources():
        assert not peers & {m.split(".")[0] for m in imports(path)}, path.name


def test_every_algorithm_file_is_listed() -> None:
    """DoRA goes around the others; LoRA's config makes either, and so stands above both."""
    listed = {a.__module__.rpartition(".")[2] for a in (*ALGORITHMS, DoRA, LoraConfig)}
    files = {p.stem for p in (PACKAGE / "algorithms").glob("*.py")} - {"__init__"}
    assert files == listed
    assert {a.name for a in ALGORITHMS} == set(SLOTS), "the formats know other algorithms"


def test_every_format_file_is_listed() -> None:
    """A format is a file that has a FORMAT; each is in FORMATS under its own name."""
    files = {p.stem for p in LEAF.glob("*.py") if re.search(r"^FORMAT = ", p.read_text(), re.M)}
    assert files == set(FORMATS)
    assert all(name == f.name for name, f in FORMATS.items())


@pytest.mark.parametrize(
    "statement",
    [
        "import adaptsurgery",
        "import adaptsurgery_formats",
        "import adaptsurgery; adaptsurgery.convert; adaptsurgery.load; adaptsurgery.verify",
        "import adaptsurgery.cli",
    ],
)
def test_start_without_torch_or_numpy(statement: str) -> None:
    check = (
        "import sys; print([m for m in ('torch', 'numpy', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; {check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_public_names_exist() -> None:
    for name in adaptsurgery.__all__:
        assert getattr(adaptsurgery, name) is not None
    assert {*adaptsurgery.__all__} <= {*dir(adaptsurgery)}
    with pytest.raises(AttributeError):
        _ = adaptsurgery.nothing_of_that_name


def test_the_public_names_are_documented() -> None:
    """Each has a docstring of its own; all but the plain types stand in the README."""
    for name in adaptsurgery.__all__:
        assert (getattr(adaptsurgery, name).__doc__ or "").strip(), name
        assert re.search(rf"\b{name}\b", readme()), f"README.md does not name `{name}`"
    assert set(adaptsurgery.__all__) == set(adaptsurgery._HOMES)


def test_what_is_tested_is_this_tree() -> None:
    """In this process and in those that tests start, also where another copy is installed."""
    assert ROOT in PACKAGE.parents and ROOT in LEAF.parents
    code = (
        "import adaptsurgery, adaptsurgery_formats as f; print(adaptsurgery.__file__, f.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.split() == [adaptsurgery.__file__, adaptsurgery_formats.__file__]


def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def commands(text: str) -> list[str]:
    """The lines of the README's shell blocks that are typed: each begins with "$ "."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.M | re.S)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def first_screen() -> str:
    return "".join(readme().splitlines(keepends=True)[:56])


def test_the_first_screen_has_the_two_lines_that_ci_runs() -> None:
    """Each makes its environment, installs, and works; .ci/run takes them from there."""
    quick, suite = commands(first_screen())[:2]
    for line in (quick, suite):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    assert quick.endswith('".[demo]" && .venv/bin/adaptsurgery quickstart')
    assert suite.endswith('".[test,lint]" && .venv/bin/python -m pytest -n 2')
    shown = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == [quick, suite]
    assert sum("venv" in command for command in commands(readme())) == 2


def test_the_first_screen_has_a_line_for_whoever_comes() -> None:
    """A kohya file into PEFT or diffusers, LoRAs into a checkpoint, a LoKr on a model in Python."""
    screen = first_screen()
    typed = [command for command in commands(screen) if command.startswith("adaptsurgery")]
    assert {command.split()[1] for command in typed} == {
        "inspect", "convert", "merge", "verify", "unmerge", "extract",
    }  # fmt: skip
    assert "from_pretrained(pipe." in screen and "get_peft_model(vit, LoKrConfig(" in screen


def test_the_readme_shows_commands_and_options_that_exist() -> None:
    import click

    from adaptsurgery.cli.app import COMMANDS, group

    context = click.Context(group)
    shown = set()
    for command in commands(readme()):
        words = command.split()
        if words[0] != "adaptsurgery":
            continue
        shown.add(words[1])
        known = group.get_command(context, words[1])
        assert known is not None, command
        options = {o for p in known.params for o in p.opts}
        assert {w for w in words[2:] if w.startswith("-")} <= options, command
    shown |= {"quickstart"}  # which stands in a line that does more
    assert shown == set(COMMANDS)


def documents() -> list[Path]:
    folders = ("adaptsurgery", "docs", "formats", "tests", "tools")
    return [*ROOT.glob("*.md"), *(p for name in folders for p in (ROOT / name).rglob("*.md"))]


def anchors(text: str) -> set[str]:
    """What a page's headings are linked by."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", [p.relative_to(ROOT).as_posix() for p in documents()])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for link in re.findall(r"\]\(([^)]+)", path.read_text("utf-8")):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their base names, all into one room."""
    files = [p for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    names = [p.name for p in files]
    assert sorted(set(names)) == sorted(names)


def test_what_is_listed_as_slow_is_there() -> None:
    [listed] = [
        ast.literal_eval(node.value)
        for node in tree(ROOT / "tests" / "conftest.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SLOW"
    ]
    for file, functions in listed.items():
        defined = {
            n.name for n in tree(ROOT / "tests" / file).body if isinstance(n, ast.FunctionDef)
        }
        assert set(functions) <= defined, file
