"""SDXL end to end: pooled text from the encoder through the store to the reader and live use."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from models.ldm.noise import draw_noise
from pipeline.decode.images import decode_picture
from pipeline.encode.prepare import prepare_encode
from pipeline.read.reader import PairReader
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.segment import Segmenter
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.spec.open_model import open_model
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store
from pipeline.train.run import open_run_layers, run_train

UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [1, 2, 4],
    "block_out_channels": [8, 16, 32],
    "cross_attention_dim": 64 + 48,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "norm_num_groups": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "transformer_layers_per_block": [1, 1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
CONFIG = TrainConfig(
    head=HeadConfig(name="ldznet"),
    num_steps=1,
    batch_size=2,
    validation_pairs=1,
    learning_rate=1e-3,
)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory, ldm_folder):
    """The tiny model with SDXL's UNet, made narrow, and a second text encoder."""
    folder = shutil.copytree(ldm_folder, tmp_path_factory.mktemp("model") / "sdxl")
    torch.manual_seed(0)
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 24}
    config |= {"architectures": ["CLIPTextModelWithProjection"], "initializer_factor": 3.0}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    encoder.save_pretrained(folder / "text_encoder_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    for name in ("text_encoder", "text_encoder_2"):
        kind = "CLIPTextModel" + ("WithProjection" if name.endswith("2") else "")
        index |= {name: ["transformers", kind]}
    for name in ("tokenizer", "tokenizer_2"):
        index |= {name: ["transformers", "CLIPTokenizer"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def sdxl_spec(sdxl_folder):
    return Spec(
        latents=LatentsSpec(model=str(sdxl_folder), size=64),
        features=FeaturesSpec(timesteps=(300, 400)),
    )


@pytest.fixture(scope="module")
def sdxl_store(tmp_path_factory, corpus_folder, sdxl_spec):
    """Latents and features of the corpus, and features of the empty prompt over its val tar."""
    folder = tmp_path_factory.mktemp("encoded") / "store"
    assert encode(sdxl_spec, corpus_folder / "*.tar", folder) == ["committed"] * 3
    return folder


def encode(spec, pattern, store):
    run = prepare_encode(spec, [str(pattern)], str(store), batch=8)
    stage = EncodeStage(run.config)
    return [(outcome := stage.encode(item)).error or outcome.status for item in run.items]


def read_val(read_arrays, folder):
    """{layer/array: values} of the val task, and its index."""
    store = Store.open(str(folder))
    commits = store.newest_commits(store.list_layers()[0].folder)
    task = next(task for task in commits if "val" in task)
    arrays = {k: v for k, v in read_arrays(folder).items() if f"/{task}/" in k}
    return {k.replace(f"/{task}", ""): v for k, v in arrays.items()}, store.read_index(
        commits[task]
    ).to_pylist()


def assert_close(stored, expected, tolerance):
    expected = expected.detach().numpy()
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(stored.astype(np.float64), expected, rtol=0, atol=limit)


def test_what_is_stored_is_what_diffusers_pipeline_gives(read_arrays, sdxl_store, sdxl_folder):
    arrays, index = read_val(read_arrays, sdxl_store)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pair = index[2]
    with torch.inference_mode():
        text, _, pooled, _ = pipeline.encode_prompt(pair["prompt"], device="cpu")
        assert_close(arrays["latents/text"][pair["text_row"]], text[0], 2e-3)
        assert_close(arrays["latents/text_pooled"][pair["text_row"]], pooled[0], 2e-3)
        mean = torch.from_numpy(arrays["latents/latent_mean"][pair["latent_row"]])[None].float()
        noise = draw_noise(mean.shape[1:], seed=0, key=pair["key"], view=0, draw=1)[None]
        schedule = DDPMScheduler.from_pretrained(sdxl_folder, subfolder="scheduler")
        timestep = torch.tensor([400])
        noised = schedule.add_noise(mean * pipeline.vae.config.scaling_factor, noise, timestep)
        seen = {}
        pipeline.unet.up_blocks[1].attentions[1].register_forward_hook(
            lambda module, args, output: seen.update(block10=output[0])
        )
        time_ids = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 24)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        pipeline.unet(noised, timestep, encoder_hidden_states=text, added_cond_kwargs=added)
    assert_close(arrays["features/block10"][2, 1], seen["block10"][0], 1e-2)


def test_the_empty_prompt_is_zeros_and_recorded(read_arrays, sdxl_store, sdxl_spec):
    arrays, index = read_val(read_arrays, sdxl_store)
    num_prompts = 1 + len({pair["prompt"] for pair in index})
    assert arrays["latents/text_pooled"].shape == (num_prompts, 24)
    assert arrays["latents/text_pooled"].dtype == np.float16
    for name in ("text", "text_pooled"):
        assert not arrays[f"latents/{name}"][0].any()
        assert all(row.any() for row in arrays[f"latents/{name}"][1:])
    layer, _ = build_layers(sdxl_spec)
    assert (layer.pooled_width, layer.zero_empty_prompt) == (24, True)
    assert (layer.canonical["text_pooled"], layer.canonical["zero_empty_prompt"]) == (24, True)
    assert {path.split("/")[0] for path in layer.canonical["weights"]} == {
        "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    }  # fmt: skip


def test_a_layer_of_sd1_says_nothing_of_pooled_text(spec):
    layer, _ = build_layers(spec)
    assert set(layer.canonical) == {
        "schema_version", "kind", "section", "weights", "scaling_factor",
    }  # fmt: skip
    assert (layer.pooled_width, layer.zero_empty_prompt) == (None, False)


def test_the_layer_not_the_folder_says_what_the_empty_prompt_is(
    read_arrays, tmp_path, sdxl_folder, sdxl_spec, corpus_folder
):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    plain = index | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(plain))
    latents = sdxl_spec.latents.model_copy(update={"model": str(folder)})
    spec = Spec(latents=latents)
    layer, _ = build_layers(spec)
    assert layer.fingerprint != build_layers(sdxl_spec)[0].fingerprint
    run = prepare_encode(spec, [str(corpus_folder / "*val*")], str(tmp_path / "store"), batch=8)
    (folder / "model_index.json").write_text(json.dumps(index))  # no part of what is digested
    assert open_model(layer) == folder
    assert EncodeStage(run.config).encode(run.items[0]).status == "committed"
    arrays, _ = read_val(read_arrays, tmp_path / "store")
    assert arrays["latents/text"][0].any()
    assert arrays["latents/text_pooled"][0].any()


def test_features_of_the_empty_prompt_read_its_zeros(
    read_arrays, tmp_path, sdxl_store, sdxl_spec, sdxl_folder, corpus_folder
):
    features = FeaturesSpec(blocks=(1,), timesteps=(300,), condition="empty")
    spec = sdxl_spec.model_copy(update={"features": features})
    assert encode(spec, corpus_folder / "*val*.tar", tmp_path / "store") == ["committed"]
    arrays, index = read_val(read_arrays, tmp_path / "store")
    unet = UNet2DConditionModel.from_pretrained(sdxl_folder, subfolder="unet").eval()
    schedule = DDPMScheduler.from_pretrained(sdxl_folder, subfolder="scheduler")
    scale = build_layers(sdxl_spec)[0].scaling_factor
    mean = torch.from_numpy(arrays["latents/latent_mean"][:1]).float() * scale
    noise = draw_noise(mean.shape[1:], seed=0, key=index[0]["key"], view=0, draw=0)[None]
    timestep = torch.tensor([300])
    added = {
        "text_embeds": torch.zeros(1, 24),
        "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
    }
    seen = {}
    unet.down_blocks[1].attentions[0].register_forward_hook(
        lambda module, args, output: seen.update(block01=output[0])
    )
    noised = schedule.add_noise(mean, noise, timestep)
    unet(noised, timestep, torch.zeros(1, 77, 112), added_cond_kwargs=added)
    assert_close(arrays["features/block01"][0, 0], seen["block01"][0], 1e-2)


def test_the_reader_gives_pooled_text_beside_text(read_arrays, sdxl_store):
    arrays, index = read_val(read_arrays, sdxl_store)
    source = open_run_layers(CONFIG, str(sdxl_store), resume_from=None)
    reader = PairReader(source, tasks="*val*", inputs=frozenset({"text"}))
    batch = reader.read([3, 0], draws=[0, 0])
    assert sorted(batch.inputs) == ["text", "text_pooled"]
    rows = [index[number]["text_row"] for number in (3, 0)]
    for name in ("text", "text_pooled"):
        expected = torch.from_numpy(arrays[f"latents/{name}"][rows]).float()
        assert torch.equal(batch.inputs[name], expected)
    assert batch.inputs["text_pooled"].shape == (2, 24)
    latents = PairReader(source, tasks="*", inputs=frozenset({"latent"}))
    assert sorted(latents.read([0], draws=[0]).inputs) == ["latent"]


def test_live_inputs_are_the_cached_ones(tmp_path, sdxl_folder, sdxl_store, corpus_folder):
    """A head is trained from the store and reads live what it read there."""
    checkpoint = run_train(CONFIG, str(sdxl_store), tmp_path / "run", num_workers=0, resume=False)
    moved = shutil.copytree(sdxl_folder, tmp_path / "moved")
    (moved / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
    segmenter = Segmenter(checkpoint, model=str(moved), device="cpu")
    assert not segmenter._encode_text("")["text"].any(), "as the layer says"
    source = open_run_layers(CONFIG, str(sdxl_store), resume_from=None)
    inputs = frozenset({"latent", "text", "features"})
    reader = PairReader(source, tasks="*val*", inputs=inputs, blocks=(6, 10))
    cached = reader.read([1], draws=[reader.num_draws // 2])
    with tarfile.open(corpus_folder / "scenes-val-00000.tar") as tar:
        data = tar.extractfile(f"{cached.keys[0]}.jpg").read()
    image = np.array(decode_picture(data, max_pixels=10**6).image)
    (live,) = segmenter.encode(image, cached.phrases[0], key=cached.keys[0])
    assert set(live.inputs) == set(cached.inputs) == {*inputs, "text_pooled"}
    for name in ("latent", "text", "text_pooled"):
        limit = source.latents.tolerance * cached.inputs[name].abs().max()
        assert (live.inputs[name] - cached.inputs[name]).abs().max() <= limit, name
    for number, feature in cached.inputs["features"].items():
        limit = source.features.tolerance * feature.abs().max()
        assert (live.inputs["features"][number] - feature).abs().max() <= limit
    assert segmenter.segment(image, cached.phrases[0]).shape == image.shape[:2]
