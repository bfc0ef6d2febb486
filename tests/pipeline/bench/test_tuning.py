"""The tuning benchmark: what must hold of its figures, whatever the machine."""

import pytest
import torch

from pipeline.bench import tuning as bench_tuning
from pipeline.bench.tuning import measure_tuning

pytestmark = pytest.mark.thorough


def test_every_variant_stays_within_what_a_layer_states(ldm_folder, monkeypatch, capfd):
    plain = tuple(variant for variant in bench_tuning.VARIANTS if not variant[1].compile)
    monkeypatch.setattr(bench_tuning, "VARIANTS", plain)  # compiling takes a minute
    rows = measure_tuning(
        str(ldm_folder),
        blocks=(6, 10),
        size_px=64,
        batch=2,
        device=torch.device("cpu"),
        repeats=1,
    )
    shown = capfd.readouterr()
    assert "should be kept in float32" not in shown.out + shown.err
    assert [row.compute for row in rows] == ["float32", "float32", "bfloat16", "float16"]
    assert rows[0].deviation == 0.0
    assert all(row.deviation <= row.tolerance for row in rows)
    assert rows[2].deviation > rows[3].deviation > rows[1].deviation


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"size_px": 0}, "bench tuning: size must be a positive multiple of 64 px, got 0"),
        ({"size_px": 70}, "size must be a positive multiple of 64 px, got 70"),
        ({"device": torch.device("meta")}, "device must be cpu, cuda .* got 'meta'"),
        ({"device": torch.device("cuda:99")}, "device is 'cuda:99', but torch sees"),
    ],
)
def test_a_size_or_device_that_there_is_not_is_refused(ldm_folder, option, message):
    options = {"size_px": 64, "device": torch.device("cpu"), **option}
    with pytest.raises(ValueError, match=message):
        measure_tuning(str(ldm_folder), blocks=(6,), batch=2, **options)
