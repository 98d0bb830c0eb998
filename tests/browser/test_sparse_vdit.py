"""The attention explorer as a reader meets it: turn its knobs in a real browser, walk over a map by keyboard."""

import os

import pytest
from browser import lab
from checks import ROOT


@pytest.mark.timeout(300)
@pytest.mark.skipif(lab.CHROMIUM is None and not os.environ.get("CI"), reason="chromium is not installed")
def test_the_explorer_and_the_board_answer(tmp_path):
    assert lab.CHROMIUM, "CI installs chromium"
    with lab.server(ROOT / "notebooks", tmp_path) as url, lab.browser() as page:
        book = lab.Notebook(page, url, "papers/sparse-vdit.ipynb")
        book.run_all()
        cube = page.locator("canvas[role=img]").first
        before = cube.get_attribute("aria-label")
        cube.focus()
        page.keyboard.press("PageDown")  # the same place, a frame later
        page.wait_for_function("old => document.querySelector('canvas[role=img]').ariaLabel !== old", arg=before)
        captions = book.captions()
        book.step_slider(number=0, key="ArrowLeft")  # layer
        book.step_slider(number=1)  # head
        assert "layer 2, head 1" in " ".join(book.captions()) and book.captions() != captions
        old = book.picture()
        page.locator(".widget-dropdown select").first.select_option(label="stripe")
        page.wait_for_function(
            "([css, old]) => document.querySelectorAll(css)[0].src !== old", arg=[lab.PICTURE, old]
        )
        assert "stripe" in " ".join(book.captions())
        book.step_slider(number=2, picture=1)  # epsilon
        assert page.problems == []
