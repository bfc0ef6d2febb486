"""Writes docs/reference/cli.md: every command's options, defaults and help, from the code.

``make docs`` runs it; a test holds the file to what it writes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperGroup, TyperOption

from jobs.__main__ import app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
HEAD = """# Commands

Made from the code by `make docs`. `ldznet VERB` is the same as `python -m jobs VERB`.

Exit status: 0 done; 1 failed, or `verify` found damage; 2 bad arguments, spec, config, corpus or
model files; 3 done, but tasks or trials failed, nothing was stored of a tar that held samples, or
rejects passed `--max-rejects`; 130 interrupted. [What each asks you to do](exit-status.md).
"""


def format_reference() -> str:
    """Return the page as Markdown."""
    return HEAD + "".join(_format_sections(typer.main.get_command(app), "ldznet"))


def _format_sections(command: Any, name: str) -> Iterator[str]:
    """Yield the section of a command, or of each command below a group."""
    if isinstance(command, TyperGroup):
        for verb, inner in command.commands.items():
            yield from _format_sections(inner, f"{name} {verb}")
        return
    yield f"\n## {name}\n\n{command.help}\n\n| option | default | meaning |\n| --- | --- | --- |\n"
    for parameter in command.params:
        if parameter.name != "help":
            yield _format_row(parameter)


def _format_row(parameter: TyperArgument | TyperOption) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    if isinstance(parameter, TyperArgument):
        names = [names[0].upper()]
    default = names[0] if parameter.default is True else parameter.default
    default = "" if default is None or default is False else f"`{default}`"
    default = "required" if parameter.required else default
    return f"| {', '.join(f'`{name}`' for name in names)} | {default} | {parameter.help} |\n"


if __name__ == "__main__":
    PAGE.write_text(format_reference(), encoding="utf-8")
