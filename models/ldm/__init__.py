"""The frozen latent diffusion model: VAE, text encoder and UNet.

files (a folder, its digests) -> family (which models are read) -> encoders (latents and
features), text_encoder, conditions · blocks (numbered places in the UNet), draws and noise (what
a feature is computed from), quantize (how it is stored), flops, tuning, sd14.

Shapes are named by suffixes: B batch, C channels, H W positions, T tokens, D width.
"""
