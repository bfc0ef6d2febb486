"""The bins against torch.bucketize, on and beside every edge, and over the whole range."""

import numpy as np
import torch

from models.heads.score_bins import (
    AP_EDGES,
    AP_PLACES,
    EDGES,
    INTERVALS_N,
    THRESHOLDS_K,
    find_bins,
)


def test_bins_are_those_of_a_search():
    generator = torch.Generator().manual_seed(0)
    edges = torch.from_numpy(EDGES)
    sides = [np.nextafter(EDGES, np.float32(end)) for end in (0, 1)]
    ends = np.float32([0, 1e-45, 1e-30, 5e-8, 1 - 2**-24, 1])
    logits = 25 * torch.randn(2**17, generator=generator)
    for values in (
        torch.from_numpy(np.concatenate([EDGES, *sides, ends])),
        torch.sigmoid(logits),
        torch.rand(2**17, generator=generator),
        1 - torch.arange(2**17) * 2.0**-24,  # every float32 near 1
    ):
        wanted = torch.bucketize(values, edges, right=True, out_int32=True)
        assert torch.equal(find_bins(values), wanted)


def test_edges_are_clipsegs_thresholds_and_even_in_the_logit():
    over = np.searchsorted(np.float32(THRESHOLDS_K), EDGES)  # those below each edge
    assert INTERVALS_N.tolist() == [0, *over]
    assert (EDGES[AP_PLACES] == AP_EDGES).all()
    steps = np.linspace(-16, 16, 32 * 256 + 1)
    wanted = torch.sigmoid(torch.from_numpy(steps)).float().numpy()
    assert set(wanted) == set(AP_EDGES)
    assert len(np.unique(wanted[steps < 10])) == (steps < 10).sum()  # all are told apart
