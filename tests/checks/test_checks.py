"""The checks themselves: each is shown a sound example, which it must accept, and a defect, which it must find."""

import os
import subprocess
import sys

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel

from checks import ROOT, notebooks, palette, source
from checks.drive import drive

ALT = "a red circle moves left in eight frames"
PICTURE = new_output("display_data", {"text/html": f'<img alt="{ALT}" src="data:image/png;base64,AAAA">'})


@pytest.fixture
def package(tmp_path):
    """Writes files of a package {name: text}; gives its folder."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "minivid" / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "minivid"

    return write


# Imports


def test_allowed_imports_pass(package):
    folder = package(
        world__scene="import torch\n",
        core__model="from minivid.world import scene\nfrom . import noise\n",
        core__noise="from ..world.scene import draw\n",
        lab__show="from minivid import core\n",
        tokenizers__simvq="from minivid.core.baselines import vq\nfrom minivid import world\n",
        low_rank__vdmini__net="from .parts import a\nfrom minivid.low_rank.vdmini import parts\n",
        claims__simvq="from minivid.tokenizers import simvq\nfrom minivid.lab import claims\n",
    )
    assert source.import_problems(folder) == []


@pytest.mark.parametrize(
    "name, text",
    [
        ("world__scene", "from minivid.core import model"),
        ("world__scene", "from ..core import model"),
        ("core__model", "def f():\n    import minivid.lab.show"),
        ("core__model", "from minivid.tokenizers.simvq import SimVQ"),
        ("core__model", "from minivid import lab"),
        ("lab__show", "from minivid.claims import simvq"),
        ("tokenizers__simvq", "from minivid.tokenizers import fqgan"),
        ("tokenizers__simvq", "from . import fqgan"),
        ("tokenizers__simvq", "from .fqgan import x"),
        ("tokenizers__simvq", "import minivid.diffusion.wan"),
        ("tokenizers__simvq", "from minivid.lab import measure"),
        ("claims__simvq", "from tests.checks import source"),
        ("helpers__things", "import torch"),
    ],
)
def test_forbidden_imports_are_found(package, name, text):
    assert len(source.import_problems(package(**{name: text}))) == 1


# Budgets


def test_functions_too_long_or_too_wide_are_found(package):
    fine = 'def f(self, a, b, c, d, e, f, g, h):\n    """Ten\n    lines\n    of\n    text."""\n' + "    a = 1\n" * 49
    long = "def f():\n" + "    a = 1\n" * 50
    wide = "def f(a, b, c, d, e, f, g, h, *, i): return a\n"
    folder = package(fine=fine, long=long, wide=wide)
    assert source.function_problems(folder / "fine.py") == []
    assert "51 lines" in source.function_problems(folder / "long.py")[0]
    assert "9 arguments" in source.function_problems(folder / "wide.py")[0]


def test_only_code_counts_as_code(package):
    text = '"""A\ncard."""\n\n# why\nx = """\ntext\n"""\n\n\ndef f():\n    """Says."""\n    return x  # so\n'
    assert source.code_lines(package(a=text) / "a.py") == 5


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import dump",
        "torch.load('x')",
        "torch.save(x, 'x')",
        "np.load('x', allow_pickle=True)",
        "def f():\n    raise NotImplementedError",
    ],
)
def test_unsafe_and_unfinished_code_is_found(package, text):
    assert len(source.safety_problems(package(a=text) / "a.py")) == 1
    assert source.safety_problems(package(b="import json\nx = np.load('x')\n") / "b.py") == []


TRACES = ["/".join(["", "root", "x"]), "/".join(["", "tmp", "x"]), "../" + "shared/x", "# TO" + "DO: more"]


@pytest.mark.parametrize("text", TRACES)
def test_machine_paths_and_notes_are_found(package, text):
    assert len(source.text_problems(package(a=text) / "a.py")) == 1
    assert source.text_problems(package(b="b/root/x and network/work/x: to do so") / "b.py") == []
    assert source.text_problems(package(c="<img src='data:image/png;base64,aX" + "XXb/" + "tmp/x='>") / "c.py") == []


# Colours


@pytest.mark.parametrize(
    "text",
    [
        "ax.plot(x, y, color='red')",
        "ax.plot(x, y, 'g--')",
        "ax.bar(x, y, color=['#0072B2', '#FF0000'])",
        "ax.imshow(x, cmap='viridis')",
        "ax.imshow(x, cmap='hot')",
        "ax.imshow(x, cmap=plt.cm.jet)",
        "html = '<b style=\"color:#ff0000\">'",
        "ax.plot(x, y, color='C1')",
    ],
)
def test_other_colours_are_found(package, text):
    assert palette.colour_problems(package(a=text) / "a.py")


def test_our_colours_pass(package):
    text = (
        "ax.plot(x, y, '--', color='#0072B2')\nax.plot(x, y, color='0.5')\nax.imshow(x, cmap='cividis')\n"
        "words = ('red', 'green', 'hot', 'autumn')\nax.text(0, 0, 'a', color='black')\n"
        "s = '#ddd'\nax.imshow(x, cmap=SIGNED)\nax.bar(x, y, color=[PALETTE['blue'], '#999'])"
    )
    assert palette.colour_problems(package(a=text) / "a.py") == []


# Notebooks as files


def book(*cells, words=600):
    """A notebook that passes, with more code cells (source or cell) at its end."""
    text = f"# Title\n\n![{ALT}](a.png)\n\n" + "word " * words
    made = [new_markdown_cell(text), new_code_cell("1", execution_count=1, outputs=[PICTURE])]
    made += [c if isinstance(c, dict) else new_code_cell(c, execution_count=i) for i, c in enumerate(cells, 2)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=made, metadata=kernel)


def problems(tmp_path, made, edit_source=lambda text: text, folder="papers"):
    """Complaints about a notebook written to a file, with its source beside it."""
    path = tmp_path / folder / "a.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(made, path)
    twin = tmp_path / "a.py"
    twin.write_text(edit_source(jupytext.writes(made, "py:percent")))
    return notebooks.static_problems(path, twin)


def test_a_sound_notebook_passes(tmp_path):
    tagged = new_code_cell("1/0", execution_count=2, metadata={"tags": ["raises-exception"]})
    tagged.outputs = [new_output("error", ename="ZeroDivisionError", evalue="no", traceback=[])]
    assert problems(tmp_path, book(tagged, "x = 1")) == []


def png(alt):
    return new_output("display_data", {"image/png": "AAAA"}, metadata={"image/png": {"alt": alt}} if alt else {})


def cell(**more):
    return new_code_cell("1", **({"execution_count": 2} | more))


OTHER_KERNEL = {"kernelspec": {"name": "mine", "display_name": "Mine", "language": "python"}}


@pytest.mark.parametrize(
    "made, complaint",
    [
        (lambda: book(cell(execution_count=None)), "no execution count"),
        (lambda: book(cell(execution_count=1)), "execution count 1 after 1"),
        (lambda: book(cell(outputs=[new_output("error", ename="E", evalue="no", traceback=[])])), "shows an error"),
        (lambda: book(cell(outputs=[png(None)])), "without alt text"),
        (lambda: book(new_markdown_cell('<img src="a.png">')), "without alt text"),
        (lambda: book(new_markdown_cell("![](a.png)")), "without alt text"),
        (lambda: book(new_markdown_cell("<svg><path/></svg>")), "without title"),
        (lambda: book("x;"), "nbval doesn't obey"),
        (lambda: book("x = 1\n" * 21), "21 lines"),
        (lambda: book(*["x"] * 39), "41 cells"),
        (lambda: book(words=300), "words"),
        (lambda: book(words=1200), "words"),
        (lambda: book(cell(outputs=[new_output("stream", text="x" * 1_600_000)])), "MB"),
        (lambda: new_notebook(cells=[new_markdown_cell("word " * 600)], metadata=book().metadata), "no picture"),
        (lambda: new_notebook(cells=book().cells, metadata=OTHER_KERNEL), "not python3"),
        (lambda: new_notebook(cells=book().cells, metadata=dict(book().metadata, widgets={})), "widget state"),
    ],
)
def test_defects_of_notebooks_are_found(tmp_path, made, complaint):
    assert [complaint in p for p in problems(tmp_path, made())] == [True]


def test_a_source_that_has_moved_on_is_found(tmp_path):
    assert "differs" in problems(tmp_path, book("x = 1"), lambda text: text.replace("x = 1", "x = 2"))[0]
    assert "cells" in problems(tmp_path, book("x = 1"), lambda text: text + "\n# %%\ny = 1\n")[0]
    assert "missing" in notebooks.static_problems(tmp_path / "papers/a.ipynb", tmp_path / "b.py")[0]
    assert "missing" in notebooks.static_problems(tmp_path / "papers/b.ipynb")[0]


def test_a_chapter_has_its_own_budget(tmp_path):
    assert problems(tmp_path, book(*["x"] * 60, words=3000), folder="chapter") == []


# Widgets


def drive_source(text):
    kernel = RunningKernel(CURRENT_ENV_KERNEL_NAME)
    kernel.execute_cell_input("import ipywidgets as W\n" + text)
    result = drive(kernel)
    kernel.stop()
    return result


DEFECTS = {  # widget that fails at a value other than its first -> where the drive must see it
    "W.interact(lambda x: 1 / (x - 9), x=W.IntSlider(3, 0, 9))": "IntSlider('x') at 9",
    "a = W.IntSlider(3, 0, 9); a.observe(lambda c: 1 / c.new, 'value')": "IntSlider('') at 0",
    "b = W.Dropdown(options=[1, 2, 0]); b.observe(lambda c: 1 / c.new, 'value')": "Dropdown('') at 2",
    "c = W.Button(description='go'); c.on_click(lambda b: 1 / 0)": "Button('go') at a click",
    "o = W.Output(); d = W.Checkbox()\ndef f(_):\n    with o: 1 / 0\nd.observe(f, 'value')": "Checkbox('') at True",
    "e = W.FileUpload(); e.observe(lambda c: 1 / 0, 'value')": "FileUpload('Upload') at ",
    "p = W.Play(min=0, max=5); p.observe(lambda c: 1 / (c.new - 5), 'value')": "Play('') at 5",
    "r = W.IntRangeSlider(value=(1, 2), max=4); r.observe(lambda c: 1 / (c.new[1] - c.new[0]), 'value')": "at (0, 0)",
}


def test_errors_at_other_values_are_found():
    errors = drive_source("\n".join(DEFECTS))["errors"]
    assert all("ZeroDivisionError" in e for e in errors)
    assert [text for text, at in DEFECTS.items() if not any(at in e for e in errors)] == [], errors


def test_sound_widgets_are_driven_through_all_values():
    text = (
        "seen = []\ns = W.IntSlider(3, 0, 9); s.observe(lambda c: seen.append(c.new), 'value')\n"
        "W.interact(lambda x: x, x=W.Dropdown(options=['a', 'b'])); W.SelectMultiple(options=[1, 2]); W.IntProgress()"
    )
    result = drive_source(text)
    assert result["errors"] == []
    assert [d for d in result["driven"] if "IntSlider" in d] == [f"IntSlider('') at {v}" for v in (0, 9, 3)]
    assert not [d for d in result["driven"] if "Progress" in d]


# pytest itself, as conftest.py and the Makefile set it up


def pytest_run(folder, *flags, ci="1"):
    """Run pytest on a folder with this project's conftest; gives its output."""
    (folder / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers = gpu\npythonpath = {ROOT}/tests\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, "."]
    return subprocess.run(command, cwd=folder, env=os.environ | {"CI": ci}, capture_output=True, text=True).stdout


