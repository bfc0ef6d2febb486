"""``ldznet blocks`` and ``ldznet bench``: arguments in, a table or JSON out, statuses."""

import json

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app
from jobs.bench import BENCHMARKS

pytestmark = pytest.mark.thorough


def run(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_help_lists_every_benchmark_with_a_line():
    shown = run("bench", "--help").stdout
    for benchmark in BENCHMARKS:
        assert f"{benchmark.__name__} " in shown
        assert benchmark.__doc__.splitlines()[0] in shown


def test_blocks_and_flops_are_the_same_rows(ldm_folder):
    result = run("blocks", str(ldm_folder), "--size", "64", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [row["block"] for row in rows] == list(range(1, 17))
    table = run("bench", "flops", "--model", str(ldm_folder), "--size", "64").stdout
    assert table.startswith("| block | module ")
    assert "full forward pass" in table
    for row in rows:
        assert f"| {row['module']} " in table


def test_parameters_and_storage_print_rows(ldm_folder, corpus_folder):
    result = run("bench", "parameters", "--model", str(ldm_folder), "--json")
    assert json.loads(result.stdout)[0]["network"] == "LDM's UNet"
    images = str(corpus_folder / "scenes-val-*.tar")
    options = ("--images", images, "--num", "2", "--size", "64", "--block", "7", "--json")
    result = run("bench", "storage", "--model", str(ldm_folder), *options)
    assert [row["form"] for row in json.loads(result.stdout)] == ["float16", "int8", "int4"]


def test_profile_prints_parts_and_the_machine(ldm_folder):
    options = ("--size", "64", "--head", "none", "--repeats", "1", "--device", "cpu")
    command = ("bench", "profile", "--model", str(ldm_folder), *options)
    result = run(*command)
    assert result.exit_code == 0
    assert "| encode " in result.stdout
    assert "threads 1, torch " in result.stdout
    found = json.loads(run(*command, "--json").stdout)
    assert {row["stage"] for row in found["parts"]} == {"encode"}
    assert set(found["machine"]) == {"device", "cores", "threads", "torch", "commit"}


def test_encode_is_held_to_a_bare_loop(ldm_folder, corpus_folder):
    images = str(corpus_folder / "scenes-val-*.tar")
    options = ("--images", images, "--size", "64", "--batch", "4", "--turns", "1", "--json")
    result = run("bench", "encode", "--model", str(ldm_folder), *options)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["of_bare_loop"] == pytest.approx(row["bare_s"] / row["span_s"])
    assert 0 < row["busy"] <= 1
    assert row["draws_a_s"] > row["images_a_s"] > 0


def test_a_bad_argument_is_status_2(ldm_folder):
    result = run("blocks", str(ldm_folder), "--size", "100")
    assert result.exit_code == 2
    assert "multiple of 64 px, got 100" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tuning", "--size", "0"), "bench tuning: size must be a positive multiple of 64 px"),
        (("tuning", "--size", "70"), "bench tuning: size must be a positive multiple of 64 px"),
        (("tuning", "--device", "foo"), "device: expected cpu, cuda or such as cuda:1, got 'foo'"),
        (("tuning", "--device", "meta"), "device must be cpu, cuda or such as cuda:1, got 'meta'"),
        (("storage", "--size", "100"), "bench storage: size must be a positive multiple of 64 px"),
        (("storage", "--size", "-64"), "bench storage: size must be a positive multiple of 64 px"),
        (("profile", "--model", "sd14", "--size", "0"), "bench profile: size must be a positive"),
        (("profile", "--model", "sd14", "--device", "foo"), "device: expected cpu, cuda or such"),
        (("profile", "--model", "sd14", "--device", "meta"), "bench profile: device must be cpu"),
        (("profile", "--model", "sd14", "--device", "cuda:99"), "is 'cuda:99', but torch sees"),
        (("flops", "--size", "0"), "size must be a positive multiple of 64 px, got 0"),
        (("flops", "--size", "-64"), "size must be a positive multiple of 64 px, got -64"),
    ],
)
def test_a_size_or_device_that_there_is_not_is_status_2(arguments, message):
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
