"""The few limits of the style guide. A limit that is reached asks for a simpler idea, not for a higher limit."""

import subprocess

import pytest
from checks import CHAPTERS, ROOT, source

PACKAGE = ROOT / "minivid"


def tracked() -> list:
    """Every file that is or would be committed."""
    out = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout  # fmt: skip
    return [path for line in out.split("\0") if line and (path := ROOT / line).is_file()]


def python(folder):
    files = sorted(folder.rglob("*.py"))
    assert files, f"{folder} has no Python file, so nothing was checked"
    return files


@pytest.mark.parametrize("folder, most_files, most_lines", [("core", 15, 2500), ("core/baselines", 8, 1200)])
def test_core_stays_small(folder, most_files, most_lines):
    files = [f for f in python(PACKAGE / folder) if folder == "core/baselines" or "baselines" not in f.parts]
    lines = {f.name: len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert len(files) <= most_files, lines
    assert sum(lines.values()) <= most_lines, lines


def test_a_paper_is_short():
    long = {}
    for chapter in CHAPTERS:
        for file in (PACKAGE / chapter).glob("*.py"):
            if (lines := source.code_lines(file)) > 200:
                long[file.name] = lines
        for recipe in (d for d in (PACKAGE / chapter).glob("*/") if d.name != "__pycache__"):
            if (lines := sum(source.code_lines(f) for f in recipe.rglob("*.py"))) > 450:
                long[recipe.name] = lines
    assert long == {}, "lines of code; a paper's file has at most 200, the folder of a recipe 450"


def test_functions_fit_a_screen():
    assert [p for f in python(PACKAGE) for p in source.function_problems(f)] == []


def test_nothing_pickles_and_nothing_is_unfinished():
    assert [p for f in python(PACKAGE) for p in source.safety_problems(f)] == []


def test_no_machine_paths_and_no_notes_of_unfinished_work():
    files = tracked()
    assert len(files) > 20, "git lists hardly any file, so nothing was checked"
    assert [p for f in files for p in source.text_problems(f)] == []


def test_shipped_weights_are_small():
    sizes = {f.name: f.stat().st_size / 1e6 for f in (PACKAGE / "weights").glob("*.safetensors")}
    assert sum(sizes.values()) <= 40, f"megabytes: {sizes}"
    assert [f.name for f in tracked() if f.suffix in (".pt", ".pth", ".ckpt", ".pkl", ".bin")] == []
