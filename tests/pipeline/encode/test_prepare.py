"""The encode stage: right values, whatever the batch; every fault an outcome with its reason."""

import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from models.ldm.noise import draw_noise
from pipeline.encode.hash_tars import hash_tars
from pipeline.encode.prepare import prepare_encode
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec, UniformTimesteps
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store
from pipeline.upkeep.inspect import inspect_store
from tests.support.plain_tar import write_tar


def prepare(spec, corpus, store, *, batch=8, **options):
    """Prepare a run; hash the tars whose marks changed."""
    patterns = None if corpus is None else [str(corpus)]
    run = prepare_encode(spec, patterns, str(store), batch=batch, **options)
    if run.suspects:
        found = hash_tars(run.suspects, on_ray=False)
        run = run.resolve(found.digests, found.unread)
    return run


def encode(spec, corpus, store, *, batch=8, **options):
    """Encode what is missing in this process; return the outcomes."""
    run = prepare(spec, corpus, store, batch=batch, **options)
    stage = EncodeStage(run.config)
    return [*(failed.outcome for failed in run.failed), *map(stage.encode, run.items)]


def read_tar(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def test_values_are_what_plain_diffusers_gives(
    read_arrays, store_folder, corpus_folder, ldm_folder, spec
):
    """Recompute one pair with the published classes alone, from the tar's bytes."""
    store = Store.open(str(store_folder))
    task = next(t for t in store.newest_commits(store.list_layers()[0].folder) if "val" in t)
    latents, _ = store.list_layers()
    index = store.read_index(store.newest_commits(latents.folder)[task]).to_pylist()
    arrays = read_arrays(store_folder)
    row, pair = 3, index[3]
    members = dict(read_tar(corpus_folder / "scenes-val-00000.tar"))
    image = np.asarray(Image.open(io.BytesIO(members[f"{pair['key']}.jpg"])).convert("RGB"))
    with torch.inference_mode():
        vae = AutoencoderKL.from_pretrained(ldm_folder, subfolder="vae").eval()
        pixels = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2).float() / 127.5 - 1
        mean = vae.encode(pixels).latent_dist.mean
        tokenizer = CLIPTokenizer.from_pretrained(ldm_folder, subfolder="tokenizer")
        encoder = CLIPTextModel.from_pretrained(ldm_folder, subfolder="text_encoder").eval()
        tokens = tokenizer(
            f"a photo of a {pair['phrase']}.", padding="max_length", max_length=77,
            return_tensors="pt",
        )  # fmt: skip
        text = encoder(tokens.input_ids).last_hidden_state
        schedule = DDPMScheduler.from_pretrained(ldm_folder, subfolder="scheduler")
        noise = draw_noise(mean.shape[1:], seed=0, key=pair["key"], view=0, draw=1)[None]
        timestep = torch.tensor([400])
        noised = schedule.add_noise(mean * vae.config.scaling_factor, noise, timestep)
        unet = UNet2DConditionModel.from_pretrained(ldm_folder, subfolder="unet").eval()
        seen = {}
        unet.up_blocks[1].attentions[2].register_forward_hook(
            lambda module, args, output: seen.update(block10=output[0])
        )
        unet(noised, timestep, encoder_hidden_states=text)
    prefix = f"latents/{task}"
    assert_close(arrays[f"{prefix}/latent_mean"][pair["latent_row"]], mean[0], 2e-3)
    assert_close(arrays[f"{prefix}/text"][pair["text_row"]], text[0], 2e-3)
    # Features start from the stored float16 latent and text, so they carry that rounding too.
    assert_close(arrays[f"features/{task}/block10"][row, 1], seen["block10"][0], 1e-2)
    assert arrays[f"features/{task}/timestep"][row].tolist() == [300, 400]
    mask = np.asarray(Image.open(io.BytesIO(members[f"{pair['key']}.mask0.png"])))
    first = next(i for i, p in enumerate(index) if p["key"] == pair["key"])
    np.testing.assert_array_equal(arrays[f"{prefix}/mask"][first], mask)
    np.testing.assert_array_equal(arrays[f"{prefix}/image"][pair["latent_row"]], image)


