"""Every widget of every notebook at its extremes and every option."""

import pytest
from checks import all_notebooks, name
from checks.drive import drive


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", all_notebooks(), ids=name)
def test_widgets_work_everywhere(path):
    assert path.exists(), f"{name(path)} is missing"
    result = drive(path)
    assert result["errors"] == []
    if path.parent.name == "papers" or path.stem == "00_start":
        assert result["driven"], "a lesson has a knob to turn, but no widget was found"
