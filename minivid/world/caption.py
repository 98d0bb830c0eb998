"""Scenes to words: 200 words, a dozen styles, captions of chunks and events with their times, and attribute vectors.

A caption is lower case, words separated by single spaces, no punctuation. `WORDS` is append-only: trained weights depend on
its order. Nothing here is random; what a caption leaves out is fixed in the scene.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .parts import ALL_MOTIONS, COLOURS, SHAPES, SIZES, TEXTURES, TONES, Body, Event, Scene, states

WORDS = tuple(
    """
    a an the and then but on in of to with while as is are it at by from into no not
    red green blue yellow magenta cyan circle square triangle star small medium large
    left right up down still moves stays moving staying
    dark grey light brown slate cream plain striped checked dotted lined numbered gradient noisy background stripes checks dots
    lines noise shade digit zero one two three four five six seven eight nine ten
    bounces orbits turns grows shrinks falls wanders curves hits touches round bouncing orbiting turning growing shrinking
    falling wandering curving hitting off
    slow fast slowly quickly steady appears leaves returns stops hides behind bar hidden wall walls floor other another
    same object objects shape image video clip scene scenes shot shots first second third last back again cut fade fades cuts
    camera pans zooms shakes out panning zooming shaking fixed
    bright normal dim spot corners night day soft
    there nothing something alone pair group many everything changes
    top bottom middle side near far front before after during start end now
    calm lively busy quiet playful wide close view flat simple clean drawing theme style colours colour texture
    gravity bouncy collision random path physics travel game dance
    brief time event events next slower faster bigger smaller which its they both all only
    what how way does move largest smallest
    """.split()
)
STYLES = (
    "short", "dense", "appearance", "motion", "keywords", "theme", "partial",
    "brief", "detailed", "background", "style", "shot", "camera", "light", "atmosphere", "summary",
)  # fmt: skip
FIELDS = ("brief", "detailed", "background", "theme", "style", "shot", "camera", "light", "atmosphere")

_VERBS = {  # motion -> (finite, participle)
    "still": ("stays still", "staying still"), "bounces": ("bounces", "bouncing"), "orbits": ("orbits", "orbiting"),
    "turns": ("turns round", "turning round"), "grows": ("grows", "growing"), "shrinks": ("shrinks", "shrinking"),
    "falls": ("falls and bounces", "falling"), "wanders": ("wanders", "wandering"), "curves": ("curves", "curving"),
    "collides": ("hits the other", "hitting the other"), "script": ("changes", "changing"),
}  # fmt: skip
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def caption(scene: Scene, style: str = "short") -> str:
    """The caption of a scene in one of `STYLES`.

    short: colour, shape and motion of every body, size unless medium, the background if the scene is `told`; <= 16 words for
    the base recipe. dense and summary: everything, <= 64 words. appearance, motion, keywords, theme: what they say.
    partial: one body, or one of several events. The nine `FIELDS` describe one aspect each.
    """
    if style not in _WRITERS:
        raise ValueError(f"Unknown caption style {style!r}. Use one of: {', '.join(STYLES)}.")
    return _WRITERS[style](scene)


def fields(scene: Scene) -> dict[str, str]:
    """The nine aspect fields of a scene."""
    return {field: caption(scene, field) for field in FIELDS}


def verb(motion: str, participle: bool = False) -> str:
    """The words for a motion: "moves left", or "moving left"."""
    if motion in _VERBS:
        return _VERBS[motion][participle]
    return ("moving " if participle else "moves ") + motion.replace("-", " ")


def name(body: Body, article: str = "a", full: bool = False) -> str:
    """ "a large red star"; `full` also says medium and the texture."""
    size = body.size + " " if full or body.size != "medium" else ""
    texture = "" if body.texture.kind == "plain" else body.texture.kind + " "
    return f"{article} {size}{texture}{body.colour} {body.shape}"


def pace(body: Body) -> str:
    """slowly (below .016 sides a frame), quickly (above .024) or nothing."""
    return "slowly" if 0 < body.speed < 0.016 else "quickly" if body.speed > 0.024 else ""


def _words(*parts: str) -> str:
    return " ".join(" ".join(part for part in parts if part).split())


def _on(scene: Scene) -> str:
    ground = scene.background
    kind = ground.texture.kind
    if kind == "plain":
        return f"on a {ground.tone} background"
    return f"on {ground.tone} {_PATTERNS[kind]}"


_PATTERNS = {"striped": "stripes", "checked": "checks", "dotted": "dots", "lined": "lines", "noisy": "noise", "gradient": "shade"}


def phrase(event: Event) -> str:
    """What happens in an event, without its subject: "turns blue", "leaves", "hits the wall"."""
    return {
        "appear": "appears", "leave": "leaves", "return": "returns", "stop": "stops", "grow": "grows", "shrink": "shrinks",
        "move": verb(event.word) if event.word else "moves", "recolour": f"turns {event.word}", "spin": "turns round",
        "contact": f"hits the {event.word}", "bounce": "bounces", "hide": "hides behind a bar", "cut": "a cut", "fade": "a fade",
        "camera": f"the camera {_CAMERA.get(event.word, '')}",
    }[event.kind]  # fmt: skip


_CAMERA = {
    "still": "is still", "left": "pans left", "right": "pans right", "up": "pans up", "down": "pans down",
    "in": "zooms in", "out": "zooms out", "shake": "shakes",
}  # fmt: skip


def _does(scene: Scene, index: int, most: int = 99) -> str:
    """The verb phrase of one body: its motion, or for a script its events in order."""
    body = scene.bodies[index]
    if body.motion == "script":
        return " then ".join(phrase(event) for event in told_events(scene, index)[:most])
    if body.motion == "collides":
        return verb(_direction(body)) + " and hits the other"
    text = verb(body.motion)
    return text + " behind a bar" if scene.occluder is not None and index == 0 else text


def _direction(body: Body) -> str:
    """The main direction of the first leg as a motion word."""
    leg = body.legs[0]
    if max(abs(leg.vx), abs(leg.vy)) < 1e-4:
        return "still"
    if abs(leg.vx) >= abs(leg.vy):
        return "right" if leg.vx > 0 else "left"
    return "down" if leg.vy > 0 else "up"


def told_events(scene: Scene, index: int) -> list[Event]:
    """The events of a body that captions speak of (contacts belong to the truth only), in order."""
    return [event for event in scene.events if event.body == index and event.kind not in ("contact", "hide")]


def short(scene: Scene) -> str:
    """See `caption`."""
    if scene.cuts:
        return _film(scene)
    text = " and ".join(_words(name(body), _does(scene, i, 4)) for i, body in enumerate(scene.bodies))
    if scene.camera.word != "still":
        text += " while the camera " + _CAMERA[scene.camera.word]
    if scene.light.word != "normal":
        text += f" in {scene.light.word} light"
    longer = _words(text, _on(scene))
    return longer if scene.told and len(longer.split()) <= 16 else text


def _film(scene: Scene) -> str:
    """The shots in order. A recurrent film keeps the look of its bodies to itself, so only memory can bring it back."""
    seen: list[str] = []
    text = []
    for cut in scene.cuts:
        body = cut.shot.bodies[0]
        who = f"a {body.shape}" if scene.recipe == "recurrent" else name(body)
        if cut.name in seen:
            text.append(f"the {_ORDER[seen.index(cut.name)]} scene again")
        else:
            seen.append(cut.name)
            text.append(_words(who, verb(body.motion)))
    join = " then a fade to " if scene.cuts[-1].fade else " then "
    return join.join(text)


_ORDER = ("first", "second", "third", "last")


def _dense(scene: Scene) -> str:
    if scene.cuts:
        return _words(_film(scene), _on(scene))
    text = " and ".join(
        _words(name(body, full=len(scene.bodies) < 3), _does(scene, i), pace(body) if len(scene.bodies) < 4 else "")
        for i, body in enumerate(scene.bodies)
    )
    if len(scene.bodies) == 2 and scene.bodies[0].motion != "script":
        text += f" the {scene.bodies[0].colour} one is {_place(scene)}"
    return _words(text, _on(scene), f"while the camera {_CAMERA[scene.camera.word]}", f"in {scene.light.word} light")


def _place(scene: Scene) -> str:
    """Where the first body stands at the start, seen from the second."""
    a, b = scene.bodies[0].legs[0], scene.bodies[1].legs[0]
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "on the left" if a.x < b.x else "on the right"
    return "at the top" if a.y < b.y else "at the bottom"


def _partial(scene: Scene) -> str:
    """One body, or of a script one event, chosen by the scene's number."""
    told = [event for event in scene.events if event.kind not in ("contact", "hide")]
    number = scene.seed[1]
    if told and not scene.cuts:
        event = told[number % len(told)]
        return phrase(event) if event.kind == "camera" else _words(name(scene.bodies[event.body]), phrase(event))
    if scene.cuts:
        return caption(scene.cuts[number % len(scene.cuts)].shot, "short")
    index = number % len(scene.bodies)
    return _words(name(scene.bodies[index]), _does(scene, index, 1))


