"""The embedded demo corpus: scenes that the project draws itself.

scene (a corpus of tars) -> drawing (objects and backgrounds), in looks (drawing styles) -> phrases
(what is true of which object).

Imports base alone.
"""
