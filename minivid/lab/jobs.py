"""The jobs behind a claim: every arm x seed is one, and a job that is done stays done.

A job's key is the hash of its own settings: arm, seed, fast or full, and the code that it stands on (the paper's file
and those definitions of the claim's file that its function reaches). So a moved margin re-runs nothing, and a changed
method re-runs what it touches. A job leaves `runs/claims/<key>/result.json`, written at once or not at all.

Code in `core` and `world` is not in the key, or every edit there would cost hours. The fast form guards those:
when it moves, measure anew with `--again`.
"""

import ast
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minivid.lab.papers import ROOT

if TYPE_CHECKING:
    from minivid.lab.claims import Arm, Claims

CACHE = (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / "runs" / "claims"


class ClaimError(ValueError):
    """A claim that is ill-formed, unmeasured or whose arm failed; the message says which and what to do."""


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a kill leaves either the old file or the new one. NaN is refused (ValueError)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


# --- code as a hash ---------------------------------------------------------------------------------------------------


def code_hash(*files: Path) -> str:
    """Hash of `files`: the syntax tree of a .py file (comments, docstrings, layout don't count), the bytes of another."""
    trees = []
    for file in files:
        if not Path(file).exists():
            raise ClaimError(f"{file} does not exist, but a claim stands on it.")
        if Path(file).suffix == ".py":
            trees.append(_plain(ast.parse(Path(file).read_text(encoding="utf-8"))))
        else:
            trees.append(hashlib.sha256(Path(file).read_bytes()).hexdigest())
    return _hash(trees)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """A syntax tree as nested lists. Empty fields are left out: new Python versions add some, and must not matter."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind"}
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    return [type(node).__name__, *([name, _plain(value)] for name, value in fields.items())]


def _reached(file: Path, name: str) -> Any:
    """The definition of `name` in `file` with all top-level definitions and imports that it uses, directly or not."""
    defined: dict[str, ast.stmt] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for bound in _binds(node):
            defined[bound] = node
    todo, seen = [name], {}
    while todo:
        node = defined.get(todo.pop())
        if node is not None and node.lineno not in seen:
            seen[node.lineno] = node
            todo += [leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)]
    return [_plain(seen[line]) for line in sorted(seen)]


def _binds(node: ast.AST) -> Iterator[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif not isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):  # their names are their own
        for part in ast.iter_child_nodes(node):
            yield from _binds(part)


def load_module(file: Path) -> ModuleType:
    """Import a claim's file: as part of the package where it is one, else by its path (as tests do)."""
    if file.resolve().parent == ROOT / "minivid" / "claims":
        return importlib.import_module(f"minivid.claims.{file.stem}")
    module = ModuleType(f"claims_{_hash(str(file.resolve()))}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)  # no .pyc of an older text
    return module


# --- jobs -------------------------------------------------------------------------------------------------------------


def key(claims: "Claims", name: str, seed: int, fast: bool) -> str:
    """The hash under which the job of this arm and seed is kept."""
    arm = claims.arms[name]
    if not getattr(arm.run, "__name__", "").isidentifier():
        raise ClaimError(f"{claims.slug}: arm {name!r} must be a named top-level function, so that it can be hashed.")
    code = [code_hash(*claims.sources, *arm.files), _reached(claims.file, arm.run.__name__)]
    try:
        return _hash([claims.slug, name, arm.settings, seed, fast, code])
    except TypeError as error:
        raise ClaimError(f"{claims.slug}: the settings of arm {name!r} must be plain values: {error}.") from None


def run_all(
    claims: "Claims",
    seeds: Iterable[int],
    *,
    fast: bool,
    workers: int = 1,
    again: bool = False,
    cache: Path | None = None,
) -> dict[tuple[str, int], dict]:
    """Every arm with every seed: {(arm, seed): {"values", "seconds", "commit" ...}}, cached ones not run again.

    Seeds go in the outer loop, so that a run that was stopped has all arms of its first seeds. `again` forgets what is
    cached, checkpoints included. `workers` processes share the jobs; keep it at 1 where an arm measures time.
    """
    from tqdm.auto import tqdm

    todo, done = [], {}
    for seed in seeds:
        for name in claims.arms:
            folder = (cache or CACHE) / key(claims, name, seed, fast)
            if again:
                shutil.rmtree(folder, ignore_errors=True)
            if (folder / "result.json").exists():
                done[name, seed] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            else:
                todo.append((name, seed, fast, folder))
    bar = tqdm(total=len(todo) + len(done), initial=len(done), mininterval=1, unit="job", leave=False, disable=None)
    bar.set_description(f"{claims.slug}{' fast' if fast else ''}")
    with bar:
        for (name, seed, *_), result in _each(todo, workers, claims):
            done[name, seed] = result
            bar.update()
    return done


def _each(todo: list[tuple], workers: int, claims: "Claims") -> Iterator[tuple[tuple, dict]]:
    if workers <= 1 or len(todo) < 2:
        for job in todo:
            yield job, _work(claims, *job)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_elsewhere, claims.file, claims.slug, *job): job for job in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _elsewhere(file: Path, slug: str, *job: Any) -> dict:
    from minivid.lab.claims import load

    return _work(load(slug, file.parent), *job)


def _work(claims: "Claims", name: str, seed: int, fast: bool, folder: Path) -> dict:
    """Run one job and keep what it gave."""
    import torch

    torch.set_num_threads(1)  # one thread and one process give the same digits on every run; two threads don't
    folder.mkdir(parents=True, exist_ok=True)
    arm = claims.arms[name]
    start = time.perf_counter()
    try:
        values = _call(arm, seed, fast, folder)
    except Exception as error:
        raise ClaimError(f"{claims.slug}: arm {name!r}, seed {seed} failed: {type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - start
    values = _checked(values, f"{claims.slug}: arm {name!r}, seed {seed}")
    job = {"slug": claims.slug, "arm": name, "settings": arm.settings, "seed": seed, "fast": fast, "values": values}
    job |= {"seconds": round(seconds, 2), "threads": torch.get_num_threads(), "commit": _commit(claims)}
    write_json(folder / "result.json", job)
    return job


def _call(arm: "Arm", seed: int, fast: bool, folder: Path) -> Any:
    takes = inspect.signature(arm.run).parameters
    extra = {"folder": folder} if "folder" in takes else {}
    return arm.run(seed=seed, fast=fast, **extra, **arm.settings)


def _checked(values: Any, who: str) -> dict[str, float]:
    if not isinstance(values, dict) or not values:
        raise ClaimError(f"{who} must return a dict of floats, got {type(values).__name__}.")
    out = {}
    for metric, value in values.items():
        try:
            out[str(metric)] = float(value)
        except (TypeError, ValueError):
            raise ClaimError(f"{who}: {metric} must be one number, got {type(value).__name__}.") from None
        if not math.isfinite(out[metric]):
            raise ClaimError(f"{who}: {metric} is {out[metric]}; a result with NaN or infinity is refused.")
    return out


# --- where and when ---------------------------------------------------------------------------------------------------


def _commit(claims: "Claims") -> str:
    return surroundings(claims.file, *claims.sources)["commit"]


def surroundings(*files: Path) -> dict:
    """Commit (with '+changes' where `files` differ from it), versions, threads and kind of machine."""
    import numpy
    import torch

    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    if commit != "unknown" and _git("status", "--porcelain", "--", *map(str, files)):
        commit += "+changes"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"commit": commit, "versions": versions, "threads": torch.get_num_threads(), "machine": machine}


def _git(*words: str) -> str:
    try:
        out = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return out.stdout.strip() if out.returncode == 0 else ""
