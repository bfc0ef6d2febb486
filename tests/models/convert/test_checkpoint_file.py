"""Checkpoint files are read for their tensors; what would run code, or is damaged, is refused."""

import collections
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.convert.checkpoint_file import load_state_dict_file

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.PosixPath(self.path),)


class HostileEval(Hostile):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.fixture
def lightning_class():
    """A class of Lightning's that this machine has only while the file is written."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    modules = {name: types.ModuleType(name) for name in names}
    kind = type("ModelCheckpoint", (), {"__module__": names[1]})
    modules[names[1]].ModelCheckpoint = kind
    sys.modules |= modules
    yield kind
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.pth", "x.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_by_name_come_back(tmp_path, name, zipped):
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    _check(load_state_dict_file(tmp_path / name))


def test_safetensors_come_back(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    _check(load_state_dict_file(tmp_path / "x.safetensors"))


def _check(found):
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert all(found[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_a_lightning_file_gives_its_state_dict_and_loads_none_of_its_classes(
    tmp_path, lightning_class
):
    callback = lightning_class()
    callback.best = np.float64(3)
    counts = collections.defaultdict(list)
    counts["x"].append(np.zeros(2))
    content = {
        "state_dict": TENSORS,
        "epoch": 3,
        "callbacks": {lightning_class: {"score": np.float32(1)}, "other": callback},
        "optimizer_states": [{"state": {0: {"step": 4, "exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": {"counts": counts, "path": pathlib.PosixPath("/x")},
    }
    torch.save(content, tmp_path / "x.ckpt")
    for name in list(sys.modules):
        if name.startswith("pytorch_lightning"):
            del sys.modules[name]
    before = set(torch.serialization.get_safe_globals())
    _check(load_state_dict_file(tmp_path / "x.ckpt"))
    assert "pytorch_lightning" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("hostile", [Hostile, HostileEval])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["state_dict", "callbacks"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, hostile, zipped, where):
    made = tmp_path / "made"
    content = {"state_dict": dict(TENSORS), "callbacks": {}}
    content[where]["x"] = hostile(made)
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"code of its own .* it names .*(Path\.touch|eval|getattr)"
    ):
        load_state_dict_file(tmp_path / "x.ckpt")
    assert not made.exists()
    torch.load(tmp_path / "x.ckpt", weights_only=False)  # the file does what it is here for
    assert made.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"it names .*torch\.nn\.modules\.linear\.Linear"):
        load_state_dict_file(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "got a list"),
        (torch.zeros(2), "got a Tensor"),
        ({}, "expected tensors by name, got none"),
        ({"state_dict": {}}, "state_dict: expected tensors by name, got none"),
        ({"a": torch.zeros(2), "n": 3}, "got a int at 'n'"),
        ({"a": {"b": torch.zeros(2)}}, "got a dict at 'a'"),
        ({3: torch.zeros(2)}, "got a Tensor at 3"),
        ({"a": np.zeros(2)}, "got a _StandIn at 'a'"),
    ],
)
def test_what_is_not_tensors_by_name_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        load_state_dict_file(tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["x.ckpt", "old.pt", "x.safetensors"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, name):
    path = tmp_path / name
    if name == "x.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name == "x.ckpt")
    whole = path.read_bytes()
    for end in {*range(1, len(whole), 37), 2, 4, 30, len(whole) - 1}:
        path.write_bytes(whole[:end])
        # Where a name is cut in the old form, it is another name than any that is known.
        with pytest.raises(
            ValueError, match=r"is cut off|not a whole safetensors file|it names \w"
        ):
            load_state_dict_file(path)


def test_a_changed_byte_of_a_tensor_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.full((64,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), 1.5).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not have its checksum"):
        load_state_dict_file(path)


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"")
    (tmp_path / "y.ckpt").write_text("<html>not found</html>")
    (tmp_path / "z.zip").write_bytes(b"x")
    for name, message in {
        "x.ckpt": r"is empty \(0 bytes\)",
        "y.ckpt": "damaged, or no file of torch.save",
        "z.zip": "expected a file that ends in one of",
        "none.ckpt": "got nothing there",
        "": "got a folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_state_dict_file(tmp_path / name)
