"""Names, shapes and figures of LD-ZNet's public code, in tests/golden/ldznet_public."""

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden" / "ldznet_public"


def load_make_script():
    """The script that made the figures, whose functions draw the same weights and inputs."""
    path = FOLDER.parent / "make_ldznet_public.py"
    spec = importlib.util.spec_from_file_location("make_ldznet_public", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_values():
    return json.loads((FOLDER / "values.json").read_text())


def read_shapes(kind):
    """{name: shape} of the public code's ``head`` or ``frozen`` UNet."""
    found = json.loads((FOLDER / "names.json").read_text())[kind]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in found.items()}
