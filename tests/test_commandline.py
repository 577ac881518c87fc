"""How a command line ends: its status and its one line."""

import errno
import os
import subprocess
import sys

import pytest

from megalrps.commandline import run_tool
from megalrps.errors import EXIT_NO_SPACE, InputError, RepeatedError


def run(error: BaseException | None) -> int | str | None:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_tool(main, "tool")
    return caught.value.code


def test_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(None) == 0
    assert capsys.readouterr() == ("", "")


def test_a_users_error_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(InputError("--input x:\n  no such file")) == 2
    assert capsys.readouterr().err == "tool: error: --input x: no such file\n"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENOTDIR])
def test_a_refusal_of_the_system_names_the_file(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    status = EXIT_NO_SPACE if code in (errno.ENOSPC, errno.EROFS) else 2
    assert run(OSError(code, os.strerror(code), "/some/file")) == status
    assert capsys.readouterr().err.startswith(f"tool: error: /some/file: {os.strerror(code)};")


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "gone", "x"), ValueError("x")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_tool(lambda: (_ for _ in ()).throw(error), "tool")


def test_the_interrupt_key_is_not_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_a_reader_that_leaves_is_not_a_defect() -> None:
    code = "from megalrps.commandline import run_tool; run_tool(lambda: print('x' * 10**6), 'tool')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_mistake_that_another_rank_reports_ends_alike_and_says_nothing(capfd):
    def main() -> None:
        raise RepeatedError("--save is missing")

    with pytest.raises(SystemExit) as end:
        run_tool(main, "pretrain_gpt.py")
    assert end.value.code == 2
    assert capfd.readouterr().err == ""
