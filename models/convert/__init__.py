"""Published weights in other layouts, as ours.

checkpoint_file (tensors of a pickle, nothing run) -> unet_names and vae_and_text_names (keys
renamed, every one accounted for), moving_average -> check_weights -> ldm or head (a folder
written). pickles rewrites a diffusers folder.
"""
