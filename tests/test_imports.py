"""Imports go one way, read from the syntax trees: jobs, then pipeline, then models."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "pipeline", "models")
TREES = {
    f"{package}.{path.stem}": ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted((ROOT / package).glob("*.py"))
}
WITH_RAY = {
    f"pipeline.{name}"
    for name in (
        *("actor_pool", "encode_metrics", "ray_start"),
        *("train_workers", "evaluate_workers", "sweep"),
    )
}
WITH_BOTH = {
    f"pipeline.{name}"
    for name in (
        *("segment", "demo", "demo_report", "pretrain", "plan", "plan_epochs"),
        *("bench_reader", "bench_reader_store", "bench_train_store"),
    )
}
TRAINING = {
    f"pipeline.{name}"
    for name in (
        *("train", "train_job", "train_config", "reader", "batch", "pair_choice", "pair_index"),
        *("evaluate", "evaluate_job", "checkpoint", "order"),
        *("pair_dataset", "view_samples"),
        *("build_head", "check_resume", "train_order", "train_data", "train_step"),
        *("train_validation", "train_outputs", "train_workers", "learning_rate"),
        *("train_log", "train_overlays", "checkpoint_writer"),
        *("resume_point", "score_pairs", "baselines", "task_sample", "evaluate_workers"),
        *("sweep", "sweep_config", "sweep_plan", "sweep_results", "sweep_trial"),
    )
}
ENCODING = {
    f"pipeline.{name}"
    for name in (
        *("encode", "encode_job", "encode_stage", "encode_latents", "encode_features", "attempt"),
        *("lanes", "actor_pool", "encode_totals", "encode_metrics", "set_aside"),
        *("watchdog", "watchdog_process"),
        *("pairs", "samples", "sample_text", "tar", "tar_part", "corpus", "views", "missing"),
        *("sample_decoder", "decode_ahead", "decode_process", "decode_worker"),
    )
}


def list_imports(tree):
    """Every module imported anywhere in a tree, in functions too; ``from a import b`` as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {module: list_imports(tree) for module, tree in TREES.items()}


def list_packages(module):
    return {name.split(".")[0] for name in IMPORTS[module]}


def reach(module):
    """The modules of ours that importing ``module`` brings in, however far."""
    found, todo = set(), [module]
    while todo:
        new = {name for name in IMPORTS[todo.pop()] if name in TREES} - found
        found |= new
        todo += new
    return found


def test_there_is_something_to_check():
    """So that a moved package or a renamed module does not pass by being absent."""
    assert set(TREES) >= WITH_RAY | WITH_BOTH | TRAINING | ENCODING
    assert {path.name for path in ROOT.glob("*/__init__.py")} == {"__init__.py"}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PACKAGES)
    assert not list(ROOT.glob("[jpm]*/*/*.py"))  # no package inside one, which TREES would miss


@pytest.mark.parametrize("module", sorted(TREES))
def test_imports_go_down_only(module):
    package = module.split(".")[0]
    above = PACKAGES[: PACKAGES.index(package)]
    assert not list_packages(module) & {*above, "tests"}


@pytest.mark.parametrize("module", sorted(m for m in TREES if m.startswith("models.")))
def test_models_know_no_engine_and_no_store(module):
    forbidden = {"ray", "zarr", "numcodecs", "pyarrow", "fsspec", "obstore", "webdataset", "typer"}
    assert not list_packages(module) & forbidden


def test_ray_is_named_in_few_modules():
    assert {module for module in TREES if "ray" in list_packages(module)} == WITH_RAY


@pytest.mark.parametrize("module", sorted(TRAINING))
def test_training_never_imports_encoding(module):
    assert not IMPORTS[module] & ENCODING
    assert not reach(module) & ENCODING


@pytest.mark.parametrize("module", sorted(ENCODING))
def test_encoding_never_imports_training(module):
    assert not IMPORTS[module] & TRAINING
    assert not reach(module) & TRAINING


def test_only_what_meets_live_imports_both():
    both = {m for m in TREES if reach(m) & ENCODING and reach(m) & TRAINING}
    assert {m for m in both if m.startswith("pipeline.")} == WITH_BOTH


@pytest.mark.parametrize("package", PACKAGES)
def test_a_packages_init_is_a_docstring(package):
    tree = TREES[f"{package}.__init__"]
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_no_module_has_its_imports_in_a_ring():
    assert not [module for module in TREES if module in reach(module)]
