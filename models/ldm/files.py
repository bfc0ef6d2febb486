"""Files of a latent diffusion model: finding, loading, digesting and writing them.

A model is a folder in diffusers' layout or a hub id, of which the local snapshot is taken. The
digests go into the fingerprint of everything computed with the model.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

FEATURE_COMPONENTS = ("unet", "scheduler")
_LATENT_COMPONENTS = ("vae", "text_encoder", "tokenizer")
_SECOND_TEXT_COMPONENTS = ("text_encoder_2", "tokenizer_2")
_WEIGHT_COMPONENTS = frozenset({"vae", "text_encoder", "text_encoder_2", "unet"})
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_COMPONENTS = frozenset({"tokenizer", "tokenizer_2"})
_VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_NUM_LISTED = 5
_DIFFUSERS_VERSION = "0.35.0"  # the oldest supported; below 0.9 diffusers changes sample_size
# What CLIP files may hold beyond the encoder: a buffer that is 0, 1, 2, ... by definition, and the
# projection to the space shared with images, which an encoder without projection leaves out.
_SPARE_KEYS = ("position_ids", "text_projection.weight")


class ModelFilesError(ValueError):
    """A model folder is missing something, or holds it in a form that is not read."""


def resolve_model(name: str, *, revision: str | None = None, local: bool = False) -> Path:
    """Return the local folder of a diffusers model given as a folder or a hub id.

    ``local``: nothing is fetched from the hub.

    Raises:
        ModelFilesError: neither a folder nor a hub id that can be had from here.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelFilesError(f"model: expected a diffusers folder or a hub id, got {name!r}.")
    kinds = ("*.json", "*.txt", "*.safetensors")  # never the pickles beside them
    components = _LATENT_COMPONENTS + _SECOND_TEXT_COMPONENTS + FEATURE_COMPONENTS
    patterns = ["model_index.json", *(f"{name}/{kind}" for name in components for kind in kinds)]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, local_files_only=local
            )
        )
    except (OSError, ValueError) as error:  # the hub's errors derive from these two
        raise ModelFilesError(
            f"model: {name!r} is no folder here and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Give a folder, or fetch it first."
        ) from error


def has_second_text_encoder(folder: Path) -> bool:
    """Tell whether a folder's prompts go through two text encoders, as SDXL's do."""
    return (folder / "text_encoder_2").is_dir()


def list_latent_components(folder: Path) -> tuple[str, ...]:
    """Return the components that latents and embeddings are made with, SDXL's second ones too."""
    return _LATENT_COMPONENTS + (_SECOND_TEXT_COMPONENTS if has_second_text_encoder(folder) else ())


def list_model_files(
    folder: Path, components: Iterable[str], *, variant: str | None = None
) -> list[str]:
    """List the files that loading ``components`` reads, as sorted POSIX paths below ``folder``.

    Weights are the safetensors of the ``variant`` ("fp16": ``*.fp16.safetensors``), whole or in
    numbered pieces with their index.

    Raises:
        ModelFilesError: a component has no folder, no safetensors weights or no vocabulary.
    """
    files: list[str] = []
    for component in components:
        if not (folder / component).is_dir():
            raise ModelFilesError(f"{folder}: expected a folder {component!r} in diffusers' layout")
        files += [
            f"{component}/{path.name}"
            for path in (folder / component).iterdir()
            if path.suffix in {".json", ".txt", ".model"} and path.is_file()
            if not path.name.endswith(".index.json")
        ]
        if component in _WEIGHT_COMPONENTS:
            files += [f"{component}/{p.name}" for p in _list_weights(folder / component, variant)]
        if component in _TOKENIZER_COMPONENTS:
            check_vocabulary(folder / component)
    return sorted(files)


