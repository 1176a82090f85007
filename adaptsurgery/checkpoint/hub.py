"""Names on the Hugging Face Hub turned into local paths, or into headers alone.

A spec is a local path, which always wins, or ``org/name[@revision][:file or folder]``::

    org/name                        the whole adapter or model at main
    org/name@v1.0                   at a branch, tag or commit
    org/name:lora.safetensors       one file
    org/name:unet                   one folder

Only what is needed is fetched. HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they
mean to huggingface_hub.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from adaptsurgery.checkpoint.base import (
    STEMS,
    Base,
    BaseFile,
    assemble,
    find_weights,
    parse_index,
    read_base,
    read_json,
)
from adaptsurgery.checkpoint.failures import missing_file
from adaptsurgery.checkpoint.system import local_path
from adaptsurgery_formats.errors import FileError, nearest
from adaptsurgery_formats.paths import check_name, misnamed
from adaptsurgery_formats.tensors import Tensor

RepoKind = Literal["adapter", "base"]
_T = TypeVar("_T")

# stabilityai/stable-diffusion-xl-base-1.0@main:unet
_SPEC = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<inner>[^:\s][^:]*))?"
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SMALL = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Spec:
    """``org/name[@revision][:inner]``, taken apart."""

    repo: str
    revision: str | None
    inner: str

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{at}" + (f":{self.inner}" if self.inner else "")


def resolve(spec: str, *, kind: RepoKind) -> Path:
    """The local path of what a spec names, fetched from the Hub if it is not a local path.

    Raises FileError: ``no-such-file`` (neither a path nor a Hub name), ``hub-offline``,
    ``hub-not-found``, ``hub-denied``, ``path-escapes``, ``ambiguous-adapter``, ``no-weights``.
    """
    if (local := local_path(spec)) is not None:
        return Path(local)
    named = parse_spec(spec)
    one_file = PurePosixPath(named.inner).suffix in (*_WEIGHTS, *_SMALL)
    try:
        names = _remote_names(named)
    except FileError as error:
        if error.code != "hub-offline":
            raise
        return _from_cache(named, kind, one_file, error)
    if one_file and named.inner in names:
        return _fetch_file(named)
    names = _inside(names, named)
    if not names:
        raise _nothing_inside(named)
    wanted = choose(names, kind, str(named), lambda name: _fetch_json(named, name))
    root = _fetch(named, [_join(named.inner, name) for name in wanted])
    return _settle(root, named, kind, wanted)


def base_headers(spec: str) -> Base:
    """A base model by its headers: read from disk if it is there, else by range requests.

    A base that is not on disk is not downloaded: its shapes and names are there, its weights refuse
    with FileError ``names-only``. Raises as ``resolve`` and ``read_base`` do.
    """
    if (local := local_path(spec)) is not None:
        return read_base(local)
    named = parse_spec(spec)
    if cached := _cached_base(named):
        return cached
    return _remote_base(named)


def parse_spec(spec: str) -> Spec:
    """A Hub name taken apart; raises FileError ``no-such-file``, ``path-escapes``, ``bad-name``."""
    match = _SPEC.fullmatch(spec)
    if not match or (not match["inner"] and spec.endswith(_WEIGHTS)):
        error = missing_file(os.path.expanduser(spec))
        also = "a model on the Hub is named org/name[@revision][:file]"
        raise FileError(
            error.what,
            where=spec,
            next=f"{error.next}; {also}" if error.next else also,
            code=error.code,
        )
    inner = (match["inner"] or "").strip("/")
    for part in inner.split("/") if inner else ():
        check_name(part, spec)
    _check_revision(match["revision"], spec)
    return Spec(match["repo"], match["revision"], inner)


def _check_revision(revision: str | None, where: str) -> None:
    """A branch may have slashes in its name, which is a path in the cache: raise as ``parse_spec``."""
    for part in revision.split("/") if revision else ():
        check_name(part, where)
        if why := misnamed(part):
            raise FileError(
                f"the Hub has no revision of this name: {why}",
                where=where,
                seen=repr(part),
                next="name a branch, a tag or a full commit hash",
                code="bad-name",
            )


# -- What to fetch ---------------------------------------------------------------------------------


def choose(
    names: Iterable[str], kind: RepoKind, where: str, load: Callable[[str], dict[str, Any]]
) -> list[str]:
    """The file names to fetch among a repository's, at the top and one folder down.

    ``load`` gives a JSON file's content by name. Raises FileError ``no-weights`` or
    ``ambiguous-adapter``.
    """
    names = [n for n in names if n.count("/") <= 1 and not n.startswith(".")]
    wanted = _adapter_files(names, where) if kind == "adapter" else _base_files(names, where, load)
    if not wanted:
        what = "an adapter" if kind == "adapter" else "a model"
        raise FileError(
            f"the repository holds no weights of {what}",
            where=where,
            seen=", ".join(sorted(names)[:8]) or "no files",
            next="name a file in it: org/name:file",
            code="no-weights",
        )
    return wanted


def _adapter_files(names: list[str], where: str) -> list[str]:
    weights = [n for n in names if n.endswith(".safetensors") and not _is_base_weight(n)]
    safe_folders = {PurePosixPath(n).parent for n in weights}
    weights += [
        n
        for n in names
        if PurePosixPath(n).name == "adapter_model.bin"
        and PurePosixPath(n).parent not in safe_folders
    ]
    top = [n for n in weights if "/" not in n]
    if "adapter_config.json" in names:
        top = [n for n in top if n.startswith("adapter_model.")] or top
        weights = top
    elif len(top) > 1:
        raise FileError(
            "the repository holds several adapters",
            where=where,
            seen=", ".join(sorted(top)[:8]),
            next=f"name one: {where}:{sorted(top)[0]}",
            code="ambiguous-adapter",
        )
    elif top:
        weights = top
    places = {PurePosixPath(n).parent.as_posix() for n in weights}
    configs = [
        n
        for n in names
        if PurePosixPath(n).name == "adapter_config.json"
        and PurePosixPath(n).parent.as_posix() in places
    ]
    return sorted({*weights, *configs}) if weights else []


def _is_base_weight(name: str) -> bool:
    """model-00001-of-00002.safetensors, unet/diffusion_pytorch_model.fp16.safetensors: no adapter."""
    return bool(re.match(r"({})[.-]".format("|".join(STEMS)), PurePosixPath(name).name))


def _base_files(names: list[str], where: str, load: Callable[[str], dict[str, Any]]) -> list[str]:
    folders = [""]
    if "model_index.json" in names:
        folders = [c for c, v in load("model_index.json").items() if isinstance(v, list)]
    wanted: set[str] = set()
    for folder in folders:
        here = [n.removeprefix(f"{folder}/") for n in names if _parent(n) == folder]
        weights = find_weights(here, where)
        if not weights:
            continue
        wanted.add(_join(folder, weights))
        if weights.endswith(".json"):
            index = parse_index(load(_join(folder, weights)), Path(where) / folder / weights)
            wanted.update(_join(folder, shard) for shard in index)
        wanted.update(_join(folder, n) for n in here if n.endswith(_SMALL) and "index" not in n)
    if wanted and "model_index.json" in names:
        wanted.update(n for n in names if n.endswith(_SMALL))
    return sorted(wanted)


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _inside(names: Iterable[str], spec: Spec) -> list[str]:
    """Names relative to the folder that the spec names."""
    if not spec.inner:
        return list(names)
    start = spec.inner + "/"
    return [n.removeprefix(start) for n in names if n.startswith(start)]


def _settle(root: Path, spec: Spec, kind: RepoKind, names: list[str]) -> Path:
    """The path to hand on: the folder, or the one file where an adapter is just a file."""
    folder = root / spec.inner if spec.inner else root
    if kind == "adapter":
        wanted = choose(names, kind, str(spec), lambda _: {})
        if len(wanted) == 1 and "/" not in wanted[0]:
            return folder / wanted[0]
        return folder
    if not any(n.endswith(_WEIGHTS) for n in names):
        raise _not_cached(spec, "none of its weights are in the cache")
    return folder


# -- The cache -------------------------------------------------------------------------------------


def _cached_root(spec: Spec) -> Path | None:
    """The snapshot of a spec in the local cache, as far as it was downloaded, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            spec.repo, revision=spec.revision, local_files_only=True, allow_patterns=["-"]
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    except OSError as error:
        raise _hub_error("the cache cannot be read", spec, error, "", "hub-failed") from error
    return Path(folder)