def _keywords(scene: Scene) -> str:
    words = [w for b in scene.bodies for w in (b.size, b.colour, b.shape, *b.motion.split("-")) if w in WORDS and w != "script"]
    return _words(*words, scene.background.tone, "background")


def _theme(scene: Scene) -> str:
    if scene.cuts:
        return "a video of many scenes"
    if scene.physics is not None:
        return "a collision" if len(scene.bodies) > 1 else "a game of gravity"
    return ("a shape alone", "a pair of objects", "a group of objects", "a group of many objects")[len(scene.bodies) - 1]


def _brief(scene: Scene) -> str:
    count = len(scene.bodies)
    return _words(_NUMBERS[count], "object" if count == 1 else "objects", _on(scene))


def _background(scene: Scene) -> str:
    return _words("the background is", scene.background.tone, "and", scene.background.texture.kind)


def _shot(scene: Scene) -> str:
    if scene.cuts:
        return _words(_NUMBERS[min(len(scene.cuts), 10)], "shots with", "fades" if scene.cuts[-1].fade else "cuts")
    return "one shot wide view" if max(body.radius for body in scene.bodies) < SIZES["large"] else "one shot close view"


def _atmosphere(scene: Scene) -> str:
    speed = max(body.speed for body in scene.bodies)
    return "quiet and still" if speed == 0 else "calm and slow" if speed < 0.018 else "lively and fast"