def assert_close(stored, expected, tolerance):
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    limit = tolerance * np.abs(expected.astype(np.float64)).max()
    np.testing.assert_allclose(stored.astype(np.float64), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_changes_nothing_beyond_the_stated_tolerance(
    read_arrays, tmp_path, corpus_folder, spec, store_folder, batch
):
    encode(spec, corpus_folder / "scenes-val-*.tar", tmp_path / "store", batch=batch)
    ours, theirs = read_arrays(tmp_path / "store"), read_arrays(store_folder)
    tolerance = {x.kind: x.tolerance for x in Store.open(str(store_folder)).list_layers()}
    assert len(ours) == 11
    for name, values in ours.items():
        if values.dtype.kind == "f":
            for row, other in zip(values, theirs[name], strict=True):
                assert_close(row, other, tolerance[name.split("/")[0]])
        else:
            np.testing.assert_array_equal(values, theirs[name])


def test_second_run_has_nothing_to_do(store_folder, corpus_folder, spec):
    run = prepare_encode(spec, [str(corpus_folder / "*.tar")], str(store_folder), batch=4)
    assert run.items == ()
    assert run.num_done == run.num_tasks == 3


def test_only_what_is_missing_is_encoded(read_arrays, tmp_path, store_folder, corpus_folder, spec):
    store = tmp_path / "store"
    shutil.copytree(store_folder, store)
    latents, features = Store.open(str(store)).list_layers()
    lost = next((store / features.folder / "commits").glob("*val*.json"))
    lost.unlink()
    before = {p.name for p in (store / latents.folder / "data").rglob("*")}
    (outcome,) = encode(spec, corpus_folder / "*.tar", store)
    assert outcome.status == "committed"
    assert lost.exists()
    assert {p.name for p in (store / latents.folder / "data").rglob("*")} == before
    ours, theirs = read_arrays(store), read_arrays(store_folder)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_another_features_layer_needs_no_image_and_no_vae(
    read_arrays, tmp_path, corpus_folder, spec
):
    """With the source tar deleted, features still come from the latents."""
    store, path = tmp_path / "store", tmp_path / "scenes-val-00000.tar"
    shutil.copy(corpus_folder / path.name, path)
    encode(spec, path, store)
    path.unlink()
    other = spec.model_copy(
        update={
            "features": FeaturesSpec(
                blocks=(1, 16),
                timesteps=UniformTimesteps(low=300, high=500, draws=2),
                condition="empty",
                storage="int8",
            )
        }
    )
    outcomes = encode(other, None, store)
    assert [outcome.status for outcome in outcomes] == ["committed"]
    layers = inspect_store(str(store))
    assert [layer.folder.split("-")[0] for layer in layers] == ["latents", "features", "features"]
    arrays = {
        name.rsplit("/", 1)[1]: values
        for name, values in read_arrays(store).items()
        if name.startswith("features/scenes-val") and ("16" in name or "timestep" in name)
    }
    # A row a view, 24 channels of 8x8 each.
    assert arrays["block16"].shape == (4, 2, 24, 8, 8)
    assert arrays["block16"].dtype == np.int8
    assert arrays["block16_scale"].shape == (4, 2, 24)


def test_uniform_timesteps_are_in_range_and_fixed_by_the_key(
    read_arrays, tmp_path, corpus_folder, ldm_folder
):
    features = FeaturesSpec(blocks=(1,), timesteps=UniformTimesteps(low=300, high=500, draws=3))
    spec = Spec(latents=LatentsSpec(model=str(ldm_folder), size=64), features=features)
    for name in ("a", "b"):
        encode(spec, corpus_folder / "scenes-val-*.tar", tmp_path / name, batch=2 + len(name))
    first, second = (read_arrays(tmp_path / name) for name in ("a", "b"))
    name = next(name for name in first if name.endswith("timestep"))
    assert (first[name] >= 300).all()
    assert (first[name] < 500).all()
    assert len(np.unique(first[name])) > 3
    np.testing.assert_array_equal(first[name], second[name])


def test_phrase_crops_and_flips_add_views(read_arrays, tmp_path, corpus_folder, ldm_folder):
    latents = LatentsSpec(
        model=str(ldm_folder), size=64, crop="phrase", views=2, flip=True,
        prompts=("a photo of a {}.", "{}."),
    )  # fmt: skip
    (outcome,) = encode(Spec(latents=latents), corpus_folder / "scenes-val-*.tar", tmp_path / "s")
    store = Store.open(str(tmp_path / "s"))
    (commit,) = store.newest_commits(store.list_layers()[0].folder).values()
    index = store.read_index(commit).to_pylist()
    assert commit.rows["views"] == commit.rows["pairs"] == outcome.num_pairs
    assert {row["prompt"] == f"{row['phrase']}." for row in index} == {True, False}
    arrays = read_arrays(tmp_path / "s")
    masks = next(values for name, values in arrays.items() if name.endswith("/mask"))
    for row, (this, after) in enumerate(itertools.pairwise(index)):
        if after["flipped"] and not this["flipped"] and after["key"] == this["key"]:
            np.testing.assert_array_equal(masks[row][:, ::-1], masks[row + 1])
    assert sum(row["flipped"] for row in index) == len(index) / 2


@pytest.fixture
def broken_corpus(tmp_path, corpus_folder):
    """Train tars: one with a broken JPEG, a missing mask and a stranger, and a whole one."""
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copy(corpus_folder / "scenes-train-00001.tar", folder)
    members = read_tar(corpus_folder / "scenes-train-00000.tar")
    keys = list(dict.fromkeys(name.split(".")[0] for name, _ in members))
    changed = []
    for name, data in members:
        if name == f"{keys[0]}.jpg":
            data = data[: len(data) // 2]
        if name != f"{keys[1]}.mask0.png":
            changed.append((name, data))
    changed.append(("README.md", b"hello"))
    write_tar(folder / "scenes-train-00000.tar", changed)
    return folder


def test_broken_samples_are_rejected_with_reasons_and_the_rest_is_stored(
    tmp_path, broken_corpus, spec
):
    outcomes = encode(spec, broken_corpus / "*.tar", tmp_path / "store")
    assert [outcome.status for outcome in outcomes] == ["committed", "committed"]
    assert outcomes[0].rejects == {"bad_image": 1, "missing_mask": 1, "unexpected_member": 1}
    assert (outcomes[0].num_samples, outcomes[1].num_samples) == (2, 4)
    store = Store.open(str(tmp_path / "store"))
    commit = next(iter(store.newest_commits(store.list_layers()[0].folder).values()))
    assert commit.accounting is not None
    assert commit.accounting.balanced
    assert commit.accounting.model_dump() == {
        "samples": 4, "stored_samples": 2, "rejected_samples": 2, "rejected_members": 1,
        "rejected_pairs": 0, "set_aside_members": 0, "notes": {},
        "rejects": {"bad_image": 1, "missing_mask": 1, "unexpected_member": 1},
    }  # fmt: skip
    rejects = store.read_parquet(commit, "rejects.parquet").to_pylist()
    assert {row["reason"] for row in rejects} == set(outcomes[0].rejects)
    assert all(row["detail"] for row in rejects)


def test_a_tar_of_which_nothing_is_whole_is_committed_empty(tmp_path, spec):
    write_tar(tmp_path / "x.tar", [("a.json", b"{}"), ("b.txt", b"hello")])
    (outcome,) = encode(spec, tmp_path / "x.tar", tmp_path / "store")
    assert (outcome.status, outcome.num_pairs) == ("committed", 0)
    assert outcome.rejects == {"no_image": 1, "unexpected_member": 1}
    assert [layer.rows["pairs"] for layer in inspect_store(str(tmp_path / "store"))] == [0, 0]


def test_a_cut_tar_fails_alone_and_nothing_of_it_is_stored(tmp_path, broken_corpus, spec):
    path = broken_corpus / "scenes-train-00000.tar"
    path.write_bytes(path.read_bytes()[:-6000])
    cut, whole = encode(spec, broken_corpus / "*.tar", tmp_path / "store")
    assert cut.status == "failed"
    assert "DamagedTarError" in cut.error
    assert whole.status == "committed"
    layers = inspect_store(str(tmp_path / "store"))
    assert [layer.num_tasks for layer in layers] == [1, 1]


def test_nan_is_never_committed(tmp_path, ldm_folder, corpus_folder, spec):
    """Fault 11: a UNet whose weights overflow."""
    model = tmp_path / "ldm"
    shutil.copytree(ldm_folder, model)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] = torch.full_like(weights["conv_in.bias"], float("nan"))
    save_file(weights, path)
    latents = spec.latents.model_copy(update={"model": str(model)})
    other = spec.model_copy(update={"latents": latents})
    (outcome,) = encode(other, corpus_folder / "scenes-val-*.tar", tmp_path / "store")
    assert outcome.status == "failed"
    assert "block06: expected finite float16 values" in outcome.error
    folders = {layer.folder: layer.num_tasks for layer in inspect_store(str(tmp_path / "store"))}
    assert [count for name, count in folders.items() if name.startswith("features")] == [0]


def test_weights_replaced_during_a_run_are_refused(
    tmp_path, ldm_folder, corpus_folder, spec, monkeypatch
):
    """Fault 23, between the driver's digests and an actor's loading."""
    monkeypatch.setattr("pipeline.stage.node_guard.FIRST_PAUSE_S", 0.01)
    model = tmp_path / "ldm"
    shutil.copytree(ldm_folder, model)
    latents = spec.latents.model_copy(update={"model": str(model)})
    run = prepare_encode(
        spec.model_copy(update={"latents": latents}), [str(corpus_folder / "*.tar")],
        str(tmp_path / "store"), batch=8,
    )  # fmt: skip
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    outcome = EncodeStage(run.config).encode(run.items[0])
    assert outcome.status == "failed"
    assert re.search(r"ModelFilesError: .*vae/diffusion.*differ in SHA-256", outcome.error)


def test_two_runs_on_one_task_both_end_well(tmp_path, corpus_folder, spec):
    """Fault 18 in one process: the second finds it done, and its outcome is success."""
    run = prepare_encode(
        spec, [str(corpus_folder / "scenes-val-*.tar")], str(tmp_path / "s"), batch=8
    )
    assert EncodeStage(run.config).encode(run.items[0]).status == "committed"
    other = EncodeStage(dataclasses.replace(run.config, run="another"))
    assert other.encode(run.items[0]).status == "lost"
    assert [layer.num_tasks for layer in inspect_store(str(tmp_path / "s"))] == [1, 1]


def test_a_tar_of_another_corpus_is_not_taken_for_one_of_the_same_path(
    tmp_path, corpus_folder, spec
):
    """Unless the other is gone: then it moved, and changed."""
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, name in ((first, "scenes-val-00000.tar"), (second, "scenes-train-00000.tar")):
        folder.mkdir()
        shutil.copy(corpus_folder / name, folder / "x.tar")
    encode(spec, first / "*.tar", tmp_path / "store")
    (item,) = prepare(spec, second / "*.tar", tmp_path / "store").items
    assert (item.latents, item.next_latents) == (None, 0)
    store = Store.open(str(tmp_path / "store"))
    assert item.task.id not in store.newest_commits(store.list_layers()[0].folder)
    (first / "x.tar").unlink()
    (failed,) = prepare(spec, second / "*.tar", tmp_path / "store").failed
    assert failed.outcome.cause == "changed"


def test_a_tar_is_known_by_its_url_whatever_its_root(tmp_path, corpus_folder, spec):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    shutil.copy(corpus_folder / "scenes-val-00000.tar", folder / "x.tar")
    encode(spec, folder / "*.tar", tmp_path / "store")
    assert prepare(spec, tmp_path / "*/*/x.tar", tmp_path / "store").items == ()


def test_a_failed_attempt_leaves_nothing_behind(tmp_path, corpus_folder, spec):
    shutil.copy(corpus_folder / "scenes-val-00000.tar", tmp_path / "x.tar")
    run = prepare_encode(spec, [str(tmp_path / "x.tar")], str(tmp_path / "store"), batch=2)
    stage = EncodeStage(run.config)
    encoder = stage.load_latents().encoder

    def fail(module, arguments):
        raise RuntimeError("out of memory")

    handle = encoder.text_encoder.register_forward_pre_hook(fail)
    outcome = stage.encode(run.items[0])
    assert outcome.error == "RuntimeError: out of memory"
    assert not list((tmp_path / "store").rglob("data/*/*/*"))
    handle.remove()
    assert stage.encode(run.items[0]).status == "committed"


def test_what_a_pattern_matches_and_cannot_be_read_is_a_failed_task(tmp_path, corpus_folder, spec):
    """Also where it was committed while it could be read; it stands in no other task's way."""
    for name in ("a", "b"):
        shutil.copy(corpus_folder / "scenes-val-00000.tar", tmp_path / f"{name}.tar")

    def encode():
        run = prepare(spec, tmp_path / "*.tar", tmp_path / "store")
        stage = EncodeStage(run.config)
        done = {item.task.below: stage.encode(item) for item in run.items}
        return done | {failed.task.below: failed.outcome for failed in run.failed}

    (tmp_path / "c.tar").symlink_to("gone")
    os.mkfifo(tmp_path / "d.tar")
    outcomes = encode()
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "a.tar": "committed",
        "b.tar": "committed",
        "c.tar": "failed",
        "d.tar": "failed",
    }
    assert "c.tar: expected a tar, got a link to gone, where nothing is" in outcomes["c.tar"].error
    (tmp_path / "b.tar").unlink()
    (tmp_path / "b.tar").symlink_to("gone")
    assert {name: outcome.status for name, outcome in encode().items()} == dict.fromkeys(
        ("b.tar", "c.tar", "d.tar"), "failed"
    )


