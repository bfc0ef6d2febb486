"""Forecasts of what encoding and training will take.

run is the start: sample (some tars) -> timing (the encode stage over them, timed here) -> counts
(totals of the corpus, by estimate) -> cost (hours) -> epochs (heads, timed here) -> forecast (the
figures as JSON) -> report (text). compare holds a forecast against what a run stored; files adds up
commits for timing and for compare.

May import both sides, encoding and training; no folder left of it may import it.
"""
