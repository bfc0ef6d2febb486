"""Table of all heads: the import paths of each one's class and options class, by name.

They are imported when asked for, so that a config is checked without loading torch.
"""

from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from models.heads.options import HeadOptions, read_config

if TYPE_CHECKING:
    from models.heads.head import Head

HEADS = {  # name -> the head's class, and that of its options
    "znet": ("models.heads.znet:ZNet", "models.heads.options:UNetOptions"),
    "ldznet": ("models.heads.ldznet:LDZNet", "models.heads.options:LDZNetOptions"),
    "rgbnet": ("models.heads.rgbnet:RGBNet", "models.heads.options:UNetOptions"),
    "probe": ("models.heads.probe:ProbeHead", "models.heads.options:ProbeOptions"),
}


_resolve = cache(resolve_name)  # a sweep of many trials asks for the same few


def find_head_class(name: str) -> "type[Head]":
    """Return a head's class; this loads torch."""
    head: type[Head] = _resolve(HEADS[name][0])
    return head


def find_options_class(name: str) -> type[HeadOptions]:
    """Return the class of a head's options."""
    options: type[HeadOptions] = _resolve(HEADS[name][1])
    return options


def list_option_names() -> list[str]:
    """Return the names of all heads' options, each once."""
    classes = map(find_options_class, HEADS)
    return list(dict.fromkeys(name for options in classes for name in options.model_fields))


def load_head(folder: Path | str) -> "Head":
    """Read the head that ``save_pretrained`` wrote to ``folder``: on the CPU, in training mode.

    Raises:
        ValueError: no saved head, one of an unknown name, or weights that do not fit the config.
    """
    folder = Path(folder)
    name = read_config(folder).get("head")
    if not isinstance(name, str) or name not in HEADS:
        raise ValueError(
            f'{folder / "config.json"}: "head" must be one of {sorted(HEADS)}, got {name!r}'
        )
    return find_head_class(name).from_pretrained(folder)
