"""AttentionPool2d against the published formula, written out step by step."""

import pytest
import torch
from torch.nn import functional as F

from models.heads.attention_pool import AttentionPool2d

CHANNELS, HEADS = 32, 4


def make_pool(grid=(3, 3)):
    torch.manual_seed(0)
    pool = AttentionPool2d(channels=CHANNELS, grid=grid, num_heads=HEADS)
    for name, parameter in pool.named_parameters():
        if name != "positional_embedding":
            torch.nn.init.normal_(parameter, std=0.3)
    return pool


def plain_pool(pool, feature, position):
    """Tokens (B, N, C) by einsum and a float32 softmax, one image and one head at a time."""
    outputs = []
    for image in feature:
        tokens = image.flatten(1)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + position
        qkv = pool.qkv_proj.weight[:, :, 0] @ tokens + pool.qkv_proj.bias[:, None]
        q, k, v = qkv[:CHANNELS], qkv[CHANNELS : 2 * CHANNELS], qkv[2 * CHANNELS :]
        depth = CHANNELS // HEADS
        heads = []
        for head in range(HEADS):
            rows = slice(head * depth, (head + 1) * depth)
            scores = (q[rows] * depth**-0.25).T @ (k[rows] * depth**-0.25)
            heads.append(v[rows] @ scores.float().softmax(dim=-1).T)
        pooled = pool.c_proj.weight[:, :, 0] @ torch.cat(heads) + pool.c_proj.bias[:, None]
        outputs.append(pooled.T)
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_tokens_equal_the_formula(grid):
    pool = make_pool(grid)
    feature = torch.randn(2, CHANNELS, *grid)
    expected = plain_pool(pool, feature, pool.positional_embedding)
    tokens = pool(feature)
    assert tokens.shape == (2, grid[0] * grid[1] + 1, CHANNELS)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [(6, 6), (2, 8), (9, 1), (1, 9)])
def test_other_sides_resize_the_position_but_not_the_means(side):
    # 9×1 and 1×9 have as many tokens as 3×3 and are still another grid.
    pool = make_pool((3, 3))
    feature = torch.randn(2, CHANNELS, *side)
    rest = pool.positional_embedding[:, 1:].reshape(1, CHANNELS, 3, 3)
    rest = F.interpolate(rest, size=side, mode="bicubic", align_corners=False)
    position = torch.cat([pool.positional_embedding[:, :1], rest.reshape(CHANNELS, -1)], dim=1)
    expected = plain_pool(pool, feature, position)
    torch.testing.assert_close(pool(feature), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_stays_close_with_large_scores():
    pool = make_pool()
    feature = 4 * torch.randn(1, CHANNELS, 3, 3)
    expected = plain_pool(pool, feature, pool.positional_embedding)
    tokens = pool.to(torch.bfloat16)(feature.bfloat16())
    assert tokens.dtype == torch.bfloat16
    assert F.cosine_similarity(tokens.float().flatten(), expected.flatten(), dim=0) > 0.995


def test_parameters_have_the_checkpoints_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make_pool().named_parameters()}
    assert shapes == {
        "positional_embedding": (CHANNELS, 10),
        "qkv_proj.weight": (3 * CHANNELS, CHANNELS, 1),
        "qkv_proj.bias": (3 * CHANNELS,),
        "c_proj.weight": (CHANNELS, CHANNELS, 1),
        "c_proj.bias": (CHANNELS,),
    }


def test_new_parameters_start_from_the_documented_normal_distributions():
    torch.manual_seed(1)
    pool = AttentionPool2d(channels=256, grid=(8, 8), num_heads=8)
    assert pool.positional_embedding.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert pool.qkv_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert (
        pool.qkv_proj.weight.abs().max() > 3 * 256**-0.5
    )  # a uniform start would end at 1.7 of them
    assert not pool.qkv_proj.bias.any()


def test_channels_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads 5, got 32"):
        AttentionPool2d(channels=32, grid=(3, 3), num_heads=5)


@pytest.mark.parametrize("shape", [(1, 16, 3, 3), (CHANNELS, 3, 3)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"feature must be \(B, 32, h, w\), got"):
        make_pool()(torch.zeros(shape))
