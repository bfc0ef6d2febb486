"""Conversion of weights that others published to models and heads that are read here.

checkpoint_file (tensors of a pickle, no code run) -> sort_keys (each key to a model or a rule) ->
configs (read off shapes) and names (CompVis's, for each parameter of the class) -> check_weights ->
ldm (a diffusers folder) or head. pickles rewrites a diffusers folder. Nothing here renames a folder
into place: pipeline/convert does.
"""
