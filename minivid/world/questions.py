"""Questions about a scene, with their exact answers: one word each. Every word is one of the captions' `WORDS`."""

from collections import Counter

from .parts import COLOURS, MOTIONS, SHAPES, Scene, source

COUNTS = ("one", "two", "three", "four")
ANSWERS = (*COLOURS, *SHAPES, *MOTIONS, *COUNTS)


def questions(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """All questions that the scene answers without doubt: kind -> [(question, answer), ...].

    Kinds: count, colour (of a shape), shape (of a colour), way (of a colour or shape), largest, smallest. A colour or shape is
    asked for by name only where exactly one body has it. Raises ValueError for a film with cuts, where "there" is not one place.
    """
    if scene.cuts or not 1 <= len(scene.bodies) <= len(COUNTS):
        raise ValueError(f"Questions are made for one shot of 1 to {len(COUNTS)} bodies, got {len(scene.bodies)} and {len(scene.cuts)} cuts.")
    shapes, colours = Counter(b.shape for b in scene.bodies), Counter(b.colour for b in scene.bodies)
    out: dict[str, list[tuple[str, str]]] = {"count": [("how many objects are there", COUNTS[len(scene.bodies) - 1])]}
    for body in scene.bodies:
        names = [f"the {body.colour} object"] * (colours[body.colour] == 1) + [f"the {body.shape}"] * (shapes[body.shape] == 1)
        if colours[body.colour] == 1:
            out.setdefault("shape", []).append((f"what shape is the {body.colour} object", body.shape))
        if shapes[body.shape] == 1:
            out.setdefault("colour", []).append((f"what colour is the {body.shape}", body.colour))
        if body.motion in MOTIONS:
            out.setdefault("way", []).extend((f"which way does {name} move", body.motion) for name in names)
    by_size = sorted(scene.bodies, key=lambda body: body.radius)
    if len(by_size) > 1 and by_size[-1].radius > by_size[-2].radius:
        out["largest"] = [("what colour is the largest object", by_size[-1].colour)]
    if len(by_size) > 1 and by_size[0].radius < by_size[1].radius:
        out["smallest"] = [("what colour is the smallest object", by_size[0].colour)]
    return out


def ask(scene: Scene, number: int = 0) -> tuple[str, str]:
    """One question about the scene and its answer: a kind, each equally likely, then one of that kind. Pure in (scene.seed, number)."""
    rng, kinds = source(*scene.seed, number, "question"), questions(scene)
    chosen = kinds[sorted(kinds)[int(rng.random() * len(kinds))]]
    return chosen[int(rng.random() * len(chosen))]
