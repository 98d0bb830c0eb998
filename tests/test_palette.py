"""Colours of figures and widgets."""

from checks import ROOT, palette


def test_colours_are_okabe_ito_and_cividis():
    files = sorted((ROOT / "minivid").rglob("*.py")) + sorted((ROOT / "notebooks").rglob("*.py"))
    files = [f for f in files if "weights" not in f.parts]
    assert any(f.parent.name == "lab" for f in files), "minivid/lab is not there, so nothing that draws was checked"
    assert [p for f in files for p in palette.colour_problems(f)] == []