def cached_path(spec: str) -> Path | None:
    """What the local cache has of a name; None for what is no name on the Hub, or not there."""
    try:
        named = parse_spec(spec)
        root = _cached_root(named)
    except FileError:
        return None
    return root / named.inner if root is not None else None


def _from_cache(spec: Spec, kind: RepoKind, one_file: bool, error: FileError) -> Path:
    """What the cache has of a spec; raises the network's error where it has nothing."""
    root = _cached_root(spec)
    if root is None or not os.path.exists(root / spec.inner):
        raise error
    if one_file:
        return root / spec.inner
    return _settle(root, spec, kind, list(_names_below(root / spec.inner)))


def _names_below(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root):
        for name in files:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _cached_base(spec: Spec) -> Base | None:
    """The base in the cache, if all of it is there."""
    root = _cached_root(spec)
    if root is None or not os.path.lexists(root / spec.inner):
        return None
    try:
        return read_base(root / spec.inner)
    except FileError as error:
        if error.code in ("no-weights", "missing-shard", "no-such-file"):
            return None
        raise


# -- The network -----------------------------------------------------------------------------------


def _remote_base(spec: Spec) -> Base:
    """A base by the headers of its files, fetched by range requests."""
    if spec.inner.endswith(".safetensors"):
        return assemble(str(spec), [_remote_header(spec, spec.inner, "")], local=False)
    names = _inside(_remote_names(spec), spec)
    if not names:
        raise _nothing_inside(spec)

    def load(name: str) -> dict[str, Any]:
        return _fetch_json(spec, name)

    wanted = choose(names, "base", str(spec), load)
    pickled = [n for n in wanted if n.endswith(_WEIGHTS[1:])]
    if pickled:
        raise FileError(
            "only the names in safetensors files can be read without a download",
            where=str(spec),
            seen=pickled[0],
            next=f"download it first: hf download {spec.repo}",
            code="names-only",
        )
    pipeline = "model_index.json" in wanted
    weights = [n for n in wanted if n.endswith(".safetensors")]
    files = _in_parallel(lambda n: _remote_header(spec, n, _parent(n) if pipeline else ""), weights)
    places = {_parent(n) for n in weights}
    configs = {
        place if pipeline else "": load(_join(place, "config.json"))
        for place in sorted(places)
        if _join(place, "config.json") in names
    }
    indexes = tuple(n for n in wanted if n.endswith(".index.json"))
    return assemble(str(spec), files, indexes=indexes, configs=configs, local=False)


