"""The ledger on toy claims in a folder of their own: verdicts, resuming, both guards, and what it refuses."""

import json
import math
import multiprocessing
from pathlib import Path

import pytest

from minivid.lab import claims, jobs
from minivid.lab.claims import HOLDS, NOT, PARTLY, Arm, ClaimError, Claims, Compare, Floor

METHOD = '''"""The method."""


def score(x):
    """Twice."""
    return 2 * x  # two times
'''

CLAIM = '''"""A toy: the method doubles.

Outcome: it does, because two is
twice one.

Nothing else.
"""

import pathlib

from minivid.lab.claims import Arm, Claims, Compare, Floor

HERE = pathlib.Path(__file__).parent
method = {}
exec((HERE / "method.py").read_text(), method)
STEPS = 3


def arm(seed, fast, gain):
    with open(HERE / "calls.txt", "a") as log:
        log.write(f"{gain} {seed} {fast}\\n")
    return {"score": method["score"](gain) + 0.01 * seed + (0.5 if fast else 0.0), "steps": STEPS}


def unused():
    return 1


CLAIMS = Claims(
    "toy",
    arms={"one": Arm(arm, gain=1.0), "two": Arm(arm, gain=2.0)},
    tests=[
        Compare("doubles", "score", method="two", baseline="one", margin=1.5),
        Floor("steps", "steps", arm="two", at_least=3),
    ],
    sources=[str(HERE / "method.py")],
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a toy method and its claim, and a cache of its own."""
    monkeypatch.setattr(jobs, "CACHE", tmp_path / "cache")
    (tmp_path / "method.py").write_text(METHOD)
    (tmp_path / "toy.py").write_text(CLAIM)
    return tmp_path


def edit(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def calls(folder: Path) -> list[str]:
    log = folder / "calls.txt"
    return log.read_text().splitlines() if log.exists() else []


# --- verdicts -------------------------------------------------------------------------------------------------------


def judge(test, **arms):
    return test.judge({name: {"m": values} for name, values in arms.items()})["verdict"]


@pytest.mark.parametrize(
    "new, old, margin, verdict",
    [
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], 0.5, HOLDS),
        ([1.3, 1.41, 1.5], [1.0, 1.1, 1.2], 0.5, PARTLY),  # surely better, but not by the margin
        ([1.0, 4.0, 1.2], [1.0, 1.1, 1.2], 0.5, PARTLY),  # by the margin on average, but not surely
        ([1.0, 1.2, 1.1], [1.0, 1.1, 1.2], 0.5, NOT),
        ([0.0, 0.1, 0.2], [1.0, 1.1, 1.2], 0.0, NOT),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 0.0, NOT),  # a tie is no win
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], -0.02, HOLDS),  # but it is no loss either
        ([0.99, 0.995, 0.99], [1.0, 1.0, 1.0], -0.02, HOLDS),
        ([0.95, 1.03, 1.0], [1.0, 1.0, 1.0], -0.02, PARTLY),  # as good on average, not surely
        ([0.9, 0.9, 0.9], [1.0, 1.0, 1.0], -0.02, NOT),
        ([9.0], [1.0], 0.5, PARTLY),  # one seed has no interval
    ],
)
def test_comparison(new, old, margin, verdict):
    assert judge(Compare("t", "m", "new", "old", margin), new=new, old=old) == verdict
    lower = Compare("t", "m", "new", "old", margin, higher=False)
    assert judge(lower, new=[-v for v in new], old=[-v for v in old]) == verdict


def test_relative_margin_is_a_share_of_the_baseline():
    test = Compare("t", "m", "new", "old", margin=0.1, higher=False, relative=True)
    assert judge(test, new=[80, 81, 80], old=[100, 100, 100]) == HOLDS
    assert judge(test, new=[95, 96, 95], old=[100, 100, 100]) == PARTLY
    with pytest.raises(ClaimError, match="baseline's m is 0"):
        judge(test, new=[1, 1], old=[0, 0])


def test_floor():
    assert judge(Floor("t", "m", "a", at_least=2), a=[2, 3]) == HOLDS
    assert judge(Floor("t", "m", "a", at_least=2), a=[1, 4]) == PARTLY
    assert judge(Floor("t", "m", "a", at_most=2), a=[3, 4]) == NOT
    assert judge(Floor("t", "m", "a", at_most=2), a=[2]) == HOLDS


def test_interval_is_students():
    mean, low, high = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2 and math.isclose(high - mean, 4.302653 / 3**0.5, rel_tol=1e-5) and math.isclose(low + high, 4)
    assert claims.interval([5.0]) == (5.0, None, None)


def test_overall_verdict():
    assert claims.overall([HOLDS, HOLDS]) == HOLDS
    assert claims.overall([HOLDS, NOT]) == PARTLY == claims.overall([NOT, PARTLY])
    assert claims.overall([NOT, NOT]) == NOT


# --- running --------------------------------------------------------------------------------------------------------


def test_a_full_run_writes_everything(toy):
    result = claims.run("toy", toy)
    assert result == claims.read("toy", toy) and result["verdict"] == HOLDS
    assert result["arms"]["two"]["values"]["score"] == [4.0, 4.01, 4.02]
    assert result["arms"]["two"]["fast"] == {"score": 4.5, "steps": 3.0}
    assert result["arms"]["two"]["settings"] == {"gain": 2.0}
    difference = result["tests"][0]["difference"]
    assert difference["mean"] == pytest.approx(2) and difference["low"] == pytest.approx(2)
    assert result["seeds"] == [0, 1, 2] and result["threads"] == 1 and {"torch", "python"} <= result["versions"].keys()
    assert result["commit"] and result["seconds"] >= 0 and result["earlier"] == []
    assert claims.outcome("toy", toy) == "it does, because two is twice one."
    assert len(calls(toy)) == 2 * 3 + 2


def test_a_second_run_measures_nothing_and_again_measures_all(toy):
    claims.run("toy", toy)
    claims.run("toy", toy)
    assert len(calls(toy)) == 8
    claims.run("toy", toy, again=True)
    assert len(calls(toy)) == 16


def test_two_workers_give_what_one_gives(toy):
    one = claims.run("toy", toy)
    two = claims.run("toy", toy, workers=2, again=True)
    assert {n: a["values"] for n, a in one["arms"].items()} == {n: a["values"] for n, a in two["arms"].items()}


def test_a_killed_run_goes_on_where_it_was(toy):
    edit(toy / "toy.py", '    return {"score"', '    if seed == 1 and not (HERE / "alive").exists():\n'
         '        (HERE / "alive").touch(), __import__("os")._exit(9)\n    return {"score"')  # fmt: skip
    victim = multiprocessing.get_context("fork").Process(target=claims.run, args=("toy", toy))
    victim.start(), victim.join()
    assert victim.exitcode == 9 and not (toy / "toy.json").exists()
    assert calls(toy) == ["1.0 0 False", "2.0 0 False", "1.0 1 False"]
    claims.run("toy", toy)
    assert calls(toy)[3:7] == ["1.0 1 False", "2.0 1 False", "1.0 2 False", "2.0 2 False"]
    assert not list(toy.rglob("*.part"))


def test_an_arm_may_keep_checkpoints_in_its_folder(toy):
    edit(toy / "toy.py", "def arm(seed, fast, gain):", "def arm(seed, fast, gain, folder):\n    (folder / 'x').touch()")
    claims.run("toy", toy)
    assert len(list(toy.glob("cache/*/x"))) == 8


# --- guards ---------------------------------------------------------------------------------------------------------


def test_stale_sees_code_but_not_comments(toy):
    assert "has not been measured" in claims.stale("toy", toy)
    claims.run("toy", toy)
    assert claims.stale("toy", toy) == ""
    edit(toy / "method.py", '"""Twice."""', '"""Two times."""')
    edit(toy / "method.py", "# two times", "# doubled")
    edit(toy / "toy.py", "it does, because two is", "it does: two is")
    assert claims.stale("toy", toy) == ""
    edit(toy / "method.py", "2 * x", "x + x")
    assert "has changed since" in claims.stale("toy", toy)
    claims.run("toy", toy)
    assert claims.stale("toy", toy) == "" and len(calls(toy)) == 16


def test_a_new_margin_is_stale_measures_nothing_and_is_never_forgotten(toy):
    claims.run("toy", toy)
    edit(toy / "toy.py", "margin=1.5", "margin=2.5")
    assert "has changed since" in claims.stale("toy", toy)
    result = claims.run("toy", toy)
    assert len(calls(toy)) == 8 and result["verdict"] == PARTLY and result["tests"][0]["verdict"] == PARTLY
    (before,) = result["earlier"]
    assert before["verdict"] == HOLDS
    assert before["tests"]["score of two is higher than of one by at least 1.5"] == HOLDS
    assert claims.run("toy", toy)["earlier"] == [before]


def test_only_the_code_that_an_arm_reaches_makes_it_run_again(toy):
    claims.run("toy", toy)
    edit(toy / "toy.py", "return 1", "return 2")
    claims.run("toy", toy)
    assert len(calls(toy)) == 8
    edit(toy / "toy.py", "STEPS = 3", "STEPS = 4")
    claims.run("toy", toy)
    assert len(calls(toy)) == 16


def test_a_name_within_a_comprehension_reaches_nothing(toy):
    pairs = '{"one": Arm(arm, gain=1.0), "two": Arm(arm, gain=2.0)}'
    edit(toy / "toy.py", pairs, '{name: Arm(arm, gain=gain) for name, gain in (("one", 1.0), ("two", 2.0))}')
    claims.run("toy", toy)
    edit(toy / "toy.py", "margin=1.5", "margin=1.0")  # arm has a `gain` too, but not this one
    claims.run("toy", toy)
    assert len(calls(toy)) == 8


def test_other_weights_make_their_arm_run_again(toy):
    (toy / "w.bin").write_bytes(b"1")
    edit(toy / "toy.py", "Arm(arm, gain=2.0)", 'Arm(arm, files=[str(HERE / "w.bin")], gain=2.0)')
    claims.run("toy", toy)
    (toy / "w.bin").write_bytes(b"2")
    assert "has changed since" in claims.stale("toy", toy)
    claims.run("toy", toy)
    assert len(calls(toy)) == 8 + 4 and {call[:3] for call in calls(toy)[8:]} == {"2.0"}
    (toy / "w.bin").unlink()
    with pytest.raises(ClaimError, match="w.bin does not exist, but a claim stands on it"):
        claims.run("toy", toy)


def test_check_fast_sees_a_result_that_moved(toy):
    claims.run("toy", toy)
    assert claims.check_fast("toy", toy) == []
    stored = json.loads((toy / "toy.json").read_text())
    stored["arms"]["one"]["fast"]["score"] *= 1.2
    stored["arms"]["one"]["fast"]["old"] = 1.0
    (toy / "toy.json").write_text(json.dumps(stored))
    complaints = claims.check_fast("toy", toy)
    assert len(complaints) == 2 and "old is gone" in complaints[0] and "was 3, is now 2.5" in complaints[1]
    edit(toy / "toy.py", "    sources=", '    tolerance={"score": 0.5},\n    sources=')
    assert len(claims.check_fast("toy", toy)) == 1


def test_every_claim_of_the_repository_is_current():
    for slug in claims.slugs():
        assert claims.stale(slug) == ""


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('method["score"](gain)', "float('nan')", "score is nan; a result with NaN"),
        ('return {"score"', 'return [] and {"score"', "must return a dict of floats, got list"),
        ("STEPS}", "[1, 2]}", "steps must be one number, got list"),
        (
            'return {"score"',
            'raise RuntimeError("boom")\n    return {"score"',
            "arm 'one', seed 0 failed: RuntimeError: boom",
        ),
        ('"score", method', '"height", method', "needs 'height'; arm 'two' gave score, steps"),
        ("Arm(arm, gain=1.0)", "Arm(lambda seed, fast: {}, gain=1.0)", "named top-level function"),
        ("gain=1.0", "gain={1}", "settings of arm 'one' must be plain values"),
        ('baseline="one"', 'baseline="zero"', r"unknown arms \['zero'\]"),
        ("margin=1.5", "margin=float('inf')", "no finite margin"),
        ("at_least=3", "at_least=3, at_most=4", "exactly one of"),
        ("CLAIMS =", "OTHER =", "must define CLAIMS"),
        ("method.py", "nothing.py", "."),
    ],
)
def test_refused(toy, old, new, message):
    edit(toy / "toy.py", old, new)
    with pytest.raises((ClaimError, FileNotFoundError), match=message):
        claims.run("toy", toy)
    assert not (toy / "toy.json").exists()


def test_refused_without_a_counting_test_or_with_double_seeds():
    tests = [Floor("t", "m", "a", at_least=1, counts=False)]
    with pytest.raises(ClaimError, match="one test that counts"):
        Claims("toy", arms={"a": Arm(len)}, tests=tests)
    with pytest.raises(ClaimError, match="seeds must be"):
        Claims("toy", arms={"a": Arm(len)}, tests=[Floor("t", "m", "a", at_least=1)], seeds=(1, 1))


def test_unknown_slug(toy):
    with pytest.raises(ClaimError, match="there are: method, toy"):
        claims.load("toi", toy)
    with pytest.raises(ClaimError, match="has not been measured"):
        claims.read("toy", toy)
