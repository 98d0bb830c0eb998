"""Questions are in known words, their answers are facts of the scene, and both are functions of the seed."""

from collections import Counter

import pytest

from minivid import world
from minivid.world.questions import ANSWERS, COUNTS, ask, questions


def test_all_words_are_known():
    for recipe in ("base", "two", "many"):
        for i in range(40):
            for question, answer in (pair for kind in questions(world.draw(0, i, recipe)).values() for pair in kind):
                assert set(question.split()) | {answer} <= set(world.WORDS) and answer in ANSWERS and len(question.split()) <= 8


def test_answers_are_facts():
    for i in range(60):
        scene = world.draw(1, i, "two")
        asked = questions(scene)
        assert asked["count"] == [("how many objects are there", COUNTS[len(scene.bodies) - 1])]
        for body in scene.bodies:  # colours of a scene differ
            assert (f"what shape is the {body.colour} object", body.shape) in asked["shape"]
            assert (f"which way does the {body.colour} object move", body.motion) in asked["way"]
        alone = [b for b in scene.bodies if sum(b.shape == c.shape for c in scene.bodies) == 1]
        assert len(asked.get("colour", [])) == len(alone)
        large, small = (f(scene.bodies, key=lambda b: b.radius) for f in (max, min))
        if large.radius > small.radius:
            assert asked["largest"][0][1] == large.colour and asked["smallest"][0][1] == small.colour
        else:
            assert "largest" not in asked


def test_one_question_is_a_function_of_scene_and_number():
    scene = world.draw(0, 3, "two")
    assert ask(scene, 2) == ask(scene, 2) and len({ask(scene, n) for n in range(30)}) > 4


def test_no_answer_dominates():
    scenes = [world.draw(2, i, recipe) for i in range(150) for recipe in ("base", "two", "many")]
    said = Counter(ask(scene, n)[1] for scene in scenes for n in range(2))
    assert max(said.values()) < 0.2 * said.total() and len(said) == len(ANSWERS)


def test_a_film_is_refused():
    with pytest.raises(ValueError, match="cuts"):
        questions(world.draw(0, 0, "cuts"))