def _in_parallel(work: Callable[[str], _T], items: list[str]) -> list[_T]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, items))


def _remote_header(spec: Spec, name: str, component: str) -> BaseFile:
    from huggingface_hub import HfApi

    path = name if name == spec.inner else _join(spec.inner, name)
    with _said(spec, path):
        header = HfApi().parse_safetensors_file_metadata(spec.repo, path, revision=spec.revision)
    tensors = {
        key: Tensor(str(info.dtype), tuple(info.shape), ()) for key, info in header.tensors.items()
    }
    return BaseFile(name, component, tensors, dict(header.metadata))


def _remote_names(spec: Spec) -> list[str]:
    from huggingface_hub import HfApi

    with _said(spec):  # list_repo_files would retry for 20 seconds where there is no network
        siblings = HfApi().model_info(spec.repo, revision=spec.revision).siblings
    return [sibling.rfilename for sibling in siblings or []]


def _fetch_file(spec: Spec) -> Path:
    from huggingface_hub import hf_hub_download

    with _said(spec, spec.inner):
        return Path(hf_hub_download(spec.repo, spec.inner, revision=spec.revision))


def _fetch_json(spec: Spec, name: str) -> dict[str, Any]:
    whole = Spec(spec.repo, spec.revision, _join(spec.inner, name))
    return read_json(_fetch_file(whole))


