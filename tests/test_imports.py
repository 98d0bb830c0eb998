"""Imports point down (chapters -> core -> world), and importing the package stays cheap."""

import json
import subprocess
import sys

import pytest
from checks import ROOT, source

PROBE = """
import importlib, json, sys
heavy, blame = set(sys.argv[1].split(",")), {}
import torch  # what torch itself brings is not the package's doing
for name in sys.argv[2:]:
    before = heavy & set(sys.modules)
    importlib.import_module(name)
    if new := sorted(heavy & set(sys.modules) - before):
        blame[name] = new
print(json.dumps(blame))
"""


def test_imports_point_down():
    assert source.import_problems(ROOT / "minivid") == []


@pytest.mark.parametrize("part", ["world", "core"])
def test_parts_import_light(part):
    """Drawing, video and learning libraries are imported inside the functions that need them."""
    names = source.modules(part)
    assert names, f"minivid/{part} has no module"
    command = [sys.executable, "-c", PROBE, ",".join(source.HEAVY), *names]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == {}, "modules that pull in heavy libraries when they are imported"


def test_init_files_of_chapters_import_no_paper():
    """Reading one paper must not run the others."""
    files = [f for f in (ROOT / "minivid").glob("*/__init__.py") if f.parent.name in source.CHAPTERS]
    for file in files:
        assert [t for t, _ in source.imports(file, ROOT / "minivid") if t.startswith("minivid")] == [], file
