"""Training the tiny latent diffusion model from drawn scenes.

run is the start: config -> corpus (scenes and captions) -> vae -> encode (latents in a store) ->
ldm (UNet and text encoder) by loop and state -> export (a model folder) -> card (figures).

May see both sides, encoding and training; nothing below it imports it.
"""
