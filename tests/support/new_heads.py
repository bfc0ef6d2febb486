"""New heads for tests, built from a UNet as a training run builds them for a store's layers."""

from models.heads.inputs import LDMNetwork, describe_inputs
from models.heads.registry import find_head_class, find_options_class


def build_from_unet(name, unet, *, size_px=64, **options):
    """A head that starts from the weights of ``unet`` where it has its layers."""
    own = find_options_class(name)(**options)
    inputs = describe_inputs(unet.config, own.list_blocks(), view_px=size_px)
    return find_head_class(name).from_layers(inputs, LDMNetwork(unet.config, lambda: unet), own)
