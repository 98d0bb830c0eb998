"""One file a slug: `<slug>.py` says what is measured and what would count, `<slug>.json` what came out.

`python -m minivid claims` lists the verdicts, `python -m minivid claims <slug>` measures. See `minivid.lab.claims`.
"""
