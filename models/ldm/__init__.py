"""The frozen latent diffusion model: VAE, text encoder and UNet.

files (a folder, its digests) -> family (which models are read, by their configs) -> encoders
(latents and features) with text_encoder, blocks (the UNet's numbered blocks) and noise -> quantize
(features as int8). draws gives random numbers, flops counts, tuning has run options, unet_config
and sd14 hold what configs say. files, family, draws, tuning, unet_config and sd14 import no torch.

Shapes are named by suffixes: B batch, C channels, H W positions, T tokens, D width.
"""