def _summary(scene: Scene) -> str:
    parts = (
        short(scene),
        _on(scene) if _on(scene) not in short(scene) else "",
        _shot(scene),
        "the camera " + _CAMERA[scene.camera.word],
    )
    return " ".join(_words(*parts, f"{scene.light.word} light", _atmosphere(scene), "flat style", _theme(scene)).split()[:64])


_WRITERS: dict[str, Callable[[Scene], str]] = {
    "short": short, "dense": _dense, "detailed": _dense, "partial": _partial, "keywords": _keywords, "theme": _theme,
    "appearance": lambda scene: _words(" and ".join(name(body, full=True) for body in scene.bodies), _on(scene)),
    "motion": lambda scene: " and ".join(_words("an object", _does(scene, i), pace(b)) for i, b in enumerate(scene.bodies)),
    "brief": _brief, "background": _background, "style": lambda scene: "a clean flat drawing in simple colours", "shot": _shot,
    "camera": lambda scene: "the camera " + _CAMERA[scene.camera.word], "light": lambda scene: scene.light.word + " light",
    "atmosphere": _atmosphere, "summary": _summary,
}  # fmt: skip


def captions(scene: Scene, frames: int, chunk: int = 4) -> list[tuple[int, int, str]]:
    """(start, stop, text) of every chunk of `chunk` frames in the first `frames` frames."""
    return [(start, min(start + chunk, frames), chunk_caption(scene, start, chunk)) for start in range(0, frames, chunk)]


def event_captions(scene: Scene) -> list[tuple[float, float, str]]:
    """(start, stop, text) of every event that captions speak of, in order."""
    told = [event for event in scene.events if event.kind not in ("contact", "hide")]

    def text(event: Event) -> str:
        return phrase(event) if event.kind == "camera" else _words(name(scene.bodies[event.body], "the"), phrase(event))

    return [(event.start, event.stop, text(event)) for event in told]


