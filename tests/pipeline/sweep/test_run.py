"""A sweep on Ray Tune: every trial once, a failure alone, a kill survived, the same as without."""

import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from jobs.command import EXIT_INTERRUPTED
from models.ldm.files import ModelFilesError
from pipeline.base.ray_cluster import NodeSize
from pipeline.base.whole_file import write_json
from pipeline.evaluate.scoring import FIGURE_NAMES, METRIC_NAMES
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.run import choose_resources, run_sweep
from pipeline.sweep.trials import plan_sweep

BASE = {"head": {"name": "probe"}, "num_steps": 3, "batch_size": 4, "learning_rate": 3e-3}
BASE |= {"log_every": 1, "validation_pairs": 1000, "keep_checkpoints": 1}
GRID = {"blocks": {"each": [6, 8]}, "draws": {"each": "all"}}


def plan(store_folder, out, axes, *, heat_map=False, **changes):
    plain = {"base": BASE | changes, "axes": axes, "heat_map": heat_map}
    return plan_sweep(SweepConfig.model_validate(plain), str(store_folder), out)


def read_figures(out):
    table = pq.read_table(out / "results.parquet").to_pylist()
    names = ("trial", "head", "blocks", "draws", "seed", *METRIC_NAMES)
    return [tuple(str(row[name]) for name in names) for row in table]


@pytest.mark.thorough
def test_a_grid_of_probes_on_tune_is_that_of_one_process(store_folder, tmp_path, monkeypatch):
    """One actor runs one trial after another; a fault of one is a line in the table.

    The store is given by a relative path, and Tune runs a trial in a folder of its own.
    """
    axes = GRID | {"learning_rate": [1e-3, 1e30]}
    monkeypatch.chdir(store_folder.parent)
    tuned = plan(store_folder.name, tmp_path / "tuned", axes, clip_norm=1e12, heat_map=True)
    run = run_sweep(tuned, at_once=1)
    assert len(run.results) == len(tuned.trials) == 9
    assert {failure.error.split(":")[0] for failure in run.failures.values()} == {
        "FloatingPointError"
    }
    assert (len(run.failures), len(run.done)) == (4, 5)
    assert (tmp_path / "tuned" / "heat-map.png").stat().st_size > 5000
    assert not (tmp_path / "tuned" / "tune").exists()
    here = plan(store_folder, tmp_path / "here", axes, clip_norm=1e12)
    run_sweep(here, at_once=0)
    assert read_figures(tmp_path / "tuned") == read_figures(tmp_path / "here")


