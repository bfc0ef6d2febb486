"""From the YAML that a user writes to a fingerprint and an opened model.

fields (the user's spec) -> fetch_model (its files on this machine) -> check (spec against the
model's configs) -> build_layers (digests of every file) -> layer (spec with fingerprint, as
stored) -> open_model (the encoders of a layer, their files checked). blocks lists what a UNet
offers.

Imports models and base alone.
"""
