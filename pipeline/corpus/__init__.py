"""From URLs of tars to the members of samples, without decoding a pixel.

local_listing, remote_listing (patterns to tars) -> tasks (tars to tasks) -> known_tars (those that
a layer was encoded from, and which changed; seen_tars) -> source (an open tar
and its identity) -> tar (strict framing; other_files says what is no tar) -> parts (which samples
of a long tar are whose) -> members (members grouped to samples) -> phrases (the sample's text).
notes has what is said of peculiarities that are no rejects.

Imports base, storage and store's words for a task; never decode, stage or the training side.
"""
