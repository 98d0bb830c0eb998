"""What the syntax tree of the package tells: who imports whom, how long things are, which calls are banned."""

import ast
import re
from pathlib import Path

from checks import CHAPTERS, ROOT

# What a part of the package may import of ours, besides itself. Chapters are handled below: never another paper.
MAY_IMPORT = {"world": {"world"}, "core": {"world", "core"}, "lab": {"world", "core", "lab"},
              "training": {"world", "core", "training"}}  # fmt: skip
BELOW_PAPERS = {"world", "core"}
ON_TOP = {"claims", "__main__"}
# Lazily imported where needed: matplotlib, scikit-learn and PyAV cost a reader seconds before the first line runs.
HEAVY = ("matplotlib", "sklearn", "av", "pandas", "IPython", "ipywidgets", "anywidget", "torch._inductor")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path, package: Path) -> list[tuple[str, int]]:
    """All modules that a file imports, also inside functions, as (dotted name, line); relative ones resolved."""
    here = ("minivid", *path.relative_to(package).with_suffix("").parts)
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def import_problems(package: Path) -> list[str]:
    """Imports point down: chapters -> core -> world; lab uses core and world; claims and __main__ stand on top."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        part = parts[0]
        if part not in (*MAY_IMPORT, *ON_TOP, *CHAPTERS, "__init__", "weights"):
            problems.append(f"minivid/{part} is neither a known part nor a chapter")
        for target, line in imports(path, package):
            where = f"{path.relative_to(package)}:{line} imports {target}"
            words = target.split(".")
            if words[0] in ("tests", "checks", "conftest", "notebooks"):
                problems.append(f"{where}: nothing imports tests or notebooks")
            if words[0] != "minivid" or len(words) == 1 or part in ON_TOP or words[1] == "__version__":
                continue
            if part in CHAPTERS:
                # minivid.<chapter>.<paper>...: only the paper's own folder, or what is below all papers
                own = words[1:3] == list(parts[:2])
                if not own and words[1] not in BELOW_PAPERS:
                    problems.append(f"{where}: a paper uses core and world, never another paper")
            elif words[1] not in MAY_IMPORT.get(part, set()):
                problems.append(f"{where}: {part} may use {sorted(MAY_IMPORT.get(part, set())) or 'nothing of ours'}")
    return problems


def is_text(node: ast.AST) -> bool:
    """A string standing alone, as a docstring does."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, not comment, not docstring."""
    tree, lines = parse(path), path.read_text(encoding="utf-8").splitlines()
    prose = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and is_text(body[0]):
            prose |= set(range(body[0].lineno, body[0].end_lineno + 1))
    return sum(bool(text.strip()) and not text.lstrip().startswith("#") and number not in prose
               for number, text in enumerate(lines, 1))  # fmt: skip


def function_problems(path: Path, longest: int = 50, most: int = 8) -> list[str]:
    """A function fits a screen (its docstring not counted) and takes at most 8 arguments (self not counted)."""
    problems = []
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        a = node.args
        count = len([x for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ("self", "cls")])
        if count > most:
            problems.append(f"{path.name}:{node.lineno} {node.name} takes {count} arguments, more than {most}")
        first = node.body[0]
        told = first.end_lineno - first.lineno + 1 if is_text(first) else 0
        length = node.end_lineno - node.lineno + 1 - told
        if length > longest:
            problems.append(f"{path.name}:{node.lineno} {node.name} has {length} lines, more than {longest}")
    return problems


BANNED_CALLS = {"torch.load": "weights are safetensors", "torch.save": "weights are safetensors"}
BANNED_IMPORTS = ("pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")


def safety_problems(path: Path) -> list[str]:
    """No code in data: nothing that pickles. No unfinished code: nothing raises NotImplementedError."""
    problems = []
    for node in ast.walk(parse(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        problems += [f"{path.name}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in BANNED_IMPORTS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in BANNED_CALLS:
                problems.append(f"{path.name}:{node.lineno} calls {called}: {BANNED_CALLS[called]}")
            if any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords):
                problems.append(f"{path.name}:{node.lineno} allows pickle")
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            problems.append(f"{path.name}:{node.lineno} raises NotImplementedError: finish it")
    return problems


# In pieces, so that this file doesn't find itself.
MACHINE = re.compile("|".join([r"(?<![\w.])/" + folder + "/" for folder in ("work", "root", "tmp", "home", "opt")]
                              + [r"\.\./" + "shared", r"pypi\." + "org", "python" + r"hosted\.org"]))  # fmt: skip
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")


PIXELS = re.compile(r"base64,[A-Za-z0-9+/=]+")  # a picture in a notebook: any letters may meet in it


def text_problems(path: Path) -> list[str]:
    """No path or host of the machine that a file was made on, and no note of unfinished work."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []  # a picture or weights
    return [f"{path.name}:{number} has {found.group()!r}"
            for number, line in enumerate(lines, 1) for rule in (MACHINE, UNFINISHED)
            if (found := rule.search(PIXELS.sub("", line)))]  # fmt: skip


def modules(part: str) -> list[str]:
    """Dotted names of all modules of a part of the package, by file."""
    package = ROOT / "minivid"
    files = sorted((package / part).rglob("*.py"))
    dotted = [".".join(("minivid", *f.relative_to(package).with_suffix("").parts)) for f in files]
    return [d.removesuffix(".__init__") for d in dotted]
