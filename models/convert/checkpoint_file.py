"""Reads a checkpoint's tensors from a file that may be a pickle, without running code from it.

A pickle is a program. ``torch.load(weights_only=True)`` allows only names on a list of harmless
ones. Lightning's checkpoints also hold objects of a training (callbacks, hyperparameters), whose
classes are not on that list. For those packages' names a stand-in is used that does nothing and
keeps nothing: their code is neither imported nor called, and only ``state_dict`` is returned.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
STAND_IN_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy")
"""Packages whose objects stand beside ``state_dict`` in Lightning's files; none is imported."""

STAND_IN_NAMES = {
    *("typing.Any", "pathlib.PosixPath", "argparse.Namespace", "collections.defaultdict"),
    *(f"builtins.{kind.__name__}" for kind in (dict, list, tuple, set, int, float, str, bool)),
}
# What reading a pickle raises where bytes are missing or changed.
_DAMAGE = (
    *(RuntimeError, EOFError, OSError, AssertionError, struct.error, UnicodeDecodeError),
    *(AttributeError, IndexError, KeyError, TypeError, zipfile.BadZipFile),
)


class _StandIn:
    """Stands for an object of another package: takes any arguments and state, and keeps none."""

    def __new__(cls, *arguments: object) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty_dict(*arguments: object) -> dict[Any, Any]:
    """Stands for ``collections.defaultdict``, which would call what the file gives it."""
    return {}


def load_state_dict_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file by name, on the CPU, in the dtypes of the file.

    Of a Lightning checkpoint these are its ``state_dict``. Pickles of torch 1.6 and later are
    memory-mapped: a tensor takes memory when it is used.

    Args:
        path: ``.safetensors``, or a pickle by ``torch.save``: ``.ckpt``, ``.pt``, ``.pth``,
            ``.bin``.

    Raises:
        ValueError: no such file, another kind of file, a damaged one, one that needs code of its
            own to be read, or one that holds something else than tensors by name.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise ValueError(f"{path}: expected a checkpoint file, got {found}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty (0 bytes); fetch it again")
    if path.suffix == ".safetensors":
        try:
            return _pick_state_dict(load_file(path), path)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: is not a whole safetensors file: {error}; fetch it again"
            ) from error
    if path.suffix not in PICKLE_ENDINGS:
        endings = ", ".join((".safetensors", *PICKLE_ENDINGS))
        raise ValueError(f"{path}: expected a file that ends in one of {endings}")
    return _pick_state_dict(_load_pickle(path), path)


def _load_pickle(path: Path) -> object:
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:  # torch.load of a mapped file checks no CRC-32
                bad = archive.testzip()
            if bad is not None:
                raise _damaged(path, f"the record {bad} does not have its checksum")
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        others = [name for name in refused if name.partition(".")[0] not in STAND_IN_PACKAGES]
        if unknown := sorted(set(others) - STAND_IN_NAMES):
            raise _refuse(path, unknown)
        allowed: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
            (_empty_dict if name == "collections.defaultdict" else _StandIn, name)
            for name in refused
        ]
        with torch.serialization.safe_globals(allowed):
            # torch.save's form before torch 1.6 is no zip and cannot be mapped.
            return torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        named = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise _refuse(path, [named[0].rstrip(".")]) from error
        raise _damaged(path, "its pickle cannot be followed") from error
    except _DAMAGE as error:
        raise _damaged(path, f"{type(error).__name__}: {str(error).partition('. ')[0]}") from error


def _refuse(path: Path, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"{path}: is a pickle that needs code of its own to be read, which is not run: it names "
        f"{', '.join(names)}. Get the model's safetensors; or, on a machine where you trust the "
        "file, load it with the code it came from and save its tensors alone: "
        "torch.save(checkpoint['state_dict'], 'tensors.ckpt')"
    )


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: is cut off, damaged, or no file of torch.save ({what}); fetch it again and "
        "compare its size and SHA-256 with its publisher's"
    )


def _pick_state_dict(content: object, path: Path) -> dict[str, Tensor]:
    where = str(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content, where = content["state_dict"], f"{path}: state_dict"
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected tensors by name, got a {type(content).__name__}")
    if not content:
        raise ValueError(f"{where}: expected tensors by name, got none")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{where}: expected tensors by name, got a {type(value).__name__} at {name!r}; "
                "this is no model's weights"
            )
    return dict(content)
