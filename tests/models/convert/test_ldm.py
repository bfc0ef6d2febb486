"""CompVis checkpoints to diffusers folders: names, values, and every key accounted for."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from models.convert.configs import read_text_config
from models.convert.ldm import convert_ldm, write_ldm
from models.convert.names import ConversionError, map_vae_names
from models.convert.pickles import convert_pickles
from models.convert.sort_keys import sort_keys
from models.ldm.encoders import FeatureEncoder, LatentEncoder
from pipeline.base.whole_file import write_new_folder
from pipeline.convert import ConvertOptions, run_convert
from tests.support.compvis_layout import to_compvis, write_narrow_ldm

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(scope="module")
def ldm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow") / "ldm"
    write_narrow_ldm(folder)
    return folder


@pytest.fixture(scope="module")
def state(ldm):
    return to_compvis(ldm)


def convert(state, **options):
    """Return the models of a checkpoint and the account of its keys."""
    found = sort_keys(state)
    return convert_ldm(found, **options), found.account


def write(state, out, ldm, **options):
    models, account = convert(state, **options)
    with write_new_folder(out) as folder:
        write_ldm(folder, models, tokenizer=ldm / "tokenizer")
    return account


@pytest.fixture(scope="module")
def converted(tmp_path_factory, ldm, state):
    out = tmp_path_factory.mktemp("converted") / "new" / "ldm"
    return out, write(state, out, ldm)


def test_every_weight_comes_back_bit_for_bit(ldm, converted):
    out, _ = converted
    for name in WEIGHTS.values():
        ours, theirs = load_file(out / name), load_file(ldm / name)
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor), key
    assert list(out.parent.iterdir()) == [out]
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert len(modes) == 1  # the weights are as readable as the configs


@torch.no_grad()
def test_latents_text_and_features_are_those_of_the_original(ldm, converted):
    image = torch.arange(64 * 64 * 3, dtype=torch.uint8).reshape(1, 64, 64, 3)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for folder in (ldm, converted[0]):
        encoder = LatentEncoder.from_pretrained(folder)
        mean, logvar = encoder.encode_image(image)
        text = encoder.encode_text(["a photo of a red circle."])[0]
        unet = FeatureEncoder.from_pretrained(folder, blocks=[1, 6, 7, 10, 16])
        latent = mean * encoder.scaling_factor
        features = unet.encode_features(latent, noise, torch.tensor([400]), text)
        found.append([mean, logvar, text, *features.values()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_names_are_those_of_diffusers_own_converters(state, converted):
    """Values too: diffusers' converters are another author's reading of the same layout."""
    out, _ = converted
    configs = {part: json.loads((out / part / "config.json").read_text()) for part in WEIGHTS}
    theirs = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(
            {f"{key}": tensor for key, tensor in state.items()},
            configs["unet"],
            extract_ema=True,
        ),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(state), configs["vae"]),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(dict(state)),
    }
    theirs["text_encoder"].pop("text_model.embeddings.position_ids")
    for part, name in WEIGHTS.items():
        ours = load_file(out / name)
        assert set(ours) == set(theirs[part])
        assert all(torch.equal(ours[key], theirs[part][key]) for key in ours)


def test_configs_are_the_originals(ldm, converted):
    """Read off shapes, but for what nothing reads: sizes that a pipeline would draw at."""
    out, _ = converted
    unet, vae = (
        [type_.from_pretrained(folder, subfolder=part).config for folder in (out, ldm)]
        for type_, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    for ours, theirs in (unet, vae):
        keys = {key for key in theirs if not key.startswith("_")} - {"sample_size"}
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    ours, theirs = (
        json.loads((folder / "text_encoder" / "config.json").read_text()) for folder in (out, ldm)
    )
    assert ours == theirs


def test_plain_diffusers_loads_and_runs_the_folder(converted):
    pipeline = StableDiffusionPipeline.from_pretrained(converted[0], use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(
        "a red circle", height=64, width=64, num_inference_steps=1, output_type="np"
    ).images
    assert image.shape == (64, 64, 3)


def test_the_account_names_every_key_once(state, converted):
    _, account = converted
    assert set(account.converted) | set(account.ignored) == set(state)
    assert not set(account.converted) & set(account.ignored)
    assert {key for key in account.converted if key.startswith("model")} == {
        key
        for key in state
        if key.startswith("model_ema.diffusion")  # the raw weights are not taken
    }
    text = "\n".join(account.describe())
    assert "EMA after 7 updates" in text
    assert "ignored 3 keys: diffusion schedule" in text
    assert "ignored 1 key: position ids" in text


def test_raw_weights_are_taken_where_there_are_no_averages(state):
    plain = {key: tensor for key, tensor in state.items() if not key.startswith("model_ema.")}
    models, account = convert(plain)
    raw = plain["model.diffusion_model.out.2.bias"]
    assert torch.equal(models["unet"].weights["conv_out.bias"], raw)
    assert not any(rule.startswith("raw") for rule in account.ignored.values())


@pytest.mark.parametrize(
    "key",
    [
        "something.weight",
        "first_stage_model.encoder.down.0.attn.0.q.weight",
        "first_stage_model.encoder.mid.attn_1.extra.weight",
        "first_stage_model.encoder.conv_in.scale",
        "cond_stage_model.transformer.vision_model.embeddings.weight",
        "cond_stage_model.logit_scale",
        "model_ema.diffusion_modelextraweight",
        "model.diffusion_model.input_blocks.1.0.extra.weight",
        "sd_features_stage_model.model.betas",
    ],
)
def test_an_unknown_key_is_an_error_that_names_it(state, key):
    with pytest.raises(ConversionError, match=key.split(".", 1)[1].replace(".", r"\.")):
        convert({**state, key: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    "key", ["first_stage_model.loss.logvar", "first_stage_model.discriminator.main.0.weight"]
)
def test_what_trained_the_vae_is_ignored_by_a_rule(state, key):
    _, account = convert({**state, key: torch.zeros(2)})
    assert account.ignored[key] == "the VAE's training loss and discriminator"


def test_another_schedule_is_refused(state):
    other = state["alphas_cumprod"].clone()
    other[500] += 2e-5
    with pytest.raises(ConversionError, match=r"alphas_cumprod: expected .* off by 2.0e-05"):
        convert({**state, "alphas_cumprod": other})
    with pytest.raises(ConversionError, match=r"got \(10,\) off by inf"):
        convert({**state, "alphas_cumprod": other[:10]})
    with pytest.raises(ConversionError, match="off by nan"):
        convert({**state, "alphas_cumprod": torch.full((1000,), float("nan"))})
    convert({**state, "alphas_cumprod": state["alphas_cumprod"].half()})


def test_a_missing_part_or_weight_is_named(ldm, state, tmp_path):
    no_vae = {key: value for key, value in state.items() if not key.startswith("first_stage")}
    torch.save(no_vae, tmp_path / "x.ckpt")
    with pytest.raises(ConversionError, match="holds no vae"):
        run_convert(tmp_path / "x.ckpt", tmp_path / "x", ConvertOptions(tokenizer=str(ldm)))
    state = dict(state)
    del state["first_stage_model.post_quant_conv.weight"]
    with pytest.raises(ConversionError, match=r"lacks post_quant_conv\.weight"):
        convert(state)


def test_float16_and_the_latents_scale(ldm, state, tmp_path):
    out = tmp_path / "half"
    state = {**state, "scale_factor": torch.tensor(0.25)}
    write(state, out, ldm, dtype=torch.float16)
    for name in WEIGHTS.values():
        ours, theirs = load_file(out / name), load_file(ldm / name)
        assert all(torch.equal(ours[key], theirs[key].half()) for key in theirs)
    assert LatentEncoder.from_pretrained(out).scaling_factor == 0.25


RAW = "model.diffusion_model."
PLACES = [
    f"{RAW}time_embed.0.weight",
    f"{RAW}out.2.bias",
    f"{RAW}output_blocks.4.0.skip_connection.bias",
    "first_stage_model.encoder.mid.attn_1.q.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias",
]


@pytest.fixture(scope="module")
def plain(state):
    """Without the moving averages, so that a weight that is changed is one that is read."""
    return {key: tensor for key, tensor in state.items() if not key.startswith("model_ema.")}


@pytest.mark.parametrize("key", PLACES)
def test_a_model_that_lacks_a_weight_is_not_written(ldm, plain, tmp_path, key):
    """A loader would fill it with random numbers."""
    lacking = {name: tensor for name, tensor in plain.items() if name != key}
    assert len(lacking) < len(plain)
    with pytest.raises(ConversionError, match=f"lacks 1: {re.escape(key)};"):
        write(lacking, tmp_path / "out", ldm)
    assert not list(tmp_path.iterdir())


def test_a_weight_of_another_shape_is_named(plain):
    key = f"{RAW}input_blocks.1.0.in_layers.2.weight"
    with pytest.raises(
        ConversionError, match=rf"unet: .*{re.escape(key)} \(32, 16, 3, 3\) in place of \(32, 32,"
    ):
        convert({**plain, key: plain[key][:, :16]})


@pytest.mark.parametrize(
    "key",
    [
        f"{RAW}time_embed.0.weight",
        f"{RAW}input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ],
)
def test_weights_that_are_no_finite_floats_are_named(plain, key):
    for wrong, message in (
        (torch.tensor(1.0), "a single number"),
        (torch.full_like(plain[key], float("nan")), "NaN or infinity"),
        (plain[key].to(torch.int8), "got int8"),
        (plain[key].flatten(), r"dimensions, got shape|other shapes"),
    ):
        with pytest.raises(ConversionError, match=message) as caught:
            convert({**plain, key: wrong})
        # A config is read before the prefix is known to be the file's own.
        assert key.split("model.", 2)[-1] in str(caught.value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_widths_of_which_no_model_can_be_built_are_refused(plain):
    key = f"{RAW}input_blocks.1.0.in_layers.2.weight"
    for width in (0, 8):
        with pytest.raises(ConversionError, match="unet: no model has the shapes of its weights"):
            convert({**plain, key: torch.zeros(width, 32, 3, 3)})


def test_an_inpainting_unet_is_refused(ldm, plain, tmp_path):
    key = f"{RAW}input_blocks.0.0.weight"
    wide = torch.cat([plain[key], plain[key], plain[key][:, :1]], 1)
    with pytest.raises(
        ConversionError, match=r"checkpoint: .* unet: expected in_channels 4.*got 9"
    ):
        write({**plain, key: wide}, tmp_path / "out", ldm)
    assert not list(tmp_path.iterdir())


def test_a_network_gets_one_dtype(plain):
    mixed = {key: t.half() if "attn2" in key else t for key, t in plain.items()}
    models, account = convert(mixed)
    assert {tensor.dtype for tensor in models["unet"].weights.values()} == {torch.float32}
    text = "\n".join(account.describe())
    assert "copies; float16 and float32 in the file, all float32 here)" in text
    assert text.count("in the file") == 1


def test_raw_weights_can_be_asked_for(state):
    models, account = convert(state, raw=True)
    raw = state[f"{RAW}out.2.bias"]
    assert torch.equal(models["unet"].weights["conv_out.bias"], raw)
    text = "\n".join(account.describe())
    assert "raw, not the EMA copies beside them" in text
    assert "684 keys: moving averages of the UNet, whose raw weights are converted" in text


def test_an_out_that_holds_something_is_left_alone(ldm, state, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="expected no file or folder, or an empty one"):
        write(state, tmp_path, ldm)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_error_leaves_nothing_behind(ldm, state, tmp_path):
    tokenizer = shutil.copytree(ldm / "tokenizer", tmp_path / "tokenizer")
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    (tokenizer / "vocab.json").write_text(json.dumps({**vocabulary, "more": len(vocabulary)}))
    with pytest.raises(ConversionError, match=r"tokens, but the checkpoint's text encoder"):
        write(state, tmp_path / "out", tmp_path)
    (tokenizer / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"expected a CLIP tokenizer's folder with vocab\.json"):
        write(state, tmp_path / "out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_clip_vit_l_by_its_shapes():
    """The published text encoder's config from its names and shapes alone."""
    with torch.device("meta"):
        shapes = {
            "embeddings.token_embedding.weight": torch.empty(49408, 768),
            "embeddings.position_embedding.weight": torch.empty(77, 768),
        } | {f"encoder.layers.{i}.mlp.fc1.weight": torch.empty(3072, 768) for i in range(12)}
    config = read_text_config(shapes)
    assert config["num_attention_heads"] == 12
    assert config["num_hidden_layers"] == 12
    assert config["intermediate_size"] == 3072
    assert (config["bos_token_id"], config["eos_token_id"]) == (49406, 49407)


