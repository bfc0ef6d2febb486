"""The embedded demo corpus: scenes that the project draws itself.

scene (a corpus of tars) -> drawing (objects and backgrounds) in looks (styles) -> phrases (what
is true of which object).

Imports no other room.
"""