def test_a_skip_fails_in_ci(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_a(): pytest.skip('no tool')\n@pytest.mark.gpu\ndef test_gpu(): pytest.skip('no gpu')\n"
    )
    assert "2 skipped" in pytest_run(tmp_path, ci="")
    assert "1 failed, 1 skipped" in pytest_run(tmp_path)
    (tmp_path / "test_a.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    assert "1 error" in pytest_run(tmp_path)


def test_a_notebook_is_compared_and_its_widgets_driven(tmp_path):
    """A number is compared; a duration or an address is not. A widget that fails at another value fails in the end."""

    def printed(source, text, count):
        return new_code_cell(source, execution_count=count, outputs=[new_output("stream", text=text)] if text else [])

    cells = [
        printed("print('took 1.5 s at', object())", "took 27 s at <object object at 0x7f5b00000000>\n", 1),
        printed("print('loss', 0.25)", "loss 0.24\n", 2),
        printed("import ipywidgets as W\na = W.IntSlider(3, 0, 9); a.observe(lambda c: 1 / c.new, 'value')", "", 3),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    out = pytest_run(tmp_path, "--nbval", "--nbval-current-env", f"--nbval-sanitize-with={ROOT}/tests/nbval.cfg")
    assert "2 failed, 2 passed" in out and "loss 0.25" in out and "IntSlider('') at 0" in out


def test_wrong_shapes_are_caught(tmp_path, request):
    """The annotations of the package are checked in tests by a switch in pyproject.toml; here is what it does."""
    assert request.config.getoption("--jaxtyping-packages") == "minivid,beartype.beartype"
    (tmp_path / "tiny.py").write_text(
        "from jaxtyping import Float\nfrom torch import Tensor\n"
        "def add(x: Float[Tensor, 'b c'], y: Float[Tensor, 'b c']): return x + y\n"
    )
    (tmp_path / "test_tiny.py").write_text(
        "import sys, torch; sys.path.insert(0, '.'); from tiny import add\n"
        "def test_good(): add(torch.ones(2, 3), torch.ones(2, 3))\n"
        "def test_bad(): add(torch.ones(2, 3), torch.ones(2, 1))\n"
    )
    assert "1 failed, 1 passed" in pytest_run(tmp_path, "--jaxtyping-packages=tiny,beartype.beartype")
