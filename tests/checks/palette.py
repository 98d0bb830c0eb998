"""Colours that everybody can tell apart: Okabe-Ito for categories, cividis for magnitude, blue-orange for signs."""

import ast
import re
from pathlib import Path

OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
NEUTRAL = {"black", "white", "gray", "grey", "none", "k", "w", "inherit", "auto", "face", "lightgray", "lightgrey",
           "dimgray", "dimgrey", "darkgray", "darkgrey", "transparent"}  # fmt: skip
MAPS = {"cividis", "cividis_r", "gray", "gray_r", "grey", "grey_r"}
# Names that mean a colour map wherever they stand (others, like "autumn" or "cool", are also plain words).
BAD_MAPS = {"jet", "rainbow", "gist_rainbow", "viridis", "plasma", "inferno", "magma", "turbo", "hsv", "Spectral",
            "RdYlGn", "RdGn", "PiYG", "PRGn", "BrBG", "coolwarm", "bwr", "seismic", "nipy_spectral", "tab10", "tab20",
            "Set1", "Set2", "Paired"}  # fmt: skip
COLOUR_ARGUMENTS = {"color", "colors", "c", "facecolor", "facecolors", "edgecolor", "edgecolors", "ecolor", "fc", "ec",
                    "markerfacecolor", "markeredgecolor", "mfc", "mec", "button_color", "bar_color"}  # fmt: skip
HEX = re.compile(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})(?![0-9a-zA-Z])")


def allowed(colour: str) -> bool:
    """Okabe-Ito, a pure grey, or a neutral name; a fraction like "0.5" is matplotlib's grey."""
    text = colour.lower()
    if HEX.fullmatch(text):
        digits = text[1:] if len(text) == 7 else "".join(2 * d for d in text[1:])
        return f"#{digits}" in OKABE_ITO or digits[:2] == digits[2:4] == digits[4:]
    return text in NEUTRAL or re.fullmatch(r"[01]?\.\d+|[01]", text) is not None


def texts(node: ast.AST) -> list[str]:
    """The strings in an expression, keys of a lookup (`PALETTE["blue"]`) left out."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    inside = [node.value] if isinstance(node, ast.Subscript) else ast.iter_child_nodes(node)
    return [text for child in inside for text in texts(child)]


def colour_problems(path: Path) -> list[str]:
    problems = []

    def complain(node, what):
        problems.append(f"{path.name}:{node.lineno} {what}: use Okabe-Ito, cividis, or the blue-orange map")

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in BAD_MAPS:
                complain(node, f"names the colour map {node.value}")
            for colour in HEX.findall(node.value):
                if not allowed(colour):
                    complain(node, f"has the colour {colour}")
        if isinstance(node, ast.Attribute) and node.attr in BAD_MAPS and ast.unparse(node.value).endswith("cm"):
            complain(node, f"uses the colour map {node.attr}")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                for text in texts(keyword.value):
                    if keyword.arg == "cmap" and text not in MAPS | BAD_MAPS:
                        complain(node, f"uses the colour map {text}")
                    if keyword.arg in COLOUR_ARGUMENTS and not text.startswith("#") and not allowed(text):
                        complain(node, f"uses the colour {text!r}")
            if isinstance(node.func, ast.Attribute) and node.func.attr == "plot":
                for value in node.args:
                    if isinstance(value, ast.Constant) and re.search("[rgbcmy]", str(value.value)):
                        complain(node, f"plots with the format {value.value!r}, which has a colour")
    return problems
