"""Python programs in processes of their own, without waiting for torch each time.

`run` is `subprocess.run` for commands that begin with this interpreter or with a script of its environment. They are
started by a server, one for each process of pytest, that has imported torch and what else transformers imports, but
nothing that reads the variables of a test: not transformers, not the Hub's client, not this package. A fork of it gets
the program's arguments, variables, folder and path, and ends as any interpreter does. What a program imports, and in
which order, is therefore not tested with it.
"""

import array
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


EXAMPLES = Path(__file__).parents[2] / "examples"


PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch._inductor.decomposition",
    "torch.distributed.checkpoint.hf_storage",
    "torchao",
    "PIL.Image",
    "httpx",
    "jinja2",
    "pandas",
    "pyarrow",
    "rich.progress",
    "safetensors.torch",
    "scipy.optimize",
    "sklearn.metrics",
    "tokenizers",
)
LEFT_OUT = {
    "transformers",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "evaluate",
    "matplotlib",
    "peft",
    "trl",
    "blt_hf",
}


def run(
    command: list, *, env=None, cwd=None, capture_output=False, text=False, timeout=280, check=False, input=None
) -> subprocess.CompletedProcess:
    """What `subprocess.run` gives. Without `capture_output`, what the program prints goes to pytest's own files."""
    command = [os.fspath(part) if not isinstance(part, str) else part for part in command]
    if not hasattr(os, "pidfd_open"):  # not Linux
        options = {"env": env, "cwd": cwd, "capture_output": capture_output, "text": text, "timeout": timeout}
        if isinstance(input, str) and not text:
            input = input.encode()
        return subprocess.run(command, check=check, input=input, **options)
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        if input is not None:
            stdin.write(input.encode() if isinstance(input, str) else input)
            stdin.seek(0)
        files = [stdin.fileno(), out.fileno() if capture_output else 1, error.fileno() if capture_output else 2]
        status = _server().start(
            {
                "arguments": command[1:] if command[0] == sys.executable else command,
                "environment": dict(os.environ if env is None else env),
                "folder": os.fspath(cwd or os.getcwd()),
            },
            files,
            timeout,
        )
        printed = []
        for file in (out, error):
            file.seek(0)
            printed.append(file.read().decode() if text else file.read())
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, *printed)
    if check and status:
        raise subprocess.CalledProcessError(status, command, *printed)
    return subprocess.CompletedProcess(command, status, *(printed if capture_output else (None, None)))


def python_path() -> str:
    """Returns a `PYTHONPATH` with which a program imports what tests do (`pythonpath` in pyproject.toml).

    `sys.path` itself would not do: transformers puts the folder of remote code there, and a program with a folder of
    its own would look in this one first.
    """
    tests = os.fspath(Path(__file__).parents[1])
    return os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))


def run_elsewhere(script: str, folder: Path) -> dict:
    """Runs `script` in a process that cannot import `blt_hf`; it prints one JSON line last."""
    prelude = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "blt_hf":
            raise ImportError("blt_hf is not installed here")

sys.meta_path.insert(0, Absent())
try:
    import blt_hf
except ImportError:
    pass
else:
    raise AssertionError("blt_hf is importable")
import json, os, pathlib, torch
folder = pathlib.Path(sys.argv[1])
expected = torch.load(folder / "expected.pt")
ids = expected["ids"]
TEXT = expected["source"]

def same(actual, name):
    torch.testing.assert_close(actual, expected[name], atol=1e-4, rtol=1e-4)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(
        HF_HUB_OFFLINE="1", HF_HOME=str(folder / "home"), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
    )
    result = run(
        [sys.executable, "-I", "-c", prelude + script, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads(result.stdout.splitlines()[-1])


def run_example(name: str, *arguments, timeout: float = 280, **environment: str) -> str:
    done = run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def _server() -> "_Server":
    return _Server()


class _Server:
    """The process that forks; it ends when the other end of its socket is closed, as by the end of this process."""

    def __init__(self):
        self.socket, theirs = socket.socketpair()
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**variables, "OMP_NUM_THREADS": "1"},
                cwd="/",
            )

    def start(self, request: dict, files: list[int], timeout: float) -> int | None:
        """The exit status of a program; None for one that was killed because it took too long."""
        content = json.dumps(request).encode()
        header = len(content).to_bytes(8, "little")
        self.socket.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
        self.socket.sendall(content)
        ready, _, _ = select.select([self.socket], [], [], timeout)
        if not ready:
            self.socket.sendall(b"k")
        answer = self.socket.recv(4)
        assert len(answer) == 4, "the server of new processes has ended"
        return int.from_bytes(answer, "little", signed=True) if ready else None


def _serve(connection: socket.socket) -> dict | None:
    """Forks for each request; returns the request in the fork, and None at the end in the server."""
    while True:
        header, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        if not header:
            return None
        files = array.array("i", ancillary[0][2])
        content = b""
        while len(content) < int.from_bytes(header, "little"):
            content += connection.recv(1 << 20)
        child = os.fork()
        if not child:
            connection.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            return json.loads(content)
        for file in files:
            os.close(file)
        ended = os.pidfd_open(child)
        ready, _, _ = select.select([ended, connection], [], [])
        if ended not in ready:  # too late, or nobody waits any more
            connection.recv(1)
            os.kill(child, signal.SIGKILL)
        os.close(ended)
        _, status = os.waitpid(child, 0)
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))


def _become(request: dict) -> None:
    """Runs a program as the interpreter runs the one that it was started with."""
    arguments = request["arguments"]
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["folder"])
    path = sys.path[1:]  # without the folder of this file
    is_isolated = arguments[0] == "-I"
    if is_isolated:
        arguments = arguments[1:]
    else:
        path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part] + path
    kind, program = arguments[0], arguments[1] if arguments[0] in ("-c", "-m") else arguments[0]
    first = {"-c": "", "-m": request["folder"]}.get(kind, os.path.dirname(os.path.realpath(program)))
    sys.path[:] = path if is_isolated else [first, *path]
    sys.path_importer_cache.clear()
    sys.argv = [kind, *arguments[2:]] if kind in ("-c", "-m") else list(arguments)
    if kind == "-c":
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(program, "<string>", "exec"), vars(main))
    elif kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    for _name in PRELOADED:
        importlib.import_module(_name)
    assert not LEFT_OUT & sys.modules.keys(), LEFT_OUT & sys.modules.keys()
    gc.freeze()  # a fork that looked through them would copy them all
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _request is not None:
        _become(_request)
