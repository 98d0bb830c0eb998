"""One slug, four places: code, test, claim, lesson. A begun paper has all four; README says what the files say."""

import pytest
from checks import CHAPTERS, ROOT

from minivid.lab import papers

BEGUN = [row for row in papers.ROWS if len(row.missing) < 4]


def test_the_registry_has_48_papers_in_the_chapters_of_the_checks():
    assert len({row.slug for row in papers.ROWS}) == 48
    assert tuple(papers.CHAPTERS) == CHAPTERS == tuple(dict.fromkeys(row.chapter for row in papers.ROWS))


def test_a_begun_paper_has_all_four_places():
    assert {row.slug: row.missing for row in BEGUN if row.missing} == {}


def test_cards_agree_with_the_registry():
    for row in BEGUN:
        card = row.card()
        assert (card.title, card.year, card.kind) == (row.title, row.year, row.kind), row.slug


@pytest.mark.parametrize("place", ["code", "test", "claim", "lesson"])
def test_no_file_is_outside_the_registry(place):
    """A file whose slug or chapter is misspelt would be seen by no other check."""
    of_chapters = {ROOT / "minivid/claims" / f"{name}.py" for name in ("core", "few_bits", "one_film")}
    known = {row.places[place] for row in papers.ROWS} | of_chapters
    chapters = [(ROOT / "minivid" / c, ROOT / "tests" / c) for c in CHAPTERS]
    found = {
        "code": [p for code, _ in chapters for p in (*code.glob("*.py"), *code.glob("*/__init__.py"))],
        "test": [p for _, tests in chapters for p in tests.glob("test_*.py")],
        "claim": list((ROOT / "minivid/claims").glob("*.py")),
        "lesson": list((ROOT / "notebooks/papers").glob("*.ipynb")),
    }[place]
    packages = {code / "__init__.py" for code, _ in chapters} | {ROOT / "minivid/claims/__init__.py"}
    assert set(found) - known - packages == set()


def test_readme_shows_the_registry():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert papers.readme(text) == text, "run `python -m minivid papers --readme`"
