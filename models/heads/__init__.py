"""Heads: what is trained on latents and features.

registry (a name to a class and its options) -> options (what configs and sweeps ask, without torch)
-> inputs (what layers hold for a new head) -> head (the interface and its folder) -> unet_head with
znet, rgbnet and ldznet, or probe. transformer and attention_pool are their parts, metrics the
scores. Everything outside asks a head's class or options; only the registry names heads.

Shapes are named by suffixes: B batch, C channels, H W positions, T tokens, D width.
"""
