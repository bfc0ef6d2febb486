"""Training the tiny latent diffusion model on drawn scenes.

run is the start: config -> corpus (scenes with captions) -> vae -> encode (latents in a store) ->
ldm (UNet and text encoder) -> export (a model folder) -> card (its figures). vae and ldm are
objectives of one loop, whose checkpoints are in state.

May see both sides, encoding and training; nothing below it imports it.
"""
