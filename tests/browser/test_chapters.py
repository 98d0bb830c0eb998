"""The explorers of the chapters, by keyboard in a real browser: every knob changes the picture, and nothing breaks."""

import os

import pytest
from browser import lab
from checks import ROOT

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(lab.CHROMIUM is None and not os.environ.get("CI"), reason="chromium is not installed"),
]


def choose(book: lab.Notebook, number: int, label: str) -> None:
    """Take another entry of a drop-down and wait until the picture has changed."""
    old = book.picture()
    book.page.locator(".widget-dropdown select").nth(number).select_option(label=label)
    book.page.wait_for_function("([css, old]) => document.querySelectorAll(css)[0].src !== old", arg=[lab.PICTURE, old])


def test_the_attention_explorer_of_chapter_05(tmp_path):
    with lab.server(ROOT / "notebooks", tmp_path) as url, lab.browser() as page:
        book = lab.Notebook(page, url, "05_sparse_attention.ipynb")
        book.run_all()
        drawn = book.captions()
        choose(book, 0, "film")
        assert book.captions() != drawn
        choose(book, 1, "0.5")  # noise
        book.step_slider(number=0)  # epsilon
        book.step_slider(number=1, key="ArrowLeft")  # layer
        book.step_slider(number=2)  # head
        assert "Layer 3, head 1" in " ".join(book.captions())
        head = page.locator("img.widget-image").first  # on the board: the first head of the first layer
        head.click(position={"x": 80, "y": 30})
        page.wait_for_function(
            "css => [...document.querySelectorAll(css)].some(x => x.textContent.includes('Layer 0, head 0'))", arg=lab.CAPTION
        )
        assert page.problems == []


def test_the_board_of_chapter_07(tmp_path):
    with lab.server(ROOT / "notebooks", tmp_path) as url, lab.browser() as page:
        book = lab.Notebook(page, url, "07_low_rank.ipynb")
        book.run_all()
        choose(book, 0, "SVD of each matrix")
        book.step_slider(key="ArrowLeft")
        assert "SVD of each matrix, 60 %" in " ".join(book.captions())
        assert page.problems == []