def check_vocabulary(tokenizer: Path) -> None:
    """Check that a tokenizer's folder holds its vocabulary.

    From configs alone transformers loads a tokenizer that makes one token of any text.

    Raises:
        ModelFilesError: no folder, or neither of the two forms of a vocabulary is whole in it.
    """
    if not any(all((tokenizer / x).is_file() for x in names) for names in _VOCABULARIES):
        found = sorted(path.name for path in tokenizer.iterdir()) if tokenizer.is_dir() else None
        raise ModelFilesError(
            f"{tokenizer}: expected a vocabulary, vocab.json and merges.txt or tokenizer.json, got "
            f"{'no such folder' if found is None else ', '.join(found) or 'no file'}; fetch the "
            "folder again"
        )


def load_component(kind: type[Any], folder: Path, component: str, **options: Any) -> Any:
    """Load a component of a model's folder by its class's ``from_pretrained``.

    Raises:
        ModelFilesError: a file is missing or damaged, or a config says what the class cannot do.
    """
    try:
        return kind.from_pretrained(folder, subfolder=component, **options)
    except MemoryError:
        raise
    except Exception as error:  # of a cut file, tokenizers and safetensors raise it all but bare
        raise ModelFilesError(
            f"{folder / component}: cannot be loaded as {kind.__name__}: {type(error).__name__}: "
            f"{error}; a file there is missing or damaged: fetch it again"
        ) from error


def load_weights(kind: type[Any], folder: Path, component: str, **options: Any) -> Any:
    """Load a component with weights: all of them from its safetensors files, and none left over.

    diffusers and transformers only warn of missing weights, which they leave random, and of others.

    Raises:
        ModelFilesError: as ``load_component``, or weights and config do not describe one model.
    """
    model, report = load_component(
        kind, folder, component, use_safetensors=True, output_loading_info=True, **options
    )
    for fault in ("missing", "mismatched", "unexpected"):
        entries = report.get(f"{fault}_keys") or ()
        keys = [entry if isinstance(entry, str) else entry[0] for entry in entries]
        if fault == "unexpected":
            keys = [key for key in keys if not key.endswith(_SPARE_KEYS)]
        if keys:
            raise ModelFilesError(
                f"{folder / component}: expected the weights that config.json describes, got "
                f"{len(keys)} {fault}: {list_some(keys)}; "
                "config.json or the safetensors file is not this model's own: fetch both again"
            )
    return model


def list_some(names: Iterable[str]) -> str:
    """Format the first five names, sorted, and how many more there are, for an error."""
    found = sorted(names)
    more = f" and {len(found) - _NUM_LISTED} more" if len(found) > _NUM_LISTED else ""
    return ", ".join(found[:_NUM_LISTED]) + more


def _list_weights(folder: Path, variant: str | None) -> list[Path]:
    ending = f".{variant}" if variant else ""
    found: list[Path] = []
    for stem in _WEIGHT_STEMS:
        found += folder.glob(f"{stem}{ending}.safetensors")
        found += folder.glob(f"{stem}{ending}-*-of-*.safetensors")
        found += folder.glob(f"{stem}.safetensors.index{ending}.json")
    if any(path.suffix == ".safetensors" for path in found):
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ModelFilesError(
            f"{folder}: weights are pickles ({', '.join(pickles)}), which are not loaded because "
            "a pickle runs code; get the safetensors of this model, or rewrite the folder: "
            f"ldznet convert {folder.parent} --out NEW"
        )
    raise ModelFilesError(f"{folder}: expected safetensors weights, variant {variant!r}, got none")


def digest_model_files(
    folder: Path, components: Iterable[str], *, variant: str | None = None
) -> dict[str, str]:
    """Return path → SHA-256 (hex) of every file that loading ``components`` reads."""
    digests = {}
    for name in list_model_files(folder, components, variant=variant):
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def write_config(path: Path, config: Mapping[str, object]) -> None:
    """Write a JSON config as diffusers and transformers read it; folders above it are made."""
    if "_class_name" in config:  # a config of diffusers, not of transformers
        config = {"_diffusers_version": _DIFFUSERS_VERSION, **config}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
