"""A store of drawn scenes for ``bench train``: a tiny LDM, a corpus, encoded by the real stage."""

from pathlib import Path

from pipeline.actor_pool import ActorBounds
from pipeline.bench_models import write_random_model
from pipeline.encode import prepare_encode
from pipeline.encode_job import run_encode
from pipeline.reader import Source, choose_layers
from pipeline.scenes import write_corpus
from pipeline.spec import Spec, validate
from pipeline.store import Store, take_snapshot

SCENES_PER_TAR = 32
VALIDATION_SCENES = 2  # a split must not be empty


def write_train_store(folder: Path, *, num: int, size_px: int) -> str:
    """Draw ``num`` training scenes below ``folder``, encode them here, return the store's URL.

    Raises:
        RuntimeError: a task failed.
    """
    for split, count in (("train", num), ("val", VALIDATION_SCENES)):
        write_corpus(
            folder / "corpus",
            split=split,
            num_images=count,
            images_per_tar=SCENES_PER_TAR,
            size_px=size_px,
        )
    write_random_model(folder / "ldm", sd14=False, size_px=size_px)
    plain = {
        "latents": {"model": str(folder / "ldm"), "size": size_px, "keep_image": True},
        "features": {},
    }
    spec = validate(plain, Spec, where="bench train")
    url = str(folder / "store")
    run = prepare_encode(spec, [str(folder / "corpus" / "*.tar")], url, batch=16)
    totals = run_encode(run, metrics_path=None, actors=ActorBounds(0, 0))
    if totals.failures:
        raise RuntimeError(f"bench train: the scenes failed to encode:\n{totals.describe()}")
    return url


def open_source(url: str) -> Source:
    """Return a store's only features layer and its latents, with what is committed now.

    Raises:
        SpecError: there is none, or there are several.
    """
    store = Store.open(url)
    latents, features = choose_layers(store, latents=None, features=None, reads_features=True)
    folders = [layer.folder for layer in (latents, features) if layer is not None]
    return Source(store, latents, features, take_snapshot(store, folders))
