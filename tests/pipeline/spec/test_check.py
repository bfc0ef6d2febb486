"""What a spec asks of its model is held to it before anything is hashed, made or started."""

from pathlib import Path

import pytest

from models.ldm.files import ModelFilesError
from pipeline.base.yaml import SpecError
from pipeline.encode.prepare import prepare_encode
from pipeline.spec.check import check_spec
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec


def with_blocks(spec, *blocks):
    return spec.model_copy(update={"features": FeaturesSpec(blocks=blocks)})


def test_blocks_that_are_there_and_none_asked_for_pass(spec):
    folder = Path(spec.latents.model)
    for passing in (with_blocks(spec, 1, 16), Spec(latents=spec.latents)):
        assert check_spec(passing)[0] == folder


def test_a_block_that_the_unet_has_not_is_refused_before_a_layer_is_made(
    spec, corpus_folder, tmp_path
):
    with pytest.raises(SpecError, match=r"^my.yaml: features.blocks must be some of 1 to 16.*77"):
        prepare_encode(
            with_blocks(spec, 6, 77),
            [str(corpus_folder / "*.tar")],
            str(tmp_path / "store"),
            batch=8,
            where="my.yaml",
        )
    assert not (tmp_path / "store").exists()


def test_a_model_that_is_not_there_is_named_by_file_and_field(tmp_path):
    missing = Spec(latents=LatentsSpec(model=str(tmp_path / "none")))
    with pytest.raises(ModelFilesError, match=r"^my.yaml: latents.model: expected .*none"):
        check_spec(missing, where="my.yaml")