def chunk_caption(scene: Scene, start: int, chunk: int = 4) -> str:
    """What is seen in frames start ... start + chunk - 1: each visible body and where it goes *in this chunk*.

    In a recurrent film the shot is only named ("second scene a circle moves left"): colour and texture stay unsaid.
    """
    middle = start + (chunk - 1) / 2
    if scene.cuts:
        when = middle % scene.period if scene.period else middle
        shown = [cut for cut in scene.cuts if cut.start <= when] or [scene.cuts[0]]
        number = list(dict.fromkeys(cut.name for cut in scene.cuts)).index(shown[-1].name)
        again = "back to the " if middle != when or shown[-1].name in [cut.name for cut in shown[:-1]] else ""
        says = chunk_caption(shown[-1].shot, start, chunk)
        if scene.recipe == "recurrent":
            body = shown[-1].shot.bodies[0]
            says = _words("a", body.shape, verb(_heading(body, start, chunk)))
        return f"{again}{_ORDER[number]} scene {says}"
    texts = []
    for body in scene.bodies:
        now = states([body], np.array([[middle]]))
        if now.shown[0, 0] < 0.5:
            continue
        near = min(COLOURS, key=lambda word: float(np.abs(np.subtract(COLOURS[word], now.colour[0, 0])).sum()))
        texts.append(f"a {near} {body.shape} {verb(_heading(body, start, chunk))}")
    return " and ".join(texts) or "nothing"


def _heading(body: Body, start: int, chunk: int) -> str:
    """The direction word of the displacement over a chunk; below .0025 sides a frame it is still."""
    state = states([body], np.array([[start, start + max(chunk - 1, 1)]], dtype=float))
    dx, dy = (float(p[0, 1] - p[0, 0]) for p in (state.x, state.y))
    if max(abs(dx), abs(dy)) < 0.0025 * max(chunk - 1, 1):
        return "still"
    if abs(dx) > 2 * abs(dy):
        return "right" if dx > 0 else "left"
    if abs(dy) > 2 * abs(dx):
        return "down" if dy > 0 else "up"
    return ("down" if dy > 0 else "up") + "-" + ("right" if dx > 0 else "left")


def compose(before: Scene, after: Scene, index: int = 0) -> str:
    """A composed query: what of one body differs, "the same object as in the image but moving left and blue"."""
    old, new = before.bodies[index], after.bodies[index]
    changes = [verb(new.motion, participle=True)] if new.motion != old.motion else []
    changes += [getattr(new, key) for key in ("size", "colour", "shape") if getattr(new, key) != getattr(old, key)]
    changes += [new.texture.kind] if new.texture.kind != old.texture.kind else []
    return "the same object as in the image" + (" but " + " and ".join(changes) if changes else "")


ATTRIBUTES = (
    *COLOURS, *SHAPES, *SIZES, *ALL_MOTIONS, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"{shape} {motion}" for shape in SHAPES for motion in ALL_MOTIONS),
    *(f"body {kind}" for kind in TEXTURES), *(f"ground {kind}" for kind in TEXTURES), *(f"ground {tone}" for tone in TONES),
    *(f"camera {word}" for word in _CAMERA), *(f"light {word}" for word in ("normal", "dim", "bright", "spot")),
)  # fmt: skip


def attributes(scene: Scene) -> Float[Tensor, "d"]:
    """A bag of attributes (names in `ATTRIBUTES`), unit length: the dot product of two scenes is their cosine.

    Every body adds its colour, shape, size, motion, texture and the pairs colour-shape and shape-motion, so that scenes with the
    same words bound differently are not the same.
    """
    bag = torch.zeros(len(ATTRIBUTES))
    bodies = [body for cut in scene.cuts for body in cut.shot.bodies] if scene.cuts else scene.bodies
    for b in bodies:
        terms = (b.colour, b.shape, b.size, b.motion, f"{b.colour} {b.shape}", f"{b.shape} {b.motion}", f"body {b.texture.kind}")
        for term in terms:
            bag[_INDEX[term]] += 1
    ground = scene.background
    for term in (
        f"ground {ground.texture.kind}",
        f"ground {ground.tone}",
        f"camera {scene.camera.word}",
        f"light {scene.light.word}",
    ):
        bag[_INDEX[term]] += 0.5
    return bag / bag.norm()


_INDEX = {term: i for i, term in enumerate(ATTRIBUTES)}
