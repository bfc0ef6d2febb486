"""Reads YAML files into validated pydantic models, with errors that name the field."""

from collections.abc import Callable, Mapping, Sequence
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
    """PyYAML's safe loader, which refuses a key given twice instead of taking the last."""

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


def load_yaml(
    path: Path, kind: type[Model], *, prepare: Callable[[dict[str, Any]], None] = lambda plain: None
) -> Model:
    """Read a YAML file into a validated model, whose plain data ``prepare`` may alter before.

    Raises:
        SpecError: no such file, no YAML, or not a valid spec; says which field and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no such date
        raise SpecError(f"{where}: is not plain YAML: {error}") from error
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
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            field = ".".join(str(part) for part in fault["loc"]) or "(whole)"
            said = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                said = f"no such field{_list_fields(kind, fault['loc'][:-1])}"
            says_it = ", got " in said or fault["type"] == "extra_forbidden"
            got = "" if says_it else f" (got {_shorten(fault['input'])})"
            faults.append(f"  {field}: {said}{got}")
        raise SpecError(f"{where}: is not a valid {kind.__name__}:\n" + "\n".join(faults)) from None


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
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
