"""What an owner does with a store: inspect, verify, retire, clean.

inspect sums up specs and records, and summary says it in words · rejects lists what was rejected ·
verify reads every committed byte and writes a damage report that encode repairs from · rm retires
tasks · gc removes what killed writers left and the files of retired tasks.

Imports corpus, store and below; neither the encoding nor the training side.
"""
