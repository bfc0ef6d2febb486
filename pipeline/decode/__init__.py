"""From members to views: images, masks and crops, in processes that a bad file may kill.

pool (several processes, results in order) -> process (one child: started, asked, timed) ->
worker (the child's loop) -> sample (members decoded) -> images (with color: profiles; jpeg: how
many scans) and masks -> views (crops with masks) -> pairs (rows of the index, and their notes).
ahead reads in front of its consumer.

Imports corpus and what corpus may; never the device, Ray or the training side.
"""