def _fetch(spec: Spec, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    with _said(spec):
        return Path(snapshot_download(spec.repo, revision=spec.revision, allow_patterns=patterns))


@contextmanager
def _said(spec: Spec, file: str = "") -> Iterator[None]:
    """huggingface_hub's errors as FileErrors that say what was tried and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _hub_error(
            "the Hub wants you to accept this model's terms first",
            spec,
            error,
            f"open https://huggingface.co/{spec.repo}, then `hf auth login`",
            "hub-denied",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise _hub_error(
            f"the repository has no revision `{spec.revision}`",
            spec,
            error,
            "name a branch, a tag or a full commit hash",
            "hub-not-found",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _hub_error(
            "the Hub knows no such repository, or it is private",
            spec,
            error,
            "check the name; for a private one, `hf auth login`",
            "hub-not-found",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _not_cached(spec, _line(error)) from error
    except errors.EntryNotFoundError as error:
        raise _hub_error(
            f"the repository has no file `{file}`",
            spec,
            error,
            _nearest_remote(spec, file),
            "hub-not-found",
        ) from error
    except errors.HFValidationError as error:
        raise _hub_error("this is no name on the Hub", spec, error, "", "no-such-file") from error
    except (errors.SafetensorsParsingError, errors.NotASafetensorsRepoError) as error:
        raise _hub_error(
            f"`{file}` is no sound safetensors file", spec, error, "", "bad-header"
        ) from error
    except Exception as error:
        raise _other(error, spec) from error


def _other(error: Exception, spec: Spec) -> Exception:
    """Network trouble of whatever HTTP library is beneath, by its name; the rest as it is."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return _hub_error("the Hub refuses access", spec, error, "`hf auth login`", "hub-denied")
    family = {c.__name__ for c in type(error).__mro__}
    if family & {
        "OfflineModeIsEnabled",
        "ConnectionError",
        "TransportError",
        "Timeout",
        "HTTPError",
    }:
        return _not_cached(spec, f"{type(error).__name__}: {_line(error)}")
    if isinstance(error, (OSError, ValueError)):  # a name that no address can have
        return _hub_error("it cannot be fetched", spec, error, "", "hub-failed")
    return error


def _not_cached(spec: Spec, seen: str) -> FileError:
    fetch = f"hf download {spec.repo}" + (f" --revision {spec.revision}" if spec.revision else "")
    return FileError(
        "it is not in the local cache, and the Hub cannot be reached",
        where=str(spec),
        seen=seen,
        next=f"where there is a network: {fetch}; or pass a local path",
        code="hub-offline",
    )


def _hub_error(what: str, spec: Spec, error: Exception, next: str, code: str) -> FileError:
    return FileError(what, where=str(spec), seen=_line(error), next=next, code=code)


def _nothing_inside(spec: Spec) -> FileError:
    what = f"no file or folder `{spec.inner}`" if spec.inner else "no files"
    return FileError(
        f"the repository has {what}",
        where=str(spec),
        next=_nearest_remote(spec, spec.inner),
        code="hub-not-found",
    )


def _nearest_remote(spec: Spec, file: str) -> str:
    try:
        names = _remote_names(spec)
    except FileError:  # only a hint
        return ""
    folders = {_parent(n) for n in names} - {""}
    return nearest(file, [*names, *folders])


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
