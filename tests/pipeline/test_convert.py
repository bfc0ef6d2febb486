"""`ldznet convert`: what it finds, writes and says, and that what it wrote segments an image."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from jobs.__main__ import app
from models.convert.names import ConversionError
from models.heads.registry import load_head
from models.ldm.files import ModelFilesError, list_model_files
from pipeline.base.yaml import SpecError, load_yaml
from pipeline.convert import ConvertOptions, resolve_tokenizer, run_convert
from pipeline.runs.checkpoint import load_checkpoint
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.runs.resume import check_resumable
from pipeline.segment import Segmenter
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import Spec
from tests.support.compvis_layout import (
    FROZEN,
    build_head,
    read_json,
    to_compvis,
    to_ldznet,
    write_narrow_ldm,
)


@pytest.fixture(scope="module")
def ldm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow") / "ldm"
    write_narrow_ldm(folder)
    return folder


@pytest.fixture(scope="module")
def head(ldm):
    return build_head(ldm)


@pytest.fixture(scope="module")
def options(ldm):
    return ConvertOptions(tokenizer=str(ldm))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, ldm, head):
    path = tmp_path_factory.mktemp("published") / "LDZNet.ckpt"
    torch.save({"state_dict": to_ldznet(ldm, head), "global_step": 5}, path)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory, ckpt, options):
    out = tmp_path_factory.mktemp("out") / "ldznet"
    return out, run_convert(ckpt, out, options)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)


def test_it_says_what_became_of_every_key(converted, ckpt):
    out, lines = converted
    assert lines[0].startswith(f"{ckpt}: an LD-ZNet checkpoint, ")
    assert lines[-1] == f"wrote {out}"
    num_keys = int(lines[0].split()[-2])
    assert sum(int(line.split()[1]) for line in lines[1:-1]) == num_keys
    text = "\n".join(lines)
    assert "head (LDZNet, blocks [6, 7, 8, 9, 10], 64 px; 758 weights, EMA after 7 updates)" in text
    assert "unet (684 weights, raw, not the EMA copies beside them)" in text


def test_the_head_and_its_ldm_are_the_files(converted, head, ldm):
    out, _ = converted
    ours, theirs = load_head(out).state_dict(), head.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for part in ("vae", "unet", "text_encoder"):
        (name,) = [n for n in list_model_files(out / "ldm", [part]) if n.endswith("safetensors")]
        ours, theirs = load_file(out / "ldm" / name), load_file(ldm / name)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_converted_head_segments_as_the_original(converted, head, image):
    """The same inputs through the original head: the same probabilities."""
    segmenter = Segmenter(converted[0], device="cpu")
    probability = segmenter.segment(image, "red circle")
    assert probability.shape == (96, 64)
    assert probability.std() > 0
    other = segmenter.segment(image, "blue square")
    segmenter.head = head.eval()
    # Weights at another address of memory may go through another kernel of the same sum.
    assert np.abs(probability - segmenter.segment(image, "red circle")).max() < 1e-5
    assert np.abs(probability - other).max() > 1e-4


def test_the_record_says_what_the_head_reads_and_where_it_came_from(converted, ckpt):
    out, _ = converted
    _, record = load_checkpoint(out)
    assert (record.step, record.store, record.train) == (0, None, None)
    assert record.converted.file == ckpt.name
    assert record.latents.latents.size == 64
    assert record.latents.latents.prompts == ("a photo of a {}.",)
    features = record.features.features
    assert features.blocks == (6, 7, 8, 9, 10)
    assert features.timesteps.model_dump() == {"low": 300, "high": 500, "draws": 1}
    assert record.latents.source["model"] == str(out / "ldm")
    assert build_layers(load_yaml(out / "spec.yaml", Spec)) == (record.latents, record.features)
    config = TrainConfig(head=HeadConfig(name="ldznet"), num_steps=1)
    with pytest.raises(SpecError, match=r"converted from LDZNet\.ckpt, which leaves no training"):
        check_resumable(config, record)


def test_a_record_is_of_a_trained_or_of_a_converted_head(converted, tmp_path):
    out = shutil.copytree(converted[0], tmp_path / "x")
    record = (out / "ldznet.json").read_text()
    half = record.replace('"store": null', '"store": "somewhere"')
    neither = json.dumps({**json.loads(record), "converted": None})
    for text in (half, neither):
        (out / "ldznet.json").write_text(text)
        with pytest.raises(SpecError, match="must have store, snapshot and train, or else"):
            load_checkpoint(out)


def test_a_file_without_the_ldm_takes_it_from_a_folder(ldm, head, tmp_path):
    state = to_ldznet(ldm, head, frozen=False, ema=False)
    state = {key: value for key, value in state.items() if not key.startswith("first_stage")}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(ConversionError, match=r"holds no vae, unet .* give its diffusers folder"):
        run_convert(tmp_path / "x.ckpt", tmp_path / "out", ConvertOptions(tokenizer=str(ldm)))
    lines = run_convert(tmp_path / "x.ckpt", tmp_path / "out", ConvertOptions(ldm=ldm))
    assert f"copied vae from {ldm}" in lines
    Segmenter(tmp_path / "out", device="cpu")
    for part in ("vae", "text_encoder", "unet"):
        assert list_model_files(tmp_path / "out" / "ldm", [part])
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "ldm" / name).read_bytes() == (ldm / name).read_bytes()


def test_an_ldm_that_does_not_fit_the_head_is_refused(ldm, head, ldm_folder, tmp_path):
    state = to_ldznet(ldm, head, frozen=False, ema=False)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    other = ConvertOptions(ldm=ldm_folder, tokenizer=str(ldm))
    with pytest.raises(ConversionError, match=r"channels of block 6 must be 64, got 96"):
        run_convert(tmp_path / "x.ckpt", tmp_path / "out", other)
    assert not (tmp_path / "out").exists()
    changed = shutil.copytree(ldm, tmp_path / "changed")
    path = changed / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.012", "0.013"))
    with pytest.raises(ConversionError, match="alphas_cumprod: expected Stable Diffusion"):
        run_convert(tmp_path / "x.ckpt", tmp_path / "out", ConvertOptions(ldm=changed))


def test_an_ldm_that_is_not_needed_is_refused(ckpt, ldm, tmp_path):
    with pytest.raises(ValueError, match="--ldm: the checkpoint holds every part"):
        run_convert(ckpt, tmp_path / "out", ConvertOptions(ldm=ldm))


def test_a_head_without_its_ldm_takes_the_raw_unet(ldm, head, tmp_path, options):
    """LD-ZNet's public code computes features with the raw weights of Stable Diffusion's file."""
    full = to_compvis(ldm)
    torch.save(full, tmp_path / "sd.ckpt")
    result = _convert(
        tmp_path / "sd.ckpt", tmp_path / "sd", "--tokenizer", str(ldm), "--weights", "raw"
    )
    assert result.exit_code == 0, result.output
    state = to_ldznet(ldm, head, frozen=False)
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ConversionError, match="converted with --weights raw"):
        run_convert(tmp_path / "x.ckpt", tmp_path / "out", options)
    run_convert(tmp_path / "x.ckpt", tmp_path / "out", ConvertOptions(ldm=tmp_path / "sd"))
    unet = load_file(tmp_path / "out/ldm/unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(unet["conv_out.bias"], full["model.diffusion_model.out.2.bias"])
    with pytest.raises(ValueError, match="--weights: does not go with an LD-ZNet checkpoint"):
        run_convert(tmp_path / "x.ckpt", tmp_path / "no", ConvertOptions(ldm=ldm, weights="raw"))


def test_a_frozen_ldm_that_is_not_whole_is_not_written(ldm, head, tmp_path, options):
    state = to_ldznet(ldm, head, ema=False)
    del state[f"{FROZEN}model.diffusion_model.time_embed.0.bias"]
    torch.save(state, tmp_path / "x.ckpt")
    message = (
        r"unet: .* lacks 1: sd_features_stage_model\.model\.model\.diffusion_model\."
        r"time_embed\.0\.bias"
    )
    with pytest.raises(ConversionError, match=message):
        run_convert(tmp_path / "x.ckpt", tmp_path / "out", options)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_converted_head_can_be_moved(converted, tmp_path):
    """Its record names the folder it was made in; the model beside it is the same."""
    moved = shutil.copytree(converted[0], tmp_path / "moved")
    record = moved / "ldznet.json"
    text = record.read_text()
    gone = text.replace(str(converted[0]), str(tmp_path / "gone"))
    assert gone != text
    record.write_text(gone)
    Segmenter(moved, device="cpu")
    (moved / "ldm" / "vae" / "config.json").write_text("{}")
    with pytest.raises(ModelFilesError, match="differ in SHA-256"):
        Segmenter(moved, device="cpu")


def test_a_znet_needs_no_frozen_unet(ldm, tmp_path):
    head = build_head(ldm, kind="znet")
    torch.save(to_ldznet(ldm, head, frozen=False, ema=False), tmp_path / "znet.pt")
    run_convert(tmp_path / "znet.pt", tmp_path / "out", ConvertOptions(tokenizer=str(ldm)))
    _, record = load_checkpoint(tmp_path / "out")
    assert record.features is None
    assert record.latents.latents.size == 384
    assert "unet" not in read_json(tmp_path / "out" / "ldm" / "model_index.json")


@pytest.mark.parametrize(
    "key", ["first_stage_model.extra", f"{FROZEN}first_stage_model.conv.weight"]
)
def test_an_unknown_key_is_an_error(ldm, head, tmp_path, options, key):
    torch.save({**to_ldznet(ldm, head, ema=False), key: torch.zeros(2)}, tmp_path / "x.ckpt")
    with pytest.raises(ConversionError, match=key.removeprefix(FROZEN).replace(".", r"\.")):
        run_convert(tmp_path / "x.ckpt", tmp_path / "out", options)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_part_that_is_there_twice_is_an_error(ldm, head, tmp_path, options):
    state = to_ldznet(ldm, head, ema=False)
    state |= {f"{FROZEN}scale_factor": torch.tensor(1.0), "scale_factor": torch.tensor(1.0)}
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ConversionError, match="holds scale_factor twice"):
        run_convert(tmp_path / "x.ckpt", tmp_path / "out", options)


def test_the_command_converts_stable_diffusion_for_encode(ldm, tmp_path):
    torch.save({"state_dict": to_compvis(ldm)}, tmp_path / "sd.ckpt")
    result = _convert(tmp_path / "sd.ckpt", tmp_path / "sd", "--tokenizer", str(ldm))
    assert result.exit_code == 0, result.output
    assert "a CompVis Stable Diffusion checkpoint" in result.output
    build_layers(Spec.model_validate({"latents": {"model": str(tmp_path / "sd")}, "features": {}}))


def test_the_refusal_of_pickles_names_a_command_that_helps(ldm, tmp_path):
    folder = shutil.copytree(ldm, tmp_path / "ldm")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=f"ldznet convert {folder} --out NEW"):
        list_model_files(folder, ["vae"])
    result = _convert(folder, tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "vae/diffusion_pytorch_model.safetensors (1 tensors)" in result.output
    assert list_model_files(tmp_path / "new", ["vae"])


def test_bad_input_ends_with_status_2_and_a_line(ldm, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.pt")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "none.ckpt",), "got nothing there"),
        ((tmp_path / "x.pt",), "expected a CompVis Stable Diffusion or LD-ZNet checkpoint"),
        ((tmp_path / "empty",), "weights in .bin pickles, got none"),
        (
            (tmp_path / "empty", "--dtype", "float16"),
            "--dtype: does not go with a folder of pickles",
        ),
    ):
        result = _convert(arguments[0], tmp_path / "out", *arguments[1:])
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "out").exists()


def _convert(source, out, *more):
    return CliRunner().invoke(app, ["convert", str(source), "--out", str(out), *more])


def test_tokenizers_are_folders_or_hub_ids(ldm):
    assert (
        resolve_tokenizer(str(ldm))
        == resolve_tokenizer(str(ldm / "tokenizer"))
        == ldm / "tokenizer"
    )
    with pytest.raises(ConversionError, match="expected a folder with vocab"):
        resolve_tokenizer(str(ldm / "vae"))
    with pytest.raises(ConversionError, match=r"could not be fetched from the hub.*--tokenizer"):
        resolve_tokenizer(None)
