"""Hub names: out of a cache without a network, and over HTTP from a stand-in of the Hub.

huggingface_hub reads its environment when it is imported, so every case runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_standin import SHA, Hub, lay_out_cache, serve
from safetensors.numpy import save
from unix import needs

from adaptsurgery.checkpoint.hub import choose, parse_spec, resolve
from adaptsurgery_formats.errors import FileError

CHILD = """
    import json, sys
    from adaptsurgery.checkpoint.hub import base_headers, resolve
    from adaptsurgery_formats.errors import SurgeryError
    answers = []
    for kind, spec in json.loads(sys.argv[1]):
        try:
            if kind == "headers":
                base = base_headers(spec)
                answers.append({"components": base.components, "local": base.local, "kinds": base.kinds})
                for component, modules in base.components.items():
                    try:
                        base.weight(component, next(iter(modules)))
                    except SurgeryError as error:
                        answers[-1]["weight"] = error.code
            else:
                answers.append({"path": str(resolve(spec, kind=kind))})
        except SurgeryError as error:
            answers.append(error.as_dict())
    print(json.dumps(answers))
"""


def ask(home: Path, *calls: tuple[str, str], url: str = "", offline: bool = False) -> list[Any]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    env = {
        **kept, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    env |= {"HF_ENDPOINT": url} if url else {}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), json.dumps(calls)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def tensors(**shapes: tuple[int, ...]) -> bytes:
    return save({k.replace("__", "."): np.ones(s, np.float32) for k, s in shapes.items()})


ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": tensors(base_model__model__a__lora_A__weight=(2, 4)),
    "README.md": b"hello",
    "optimizer.pt": b"x" * 1000,
}
SHARDS = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a.weight": "model-00001-of-00002.safetensors",
                        "b.weight": "model-00002-of-00002.safetensors"}}).encode(),
    "model-00001-of-00002.safetensors": tensors(a__weight=(300, 400)),
    "model-00002-of-00002.safetensors": tensors(b__weight=(500, 600)),
    "pytorch_model.bin": b"y" * 5000,
    "consolidated.safetensors": b"z" * 5000,
}  # fmt: skip
PIPELINE = {
    "model_index.json": b'{"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["t", "C"]}',
    "unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
    "unet/diffusion_pytorch_model.safetensors": tensors(down_blocks__0__q__weight=(200, 200)),
    "unet/diffusion_pytorch_model.fp16.safetensors": b"w" * 5000,
    "text_encoder/model.safetensors": tensors(text_model__fc1__weight=(3, 5)),
    "whole_pipeline.safetensors": b"v" * 5000,
}
LORAS = {"one.safetensors": tensors(a__lora_up__weight=(2, 2)), "two.safetensors": b"u"}
FOLDERS = {
    "unet/adapter_config.json": b"{}",
    "unet/adapter_model.safetensors": tensors(a__lora_A__weight=(2, 2)),
    "text_encoder/adapter_config.json": b"{}",
    "text_encoder/adapter_model.safetensors": tensors(a__lora_A__weight=(2, 2)),
}
SINGLE = {
    "pytorch_lora_weights.safetensors": tensors(unet__a__lora_A__weight=(2, 2)),
    "x.png": b"p",
}
REPOS = {
    "org/adapter": ADAPTER, "org/sharded": SHARDS, "org/pipeline": PIPELINE, "org/loras": LORAS,
    "org/folders": FOLDERS, "org/single": SINGLE, "org/gated": ADAPTER, "org/pictures": {"x.png": b"p"},
}  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    made = Hub(REPOS)
    made.gated.add("org/gated")
    with serve(made):
        yield made


def below(path: str) -> set[str]:
    root = Path(path)
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}


# -- Over HTTP -----------------------------------------------------------------------------------


@needs("fcntl")  # for the locks of the Hub's own library
def test_what_is_fetched_is_what_is_needed(tmp_path: Path, hub: Hub) -> None:
    got = ask(
        tmp_path,
        ("adapter", "org/adapter"), ("base", "org/sharded@main"), ("base", "org/pipeline"),
        ("adapter", "org/folders"), ("adapter", "org/single"), ("adapter", "org/loras:one.safetensors"),
        ("adapter", "org/adapter@v1"), ("adapter", f"org/single@{SHA}"),
        url=hub.url,
    )  # fmt: skip
    paths = [answer["path"] for answer in got]
    assert below(paths[0]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert below(paths[1]) == set(SHARDS) - {"pytorch_model.bin", "consolidated.safetensors"}
    assert below(paths[2]) == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }  # fmt: skip
    assert below(paths[3]) == set(FOLDERS)
    assert Path(paths[4]).name == "pytorch_lora_weights.safetensors"
    assert Path(paths[5]).read_bytes() == LORAS["one.safetensors"]
    assert paths[6] == paths[0] and paths[7] == paths[4]
    again = ask(tmp_path, ("adapter", "org/adapter"), ("base", "org/pipeline:unet"), offline=True)
    assert again == [{"path": paths[0]}, {"path": f"{paths[2]}/unet"}]


@needs("fcntl")  # for the locks of the Hub's own library
def test_a_folder_of_a_repository(tmp_path: Path, hub: Hub) -> None:
    got = ask(
        tmp_path,
        ("base", "org/pipeline:unet"),
        ("adapter", "org/folders:text_encoder"),
        url=hub.url,
    )
    assert below(got[0]["path"]) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert below(got[1]["path"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_refusals_say_what_to_do(tmp_path: Path, hub: Hub) -> None:
    cases = [
        (("adapter", "org/nothing"), "hub-not-found", "hf auth login"),
        (("adapter", "org/adapter@v9"), "hub-not-found", "branch"),
        (("adapter", "org/loras:on.safetensors"), "hub-not-found", "one.safetensors"),
        (("adapter", "org/folders:unett"), "hub-not-found", "`unet`"),
        (("adapter", "org/gated"), "hub-denied", "hf auth login"),
        (("adapter", "org/loras"), "ambiguous-adapter", "org/loras:one.safetensors"),
        (("adapter", "org/pictures"), "no-weights", "org/name:file"),
        (("base", "org/pictures"), "no-weights", "org/name:file"),
        (("headers", "org/nothing"), "hub-not-found", "hf auth login"),
    ]
    got = ask(tmp_path, *(call for call, _, _ in cases), url=hub.url)
    for answer, (call, code, hint) in zip(got, cases):
        assert answer.get("code") == code, (call, answer)
        assert hint in answer["next"] and answer["where"].startswith("org/"), answer


@needs("fcntl")  # for the locks of the Hub's own library
def test_headers_come_by_range_requests(tmp_path: Path, hub: Hub) -> None:
    hub.log.clear()
    got = ask(
        tmp_path,
        ("headers", "org/sharded"), ("headers", "org/pipeline"),
        ("headers", "org/pipeline:unet/diffusion_pytorch_model.safetensors"),
        url=hub.url,
    )  # fmt: skip
    sharded, pipeline, one = got
    assert sharded["components"] == {"": {"a": [300, 400], "b": [500, 600]}}
    assert sharded["kinds"] == {"": "LlamaForCausalLM"}
    assert pipeline["components"] == {
        "text_encoder": {"text_model.fc1": [3, 5]}, "unet": {"down_blocks.0.q": [200, 200]},
    }  # fmt: skip
    assert pipeline["kinds"] == {"unet": "UNet2DConditionModel"}
    assert one["components"] == {"": {"down_blocks.0.q": [200, 200]}}
    assert all(not x["local"] and x["weight"] == "names-only" for x in got)
    # huggingface_hub asks for the first 100 kB of each file, whatever its length
    assert 0 < hub.sent("00002-of-00002.safetensors") <= 100_001 < 500 * 600 * 4


def test_what_is_cached_is_not_asked_for_again(tmp_path: Path, hub: Hub) -> None:
    lay_out_cache(tmp_path, "org/sharded", SHARDS, ("main",))
    hub.log.clear()
    (answer,) = ask(tmp_path, ("headers", "org/sharded"), url=hub.url)
    assert answer["local"] and "weight" not in answer
    assert not hub.log


def test_a_half_cached_base_is_asked_for(tmp_path: Path, hub: Hub) -> None:
    half = {n: b for n, b in SHARDS.items() if n != "model-00002-of-00002.safetensors"}
    lay_out_cache(tmp_path, "org/sharded", half, ("main",))
    (answer,) = ask(tmp_path, ("headers", "org/sharded"), url=hub.url)
    assert not answer["local"] and answer["components"][""]["b"] == [500, 600]


def test_no_network(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9"  # the discard port: refused at once
    got = ask(
        tmp_path, ("adapter", "org/adapter"), ("headers", "org/sharded"),
        ("adapter", "org/loras:one.safetensors"), url=url,
    )  # fmt: skip
    assert [x["code"] for x in got] == ["hub-offline"] * 3


# -- From the cache ------------------------------------------------------------------------------


def test_offline_from_a_cache(tmp_path: Path) -> None:
    roots = {r: lay_out_cache(tmp_path, r, f, ("main", "v1")) for r, f in REPOS.items()}
    cases = [
        (("adapter", "org/adapter"), roots["org/adapter"]),
        (("adapter", "org/adapter@v1"), roots["org/adapter"]),
        (("adapter", f"org/adapter@{SHA}"), roots["org/adapter"]),
        (("adapter", "org/single"), roots["org/single"] / "pytorch_lora_weights.safetensors"),
        (("adapter", "org/loras:one.safetensors"), roots["org/loras"] / "one.safetensors"),
        (("adapter", "org/folders:unet"), roots["org/folders"] / "unet"),
        (("base", "org/sharded"), roots["org/sharded"]),
        (("base", "org/pipeline"), roots["org/pipeline"]),
    ]
    got = ask(tmp_path, *(call for call, _ in cases), offline=True)
    assert [x.get("path") for x in got] == [str(path) for _, path in cases], got
    (headers,) = ask(tmp_path, ("headers", "org/pipeline"), offline=True)
    assert headers["local"] and set(headers["components"]) == {"unet", "text_encoder"}


def test_offline_and_not_cached(tmp_path: Path) -> None:
    lay_out_cache(tmp_path, "org/adapter", ADAPTER, ("main",))
    lay_out_cache(tmp_path, "org/sharded", {"config.json": b"{}"}, ("main",))
    got = ask(
        tmp_path, ("adapter", "org/other"), ("adapter", "org/adapter@v2"), ("base", "org/sharded"),
        ("headers", "org/sharded"), ("adapter", "org/adapter:more.safetensors"),
        ("adapter", "org/adapter:unet"), ("headers", "org/other"), offline=True,
    )  # fmt: skip
    assert [x.get("code") for x in got] == ["hub-offline"] * 7, got
    assert all("hf download org/" in x["next"] for x in got)
    assert "--revision v2" in got[1]["next"]


# -- Local paths and names that are none ----------------------------------------------------------


def test_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "adapter").mkdir(parents=True)
    assert resolve("org/adapter", kind="adapter") == Path("org/adapter")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org", kind="base") == tmp_path / "org"


@pytest.mark.parametrize(
    "spec",
    ["lora.safetensor", "./lora.safetensors", "/no/such/file", "x/lora.safetensors", "a b/c", "", "org/name:"],
)  # fmt: skip
def test_neither_a_path_nor_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.safetensors.bak").write_bytes(b"")
    with pytest.raises(FileError) as e:
        resolve(spec, kind="adapter")
    assert e.value.code == "no-such-file"
    assert "org/name" in e.value.next
    assert ("lora.safetensors.bak" in e.value.next) == (
        spec in ("lora.safetensor", "./lora.safetensors")
    )


@pytest.mark.parametrize(
    "spec", ["org/name:../x.safetensors", "org/name:a/../../b", "org/name:a//b"]
)
def test_a_name_may_not_lead_out(spec: str) -> None:
    with pytest.raises(FileError) as e:
        parse_spec(spec)
    assert e.value.code == "path-escapes"


def test_spec() -> None:
    spec = parse_spec("stabilityai/sd-xl.1_0@refs/pr/3:sub/lora.safetensors")
    assert (spec.repo, spec.revision, spec.inner) == (
        "stabilityai/sd-xl.1_0", "refs/pr/3", "sub/lora.safetensors",
    )  # fmt: skip
    assert str(spec) == "stabilityai/sd-xl.1_0@refs/pr/3:sub/lora.safetensors"
    assert str(parse_spec("a/b")) == "a/b"


def test_a_pickled_adapter_is_taken_only_where_there_is_no_other() -> None:
    names = ["adapter_config.json", "adapter_model.bin"]
    assert choose(names, "adapter", "x", lambda _: {}) == names
    both = [*names, "adapter_model.safetensors"]
    assert choose(both, "adapter", "x", lambda _: {}) == [names[0], "adapter_model.safetensors"]
