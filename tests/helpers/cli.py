"""The `blt-hf` command in this process and in another."""

import os
import subprocess
import sys

from typer.testing import CliRunner

from blt_hf_cli import app


def run(*arguments, status: int = 0, stdin: str | bytes | None = None) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def in_a_shell(*arguments, timeout: float = 240, **environment) -> subprocess.CompletedProcess:
    """`blt-hf` as its users start it: another process."""
    return subprocess.run(
        [sys.executable, "-m", "blt_hf_cli", *map(str, arguments)],
        capture_output=True, timeout=timeout, env={**os.environ, "COLUMNS": "100", **environment},
    )  # fmt: skip
