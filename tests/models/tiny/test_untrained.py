import torch
from torch.nn import functional

from models.tiny.losses import measure_psnr
from models.tiny.untrained import build_text_encoder, build_unet, build_vae, fit_colours


def draw_patches(num):
    """Images of smooth random colours."""
    cells = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return functional.interpolate(cells, size=(64, 64), mode="bilinear")


def test_a_fitted_vae_keeps_every_hue():
    pixels = draw_patches(12)
    vae = build_vae(2).eval()
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        fit_colours(vae, pixels)
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean).sample
    assert measure_psnr(after, pixels).mean() > measure_psnr(before, pixels).mean() + 5
    assert (posterior.std < 0.2).all()
    green_BChw = functional.avg_pool2d(pixels, 8)
    axis = green_BChw[:, 1] - (green_BChw[:, 0] + green_BChw[:, 2]) / 2
    found = torch.corrcoef(torch.stack([axis.flatten(), posterior.mean[:, 2].flatten()]))
    assert found[0, 1] > 0.8


def test_the_same_seed_gives_the_same_weights():
    for build in (build_vae, build_unet):
        ours, theirs, others = (build(seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_the_text_encoder_is_of_its_config():
    config = {
        "vocab_size": 600,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 7,
    }
    encoder = build_text_encoder(0, config)
    assert encoder(torch.zeros(1, 7, dtype=torch.long)).last_hidden_state.shape == (1, 7, 16)
