"""Fingerprints: what changes them, what does not, and that they never change by themselves."""

import json
import shutil

import pytest

from models.ldm.files import ModelFilesError, list_latent_components
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import INT8_TOLERANCE, TOLERANCES, FeaturesSpec, LatentsSpec, Spec
from pipeline.spec.open_model import open_model

FILES = {
    "model_index.json": "{}",
    "vae/config.json": '{"scaling_factor": 0.18215}',
    "vae/diffusion_pytorch_model.safetensors": "vae weights",
    "text_encoder/config.json": "{}",
    "text_encoder/model.safetensors": "text weights",
    "tokenizer/vocab.json": "{}",
    "tokenizer/merges.txt": "merges",
    "unet/config.json": "{}",
    "unet/diffusion_pytorch_model.safetensors": "unet weights",
    "scheduler/scheduler_config.json": (
        '{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}'
    ),
}
# What every store on disk is named by. If these change, every store is encoded anew: that is a new
# SCHEMA_VERSION, never an accident (a new field with a default is enough to cause it).
GOLDEN = ("e34a41a687bf7c5e", "065dace0de39becb")


@pytest.fixture
def fixed_folder(tmp_path):
    """A folder laid out as a model, with the same few bytes always; nothing can load it."""
    for name, content in FILES.items():
        path = tmp_path / "fixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "fixed"


def fixed_spec(folder, *, latents=None, features=None):
    return Spec(
        latents=LatentsSpec(**{"model": str(folder), "size": 384} | (latents or {})),
        features=FeaturesSpec(**(features or {})),
    )


def fingerprints(spec):
    return tuple(layer.fingerprint for layer in build_layers(spec))


def test_the_fingerprints_of_a_fixed_spec_are_pinned(fixed_folder):
    assert fingerprints(fixed_spec(fixed_folder)) == GOLDEN


def test_a_moved_model_is_the_same_layer(tmp_path, fixed_folder):
    before = fingerprints(fixed_spec(fixed_folder))
    moved = shutil.move(fixed_folder, tmp_path / "elsewhere" / "model")
    assert fingerprints(fixed_spec(moved)) == before


@pytest.mark.parametrize("name", sorted(set(FILES) - {"model_index.json"}))
def test_a_changed_byte_of_any_model_file_is_another_layer(fixed_folder, name):
    before = fingerprints(fixed_spec(fixed_folder))
    path = fixed_folder / name
    path.write_bytes(path.read_bytes() + b" ")
    after = fingerprints(fixed_spec(fixed_folder))
    of_latents = name.split("/")[0] in list_latent_components(fixed_folder)
    assert (after[0] != before[0]) == of_latents
    assert after[1] != before[1]  # through its latents layer too


def test_every_file_of_the_tiny_model_counts(tmp_path, ldm_folder):
    """On the real layout: no file that loading reads is left out."""
    folder = shutil.copytree(ldm_folder, tmp_path / "ldm")
    (folder / "model_index.json").unlink()  # names classes; nothing here reads it
    spec = fixed_spec(folder)
    before = fingerprints(spec)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        middle = len(data) // 2
        if path.name in ("config.json", "scheduler_config.json"):
            path.write_bytes(data + b" ")  # must stay JSON: the model's family is told by it
        else:
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        assert fingerprints(spec) != before, path
        path.write_bytes(data)
    assert fingerprints(spec) == before


@pytest.mark.parametrize(
    ("latents", "features"),
    [
        ({"size": 512}, {}),
        ({"crop": "resize"}, {}),
        ({"flip": True}, {}),
        ({"prompts": ("{}.",)}, {}),
        ({"keep_image": True}, {}),
        ({"compute": "bfloat16"}, {}),
        ({"seed": 1}, {}),
        ({"orientation": "ignore"}, {}),
        ({"color": "srgb"}, {}),
        ({}, {"blocks": (6,)}),
        ({}, {"timesteps": (300,)}),
        ({}, {"timesteps": {"low": 300, "high": 500, "draws": 3}}),
        ({}, {"condition": "empty"}),
        ({}, {"storage": "int8"}),
        ({}, {"compute": "float16"}),
        ({}, {"seed": 1}),
    ],
)
def test_what_changes_a_value_changes_the_fingerprint(fixed_folder, latents, features):
    before = fingerprints(fixed_spec(fixed_folder))
    after = fingerprints(fixed_spec(fixed_folder, latents=latents, features=features))
    assert (after[0] != before[0]) == bool(latents)
    assert after[1] != before[1]


def test_layers_know_their_scale_tolerance_and_source(fixed_folder):
    spec = fixed_spec(fixed_folder, features={"storage": "int8", "compute": "float16"})
    latents, features = build_layers(spec)
    assert latents.scaling_factor == 0.18215
    assert latents.tolerance == TOLERANCES["float32"]
    assert features.tolerance == TOLERANCES["float16"] + INT8_TOLERANCE
    assert features.latents_folder == latents.folder
    assert latents.source == {"model": str(fixed_folder), "revision": None, "variant": None}
    assert latents.latents == spec.latents
    assert features.features == spec.features
    assert build_layers(Spec(latents=spec.latents)) == (latents, None)


def test_the_scaling_factor_is_the_models(fixed_folder):
    config = fixed_folder / "vae" / "config.json"
    config.write_text("{}")
    assert build_layers(fixed_spec(fixed_folder))[0].scaling_factor == 0.18215
    config.write_text(json.dumps({"scaling_factor": 0.13025}))
    assert build_layers(fixed_spec(fixed_folder))[0].scaling_factor == 0.13025
    for factor in ("small", "0.18215", None, True, 0, -1, float("nan"), float("inf")):
        config.write_text(json.dumps({"scaling_factor": factor}))
        message = rf"vae: scaling_factor must be a finite number above 0, got {factor!r}"
        with pytest.raises(ModelFilesError, match=message):
            build_layers(fixed_spec(fixed_folder))
    config.write_text("{")
    with pytest.raises(ModelFilesError, match=r"vae/config\.json: cannot be read as the VAE"):
        build_layers(fixed_spec(fixed_folder))


def test_a_model_is_held_to_the_layers_digests(tmp_path, fixed_folder):
    latents, features = build_layers(fixed_spec(fixed_folder))
    assert open_model(latents) == fixed_folder
    moved = shutil.move(fixed_folder, tmp_path / "moved")
    with pytest.raises(ModelFilesError, match=r"expected a diffusers folder .* head\.model in a"):
        open_model(latents)
    with pytest.raises(ModelFilesError, match=r"hub id, got '/none'\.$"):
        open_model(latents, model="/none")
    assert open_model(latents, model=str(moved)) == tmp_path / "moved"
    (tmp_path / "moved" / "unet" / "config.json").write_text("[]")
    assert open_model(latents, model=str(moved)) == tmp_path / "moved"
    with pytest.raises(ModelFilesError, match=r"is not the model .* unet/config\.json differ"):
        open_model(features, model=str(moved))


def test_a_tokenizer_without_its_vocabulary_makes_no_layer(fixed_folder):
    (fixed_folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ModelFilesError, match=r"tokenizer: expected a vocabulary, .* got vocab.js"):
        build_layers(fixed_spec(fixed_folder))


def test_a_model_of_another_family_makes_no_layer(fixed_folder):
    (fixed_folder / "unet" / "config.json").write_text(json.dumps({"in_channels": 9}))
    (fixed_folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # not come to
    with pytest.raises(ModelFilesError, match=r"expected in_channels 4, .* got 9: inpainting"):
        build_layers(fixed_spec(fixed_folder))
