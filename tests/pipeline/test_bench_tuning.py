"""The tuning benchmark: what must hold of its figures, whatever the machine."""

import torch

from pipeline import bench_tuning
from pipeline.bench_models import load_unet
from pipeline.bench_tuning import measure_tuning


def test_every_variant_stays_within_what_a_layer_states(ldm_folder, monkeypatch):
    plain = tuple(variant for variant in bench_tuning.VARIANTS if not variant[1].compile)
    monkeypatch.setattr(bench_tuning, "VARIANTS", plain)  # compiling takes a minute
    rows = measure_tuning(
        load_unet(str(ldm_folder)),
        blocks=(6, 10),
        size_px=64,
        batch=2,
        device=torch.device("cpu"),
        repeats=1,
    )
    assert [row.compute for row in rows] == ["float32", "float32", "bfloat16", "float16"]
    assert rows[0].deviation == 0.0
    assert all(row.deviation <= row.tolerance for row in rows)
    assert rows[2].deviation > rows[3].deviation > rows[1].deviation
