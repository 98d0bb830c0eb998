"""The first notebook as a reader meets it: JupyterLab in Chromium, all cells, one turn of the first knob."""

import os

import pytest
from browser import lab
from checks import ROOT


@pytest.mark.timeout(300)
@pytest.mark.skipif(lab.CHROMIUM is None and not os.environ.get("CI"), reason="chromium is not installed")
def test_the_first_knob_turns(tmp_path):
    assert lab.CHROMIUM, "CI installs chromium"
    assert (ROOT / "notebooks/00_start.ipynb").exists(), "notebooks/00_start.ipynb is missing"
    with lab.server(ROOT / "notebooks", tmp_path) as url, lab.browser() as page:
        book = lab.Notebook(page, url, "00_start.ipynb")
        book.run_all()
        value, captions = book.readout(), book.captions()
        book.step_slider()
        assert book.readout() != value
        assert book.captions() != captions, "the text under the picture says what the picture now shows"
        assert page.problems == []
