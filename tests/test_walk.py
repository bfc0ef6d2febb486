"""README and docs/ as their reader types them: each block runs, or is parsed where it cannot.

Pages that go on from one another are walked in one folder, in their reader's order.
"""

import ast
import re
import shlex

import pytest
import typer
import yaml

from jobs.__main__ import app
from pipeline.base.yaml import parse_yaml
from pipeline.runs.config import TrainConfig
from pipeline.spec.fields import Spec
from tests.support.doc_blocks import ALL_BLOCKS, TIMEOUT_S, Clone

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

ENCODED = [
    *("docs/howto/encode.md", "docs/howto/train.md", "docs/howto/segment.md"),
    *("docs/howto/sweep.md", "docs/howto/own-loop.md", "docs/reference/store.md"),
    "docs/howto/repair.md",
]
ALONE = ["docs/howto/ingest.md"]
README = "README.md"
NEEDS = {
    "cloud": "an account at AWS, a bucket or a cluster",
    "network": "a package index",
    "dataset": "files of a published dataset",
    "weights": "published weights",
    "files": "files that the reader writes",
}


def blocks_in(language):
    return [pytest.param(b, id=str(b)) for b in ALL_BLOCKS if b.language == language]


def test_each_block_runs_or_says_what_it_needs():
    walked = {README, *ENCODED, *ALONE}
    for block in ALL_BLOCKS:
        assert block.language in {"", "sh", "python", "yaml"}, block
        if block.language in {"sh", "python"}:
            assert block.needs in NEEDS or (not block.needs and block.page in walked), block
        else:
            assert not block.needs, block


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder in which pages were walked, in order; each test walks the pages before its own."""
    clone = Clone(tmp_path_factory.mktemp("walk") / "clone")
    clone.add_tars()
    clone.add_pictures()
    return clone


@pytest.mark.thorough
@pytest.mark.parametrize("page", ENCODED)
def test_pages_over_one_store_run_as_typed(clone, page):
    for before in ENCODED[: ENCODED.index(page)]:
        clone.walk(before)
    clone.walk(page)


@pytest.mark.thorough
@pytest.mark.parametrize("page", ALONE)
def test_a_page_runs_as_typed(tmp_path, page):
    clone = Clone(tmp_path / "clone")
    clone.add_pictures()
    clone.walk(page)


@pytest.mark.slow  # draws the smallest demo; .ci/run does it
def test_the_readme_runs_as_typed(tmp_path):
    clone = Clone(tmp_path / "clone")
    assert "IoU_FG" in clone.walk(README)
    assert (clone.folder / "demo" / "report.html").stat().st_size > 0


def list_commands(block):
    """The words of every ``ldznet VERB …`` and ``python -m jobs VERB …`` of a block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|\s)(?:ldznet|python -m jobs|\$JOB)\s+(.*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("block", blocks_in("sh"))
def test_commands_have_the_arguments_that_they_are_given(block):
    """By the command line's own parser, which also finds what is missing or of another type."""
    for words in list_commands(block):
        command, given = typer.main.get_command(app), [*words]
        while (inner := getattr(command, "commands", None)) is not None and given[0] in inner:
            command = inner[given.pop(0)]
        assert len(given) < len(words), words
        for parameter in command.params:
            parameter.type_descriptor.parameter_info.exists = False  # a file may be the reader's
        command.make_context(words[0], given)


@pytest.mark.parametrize("block", blocks_in("python"))
def test_python_is_python(block):
    one_entry = block.text.lstrip().startswith('"')  # of a registry
    ast.parse(f"{{{block.text}}}" if one_entry else block.text)


@pytest.mark.parametrize("block", blocks_in("yaml"))
def test_yaml_is_a_spec_a_config_or_part_of_one(block):
    """Any part of a config is valid beside the fields that must be given."""
    fields = yaml.safe_load(block.text)
    if "latents" in fields:
        parse_yaml(block.text, Spec, where=str(block))
    else:
        must = {"head": {"name": "ldznet"}, "num_steps": 1}
        parse_yaml(yaml.safe_dump(must | fields), TrainConfig, where=str(block))