def test_the_vaes_attention_becomes_linear_and_its_decoder_is_turned_round(state):
    key = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert state[key].shape[2:] == (1, 1)
    weight = convert(state)[0]["vae"].weights["decoder.mid_block.attentions.0.to_q.weight"]
    assert torch.equal(weight, state[key][:, :, 0, 0])
    names = {
        "up_blocks.3.resnets.1.conv_shortcut.bias": "up.0.block.1.nin_shortcut.bias",
        "up_blocks.0.upsamplers.0.conv.bias": "up.3.upsample.conv.bias",
        "up_blocks.1.resnets.0.norm1.bias": "up.2.block.0.norm1.bias",
        "up_blocks.2.resnets.0.norm1.bias": "up.1.block.0.norm1.bias",
    }
    expected = {f"decoder.{ours}": f"decoder.{theirs}" for ours, theirs in names.items()}
    assert map_vae_names(expected) == expected


@pytest.fixture(scope="module")
def pickled(tmp_path_factory, ldm):
    """The narrow model as a folder of pickles: a variant, pieces with an index, tied tensors."""
    folder = shutil.copytree(ldm, tmp_path_factory.mktemp("pickled") / "ldm")
    for name in WEIGHTS.values():
        weights = load_file(ldm / name)
        (folder / name).unlink()
        if name.startswith("vae"):
            torch.save(weights, folder / "vae/diffusion_pytorch_model.fp16.bin")
        elif name.startswith("text"):
            weights["tied.weight"] = weights["text_model.embeddings.token_embedding.weight"]
            weights["view"] = weights["tied.weight"][3:5]
            weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
            torch.save(weights, folder / "text_encoder/pytorch_model.bin")
        else:
            _save_pieces(weights, folder / "unet")
    (folder / "v1-4.ckpt").write_bytes(b"not read")
    return folder


