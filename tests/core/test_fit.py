"""Training survives: a kill at any moment, two processes instead of one, a loss that explodes, a foreign checkpoint."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from minivid.core import fit, weights

SCRIPT = textwrap.dedent("""
    import sys, time, torch
    from torch import nn
    from minivid.core import fit, weights
    torch.set_num_threads(1)
    fit.processes()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2))
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    state = fit.State({"model": model, "opt": opt, "ema": fit.Ema(model)})
    def step(state, batch, generator):
        loss = (state.model(batch + 0.1 * fit.normal(*batch.shape, generator=generator)) - batch[:, :2]).square().mean()
        state.opt.zero_grad(); loss.backward(); fit.average(state.model); state.opt.step()
        state.ema.update(state.model, state.i)
        if len(sys.argv) > 2: time.sleep(float(sys.argv[2]))
        return {"loss": loss.detach()}
    batches = lambda i: torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
    from pathlib import Path
    fit.fit(step, state, batches, 40, path=Path(sys.argv[1]), every=1)
""")


def run(path, *more, torchrun=0):
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    script = path.parent / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen([*start, str(script), str(path), *more], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def same(one, two, exact=True):
    a, b = weights.read(one)[0], weights.read(two)[0]
    assert a.keys() == b.keys() and len(a) > 8
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=0 if exact else 1e-5, rtol=0)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    finished(run(whole))
    process, waited = run(broken, "0.05"), time.time()
    while not broken.exists() and time.time() - waited < 60:
        time.sleep(0.01)
    time.sleep(0.33)  # wherever it is now: in a step, or in the middle of writing
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = weights.read(broken)[1]["state"]
    assert '"i": 40' not in state
    finished(run(broken))
    same(whole, broken)


def test_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    finished(run(one))
    finished(run(two, torchrun=2))
    same(one, two, exact=False)


def toy(scale=1.0):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    state = fit.State({"model": model, "opt": torch.optim.SGD(model.parameters(), 0.1)})

    def step(state, batch, generator):
        loss = (state.model(batch) * scale).square().mean()
        state.opt.zero_grad(), loss.backward(), state.opt.step()
        return {"loss": loss.detach()}

    return state, step, lambda i: torch.randn(4, 3, generator=torch.Generator().manual_seed(i))


def test_loss_falls_and_log_is_kept():
    state, step, batches = toy()
    log = fit.fit(step, state, batches, 101)
    assert [entry["step"] for entry in log] == list(range(0, 101, 10)) and log[-1]["loss"] < 0.01 * log[0]["loss"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    state, step, batches = toy()
    path = tmp_path / "x.safetensors"
    fit.fit(step, state, batches, 5, path=path, every=1, note={"a": 1})
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match="not finite"):
        fit.fit(toy(float("nan"))[1], toy()[0], batches, 5, path=tmp_path / "y.safetensors")
    assert path.read_bytes() == before and not (tmp_path / "y.safetensors").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    state, step, batches = toy()
    path = tmp_path / "x.safetensors"
    fit.fit(step, state, batches, 5, path=path, note={"lr": 1})
    with pytest.raises(ValueError, match="belongs to another run"):
        fit.fit(step, toy()[0], batches, 5, path=path, note={"lr": 2})


def test_ema_is_the_slow_loop():
    model = nn.Linear(2, 2)
    ema, want = fit.Ema(model, 0.9), model.weight.detach().clone()
    for i in range(30):
        with torch.no_grad():
            model.weight += 1
        ema.update(model, i)
        decay = min(0.9, (1 + i) / (10 + i))
        want = decay * want + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.slow["weight"], want)


def test_draws_are_a_function_of_seed_and_step():
    a, b = (fit.normal(4, 2, generator=fit.draws(3, 7)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, fit.normal(4, 2, generator=fit.draws(3, 8)))
    shares = []
    for rank in range(2):
        g = fit.draws(3, 7)
        g.rank, g.world = rank, 2
        shares.append(fit.normal(2, 2, generator=g))
    assert torch.equal(torch.cat(shares), a)


def test_cosine():
    values = [fit.cosine(i, 1000) for i in range(1001)]
    assert values[0] == 0.01 and max(values) == values[99] or max(values) <= 1
    assert abs(values[1000]) < 1e-6 and values[550] == pytest.approx(0.5, abs=0.01)
