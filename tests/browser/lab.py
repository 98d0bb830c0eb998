"""JupyterLab in a real Chromium: start a server, open a notebook, run it, turn a knob, look for errors.

    with server(folder) as url, browser() as page:
        book = Notebook(page, url, "papers/simvq.ipynb")
        book.run_all()
        book.step_slider()
        assert page.problems == []
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()  # fmt: skip
# The menu "Run all cells" is a race (it sometimes does nothing); the command waits for the kernel first.
RUN_ALL = """async () => {
  const app = window.jupyterapp; await app.restored;
  const widget = app.shell.currentWidget;
  await widget.context.ready; await widget.sessionContext.ready;
  await widget.sessionContext.session.kernel.info;
  return await app.commands.execute('notebook:run-all-cells');
}"""
PICTURE = ".widget-image, .jupyter-widgets .jp-OutputArea-output img"
CAPTION = ".widget-html, .widget-htmlmath, .widget-label"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(root: Path, state: Path):
    """A JupyterLab server on `root`, its settings in the empty folder `state`; gives its address."""
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}  # fmt: skip
    env = os.environ | {key: str(Path(state).resolve() / value) for key, value in folders.items()}
    quiet = Path(env["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))  # a toast would cover the corner
    port = free_port()
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--allow-root", "--IdentityProvider.token=", "--ServerApp.password=",
               "--ServerApp.disable_check_xsrf=True", "--LabApp.expose_app_in_browser=True",
               f"--ServerApp.root_dir={root}"]  # fmt: skip
    with open(Path(state) / "server.log", "w") as log:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=root)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/api", timeout=5).read()
                break
            assert process.poll() is None, (Path(state) / "server.log").read_text()
            time.sleep(0.1)
        else:
            raise TimeoutError((Path(state) / "server.log").read_text())
        yield url
    finally:
        with contextlib.suppress(OSError):  # signals leave it hanging
            urllib.request.urlopen(urllib.request.Request(f"{url}/api/shutdown", method="POST"), timeout=10).read()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 1000):
    """A page of a headless Chromium; `page.problems` gathers script errors and failed requests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(120_000)  # generous: a busy machine is slow, not broken
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(f"script error: {error}"))
        page.on("requestfailed", lambda request: note_failure(page, request))
        yield page
        chromium.close()


def note_failure(page, request):
    """Requests that the page itself gives up on (it closes, or asks again) are no failure."""
    if "ERR_ABORTED" not in (request.failure or ""):
        page.problems.append(f"request failed: {request.url} {request.failure}")


class Notebook:
    """One open notebook. `run_all`, then `step_slider`, `picture`, `caption`, `screenshot`."""

    def __init__(self, page, url: str, path: str):
        self.page = page
        page.goto(f"{url}/lab/tree/{path}?reset")
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext")

    def run_all(self) -> None:
        """Run all cells; an error in a cell is an AssertionError that shows the cell's output."""
        worked = self.page.evaluate(RUN_ALL)
        errors = self.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']")
        assert worked, f"a cell failed: {errors.all_inner_texts()[-1:]}"

    def picture(self, number: int = 0) -> str:
        """The address of the widgets' picture: it changes exactly when the picture does."""
        return self.page.locator(PICTURE).nth(number).get_attribute("src")

    def captions(self) -> list[str]:
        return self.page.locator(CAPTION).all_text_contents()  # also of cells that are out of sight

    def readout(self, number: int = 0) -> str:
        return self.page.locator(".widget-readout").nth(number).inner_text()

    def step_slider(self, number: int = 0, key: str = "ArrowRight", picture: int = 0) -> None:
        """One step of a slider by keyboard (exact, unlike dragging); waits until the picture has changed."""
        old = self.picture(picture)
        self.page.locator(".noUi-handle").nth(number).focus()
        self.page.keyboard.press(key)
        self.page.wait_for_function(
            "([css, i, old]) => document.querySelectorAll(css)[i].src !== old", arg=[PICTURE, picture, old]
        )

    def screenshot(self, path: Path) -> None:
        self.page.screenshot(path=str(path))
