"""Kills: a worker is killed again and again while it works, and afterwards every job must have ended right.

    python -m tests.chaos --kills 300 --seed 7

`campaign` does it, `jobs` says what is run and what must come of it, `seen` what there is to see,
`oracle` judges it.
"""
