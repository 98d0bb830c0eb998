"""Run notebooks from their sources and store them with their outputs: `python notebooks/record.py [papers/simvq ...]`.

A notebook is written in notebooks/source/NAME.py (py:percent); notebooks/NAME.ipynb is what readers open. Cells keep
their ids, and what differs from run to run (times of execution, widget state, details of the machine) is left out, so
that a second recording changes nothing. One thread: two give other last digits.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before a kernel starts
os.environ["TQDM_DISABLE"] = "1"  # a bar at 0 % is no output to read

import jupytext
import nbclient
import nbformat
from jupytext.combine import combine_inputs_with_outputs

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def steady(book):
    """Remove or number what another run, or another machine, would write differently."""
    book.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    views = 0
    for cell in book.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in ("tags", "jupyter", "collapsed")}
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                views += 1
                output["data"][WIDGET]["model_id"] = f"{views:032x}"
            if "traceback" in output:
                output["traceback"] = [line.replace(f"{HERE.parent}/", "") for line in output["traceback"]]
    return book


def record(source: Path) -> Path:
    """Run one source; returns the notebook's path. An error in a cell is raised; the old notebook stays as it was."""
    target = HERE / source.relative_to(HERE / "source").with_suffix(".ipynb")
    target.parent.mkdir(exist_ok=True)
    book = jupytext.read(source)
    if target.exists():
        book = combine_inputs_with_outputs(book, nbformat.read(target, 4))  # keeps the ids of unchanged cells
    options = {"timeout": 600, "kernel_name": "python3", "store_widget_state": False}
    nbclient.NotebookClient(book, **options, resources={"metadata": {"path": str(target.parent)}}).execute()
    nbformat.write(steady(book), target)
    return target


if __name__ == "__main__":
    names = sys.argv[1:] or [
        f.relative_to(HERE / "source").with_suffix("").as_posix() for f in sorted((HERE / "source").rglob("*.py"))
    ]
    for name in names:
        print(record(HERE / "source" / f"{name}.py"), flush=True)
