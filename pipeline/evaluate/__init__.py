"""Scores of heads on a store's pairs.

run is the start: a checkpoint and a snapshot -> pair_scorer (a picklable scoring job and its
runner) -> here, or on workers (processes on Ray) -> scoring (batches to sums of metrics), with
baselines beside the head. phrasecut adds the figures of PhraseCut's own evaluator.

Imports runs and below; never the encoding side.
"""
