"""The heads there are, and how a saved one is loaded without knowing which it is.

Every head takes keyword tensors named in ``head.inputs`` (latent, image, text, features) and
returns mask logits (B, 1, H, W); the shapes are in each class's ``forward``. Build one with
``HEADS[name].from_ldm(unet, **options)``, or read one with ``load_head``.
"""

from pathlib import Path

from models.heads.head import Head, read_config
from models.heads.ldznet import LDZNet
from models.heads.probe import ProbeHead
from models.heads.rgbnet import RGBNet
from models.heads.znet import ZNet

HEADS: dict[str, type[Head]] = {
    "znet": ZNet,
    "ldznet": LDZNet,
    "rgbnet": RGBNet,
    "probe": ProbeHead,
}


def load_head(folder: Path | str) -> Head:
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
    return HEADS[name].from_pretrained(folder)
