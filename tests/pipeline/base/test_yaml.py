"""What YAML 1.1 makes of what was typed: read as meant where there is one meaning, else refused."""

from typing import Any

import pytest
from pydantic import Field

from pipeline.base.yaml import FrozenModel, SpecError, load_yaml, parse_yaml
from pipeline.runs.config import TrainConfig
from pipeline.sweep.config import SweepConfig


class Below(FrozenModel):
    steps: int = 0


class Form(FrozenModel):
    count: int = 1
    share: float = 1.0
    text: str = ""
    flag: bool = False
    maybe: int | None = None
    counts: tuple[int, ...] = ()
    named: dict[str, int] = Field(default_factory=dict)
    below: Below = Below()
    anything: tuple[bool | int | float | str, ...] = ()


def read(text):
    return parse_yaml(text, Form, where="form.yaml")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("count: 1_000", "count", 1000),
        ("count: 0x10", "count", 16),
        ("count: 0", "count", 0),
        ("count: 007", "count", 7),
        ("count: 089", "count", 89),
        ("count: -12", "count", -12),
        ("share: 1e-4", "share", 1e-4),
        ("share: .5", "share", 0.5),
        ("share: 1E3", "share", 1000.0),
        ("flag: yes", "flag", True),
        ("flag: Off", "flag", False),
        ("text: 2024-01-01", "text", "2024-01-01"),
        ("text: 2024-13-45", "text", "2024-13-45"),
        ("text: 123e4567", "text", "123e4567"),
        ("text: .inf", "text", ".inf"),
        ("text: '010'", "text", "010"),
        ("text: '12:30'", "text", "12:30"),
        ("text: 's3://a:1/b'", "text", "s3://a:1/b"),
        ("maybe: ~", "maybe", None),
        ("\ufeffcount: 3\r\ntext: a\r\n", "count", 3),
        ("anything: [true, 1, 1.5, no, 'no', 1_0]", "anything", (True, 1, 1.5, False, "no", 10)),
    ],
)
def test_what_has_one_meaning_is_read_so(text, field, value):
    found: Any = getattr(read(text), field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: 010", "010 would be read as 8: write that, or the text in quotes"),
        ("text: 010", "010 would be read as 8: write that, or the text in quotes"),
        ("count: 12:30", "12:30 would be read as 750: write that, or the text in quotes"),
        ("text: 1:30.5", "1:30.5 would be read as 90.5"),
        ("count: -1:0", "-1:0 would be read as -60"),
        ("count: yes", "count: must be a number, got true, as YAML reads yes and on"),
        ("count: true", "count: must be a number, got true"),
        ("share: off", "share: must be a number, got false, as YAML reads no and off"),
        ("maybe: no", "maybe: must be a number, got false"),
        ("counts: [1, on]", r"counts\.1: must be a number, got true"),
        ("named: {a: on}", r"named\.a: must be a number, got true"),
        ("below: {steps: on}", r"below\.steps: must be a number, got true"),
        ("count: 1e5", r"count: .*\(got '1e5'\); write 100000"),
        ("count: .5", r"count: .*fractional part"),
        ("share: NaN", "share: must be a finite number, got NaN"),
        ("share: .nan", r"share: .*\(got '.nan'\)"),
        ("share: -.inf", r"share: .*\(got '-.inf'\)"),
        ("share: inf", "share: must be a finite number, got inf"),
        ("count: ~", r"count: .*\(got null\)"),
        ("count:", r"count: .*\(got null\)"),
        ("text: no", r"text: .*\(got False\), as YAML reads yes, no, on and off; write a text in"),
        ("text: 1234567890123456", r"text: .*\(got 1234567890123456\); write a text in quotes"),
        ("named: {1: 2}", r"named.1.*\(got 1\); write a text in quotes"),
        ("count: [3]", r"count: .*\(got \[3\]\)"),
        ("count:\t3", "found character .* write spaces in place of the tab"),
        ("below:\n\tsteps: 3", "found character .* write spaces in place of the tab"),
        ("text: *train*", "alias.*; write a glob in quotes"),
        ("count: 1\ncount: 2", "the key 'count' is given twice"),
    ],
)
def test_what_has_another_meaning_is_refused_with_it(text, message):
    with pytest.raises(SpecError, match=rf"(?s)^form\.yaml: .*{message}"):
        read(text)


def test_a_file_that_is_no_utf_8_says_how_to_save_it(tmp_path):
    (tmp_path / "form.yaml").write_bytes("text: é".encode("utf-16"))
    with pytest.raises(SpecError, match=r"form\.yaml: cannot be read: .*; save it as UTF-8"):
        load_yaml(tmp_path / "form.yaml", Form)


@pytest.mark.parametrize("name", ["num_steps", "seed", "batch_size"])
def test_every_config_refuses_flags_for_numbers(name):
    fields = {"head": "{name: znet}", "num_steps": "3", name: "on"}
    text = "\n".join(f"{key}: {value}" for key, value in fields.items())
    with pytest.raises(SpecError, match=f"{name}: must be a number, got true"):
        parse_yaml(text, TrainConfig, where="train.yaml")
    base = "base: {head: {name: znet}, num_steps: 3}\n"
    with pytest.raises(SpecError, match=r"axes.seeds.1: must be a number, got false"):
        parse_yaml(f"{base}axes: {{seeds: [1, off]}}", SweepConfig, where="sweep.yaml")
    changed = parse_yaml(f"{base}variants: [{{name: a, {name}: on}}]", SweepConfig, where="s")
    with pytest.raises(SpecError, match=rf"variant 'a': .*\n  {name}: must be a number, got true"):
        changed.list_bases()
