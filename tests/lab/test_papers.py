"""The registry has all 48 rows from day one, and what it calls done is looked up, never declared."""

import json
from collections import Counter

import pytest

from minivid.lab import papers

CARD = '''"""SimVQ: move the whole codebook through one linear layer.

Paper:   Addressing Representation Collapse in Vector Quantized Models
         with One Linear Layer (2024; ICCV 2025), arXiv 2411.02038
Kind:    part (a bottleneck of the tokenizer)
Equal:   with the layer frozen at the identity it is plain VQ
Claim:   codes in use at K = 1024: +0.30 over plain VQ at equal steps
Differs: no adversarial loss; 32 x 32 clips

More text: that is not a field of the card.
"""
x = 1
'''


def build(root, places=("code", "test", "claim", "lesson"), card=CARD):
    row = papers.find("simvq", root)
    for place in places:
        row.places[place].parent.mkdir(parents=True, exist_ok=True)
        row.places[place].write_text(card if place == "code" else "")
    return row


def test_48_rows_in_11_chapters():
    assert len(papers.ROWS) == 48 == len({row.slug for row in papers.ROWS}) == len({row.arxiv for row in papers.ROWS})
    assert list(dict.fromkeys(row.chapter for row in papers.ROWS)) == list(papers.CHAPTERS)
    assert {row.kind for row in papers.ROWS} == set(papers.KINDS)
    assert Counter(row.chapter for row in papers.ROWS)["diffusion"] == 8


def test_repository_cards_are_well_formed_and_done_means_four_places():
    for row in papers.rows():
        if row.code.exists():
            assert row.card().arxiv == row.arxiv, row.slug
            assert row.done, f"{row.slug} has a file, but lacks {row.missing}"


def test_a_row_is_done_when_all_four_places_exist(tmp_path):
    row = build(tmp_path, ("code", "test", "claim"))
    assert not row.done and row.missing == ["lesson"]
    row = build(tmp_path)
    assert row.done and row.verdict == ""
    row.result.write_text(json.dumps({"verdict": "partly"}))
    assert row.verdict == "partly"


def test_facts_of_a_done_paper_come_from_its_card(tmp_path):
    row = build(tmp_path)
    card = row.card()
    assert (card.name, card.year, card.kind, card.detail) == ("SimVQ", 2024, "part", "a bottleneck of the tokenizer")
    assert card.title.endswith("Vector Quantized Models with One Linear Layer")
    assert card.claim.startswith("codes in use")
    build(tmp_path, card=CARD.replace("SimVQ:", "SimVQ two:"))
    assert row.facts()["name"] == "SimVQ two" and row.facts()["code"] == "minivid/tokenizers/simvq.py"


def test_a_recipe_may_be_a_folder(tmp_path):
    row = build(tmp_path)
    row.places["code"].unlink()
    folder = tmp_path / "minivid" / "tokenizers" / "simvq"
    folder.mkdir()
    (folder / "__init__.py").write_text(CARD)
    assert row.done and row.card().name == "SimVQ"


@pytest.mark.parametrize(
    "card, message",
    [
        ("x = 1", "must open with a docstring"),
        ('"""Simple words."""', "first line should read"),
        (CARD.replace("Equal:", "Equals:"), "lacks Equal:"),
        (CARD.replace("Kind:    part", "Kind:    gadget"), "begin with one of part"),
        (CARD.replace("arXiv 2411", "arXiv: 2411"), "should read 'Title"),
        (CARD.replace("2411.02038", "2411.02039"), "the registry 2411.02038"),
    ],
)
def test_a_malformed_card_says_what_is_wrong(tmp_path, card, message):
    row = build(tmp_path, card=card)
    with pytest.raises(papers.CardError, match=message) as error:
        row.card()
    assert "simvq.py" in str(error.value)


def test_an_open_paper_has_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="still open"):
        papers.find("wan", tmp_path).card()


def test_unknown_slug_suggests_a_near_one():
    assert papers.find("sparse_vdit").slug == "sparse-vdit"
    with pytest.raises(KeyError, match="simvq"):
        papers.find("simqv")


def test_table_links_what_exists(tmp_path):
    row = build(tmp_path)
    row.result.write_text(json.dumps({"verdict": "holds"}))
    lines = papers.table(tmp_path).splitlines()
    assert len(lines) == 2 + 48 + 2 and lines[-1] == "1 of 48 papers are done."
    (line,) = [line for line in lines if "/2411.02038" in line]
    assert "[code](minivid/tokenizers/simvq.py)" in line and "[holds](minivid/claims/simvq.json)" in line
    assert sum(line.endswith("| open | open |") for line in lines) == 47


def test_a_list_of_questions_links_the_lessons_that_exist(tmp_path):
    build(tmp_path).result.write_text(json.dumps({"verdict": "holds"}))
    first, second = papers.listed({"simvq": "who lives?", "fqgan": "how many?"}, tmp_path).splitlines()
    assert first.startswith("* **simvq**: who lives? [Addressing")
    assert first.endswith("(2024); [lesson](papers/simvq.ipynb), holds")
    assert second.endswith("lesson still open")


def test_readme_is_written_between_its_markers(tmp_path):
    text = f"# title\n\n{papers.BEGIN}\nold\n{papers.END}\nend\n"
    new = papers.readme(text, tmp_path)
    assert new.startswith("# title\n\n") and new.endswith(f"{papers.END}\nend\n") and "old" not in new
    assert papers.readme(new, tmp_path) == new
    with pytest.raises(ValueError, match="needs the two lines"):
        papers.readme("# title")


def test_the_readme_of_the_repository_is_current():
    text = (papers.ROOT / "README.md").read_text(encoding="utf-8")
    if papers.BEGIN in text:
        assert papers.readme(text) == text, "run `python -m minivid papers --readme`"
