"""A fresh clone becomes usable by the Makefile's own set-up step."""

import os
import shutil
import subprocess

import pytest
from checks import ROOT

HAS_UV = shutil.which("uv") is not None and subprocess.run(["uv", "--version"], capture_output=True).returncode == 0


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not HAS_UV and not os.environ.get("CI"), reason="without uv the set-up takes minutes: only in CI")
def test_a_fresh_clone_sets_itself_up(tmp_path):
    clone = tmp_path / "clone"
    inherited = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # this test may itself run under make
    env = {key: value for key, value in os.environ.items() if key not in inherited} | {"LC_ALL": "C"}

    def run(*command, where=clone):
        out = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True)
        assert out.returncode == 0, f"{' '.join(command)}\n{out.stdout[-2000:]}{out.stderr[-4000:]}"
        return out.stdout

    run("git", "clone", "--quiet", str(ROOT), str(clone), where=tmp_path)
    run("make", ".venv/ready")
    assert "up to date" in run("make", ".venv/ready"), "the stamp file must make the second call instant"
    code = "import minivid, minivid.world, minivid.core, minivid.lab; print(minivid.__file__)"
    python = str(clone / ".venv/bin/python")
    assert run(python, "-c", code, where=tmp_path).strip() == str(clone / "minivid/__init__.py")