def _save_pieces(weights, folder):
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    keys = sorted(weights)
    pieces = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        torch.save({key: weights[key] for key in keys if pieces[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": pieces}
    (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_folder_of_pickles_becomes_one_of_safetensors(ldm, pickled, tmp_path):
    out = tmp_path / "new"
    out.mkdir()
    lines = convert_pickles(pickled, out)
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".ckpt")]
    ignored = [line for line in lines if line.startswith("ignored")]
    assert ignored == ["ignored v1-4.ckpt: no weights of a part in diffusers' layout"]
    vae = load_file(out / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(vae[k], v) for k, v in load_file(ldm / WEIGHTS["vae"]).items())
    text = load_file(out / WEIGHTS["text_encoder"])
    original = load_file(ldm / WEIGHTS["text_encoder"])
    assert set(text) == {*original, "tied.weight", "view", "text_model.embeddings.position_ids"}
    assert torch.equal(text["view"], text["tied.weight"][3:5])
    assert text["text_model.embeddings.position_ids"].dtype == torch.int64
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet", use_safetensors=True)
    expected = load_file(ldm / WEIGHTS["unet"])
    assert all(torch.equal(v, expected[k]) for k, v in unet.state_dict().items())
    for name in ("tokenizer/vocab.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert (out / name).read_bytes() == (ldm / name).read_bytes()


def test_an_index_that_names_no_piece_is_refused(pickled, tmp_path):
    folder = shutil.copytree(pickled, tmp_path / "in")
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConversionError, match="which is no piece in its folder"):
        run_convert(folder, tmp_path / "out", ConvertOptions())
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pickles_is_refused(ldm, tmp_path):
    with pytest.raises(ConversionError, match=r"weights in \.bin pickles, got none"):
        convert_pickles(ldm, tmp_path)


def test_an_out_inside_the_folder_is_refused(pickled):
    with pytest.raises(ValueError, match="lies inside the folder to convert"):
        run_convert(pickled, pickled / "new", ConvertOptions())