def test_source_rewritten_after_the_listing_fails_its_task(tmp_path, corpus_folder, spec):
    """Fault 22."""
    shutil.copy(corpus_folder / "scenes-val-00000.tar", tmp_path / "x.tar")
    run = prepare_encode(spec, [str(tmp_path / "x.tar")], str(tmp_path / "store"), batch=8)
    with (tmp_path / "x.tar").open("ab") as file:
        file.write(bytes(512))
    outcome = EncodeStage(run.config).encode(run.items[0])
    assert outcome.status == "failed"
    assert "SourceChangedError" in outcome.error


def test_source_written_to_while_it_is_read_is_not_committed(tmp_path, corpus_folder, spec):
    """Fault 22, at the last moment: after its first sample was decoded."""
    path = tmp_path / "x.tar"
    shutil.copy(corpus_folder / "scenes-val-00000.tar", path)
    run = prepare_encode(spec, [str(path)], str(tmp_path / "store"), batch=8)
    stage = EncodeStage(run.config)
    decoder = stage.load_latents().decoder
    decode_views = decoder.decode_views

    def touch_after_the_first(*arguments, **options):
        for sample in decode_views(*arguments, **options):
            os.utime(path, ns=(1, 1))
            yield sample

    decoder.decode_views = touch_after_the_first
    outcome = stage.encode(run.items[0])
    assert outcome.status == "failed"
    assert "was written to while it was read" in outcome.error
    assert [layer.num_tasks for layer in inspect_store(str(tmp_path / "store"))] == [0, 0]


def test_provenance_names_what_computed_it(store_folder):
    store = Store.open(str(store_folder))
    commit = next(iter(store.newest_commits(store.list_layers()[0].folder).values()))
    assert commit.provenance["batch"] == 8
    assert commit.provenance["libraries"]["torch"].startswith("2.")
    assert json.loads(commit.model_dump_json())["source"]["sha256"] == commit.source.sha256
