"""Claims: what a paper promises, decided before the run, measured by one command, and kept true afterwards.

A claim's file, `minivid/claims/<slug>.py`, defines one object:

    def train(seed, fast, quantiser):                      # an arm: settings in, metrics out
        ...
        return {"usage": 0.93, "psnr": 27.1}

    CLAIMS = Claims(
        "simvq",
        arms={"vq": Arm(train, quantiser="vq"), "simvq": Arm(train, quantiser="simvq")},
        seeds=(0, 1, 2),
        tests=[Compare("codes in use", "usage", method="simvq", baseline="vq", margin=0.30)],
    )

`run` does every arm with every seed (jobs that survive a kill, see `jobs.py`), judges the tests from the numbers alone
and writes `<slug>.json` beside the file. Two guards keep that file true: `stale` says when the code it stands on has
changed, `check_fast` runs the short form again and compares it with what was stored.

An unwelcome verdict is a result, not a failure: the claim's docstring explains it in a paragraph "Outcome: ...", which
may be written after the run, as docstrings aren't hashed. What was decided earlier is never forgotten: a run that moves
a margin or changes a test or a verdict keeps those of the runs before it under "earlier".
"""

import ast
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from minivid.lab import jobs
from minivid.lab.jobs import ClaimError
from minivid.lab.papers import ROOT, find

HOLDS, PARTLY, NOT = "holds", "partly", "not reproduced"
FOLDER = ROOT / "minivid" / "claims"

Number = float | int
Values = Mapping[str, Mapping[str, Sequence[Number]]]  # arm -> metric -> one value a seed


class Arm:
    """One thing to be measured: `run(seed=, fast=, **settings)` returns a dict of floats.

    `run` is a top-level function of the claim's file. The settings are plain values (they go into the job's hash and
    into the result file). `fast=True` asks for the form of a few seconds that the tests repeat. A `run` that takes
    `folder` gets a folder that outlives a kill, for checkpoints of its own. `files` are what this arm reads besides the
    code, from the repository's root (such as "minivid/weights/video.safetensors"): when one changes, so does the job.
    """

    def __init__(self, run: Callable[..., dict[str, float]], files: Sequence[str] = (), **settings: Any):
        self.run, self.settings = run, settings
        self.files = [ROOT / file for file in files]


@dataclass(frozen=True)
class Compare:
    """Is the method better than the baseline by at least `margin`, seed by seed?

    `margin` is in units of the metric, or a share of the baseline's value where `relative`. A margin of +0.3 must be
    won by; one of -0.02 says that losing 0.02 is still as good. `counts=False` reports the comparison without letting
    it touch the verdict: for strong rivals and for what is only expected.

    With d the mean over seeds of the paired differences (positive = method better) and its 95 % t interval:
    holds where d >= margin and the interval excludes 0 (for a negative margin: stays above the margin);
    partly where only one of the two is so; else not reproduced. One seed has no interval, so it can't hold.
    """

    name: str
    metric: str
    method: str
    baseline: str
    margin: Number
    higher: bool = True  # is more of this metric better?
    relative: bool = False
    counts: bool = True

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.baseline)

    def __str__(self) -> str:
        unit = f"{100 * abs(self.margin):.3g} %" if self.relative else f"{abs(self.margin):.3g}"
        way = "higher" if self.higher else "lower"
        if self.margin < 0:
            return f"{self.metric} of {self.method} is at most {unit} worse than of {self.baseline} ({way} is better)"
        return f"{self.metric} of {self.method} is {way} than of {self.baseline} by at least {unit}"

    def judge(self, values: Values) -> dict:
        """The differences, their interval and the verdict."""
        sign = 1.0 if self.higher else -1.0
        each = []
        for new, old in zip(values[self.method][self.metric], values[self.baseline][self.metric], strict=True):
            if self.relative and old == 0:
                raise ClaimError(f"{self.name}: the baseline's {self.metric} is 0, so a relative margin means nothing.")
            each.append(sign * (new - old) / (abs(old) if self.relative else 1.0))
        mean, low, high = interval(each)
        enough = mean >= self.margin and (self.margin != 0 or mean > 0)  # a tie is no win
        sure = low is not None and (low > 0 if self.margin >= 0 else low >= self.margin)
        verdict = HOLDS if enough and sure else PARTLY if enough or (sure and self.margin > 0) else NOT
        return {"verdict": verdict, "difference": {"mean": mean, "low": low, "high": high, "each": each}}


