"""``python`` and ``torchrun`` for a test that starts dozens: forked from one interpreter, five seconds each saved.

A server process imports what a launch needs, once. The two programs, which do no more than ask it, stand first on PATH:
the server forks, and the fork takes the asker's arguments, directory, environment and standard streams, runs the
program as ``__main__`` and hands its exit status back. Programs import for themselves what they name, so that a missing
import still fails; that they start as processes of their own is for other tests to show.

Whoever asks and is killed takes its fork along, and the end of the test process takes the server and all forks.
"""

import atexit
import faulthandler
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

PRELOADED = (
    "torch.distributed.run",
    "torch._dynamo",  # what recomputation imports when it is first used
    "tyro",
    "sentencepiece",
    "megalrps.data.preprocess",
    "megalrps.evaluation.releases",  # and with it all that a launch needs
    "megalrps.evaluation.report",
    "megalrps.training.loop",
)
_LENGTH_BYTES = 4

# What stands on PATH. -I -S: it needs the standard library alone, and starts in a fiftieth of a second.
_ASKER = """#!{interpreter} -IS
import json, os, signal, socket, sys

arguments = sys.argv[1:]
if os.path.basename(sys.argv[0]) == "torchrun":
    arguments = ["-m", "torch.distributed.run", *arguments]
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes({length_bytes}, "big")], [0, 1, 2])
server.sendall(request)
replies = server.makefile("r")
fork = int(replies.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT):
    signal.signal(number, lambda received, frame: os.kill(fork, received))
status = int(replies.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextmanager
def warm_interpreter(folder: Path, environment: dict[str, str], preloaded: Sequence[str] = PRELOADED) -> Iterator[Path]:
    """A folder with ``bin/python`` and ``bin/torchrun``, which work while the block runs.

    The server starts in ``environment``, whose PYTHONPATH says which tree its packages are of. ``folder`` must not
    exist; its path must be short enough for a socket's name. The environment of what is to use it: ``warmed``.
    """
    programs, address = folder / "bin", str(folder / "server")
    programs.mkdir(parents=True)
    text = _ASKER.format(interpreter=Path(sys.executable).resolve(), address=address, length_bytes=_LENGTH_BYTES)
    for name in ("python", "torchrun"):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    command = [sys.executable, __file__, address, *preloaded]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    try:
        assert server.stdout.readline() == "ready\n", "the server of warm interpreters did not start"
        yield folder
    finally:
        server.stdin.close()
        server.wait(10)
        server.stdout.close()


def warmed(environment: dict[str, str], warm: Path) -> dict[str, str]:
    """``environment`` with the programs of ``warm`` first; torchrun starts its workers with them too."""
    return environment | {"PATH": f"{warm}/bin:{environment['PATH']}", "PYTHON_EXEC": f"{warm}/bin/python"}


def _serve(address: str, preloaded: list[str]) -> None:
    for name in preloaded:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would be without these threads"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    ready.register(0, selectors.EVENT_READ)  # whose end is the test process's
    askers: dict[int, tuple[socket.socket, int]] = {}  # by the file that tells of a fork's end
    while True:
        for key, _ in ready.select():
            if key.fileobj is listener:
                _fork(listener, ready, askers)
            elif key.fd == 0:
                for _, process in askers.values():
                    os.kill(process, signal.SIGKILL)
                return
            elif key.data is not None and key.data in askers:  # the asker is gone: nothing else does it say
                os.kill(askers[key.data][1], signal.SIGKILL)
                ready.unregister(key.fileobj)
            elif key.fd in askers:
                _hand_back(key.fd, ready, askers)


def _fork(listener: socket.socket, ready: selectors.BaseSelector, askers: dict[int, tuple[socket.socket, int]]) -> None:
    asker, _ = listener.accept()
    length, streams, _, _ = socket.recv_fds(asker, _LENGTH_BYTES, 3)
    with asker.makefile("rb") as file:
        arguments, directory, environment = json.loads(file.read(int.from_bytes(length, "big")))
    process = os.fork()
    if process == 0:
        for key in list(ready.get_map().values()):
            if key.fd > 2:
                os.close(key.fd)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        asker.close()
        _become(arguments, directory, environment)
    for stream in streams:
        os.close(stream)
    asker.sendall(f"{process}\n".encode())
    end = os.pidfd_open(process)
    askers[end] = (asker, process)
    ready.register(end, selectors.EVENT_READ)
    ready.register(asker, selectors.EVENT_READ, data=end)


def _hand_back(end: int, ready: selectors.BaseSelector, askers: dict[int, tuple[socket.socket, int]]) -> None:
    asker, process = askers.pop(end)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    ready.unregister(end)
    os.close(end)
    if asker.fileno() in ready.get_map():
        ready.unregister(asker)
        asker.sendall(f"{status}\n".encode())
    asker.close()


def _become(arguments: list[str], directory: str, environment: dict[str, str]) -> NoReturn:
    """Run the program in this fork, as ``python ARGUMENTS`` would, and end the process."""
    status = 1
    try:
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        if environment.get("PYTHONFAULTHANDLER"):
            faulthandler.enable(file=2)
        # Objects of its own, for the server's know of other files, whether one can seek in them.
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        if arguments[0] == "-u":
            arguments = arguments[1:]
            sys.stdout.reconfigure(write_through=True)
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], directory
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
