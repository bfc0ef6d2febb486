"""Starting a head from a checkpoint's weights: ``head: {from: DIR}`` of a config.

Data flow: a config file's plain data -> the checkpoint in each DIR, its files verified -> in DIR's
place a ``HeadStart``, with an absolute path and the weights' SHA-256, which ``new_head`` reads.
"""

from pathlib import Path
from typing import Any

from models.heads.options import read_config
from models.heads.registry import find_options_class
from pipeline.base.yaml import SpecError
from pipeline.runs.checkpoint import (
    MODEL,
    DamagedCheckpointError,
    find_checkpoint,
    list_checkpoints,
    read_record,
    sum_file,
    verify_files,
)
from pipeline.runs.config import HeadStart
from pipeline.runs.step_folders import read_steady


def look_up_starts(plain: dict[str, Any], *, resumed: Path | None = None) -> None:
    """Replace each ``head.from`` of a training or sweep config by the checkpoint in that folder.

    ``resumed`` is the ``--out`` of a run that goes on: it has its weights, and its start is taken
    from its own record, so that the folder need not be there any more.

    Raises:
        SpecError: a folder holds no checkpoint, or a damaged one.
    """
    variants = plain.get("variants")
    sections = [plain, plain.get("base"), *(variants if isinstance(variants, list) else [])]
    for section in sections:
        head = section.get("head") if isinstance(section, dict) else None
        if isinstance(head, dict) and isinstance(head.get("from"), str):
            start = _find_earlier(resumed) if resumed else None
            head["from"] = (start or find_start(head["from"])).model_dump()


def _find_earlier(out: Path) -> HeadStart | None:
    """Return what the run in ``out`` started from, None if it has no checkpoint that tells."""
    for path in reversed(list_checkpoints(out)):
        try:
            return read_record(path).require_run()[1].head.from_
        except DamagedCheckpointError:  # what resumes the run says so
            continue
    return None


def find_start(place: str) -> HeadStart:
    """Return the checkpoint in a folder, a run's ``--out`` or ``OUT/best``, with files verified.

    Raises:
        SpecError: there is none, or it is damaged.
    """
    folder = Path(place).expanduser().absolute()
    try:
        return read_steady(lambda: find_checkpoint(folder).resolve(), _read_start)
    except ValueError as error:
        raise SpecError(f"head.from: {error}") from error


def _read_start(path: Path) -> HeadStart:
    record = read_record(path)
    verify_files(path, record, "config.json", MODEL)
    weights = record.files.get(MODEL) or sum_file(path / MODEL)  # a converted head's lists none
    if weights is None:
        raise DamagedCheckpointError(f"{path / MODEL}: expected the weights, got no file")
    config = read_config(path)
    if record.train is not None:
        name, options = record.train.head.name, record.train.head.options.model_dump(mode="json")
    else:  # a converted head's constructor takes what its options are
        name = config["head"]
        options = {x: config[x] for x in find_options_class(name).model_fields if x in config}
    return HeadStart(checkpoint=str(path), sha256=weights.sha256, name=name, options=options)
