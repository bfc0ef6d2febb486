"""From the YAML that a user writes to a fingerprint, and from a fingerprint to opened encoders.

fields (the user's spec) -> check (spec against the configs of its model, which fetch_model finds)
-> build_layers (digests of every file) -> layer (spec with fingerprint, as stored) -> open_model (a
layer's files verified, its encoders loaded). blocks lists what a UNet offers.

Imports models and base alone.
"""
