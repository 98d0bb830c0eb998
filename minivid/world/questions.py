"""Questions about a scene, with their exact answers: one word each. Every word is one of the captions' `WORDS`."""

from collections import Counter

from .parts import COLOURS, MOTIONS, SHAPES, Scene, source

COUNTS = ("one", "two", "three", "four")
ANSWERS = (*COLOURS, *SHAPES, *MOTIONS, *COUNTS)


def questions(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """All questions that the scene answers without doubt: kind -> [(question, answer), ...].

    Kinds: count, colour (of a shape), shape (of a colour), way (of either), largest and smallest. A colour or
    shape names a body only where no other has it. Raises ValueError for a film with cuts ("there" is not one place)
    and for more than four bodies.
    """
    if scene.cuts or not 1 <= len(scene.bodies) <= len(COUNTS):
        got = f"{len(scene.bodies)} bodies and {len(scene.cuts)} cuts"
        raise ValueError(f"Questions are made for one shot of 1 to {len(COUNTS)} bodies, got {got}.")
    shapes, colours = Counter(b.shape for b in scene.bodies), Counter(b.colour for b in scene.bodies)
    out: dict[str, list[tuple[str, str]]] = {"count": [("how many objects are there", COUNTS[len(scene.bodies) - 1])]}
    for body in scene.bodies:
        names = []
        if colours[body.colour] == 1:
            names.append(f"the {body.colour} object")
            out.setdefault("shape", []).append((f"what shape is {names[-1]}", body.shape))
        if shapes[body.shape] == 1:
            names.append(f"the {body.shape}")
            out.setdefault("colour", []).append((f"what colour is {names[-1]}", body.colour))
        if names and body.motion in MOTIONS:
            out.setdefault("way", []).extend((f"which way does {name} move", body.motion) for name in names)
    by_size = sorted(scene.bodies, key=lambda body: body.radius)
    if len(by_size) > 1 and by_size[-1].radius > by_size[-2].radius:
        out["largest"] = [("what colour is the largest object", by_size[-1].colour)]
    if len(by_size) > 1 and by_size[0].radius < by_size[1].radius:
        out["smallest"] = [("what colour is the smallest object", by_size[0].colour)]
    return out


def ask(scene: Scene, number: int = 0) -> tuple[str, str]:
    """One question and its answer, by (scene.seed, number): a kind, each equally likely, then one of that kind."""
    rng, kinds = source(*scene.seed, number, "question"), questions(scene)
    chosen = kinds[sorted(kinds)[int(rng.random() * len(kinds))]]
    return chosen[int(rng.random() * len(chosen))]
