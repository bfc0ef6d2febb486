"""Shared inputs, made once a session: a tiny model, a small corpus, a store encoded from it.

The model and the corpus are the project's own; nothing is downloaded. Copy ``store_folder`` before
altering it.
"""

import os
import re
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray on loopback alone

import numpy as np
import pytest
import torch
import zarr
from hypothesis import settings

from models.tiny.write import write_tiny_ldm
from pipeline.scenes.scene import draw_scene, list_words, write_corpus
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.store.store import Store
from tests.support.encode_here import encode_here
from tests.support.examples import THOROUGH

SIZE_PX = 64

pytest_plugins = ("tests.support.s3_server", "tests.support.small_disk", "tests.support.writers")


def pytest_configure(config):
    """In a run of the mark ``thorough`` properties are tried with all their examples."""
    if selects_thorough(config):
        settings.load_profile(THOROUGH)


@pytest.hookimpl(tryfirst=True)  # before marks are selected
def pytest_collection_modifyitems(config, items):
    if selects_thorough(config):
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker(THOROUGH)


def selects_thorough(config):
    """Whether ``-m`` asks for the mark, and not for what does not have it."""
    return bool(re.search(rf"(?<!not ){THOROUGH}", config.getoption("markexpr")))


@pytest.fixture(scope="session")
def read_arrays():
    """A function: store folder -> {layer/task/array: values}, newest commits, by plain Zarr."""

    def read(folder):
        store = Store.open(str(folder))
        found = {}
        for layer in store.list_layers():
            for task, commit in store.newest_commits(layer.folder).items():
                group = zarr.open_group(folder / commit.data_folder / "arrays.zarr", mode="r")
                for name, array in group.arrays():
                    found[f"{layer.kind}/{task}/{name}"] = array[:]
        return found

    return read


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ldm_folder(tmp_path_factory):
    """A tiny latent diffusion model in diffusers' layout."""
    folder = tmp_path_factory.mktemp("model") / "ldm"
    images = [draw_scene(seed=0, split="train", index=i, size_px=SIZE_PX).image for i in range(4)]
    write_tiny_ldm(folder, words=list_words(), calibration_BHWC=torch.from_numpy(np.stack(images)))
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """Scenes of 64 px: scenes-train-00000.tar and 00001 with 4 samples each, one val tar of 4."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, split="train", num_images=8, images_per_tar=4, size_px=SIZE_PX)
    write_corpus(folder, split="val", num_images=4, images_per_tar=4, size_px=SIZE_PX)
    return folder


@pytest.fixture(scope="session")
def spec(ldm_folder):
    """Latents with images, and features of blocks 6-10 at two timesteps."""
    return Spec(
        latents=LatentsSpec(model=str(ldm_folder), size=SIZE_PX, keep_image=True),
        features=FeaturesSpec(timesteps=(300, 400)),
    )


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory, corpus_folder, spec):
    """The corpus encoded with the spec, both layers, every task committed."""
    folder = tmp_path_factory.mktemp("encoded") / "store"
    return encode_here(spec, corpus_folder, folder)


@pytest.fixture
def copied_store(tmp_path, store_folder):
    """A copy of the store that a test may alter, as its writer left it.

    The inventory is a cache that any listing of the shared store makes; snapshots are other tests'.
    """
    without = shutil.ignore_patterns("inventory", "snapshots")
    return shutil.copytree(store_folder, tmp_path / "store", ignore=without)
