"""What the documentation names is there: tests, files, links."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from models.heads.registry import HEADS, load_head
from pipeline.base.yaml import load_yaml, parse_yaml
from pipeline.corpus.members import FORMER_REASONS, RejectReason
from pipeline.read.batch import move_inputs
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.runs.config import TrainConfig
from pipeline.runs.new_head import build_head
from pipeline.spec.fields import Spec
from pipeline.stage.work import Cause
from tests.support.doc_blocks import list_blocks

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_that_are_named_exist(page):
    file = ""
    for path, name in re.findall(
        r"`(?:tests/)?((?:\w+/)*test_\w+\.py)?(?:::(\w+)[^`]*)?`", page.read_text()
    ):
        file = path or file  # `::name` alone is of the file named before it
        if file:
            text = (ROOT / "tests" / file).read_text()
            assert not name or re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_named_and_linked_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for path in re.findall(
        r"`((?:models|pipeline|jobs|tests)/(?!(?:\w+/)*test_)[\w/.-]+\.\w+)`", text
    ):
        assert "VERB" in path or (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text()) <= 6000


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or name in index or "decisions/" in name, name


def test_the_specs_of_web_corpora_share_the_recipes_latents():
    page = ROOT / "docs" / "howto" / "web.md"
    snippets = [block.text for block in list_blocks(page) if block.language == "yaml"]
    first, second = (parse_yaml(snippet, Spec, where=page.name) for snippet in snippets)
    assert first == load_yaml(ROOT / "jobs" / "recipes" / "web.yaml", Spec)
    assert (second.latents, second.features.condition) == (first.latents, "empty")


def test_the_protocols_training_draws_from_nine_prompts():
    page = ROOT / "docs" / "howto" / "protocols.md"
    snippet = next(block.text for block in list_blocks(page) if block.language == "yaml")
    templates = parse_yaml(snippet, Spec, where=page.name).latents.prompts
    assert len(set(templates)) == 9  # the paper's


def test_every_reject_reason_has_its_meaning():
    page = (ROOT / "docs" / "reference" / "store.md").read_text()
    table = page.partition("| reason | level | meaning |")[2].partition("\n\n")[0]
    first_cells = " ".join(row.split("|")[1] for row in table.splitlines() if "|" in row)
    listed = re.findall(r"`(\w+)`", first_cells)
    assert sorted(listed) == sorted([*RejectReason, *FORMER_REASONS])


def test_every_cause_of_a_failed_task_has_what_to_do():
    page = (ROOT / "docs" / "reference" / "exit-status.md").read_text()
    table = page.partition("| `cause` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(get_args(Cause))


def test_the_own_head_runs_as_written(store_folder, tmp_path, monkeypatch):
    """The page's file and line, from a config to logits of pairs that a store holds."""
    page = ROOT / "docs" / "howto" / "own-head.md"
    file, line = [block.text for block in list_blocks(page)]
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "late_fusion.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(HEADS, *ast.literal_eval(f"{{{line}}}").popitem())
    config = TrainConfig(head={"name": "late_fusion", "blocks": [6, 9], "width": 8}, num_steps=1)
    source = open_layers(str(store_folder))
    head = build_head(config.head, source.latents, source.features)
    reader = PairReader(source, tasks="*", inputs=head.reads, blocks=(6, 9))
    batch = reader.read([0, 1, 2], draws=[0, 1, 0])
    logits = head(**move_inputs(batch.inputs, torch.device("cpu")))
    assert logits.shape == (3, 1, 64, 64)
    head.save_pretrained(tmp_path / "saved")
    again = load_head(tmp_path / "saved")
    assert torch.equal(again(**move_inputs(batch.inputs, torch.device("cpu"))), logits)