@dataclass(frozen=True)
class Floor:
    """Does a measured value reach a threshold decided before? Exactly one of `at_least` and `at_most` is given.

    holds where every seed does, partly where the mean does, else not reproduced.
    """

    name: str
    metric: str
    arm: str
    at_least: Number | None = None
    at_most: Number | None = None
    counts: bool = True

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ClaimError(f"{self.name}: a Floor takes exactly one of at_least and at_most.")

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)

    @property
    def margin(self) -> Number:
        return self.at_least if self.at_least is not None else self.at_most  # type: ignore[return-value]

    def __str__(self) -> str:
        return f"{self.metric} of {self.arm} is at {'least' if self.at_least is not None else 'most'} {self.margin:.4g}"

    def judge(self, values: Values) -> dict:
        """The mean and the verdict."""
        each = list(values[self.arm][self.metric])
        mean = sum(each) / len(each)

        def passes(x: Number) -> bool:
            return x >= self.margin if self.at_least is not None else x <= self.margin

        verdict = HOLDS if all(map(passes, each)) else PARTLY if passes(mean) else NOT
        return {"verdict": verdict, "mean": mean}


class Claims:
    """All that one slug claims. See the top of this file for an example.

    seeds      one job is run for each arm and seed; fewer than 3 seeds leave a comparison without a useful interval
    minutes    the budget on two cores: 10 where nothing is trained, 30 where shipped weights are tuned, 60 from scratch
    sources    files, from the repository's root, that the result stands on; by default the paper's own
    tolerance  how far the repeated fast form may move: a relative share, or {metric: share}; math.inf for a timing
    """

    def __init__(
        self, slug: str, *, arms: Mapping[str, Arm], tests: Sequence[Compare | Floor], seeds: Sequence[int] = (0, 1, 2),
        minutes: Number = 30, sources: Sequence[str] = (), tolerance: Number | Mapping[str, Number] = 0.05,
    ):  # fmt: skip
        self.slug, self.arms, self.tests, self.seeds = slug, dict(arms), list(tests), tuple(seeds)
        self.minutes, self.tolerance = minutes, tolerance
        self.sources = [ROOT / source for source in sources]
        self.file = Path()  # set by load
        names = [test.name for test in self.tests]
        if not any(test.counts for test in self.tests) or len(set(names)) < len(names):
            raise ClaimError(f"{slug}: needs at least one test that counts, and each test a name of its own.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ClaimError(f"{slug}: seeds must be one or more different numbers, got {self.seeds}.")
        for test in self.tests:
            unknown = [arm for arm in test.arms if arm not in self.arms]
            if unknown or not math.isfinite(test.margin):
                raise ClaimError(f"{slug}: test {test.name!r} names unknown arms {unknown} or has no finite margin.")

    @property
    def result(self) -> Path:
        return self.file.with_suffix(".json")

    @property
    def code(self) -> str:
        """Hash of the claim's file, its sources (comments and docstrings don't count) and the files its arms read."""
        read = sorted({file for arm in self.arms.values() for file in arm.files})
        return jobs.code_hash(self.file, *self.sources, *read)

    def within(self, metric: str) -> Number:
        return self.tolerance.get(metric, 0.05) if isinstance(self.tolerance, Mapping) else self.tolerance


def interval(values: Sequence[Number], share: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean and t confidence interval; (mean, None, None) for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None, None
    from scipy.stats import t

    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(t.ppf((1 + share) / 2, n - 1)) * spread
    return mean, mean - half, mean + half


def overall(verdicts: Sequence[str]) -> str:
    """holds where all do, not reproduced where none does even partly, else partly."""
    if all(v == HOLDS for v in verdicts):
        return HOLDS
    return NOT if all(v == NOT for v in verdicts) else PARTLY


def _file(slug: str, folder: Path | None) -> Path:
    return (folder or FOLDER) / f"{slug.replace('-', '_')}.py"


def load(slug: str, folder: Path | None = None) -> Claims:
    """The `CLAIMS` object of `<folder>/<slug>.py` (by default minivid/claims). Raises ClaimError where there is none."""
    file = _file(slug, folder)
    if not file.exists():
        known = ", ".join(slugs(folder)) or "none yet"
        raise ClaimError(f"no claim is written for {slug!r}: {file} does not exist (there are: {known}).")
    claims = getattr(jobs.load_module(file), "CLAIMS", None)
    if not isinstance(claims, Claims):
        raise ClaimError(f"{file} must define CLAIMS = Claims(...).")
    claims.file = file
    if not claims.sources:
        try:
            code = find(slug).code
        except KeyError:
            raise ClaimError(f"{file}: {slug!r} is no paper, so Claims(sources=[...]) must name its files.") from None
        claims.sources = sorted(code.parent.glob("*.py")) if code.name == "__init__.py" else [code]
    return claims


def slugs(folder: Path | None = None) -> list[str]:
    """Every slug that has a claim's file."""
    return sorted(p.stem.replace("_", "-") for p in (folder or FOLDER).glob("*.py") if p.stem != "__init__")


def read(slug: str, folder: Path | None = None) -> dict:
    """The stored result of a slug. Raises ClaimError while nothing has been measured."""
    path = _file(slug, folder).with_suffix(".json")
    if not path.exists():
        raise ClaimError(f"{slug} has not been measured: run `python -m minivid claims {slug}`.")
    return json.loads(path.read_text(encoding="utf-8"))


def outcome(slug: str, folder: Path | None = None) -> str:
    """The explanation of the verdict: the paragraph "Outcome: ..." of the docstring of the claim's file, or ''."""
    text = _file(slug, folder).read_text(encoding="utf-8")
    found = re.search(r"^Outcome:\s*((?:.+\n?)+)", ast.get_docstring(ast.parse(text)) or "", flags=re.M)
    return " ".join(found[1].split()) if found else ""


def run(slug: str, folder: Path | None = None, *, workers: int = 1, again: bool = False) -> dict:
    """Run a claim in full, write its result file, return what was written.

    Jobs that were done before with the same settings and code are taken from the cache; `again` measures them anew.
    Raises ClaimError when an arm fails or returns something that is not a finite number; nothing is written then.
    """
    claims = load(slug, folder)
    full = jobs.run_all(claims, claims.seeds, fast=False, workers=workers, again=again)
    fast = jobs.run_all(claims, claims.seeds[:1], fast=True, again=again)
    result = _judge(claims, full, fast)
    jobs.write_json(claims.result, result)
    return result


def _judge(claims: Claims, full: dict, fast: dict) -> dict:
    arms: dict[str, dict] = {}
    for name, arm in claims.arms.items():
        done = [full[name, seed] for seed in claims.seeds]
        metrics = {metric: [job["values"][metric] for job in done] for metric in done[0]["values"]}
        arms[name] = {
            "settings": arm.settings,
            "values": metrics,
            "seconds": [job["seconds"] for job in done],
            "fast": fast[name, claims.seeds[0]]["values"],
            "measured_at": sorted({job["commit"] for job in done}),
        }
    values = {name: arm["values"] for name, arm in arms.items()}
    tests = []
    for test in claims.tests:
        for arm_name in test.arms:
            if test.metric not in values[arm_name]:
                raise ClaimError(
                    f"{claims.slug}: test {test.name!r} needs {test.metric!r}; arm {arm_name!r} gave "
                    f"{', '.join(values[arm_name])}."
                )
        tests.append(
            {"name": test.name, "claim": str(test), "kind": type(test).__name__.lower(), **vars(test)} | test.judge(values)
        )
    return {
        "slug": claims.slug,
        "verdict": overall([test["verdict"] for test in tests if test["counts"]]),
        "tests": tests,
        "arms": arms,
        "seeds": list(claims.seeds),
        "seconds": round(sum(sum(arm["seconds"]) for arm in arms.values()), 1),
        "minutes_allowed": claims.minutes,
        "date": date.today().isoformat(),
        "code": claims.code,
        **jobs.surroundings(claims.file, *claims.sources),
        "threads": max(job["threads"] for job in full.values()),
        "fast_seconds": round(sum(job["seconds"] for job in fast.values()), 1),
        "earlier": _earlier(claims, {test["claim"]: test["verdict"] for test in tests}),
    }


def _earlier(claims: Claims, tests: dict[str, str]) -> list[dict]:
    """What earlier runs decided and found otherwise; a margin moved after a run stays visible for ever."""
    if not claims.result.exists():
        return []
    old = json.loads(claims.result.read_text(encoding="utf-8"))
    before = {test["claim"]: test["verdict"] for test in old["tests"]}
    if before == tests:
        return old["earlier"]
    return [*old["earlier"], {key: old[key] for key in ("date", "commit", "code", "verdict")} | {"tests": before}]


def stale(slug: str, folder: Path | None = None) -> str:
    """Why the stored result can't be trusted any more; empty while it can."""
    claims = load(slug, folder)
    if not claims.result.exists():
        return f"{slug} has not been measured: run `python -m minivid claims {slug}`."
    if read(slug, folder)["code"] != claims.code:
        return f"the code of {slug} has changed since it was measured: run `python -m minivid claims {slug}` again."
    return ""


def check_fast(slug: str, folder: Path | None = None) -> list[str]:
    """Run the fast form anew and say which values left their tolerance; an empty list is a pass."""
    claims, stored = load(slug, folder), read(slug, folder)
    with tempfile.TemporaryDirectory() as nowhere:  # a cached answer would prove nothing
        fresh = jobs.run_all(claims, claims.seeds[:1], fast=True, cache=Path(nowhere))
    complaints = []
    for name in claims.arms:
        was, now = stored["arms"].get(name, {}).get("fast", {}), fresh[name, claims.seeds[0]]["values"]
        for metric in sorted(was.keys() | now.keys()):
            a, b = was.get(metric), now.get(metric)
            if a is None or b is None:
                complaints.append(f"{slug}: {name}'s {metric} is {'new' if a is None else 'gone'} since the full run.")
            elif abs(b - a) > claims.within(metric) * max(abs(a), 1e-6):
                complaints.append(f"{slug}: fast {metric} of {name} was {a:.4g}, is now {b:.4g}.")
    return complaints
