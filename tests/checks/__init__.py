"""The rules of the project as plain functions that return a list of complaints; the tests assert that it is empty.

`tests/checks/test_checks.py` shows each of them a defect that it must find.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ("data", "tokenizers", "diffusion", "block_diffusion", "sparse_attention", "quantization", "low_rank",
            "codecs", "restoration", "understanding", "foundations")  # fmt: skip


def all_notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook. `00_start.ipynb` is always in the list, so that its absence is an error and not an empty loop."""
    folder = root / "notebooks"
    return sorted({folder / "00_start.ipynb", *folder.glob("*.ipynb"), *folder.glob("papers/*.ipynb")})


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
