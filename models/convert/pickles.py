"""Rewrites a diffusers folder whose weights are pickles as the same folder with safetensors."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.convert.checkpoint_file import load_state_dict_file
from models.convert.names import ConversionError

# Whole: pytorch_model.bin, pytorch_model.fp16.bin; in pieces: pytorch_model-00001-of-00002.bin.
_WEIGHTS = re.compile(r"(?P<stem>(?:diffusion_)?pytorch_model)(?P<middle>[\w.-]*)\.bin")
_INDEX = re.compile(r"(?P<stem>(?:diffusion_)?pytorch_model)\.bin(?P<middle>\.index[\w.-]*\.json)")
_STEMS = {"pytorch_model": "model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
_COPIED = (".json", ".txt", ".model", ".safetensors")


def convert_pickles(folder: Path, new: Path) -> list[str]:
    """Rewrite a folder's pickled weights as safetensors in ``new``, its other files copied.

    Every tensor is kept, in its dtype and under its name; tensors that share memory are written
    each. Names follow what diffusers and transformers read: ``diffusion_pytorch_model.fp16.bin``
    becomes ``….fp16.safetensors``, ``pytorch_model.bin`` becomes ``model.safetensors``, and an
    index of pieces names the new ones. Hidden files are left out.

    Returns:
        What became of the files: a line a pickle, one for all copies, and a line a file left out.

    Raises:
        ConversionError: no pickled weights in the folder or its models' folders, or an index that
            cannot be read or names a missing piece.
        ValueError: a pickle is refused (``load_state_dict_file``).
    """
    visible = {*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")}
    files = sorted(path for path in visible if path.is_file())
    if not any(_WEIGHTS.fullmatch(path.name) for path in files):
        raise ConversionError(
            f"{folder}: expected a diffusers folder with weights in .bin pickles, got none; "
            "safetensors need no conversion"
        )
    converted, num_copied, ignored = [], 0, []
    for path in files:
        place = path.relative_to(folder)
        (new / place).parent.mkdir(parents=True, exist_ok=True)
        is_index = _INDEX.fullmatch(path.name) is not None
        if is_index or _WEIGHTS.fullmatch(path.name):
            renamed = place.with_name(_rename(path.name))
            if path.with_name(renamed.name).is_file():
                ignored.append(f"ignored {place}: pickle of weights that are there as safetensors")
            elif is_index:
                _write_index(path, new / renamed)
                num_copied += 1
            else:
                state = load_state_dict_file(path)
                write_safetensors(state, new / renamed)
                converted.append(f"converted {place} -> {renamed} ({len(state)} tensors)")
        elif path.suffix in _COPIED:
            shutil.copyfile(path, new / place)
            num_copied += 1
        else:
            ignored.append(f"ignored {place}: no weights of a part in diffusers' layout")
    copied = f"copied {num_copied} files: configs, tokenizers, safetensors"
    return [*converted, copied, *ignored]


def _rename(name: str) -> str:
    weights, index = _WEIGHTS.fullmatch(name), _INDEX.fullmatch(name)
    if weights:
        return f"{_STEMS[weights['stem']]}{weights['middle']}.safetensors"
    assert index is not None
    return f"{_STEMS[index['stem']]}.safetensors{index['middle']}"


def _write_index(path: Path, new: Path) -> None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        pieces = {name: str(piece) for name, piece in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path}: is no index of weights in pieces: {error!r}") from error
    for piece in sorted(set(pieces.values())):
        if not _WEIGHTS.fullmatch(piece) or not path.with_name(piece).is_file():
            raise ConversionError(f"{path}: names {piece!r}, which is no piece in its folder")
    index["weight_map"] = {name: _rename(piece) for name, piece in pieces.items()}
    new.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name; those that share memory are copied first."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in state.items():
        dense = tensor.detach().contiguous()
        if dense.untyped_storage().data_ptr() in seen:
            dense = dense.clone()
        seen.add(dense.untyped_storage().data_ptr())
        weights[name] = dense
    save_file(weights, path, metadata={"format": "pt"})
