"""Programs that tests start in processes of their own: the same with and without a server that forks."""

import os
import subprocess
import sys

import pytest

from helpers.processes import run


PROGRAM = """
import os, sys
print(sys.argv[1:], os.environ["WORD"], os.getcwd(), sys.stdin.read(), "torch" in sys.modules)
print("told", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("forks", [True, False])
def test_what_a_program_gets_and_gives(forks, monkeypatch, tmp_path):
    if not forks:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    elif not hasattr(os, "pidfd_open"):
        pytest.skip("no `os.pidfd_open`: every program is started by `subprocess`")
    options = {"env": {**os.environ, "WORD": "word"}, "cwd": tmp_path, "input": "given", "capture_output": True}
    result = run([sys.executable, "-c", PROGRAM, "a", "b"], text=True, **options)
    assert result.returncode == 3 and "told" in result.stderr
    assert result.stdout == f"['a', 'b'] word {tmp_path} given {forks}\n"
    assert run([sys.executable, "-c", PROGRAM], **options).stdout == f"[] word {tmp_path} given {forks}\n".encode()
    with pytest.raises(subprocess.CalledProcessError):
        run([sys.executable, "-c", PROGRAM], check=True, **options)
    with pytest.raises(subprocess.TimeoutExpired):
        run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=1, capture_output=True)
