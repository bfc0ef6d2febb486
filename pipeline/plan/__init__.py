"""What encoding and training will take, before it is spent.

run is the start: sample (some tars) -> counts and estimate (totals with ranges) -> timing and
epochs (measured here) -> cost -> forecast (figures as JSON) -> report (text). files and compare
hold a forecast against what was stored.

May see both sides, encoding and training; nothing below it imports it.
"""
