"""Heads: what is trained on latents and features.

registry (a name to a class) -> head (the interface and its folder) -> unet_head with znet,
rgbnet and ldznet, or probe. transformer and attention_pool are their parts, metrics the scores.

Shapes are named by suffixes: B batch, C channels, H W positions, T tokens, D width.
"""
