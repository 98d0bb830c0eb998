"""Every notebook as a file: run in order, in sync with its source, pictures described, within its budget."""

import pytest
from checks import ROOT, all_notebooks, name
from checks.notebooks import static_problems


@pytest.mark.parametrize("path", all_notebooks(), ids=name)
def test_notebook(path):
    assert static_problems(path) == []


def test_every_source_has_its_notebook():
    folder = ROOT / "notebooks" / "source"
    sources = {f.relative_to(folder).with_suffix("").as_posix() for f in folder.rglob("*.py")}
    assert "00_start" in sources, "notebooks/source/00_start.py is missing"
    books = [f for f in all_notebooks() if f.exists()]
    assert sources == {f.relative_to(ROOT / "notebooks").with_suffix("").as_posix() for f in books}
