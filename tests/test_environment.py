"""environment.yml is never run by our checks, so this holds it to pyproject.toml and to what is installed."""

import re
import sys
import tomllib
from importlib.metadata import distributions, version

import pytest
import yaml
from checks import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
PYPI_NAME = {"pytorch-cpu": "torch"}
ALWAYS = {"torch", "jupyterlab", "matplotlib", "ipywidgets", "nbval", "einops", "numpy"}


def requirements(lines) -> dict[str, SpecifierSet]:
    found = [Requirement(line) for line in lines]
    return {PYPI_NAME.get(r.name.lower(), r.name.lower()): r.specifier for r in found}


RUNTIME = requirements(PROJECT["dependencies"])
DEV = requirements(PROJECT["optional-dependencies"]["dev"])
CONDA_LINES = [line for line in CONDA["dependencies"] if isinstance(line, str)]
CONDA_PACKAGES = requirements(line for line in CONDA_LINES if line.split()[0] not in ("python", "pip"))
PINS = requirements(line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))


def test_it_has_the_form_that_conda_reads():
    assert set(CONDA) == {"name", "channels", "dependencies"}
    assert CONDA["name"] == "minivid" and CONDA["channels"] == ["conda-forge"]


def test_names_are_the_projects():
    assert set(CONDA_PACKAGES) == set(RUNTIME) | ALWAYS


@pytest.mark.parametrize("name", sorted(CONDA_PACKAGES))
def test_lower_bounds_are_the_projects_and_admit_what_is_installed(name):
    assert CONDA_PACKAGES[name] == (RUNTIME | DEV)[name]
    assert CONDA_PACKAGES[name].contains(version(name).split("+")[0])


def test_python_range_is_the_projects():
    (line,) = (line for line in CONDA_LINES if line.split()[0] == "python")
    assert SpecifierSet(line.removeprefix("python ")) == SpecifierSet(PROJECT["requires-python"])
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


def test_pip_lines_exist_in_the_project():
    pip = next(line for line in CONDA["dependencies"] if isinstance(line, dict))["pip"]
    assert "-e ." in pip, "conda users need the package itself"
    assert {re.split(r"[ <>=!~\[]", line)[0].lower() for line in pip if line != "-e ."} <= set(RUNTIME | DEV)


def test_constraints_pin_all_we_ask_for():
    """Exact versions, no address, no hash; torch without the CPU wheel's local label, so that both builds fit."""
    for name, specifier in (RUNTIME | DEV).items():
        pin = next(iter(PINS[name]))
        assert pin.operator == "==" and specifier.contains(pin.version), name
        assert version(name).split("+")[0] == pin.version, f"{name} {version(name)} is installed, {pin} is pinned"
    assert not re.search(r"://|--hash|\+cpu", (ROOT / "constraints.txt").read_text())


def test_every_pin_runs_on_the_oldest_python_we_promise():
    """Debian 12 has 3.11.2, and a pin that wants 3.11.5 makes the set-up fail there."""
    oldest = min(s.version for s in SpecifierSet(PROJECT["requires-python"]) if s.operator == ">=") + ".0"
    wants = {d.name: d.metadata.get("Requires-Python") for d in distributions()}
    assert {name: w for name, w in wants.items() if w and not SpecifierSet(w).contains(oldest)} == {}


def test_folders_are_where_readers_look():
    assert all((ROOT / folder).is_dir() for folder in ("minivid", "notebooks", "tests"))
    assert not (ROOT / "src").exists()
