"""Exercises: what stands in the notebook fails its own check, and the folded solution passes it.

A notebook marks the two cells by tags: `exercise` (a function to be written) and `exercise-check` (stands on its own, ends by
printing "Right." or "Not yet."). The solution is the Python block of the next text cell.
"""

import contextlib
import io
import re

import nbformat
import pytest
from checks import all_notebooks, name


def exercises():
    """(id, stub, check, solution) of every exercise; a part that is missing is an empty text."""
    for path in all_notebooks():
        cells = nbformat.read(path, 4).cells if path.exists() else []
        for i, cell in enumerate(cells):
            if "exercise" in cell.metadata.get("tags", []):
                after = cells[i + 1 : i + 3]
                check = after[0].source if after and "exercise-check" in after[0].metadata.get("tags", []) else ""
                block = re.search(r"```python\n(.*?)```", after[1].source, re.DOTALL) if len(after) > 1 else None
                yield pytest.param(cell.source, check, block[1] if block else "", id=f"{name(path)} cell {i}")


def verdict(*parts):
    """What a reader sees at the end of the check."""
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for part in parts:
            exec(compile(part, "exercise", "exec"), names)
    return printed.getvalue().strip().splitlines()[-1]


@pytest.mark.parametrize("stub, check, solution", list(exercises()))
def test_the_stub_fails_and_the_solution_passes(stub, check, solution):
    assert check and solution, "an exercise is followed by its check, and the check by a text with the solution"
    assert verdict(stub, check).startswith("Not yet")
    assert verdict(stub, solution, check) == "Right."
