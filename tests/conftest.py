"""What all tests share: one thread, fixed seeds, patience for notebook cells, no quiet skips in CI.

`--jaxtyping-packages=minivid,beartype.beartype` (pyproject.toml) checks every annotated shape, so nothing here may
import minivid: the checks are installed when the package is first imported.
"""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; inherited by the notebooks' kernels
os.environ.setdefault("TQDM_DISABLE", "1")  # a bar is for who waits; as notebooks/record.py

import hypothesis  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from checks.drive import Widgets  # noqa: E402

CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

torch.set_num_threads(1)
matplotlib.use("agg")  # not by MPLBACKEND: the kernels would inherit it and show no figure
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The package never uses global random state; a test that does still gives the same each time."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def untyped():
    """Switches the shape checks off, to see what a reader sees, who has none, when a shape is wrong."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items):
    last = {}  # cell of each notebook
    for item in items:
        if hasattr(item, "output_timeout"):  # a notebook cell; nbval waits only 5 s for its output
            item.output_timeout = 60
            item.add_marker(pytest.mark.timeout(0))  # nbval has its own, which leaves the next cell intact
            last[item.parent] = item
    for book, cell in last.items():  # while its kernel lives
        items.insert(items.index(cell) + 1, Widgets.from_parent(book, name="widgets"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        report.outcome, report.longrepr = "failed", f"skipped, and in CI nothing may be: {call.excinfo.value}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if CI and report.skipped:
        report.outcome, report.longrepr = "failed", f"{collector.nodeid} was skipped, and in CI nothing may be"
    return report
