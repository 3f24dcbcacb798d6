"""`adapterkit draft`: an interface on standard output or in a file, what is left open on standard error."""

from __future__ import annotations

import sys
from pathlib import Path

from adapterkit.author import draft as author
from adapterkit.cli import models, report
from adapterkit.errors import ConfigError, Problem


def run(model: str, output: str | None, like: bool, as_json: bool) -> bool:
    """Whether everything was found.

    Raises: ConfigError: there is no such model, or the file exists or cannot be written.
    """
    if output is not None and Path(output).exists():
        raise ConfigError(Problem("unwritable", f"{output} exists, and may hold work of yours", "--output"))
    models.see_here()
    found = author.draft(model, like=like)
    if as_json:
        report.as_json(found.to_dict())
    elif output is None:
        sys.stdout.write(found.text)
    else:
        try:
            Path(output).write_text(found.text, encoding="utf-8")
        except OSError as error:
            message = f"{output} cannot be written: {error.strerror}"
            raise ConfigError(Problem("unwritable", message, "--output")) from None
    sys.stderr.write(f"{found.summary}\n")
    return found.is_complete
