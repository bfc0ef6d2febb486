"""What a training run is and what it leaves behind.

config (YAML) -> new_head (a head for the store's layers) -> checkpoint and checkpoint_writer
(state, step_folders) -> resume (does a config go on with a run?). lock keeps a folder for one
run; stop ends one after its step.

Imports read and below; never the encoding side.
"""
