"""What can be seen in a notebook file without running it."""

import re
from pathlib import Path

import jupytext
import nbformat

from checks import ROOT, name

KINDS = {  # megabytes, cells, words
    "lesson": (1.5, 40, (500, 1000)),
    "chapter": (3.0, None, None),
}
MAX_CODE_LINES = 20


def twin(path: Path, root: Path = ROOT) -> Path:
    """The py:percent source of a notebook."""
    return root / "notebooks" / "source" / path.relative_to(root / "notebooks").with_suffix(".py")


def words(book) -> int:
    """Words that a reader reads: no code blocks, tags, formulas or addresses."""
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for pattern in (r"```.*?```", r"<[^>]+>", r"\$\$.*?\$\$", r"\$[^$]*\$", r"\]\([^)]*\)"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return len(re.findall(r"[A-Za-z][\w'-]*", text))


def pair_problems(path: Path, source: Path) -> list[str]:
    """The twin holds the same cells, in the same order, with the same tags."""
    if not source.exists():
        return [f"{source.name} (py:percent twin) is missing: a notebook is written there, then `make notebooks`"]
    ours, theirs = nbformat.read(path, 4), jupytext.read(source)

    def shape(book):
        return [(c.cell_type, c.source.strip(), sorted(c.metadata.get("tags", []))) for c in book.cells]

    if len(ours.cells) != len(theirs.cells):
        return [f"{len(ours.cells)} cells, but its source has {len(theirs.cells)}: run `make notebooks`"]
    return [f"cell {i} differs from its source: run `make notebooks`"
            for i, (a, b) in enumerate(zip(shape(ours), shape(theirs), strict=True)) if a != b]  # fmt: skip


def output_problems(book) -> list[str]:
    """Every cell was run, once, in order, without an error. nbval compares *nothing* in a cell that has no count."""
    problems, last = [], 0
    for i, cell in enumerate(book.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        count = cell.get("execution_count")
        if count is None:
            problems.append(f"cell {i} has no execution count, so its output is never checked")
        elif count <= last:
            problems.append(f"cell {i} has execution count {count} after {last}")
        last = count or last
        if cell.source.rstrip().endswith(";"):
            problems.append(f"cell {i} ends with ';', which nbval doesn't obey: write `_ = ...`")
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                problems.append(f"cell {i} shows an error: {output.ename}: {output.evalue}")
    return problems


def alt_problems(book) -> list[str]:
    """A picture says in words what it shows, for a reader who can't see it."""
    problems, pictures = [], 0
    for i, cell in enumerate(book.cells):
        html = cell.source if cell.cell_type == "markdown" else ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            html += "".join(data.get("text/html", ""))
            pictures += any(key.startswith("image/") for key in data)
            for kind in (key for key in data if key.startswith("image/")):
                if "text/html" not in data and not output.metadata.get(kind, {}).get("alt"):
                    problems.append(f"cell {i} shows a bare {kind} without alt text: show it with minivid.lab.show")
        for tag in re.findall(r"<(?:img|video)\b[^>]*>", html, flags=re.DOTALL):
            pictures += 1
            if not re.search(r"""(?:alt|aria-label)=["'][^"']{8,}""", tag):
                problems.append(f"cell {i} has an <img> without alt text")
        for alt in re.findall(r"!\[([^]]*)\]\(", cell.source if cell.cell_type == "markdown" else ""):
            pictures += 1
            if len(alt) < 8:
                problems.append(f"cell {i} has a picture without alt text")
        for tag in re.findall(r"<svg\b.*?</svg>", html, flags=re.DOTALL):
            pictures += 1
            if "<title" not in tag and "aria-label" not in tag:
                problems.append(f"cell {i} has an <svg> without title or aria-label")
    return problems + ([] if pictures else ["it has no picture"])


def budget_problems(path: Path, book, kind: str) -> list[str]:
    megabytes, most_cells, range_of_words = KINDS[kind]
    problems = []
    if (size := path.stat().st_size / 1e6) > megabytes:
        problems.append(f"{size:.1f} MB, more than {megabytes}")
    if most_cells and len(book.cells) > most_cells:
        problems.append(f"{len(book.cells)} cells, more than {most_cells}")
    if range_of_words and not range_of_words[0] <= words(book) <= range_of_words[1]:
        problems.append(f"{words(book)} words, not {range_of_words[0]} to {range_of_words[1]}")
    for i, cell in enumerate(book.cells):
        if cell.cell_type == "code" and len(cell.source.splitlines()) > MAX_CODE_LINES:
            problems.append(f"cell {i} has {len(cell.source.splitlines())} lines of code, more than {MAX_CODE_LINES}")
    return problems


def static_problems(path: Path, source: Path | None = None) -> list[str]:
    """All of the above for one notebook; complaints start with its name."""
    if not path.exists():
        return [f"{name(path)} is missing"]
    book = nbformat.read(path, 4)
    kind = "lesson" if path.parent.name == "papers" else "chapter"
    problems = output_problems(book) + alt_problems(book) + budget_problems(path, book, kind)
    problems += pair_problems(path, source or twin(path))
    if book.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("its kernel is not python3")
    if "widgets" in book.metadata:
        problems.append("it carries widget state: run `make notebooks`")
    return [f"{name(path)}: {problem}" for problem in problems]
