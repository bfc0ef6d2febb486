"""Damaged model folders: each fault ends loading, with the part and what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.ldm.files import ModelFilesError

WEIGHTS = {
    "unet": ("diffusion_pytorch_model.safetensors", "mid_block.resnets.0.norm1.weight"),
    "vae": ("diffusion_pytorch_model.safetensors", "encoder.conv_in.bias"),
    "text_encoder": ("model.safetensors", "text_model.encoder.layers.1.mlp.fc1.weight"),
}


@pytest.fixture
def folder(tmp_path, ldm_folder):
    return shutil.copytree(ldm_folder, tmp_path / "ldm")


def load(folder, part):
    if part in ("unet", "scheduler"):
        return FeatureEncoder.from_pretrained(folder, blocks=[6])
    return LatentEncoder.from_pretrained(folder)


def edit_weights(folder, part, change):
    path = folder / part / WEIGHTS[part][0]
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path, **options):
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_weight_is_named(folder, part):
    key = WEIGHTS[part][1]
    edit_weights(folder, part, lambda weights: weights.pop(key))
    shown = key.removeprefix("text_model.")
    with pytest.raises(ModelFilesError, match=rf"/{part}: .* 1 missing: \S*{shown}; .* fetch both"):
        load(folder, part)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_weight_that_nothing_reads_is_named(folder, part):
    edit_weights(folder, part, lambda weights: weights.update({"odd.weight": torch.zeros(1)}))
    with pytest.raises(ModelFilesError, match=rf"/{part}: .* 1 unexpected: odd.weight; "):
        load(folder, part)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_weight_of_another_shape_is_named(folder, part):
    key = WEIGHTS[part][1]
    edit_weights(folder, part, lambda weights: weights.update({key: torch.zeros(3)}))
    shown = key.removeprefix("text_model.")
    with pytest.raises(ModelFilesError, match=rf"(?s)/{part}: .*{shown}.* fetch "):
        load(folder, part)


def test_all_weights_under_other_names_are_counted(folder):
    def rename(weights):
        for key in list(weights):
            weights[f"foo.{key}"] = weights.pop(key)

    edit_weights(folder, "text_encoder", rename)
    with pytest.raises(ModelFilesError, match=r"/text_encoder: .* \d+ missing: .* and \d+ more;"):
        load(folder, "text_encoder")


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_cut_weight_file_is_named(folder, part):
    path = folder / part / WEIGHTS[part][0]
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ModelFilesError, match=rf"(?s)/{part}: cannot be loaded .* fetch it again"):
        load(folder, part)


def test_what_older_versions_wrote_still_loads(folder, ldm_folder):
    """CLIP's position_ids and projection, and the VAE's attention under its former names."""

    def add_positions(weights):
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        weights["text_projection.weight"] = torch.eye(64)

    def rename(weights):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for key in [key for key in weights if ".attentions." in key]:
            older = key
            for new, old in names.items():
                older = older.replace(f".{new}.", f".{old}.")
            weights[older] = weights.pop(key)
        assert "encoder.mid_block.attentions.0.query.weight" in weights

    edit_weights(folder, "text_encoder", add_positions)
    edit_weights(folder, "vae", rename)
    older, newer = load(folder, "vae"), load(ldm_folder, "vae")
    image = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(older.encode_image(image)[0], newer.encode_image(image)[0])
    assert torch.equal(older.encode_text(["red"]).tokens, newer.encode_text(["red"]).tokens)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vocab.json", "merges.txt"], "got special_tokens_map.json, tokenizer_config.json; fetch"),
        (["merges.txt"], "expected a vocabulary, vocab.json and merges.txt or tokenizer.json"),
        ([], "got no such folder"),
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_refused(folder, names, message):
    for name in names:
        (folder / "tokenizer" / name).unlink()
    if not names:
        shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelFilesError, match=f"/tokenizer: .*{message}"):
        load(folder, "tokenizer")


def test_an_empty_vocabulary_is_refused(folder):
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"/tokenizer: cannot be loaded .* fetch it again"):
        load(folder, "tokenizer")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelFilesError, match=r"/tokenizer: .* at least 512 tokens, got "):
        load(folder, "tokenizer")


def test_special_tokens_have_embeddings(folder):
    path = folder / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["<|endoftext|>"] += 1
    path.write_text(json.dumps(vocabulary))
    message = r"/tokenizer: .* tokens below 630, .* got \(628, 630, 630\)"
    with pytest.raises(ModelFilesError, match=message):
        load(folder, "tokenizer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "odd"}, "cannot be loaded as DDPMScheduler: NotImplementedError: odd"),
        ({"beta_end": "high"}, "cannot be loaded as DDPMScheduler: TypeError"),
        ({"beta_end": 1e9}, "signal between 0 and 1"),
        ({"beta_end": float("nan")}, "signal between 0 and 1"),
    ],
)
def test_a_damaged_noise_schedule_is_refused(folder, options, message):
    edit_json(folder / "scheduler" / "scheduler_config.json", **options)
    with pytest.raises(ModelFilesError, match=rf"/scheduler: .*{message}.* again"):
        load(folder, "scheduler")


def test_a_missing_scheduler_and_an_impossible_unet_are_refused(folder):
    edit_json(folder / "unet" / "config.json", down_block_types=["CrossAttnDownBlock2D", "Odd"])
    with pytest.raises(ModelFilesError, match=r"/unet: cannot be loaded .* fetch it again"):
        load(folder, "unet")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ModelFilesError, match=r"/scheduler: cannot be loaded .* fetch it again"):
        load(folder, "scheduler")
