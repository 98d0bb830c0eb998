"""Draws docs/model.svg, the figure of the README: the model and the process, and where each chapter plugs in.

    python scripts/readme_figure.py
"""

from pathlib import Path

INK, PALE, LINE = "#222222", "#f4f4f2", "#555555"
SEAMS = {  # chapter -> (Okabe-Ito colour, what it changes)
    "02": ("#0072B2", "tokenizers: the bottleneck"),
    "03": ("#E69F00", "diffusion: inlet, path, guidance"),
    "04": ("#009E73", "block diffusion: rollout, cache"),
    "05": ("#CC79A7", "sparse attention: who reads whom"),
    "06": ("#56B4E9", "quantization: bits of every layer"),
    "07": ("#D55E00", "low rank: weights of every layer"),
}
W, H = 980, 470


def text(x, y, words, size=15, anchor="middle", weight="normal", fill=INK, family="sans-serif"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}" '
            f'font-family="{family}">{words}</text>')


def box(x, y, w, h, title, below="", fill="white"):
    middle = y + h / 2 + 5 - (9 if below else 0)
    out = [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" stroke="{INK}" stroke-width="1.5"/>',
           text(x + w / 2, middle, title, 16, weight="bold")]
    return out + ([text(x + w / 2, middle + 19, below, 13, fill=LINE, family="monospace")] if below else [])


def arrow(*points, words="", at=None):
    path = " ".join(f"{x},{y}" for x, y in points)
    out = [f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.8" marker-end="url(#tip)"/>']
    return out + ([text(*at, words, 13, fill=LINE)] if words else [])


def seam(x, y, chapter):
    colour = SEAMS[chapter][0]
    return [f'<circle cx="{x}" cy="{y}" r="13" fill="{colour}" stroke="white" stroke-width="2"/>',
            text(x, y + 5, chapter, 13, weight="bold", fill="white" if chapter in ("02", "04", "07") else INK)]


def process() -> list[str]:
    """The upper row: from a clip and a caption to a clip."""
    parts = [text(24, 34, "the process", 17, "start", "bold")]
    parts += box(24, 60, 120, 62, "tokenizer", "encode", PALE) + arrow((144, 91), (198, 91), words="latent", at=(170, 81))
    parts += box(200, 60, 150, 62, "path", "a x + b end + c n", PALE) + arrow((350, 91), (414, 91), words="x, t", at=(380, 81))
    parts += box(416, 60, 150, 62, "model", "x, t, cond", "white")
    parts += arrow((566, 91), (624, 91), words="out", at=(592, 81)) + box(626, 60, 150, 62, "sampler", "clean, then step", PALE)
    parts += arrow((776, 91), (838, 91), words="latent", at=(806, 81)) + box(840, 60, 116, 62, "tokenizer", "decode", PALE)
    parts += arrow((701, 122), (701, 150), (491, 150), (491, 126), words="again, with less noise", at=(596, 168))
    parts += [text(84, 146, "a clip b c f h w", 13, fill=LINE), text(898, 146, "a new clip", 13, fill=LINE)]
    parts += [*arrow((330, 34), (491, 34), (491, 57)), text(322, 39, "caption, known frames", 13, "end", fill=LINE)]
    return parts


def inside() -> list[str]:
    """The lower row: what the model is made of."""
    parts = [text(24, 212, "inside the model", 17, "start", "bold")]
    parts += [f'<polyline points="416,122 250,190" stroke="{LINE}" stroke-dasharray="4 4" fill="none"/>',
              f'<polyline points="566,122 956,190" stroke="{LINE}" stroke-dasharray="4 4" fill="none"/>']
    parts += [f'<rect x="200" y="232" width="620" height="128" rx="10" fill="{PALE}" stroke="{INK}" stroke-width="1.5"/>',
              text(510, 351, "trunk: block(x, ctx), six times", 14, fill=LINE)]
    parts += box(40, 258, 116, 62, "inlet", "patches") + arrow((156, 289), (220, 289), words="tokens", at=(180, 279))
    parts += box(222, 258, 216, 62, "attention", "(q, k, v, where) -> o") + arrow((438, 289), (466, 289))
    parts += box(468, 258, 150, 62, "words", "cross-attention") + arrow((618, 289), (646, 289))
    parts += box(648, 258, 156, 62, "feed-forward", "fc1, fc2") + arrow((804, 289), (858, 289))
    return parts + box(860, 258, 96, 62, "head", "out")


def draw() -> str:
    """The whole figure as SVG."""
    parts = process() + inside()
    marks = [(144, 60, "02"), (956, 60, "02"), (350, 60, "03"), (566, 60, "03"), (156, 258, "03"), (776, 60, "04"),
             (410, 258, "04"), (438, 258, "05"), (790, 232, "06"), (820, 232, "07")]
    for mark in marks:
        parts += seam(*mark)
    for i, (chapter, (_, says)) in enumerate(SEAMS.items()):
        x, y = 40 + 320 * (i % 3), 400 + 38 * (i // 3)
        parts += [*seam(x, y, chapter), text(x + 22, y + 5, says, 15, "start")]
    tip = ('<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
           f'<path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker></defs>')
    label = "A clip is encoded, mixed with noise, cleaned step by step, decoded; dots mark where chapters plug in."
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" role="img" aria-label="{label}">'
            f'<rect width="{W}" height="{H}" fill="white"/>{tip}{"".join(parts)}</svg>\n')


if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("docs/model.svg").write_text(draw())
