"""The networks: torch modules, tensors in, tensors out.

A frozen latent diffusion model (``ldm``) turns images into latents, prompts into text embeddings
and noised latents into the features of its UNet's blocks. Heads (``heads``) turn what is stored
of those into mask logits. ``convert`` reads published weights, ``tiny`` has a small model.

Nothing here knows of Ray, Zarr or tars; the only files are weights.
"""
