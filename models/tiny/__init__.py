"""The tiny latent diffusion model: Stable Diffusion's classes, made narrow.

write (random weights, or the bundled trained ones) with tokenizer · untrained (where training
starts) -> losses -> sample_images.
"""
