"""Reads YAML files into validated pydantic models, with errors that name the field."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class FrozenModel(BaseModel):
    """An immutable model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SpecError(ValueError):
    """A spec that is invalid, or that does not match what it is used with."""


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without YAML 1.1's surprises.

    It refuses a key given twice instead of taking the last, and numbers in base 60 (12:30) or with
    a leading 0 that would change them (010). Dates, .nan and .inf are text.
    """

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """Build a number that has one meaning."""
        text = node.value.replace("_", "")
        is_float = node.tag.endswith(":float")
        value = self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)
        if not math.isfinite(value):
            return str(node.value)
        if ":" in text or (text.lstrip("+-").isdecimal() and int(text) != value):
            what = f"{node.value} would be read as {value}: write that, or the text in quotes"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping of keys that differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    what = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.construct_number)


def load_yaml(
    path: Path, kind: type[Model], *, prepare: Callable[[dict[str, Any]], None] = lambda plain: None
) -> Model:
    """Read a YAML file into a validated model, whose plain data ``prepare`` may alter before.

    Raises:
        SpecError: no such file, no YAML, or not a valid spec; says which field and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: cannot be read: {error}; save it as UTF-8") from error
    return parse_yaml(text, kind, where=str(path), prepare=prepare)


def parse_yaml(
    text: str,
    kind: type[Model],
    *,
    where: str,
    prepare: Callable[[dict[str, Any]], None] = lambda plain: None,
) -> Model:
    """Read YAML text into a validated model; ``where`` names it in errors."""
    try:
        refused = [t for t in yaml.scan(text) if isinstance(t, yaml.AliasToken | yaml.TagToken)]
        data = None if refused else yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: too many digits
        advised = {"'\\t'": "write spaces in place of the tab", "alias": "write a glob in quotes"}
        advice = "".join(f"; {advised[sign]}" for sign in advised if sign in str(error))
        raise SpecError(f"{where}: is not plain YAML: {error}{advice}") from error
    if refused:
        line = refused[0].start_mark.line + 1
        raise SpecError(
            f"{where}: line {line}: aliases (*name) and tags (!name) are not read; "
            "write the value out"
        )
    if not isinstance(data, dict):
        raise SpecError(f"{where}: expected a mapping of fields, got {type(data).__name__}")
    prepare(data)
    return validate(data, kind, where=where)


def validate(data: Mapping[str, Any], kind: type[Model], *, where: str) -> Model:
    """Build a model from plain data.

    Raises:
        SpecError: with a line for each fault: the field, the reason and what was got.
    """
    faults = []
    try:
        made = kind.model_validate(data)
        faults = [f"  {fault}" for fault in _list_misread(data, made)]
        if not faults:
            return made
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            field = ".".join(str(part) for part in fault["loc"]) or "(whole)"
            said = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                said = f"no such field{_list_fields(kind, fault['loc'][:-1])}"
            says_it = ", got " in said or fault["type"] == "extra_forbidden"
            got = "" if says_it else f" (got {_shorten(fault['input'])})"
            faults.append(f"  {field}: {said}{got}{_advise(fault['type'], fault['input'])}")
    raise SpecError(f"{where}: is not a valid {kind.__name__}:\n" + "\n".join(faults))


def _list_misread(given: Any, made: Any, field: str = "") -> Iterator[str]:
    """Yield the flags of a file that pydantic takes for numbers, and texts such as NaN.

    JSON has its own NaN, of scores, which is none.
    """
    if isinstance(given, Mapping):
        for key, value in given.items():
            below = made.get(key) if isinstance(made, Mapping) else getattr(made, str(key), None)
            yield from _list_misread(value, below, f"{field}.{key}".lstrip("."))
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple):
        for number, (value, below) in enumerate(zip(given, made, strict=False)):
            yield from _list_misread(value, below, f"{field}.{number}")
    elif isinstance(given, bool) and isinstance(made, int | float) and made is not given:
        said = "true, as YAML reads yes and on" if given else "false, as YAML reads no and off"
        yield f"{field}: must be a number, got {said}"
    elif isinstance(given, str) and isinstance(made, float) and not math.isfinite(made):
        yield f"{field}: must be a finite number, got {given}"


def _advise(fault: str, given: Any) -> str:
    """Return how to write what a file's author may have meant, "" where that is not known."""
    if fault in ("string_type", "invalid_key") and isinstance(given, bool | int | float):
        flag = ", as YAML reads yes, no, on and off" if isinstance(given, bool) else ""
        return f"{flag}; write a text in quotes"
    with suppress(ValueError, OverflowError):  # no number
        if fault == "int_parsing" and float(given).is_integer():
            return f"; write {int(float(given))}"
    return ""


def _list_fields(kind: type[BaseModel], where: Sequence[str | int]) -> str:
    """Return ``; there are a, b, c``, the fields of a model's section; "" for that of a union."""
    section: Any = kind
    for part in where:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        options = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = [x for x in options if isinstance(x, type) and issubclass(x, BaseModel)]
        if not found:
            return ""
        section = found[0]
    return f"; there are {', '.join(section.model_fields)}"


def _shorten(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