def test_paths_are_absolute_whatever_folder_a_trial_runs_in(
    store_folder, ldm_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(ldm_folder.parent)
    head = {"name": "znet", "model": ldm_folder.name}
    relative = os.path.relpath(store_folder)
    found = plan(relative, tmp_path, {"seeds": [0, 1]}, head=head)
    assert found.store_url.startswith("/")
    assert store_folder.samefile(found.store_url)
    assert {trial.config.head.model for trial in found.trials} == {str(ldm_folder), None}


def test_resources_are_a_cpu_a_trial_and_a_share_of_a_gpu(store_folder, tmp_path):
    probes = plan(store_folder, tmp_path, GRID).trials
    heads = plan(store_folder, tmp_path, {"head": ["znet"], "seeds": list(range(9))}).trials
    cpus, gpus = [NodeSize(4), NodeSize(2)], [NodeSize(16, 2)]

    def choose(nodes, trials, **given):
        found = choose_resources(nodes, trials, **given)
        return found.at_once, found.num_cpus, found.num_gpus

    assert choose(cpus, heads) == (6, 1.0, 0.0)
    assert choose(cpus, heads, at_once=2) == (2, 1.0, 0.0)
    assert choose(cpus, heads, num_cpus=4) == (1, 4, 0.0)
    assert choose(gpus, heads) == (2, 1.0, 1.0)
    assert choose(gpus, probes) == (5, 1.0, 0.25)  # as many as there are
    assert choose(gpus, heads, num_gpus=0.5) == (4, 1.0, 0.5)
    with pytest.raises(ValueError, match="no node has 8 CPUs and 0 GPUs for a trial"):
        choose(cpus, heads, num_cpus=8)


CONFIG = """
base: {head: {name: znet}, num_steps: %d, batch_size: 4, checkpoint_every: 1}
axes: {head: [znet, probe], seeds: [0, 1]}
"""


def start(store_folder, folder, num_steps):
    config = folder / "sweep.yaml"
    config.write_text(CONFIG % num_steps, encoding="utf-8")
    command = [sys.executable, "-m", "jobs", "sweep", "--store", str(store_folder)]
    command += ["--config", str(config), "--out", str(folder / "out"), "--trials-at-once", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A job in a shell's background has SIGINT ignored, and its children take that over.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_checkpoint(folder):
    for _ in range(1200):
        if list((folder / "out").glob("trials/*/checkpoints/step-*")):
            return
        time.sleep(0.1)
    raise AssertionError("no trial saved a checkpoint in two minutes")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_killed_or_interrupted_goes_on(store_folder, tmp_path, number):
    """Two heads by two seeds, in two actors, cut off in the middle; then the same command."""
    first = start(store_folder, tmp_path, 60)
    wait_for_checkpoint(tmp_path)
    started_s = time.monotonic()
    os.kill(first.pid, number)
    said = first.communicate(timeout=60)[0]
    assert time.monotonic() - started_s < 30
    if number == signal.SIGINT:
        assert first.returncode == EXIT_INTERRUPTED, said
        assert "Finished trials and last checkpoints stay; to go on:" in said
    begun = {p.parents[1].name for p in (tmp_path / "out").glob("trials/*/checkpoints/step-*")}
    second = start(store_folder, tmp_path, 60)
    said = second.communicate(timeout=240)[0]
    assert second.returncode == 0, said
    table = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert [row["status"] for row in table] == ["done"] * 6
    assert {row["steps"] for row in table if row["seed"] is not None} == {60}
    assert begun <= {row["trial"] for row in table}


def test_a_model_that_is_gone_is_one_sentence_and_no_trial(store_folder, tmp_path):
    """Where all trials are done, it is not asked for: their tables can be made again."""
    head = {"name": "znet", "model": str(tmp_path / "gone")}
    found = plan(store_folder, tmp_path / "out", {"seeds": [0, 1]}, head=head)
    with pytest.raises(ModelFilesError, match=r"expected a diffusers folder .*/gone"):
        run_sweep(found, at_once=0)
    assert not (tmp_path / "out" / "trials").exists()
    rows = {"znet": dict.fromkeys(FIGURE_NAMES, 0.5)}
    for trial in found.trials:
        write_json(found.folder(trial) / "result.json", {"rows": rows, "run": {}})
    assert run_sweep(found, at_once=0).done == {trial.id for trial in found.trials}


@pytest.mark.thorough
def test_a_heat_map_and_tables_of_old_axes_do_not_stay(store_folder, tmp_path):
    (tmp_path / "heat-map-mine.txt").touch()
    wide = plan(store_folder, tmp_path, GRID | {"width": [2, 4]}, heat_map=True)
    run_sweep(wide, at_once=0)
    assert len(list(tmp_path.glob("heat-map-*.png"))) == 2
    less = plan(store_folder, tmp_path, GRID | {"width": [2]}, heat_map=True)
    said = run_sweep(less, at_once=0).describe()
    assert [path.name for path in tmp_path.glob("heat-map*.png")] == ["heat-map.png"]
    assert "4 trials of other settings stay in trials/, and are in no table" in said
    assert {row[2] for row in read_figures(tmp_path)} == {"[6]", "[8]", "None"}
    assert len({row[0] for row in read_figures(tmp_path)}) == 5
    run_sweep(plan(store_folder, tmp_path, {"seeds": [0]}), at_once=0)
    assert not list(tmp_path.glob("heat-map*.png"))
    assert (tmp_path / "heat-map-mine.txt").exists()
