"""Small training runs for the tests of training."""

import json

import torch

from pipeline.reader import Source, choose_layers
from pipeline.store import Store, take_snapshot
from pipeline.train import METRICS, Worker, fit
from pipeline.train_config import HeadConfig, TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    head=HeadConfig(name="znet"),
    num_steps=6,
    batch_size=4,
    learning_rate=1e-3,
    log_every=1,
    validate_every=3,
    validation_pairs=4,
    checkpoint_every=3,
    ema_decay=0.5,
    overlays=False,
)


def make(config=CONFIG, **changes):
    """A config with other values; ``head`` by its name, ``data`` by what changes of it."""
    if isinstance(changes.get("head"), str):
        changes["head"] = HeadConfig(name=changes["head"])
    if "data" in changes:
        changes["data"] = config.data.model_copy(update=changes["data"])
    return config.model_copy(update=changes)


def open_source(store_folder):
    """Both layers of a store as they are committed now; writes nothing."""
    store = Store.open(str(store_folder))
    latents, features = choose_layers(store, latents=None, features=None, reads_features=True)
    return Source(store, latents, features, take_snapshot(store, [latents.folder, features.folder]))


def fit_here(config, store_folder, out, *, rank=0, num_workers=1, resume=False, **options):
    """Fit without Ray and return the steps made."""
    worker = Worker(rank, num_workers, CPU)
    return fit(config, open_source(store_folder), out, worker, resume=resume, **options)


def read_records(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def losses(out):
    """Step -> loss."""
    return {r["step"]: r["loss"] for r in read_records(out) if "loss" in r and "verb" not in r}


def read_pairs(out, num_workers=1):
    """Step -> the pairs that the workers read, in the order of the global batch."""
    shares = []
    for rank in range(num_workers):
        lines = (out / f"pairs-{rank}.jsonl").read_text().splitlines()
        shares.append({r["step"]: r["pairs"] for r in map(json.loads, lines)})
    found = {}
    for step in shares[0]:
        parts = [share[step] for share in shares]
        num = sum(map(len, parts))
        found[step] = [parts[k % num_workers][k // num_workers] for k in range(num)]
    return found
