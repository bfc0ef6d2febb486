"""The tiny latent diffusion model: Stable Diffusion's classes, made narrow.

architecture (its sizes, and where the trained weights that come with the project are) -> write (a
folder with random weights) with tokenizer. Training: untrained (the weights it starts from) ->
losses -> sample_images.
"""
