"""Start ``trainer`` in processes of its own: as a shell does, or many times without importing torch each time.

For the second, one process imports all that the commands use, and forks for every call. A call's process is like any
other: a group and a log of its own, and it can be killed at any moment. What differs: the seed of Python's string
hashes is that of the process that forks, so what depends on the order of a set shows only between processes that were
started apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

USED = (
    "matplotlib.backends.backend_svg",
    "peft",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    "graftwork.cli",
    "graftwork.commands.generating",
    "graftwork.commands.training",
    "graftwork.evaluate.job",
    "graftwork.generate.session",
    "graftwork.report.html",
    "graftwork.self_play.stream",
    "graftwork.train.job",
    "graftwork.transform.job",
)
"""What the commands import when they are called."""
IF_THERE = ("deepspeed",)
"""What libraries import where it is installed."""


class Started:
    """A process that runs one command; its standard output and error go to ``log``."""

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]) -> None:
        self.pid = pid
        self.log = log
        self._poll = poll
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._poll()
        return self._code

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end and return the exit code.

        Raises:
            TimeoutError: it has not ended in time (seconds).
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
            time.sleep(0.01)
        return code

    def send(self, number: int) -> None:
        """Send a signal to the process and all that it has started."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def said(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Starter(Protocol):
    """What starts a command: :class:`Cold` or :class:`Warm`."""

    def start(self, words: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None) -> Started: ...


class Cold:
    """Starts every command as a shell would."""

    def start(self, words: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None) -> Started:
        """Start ``trainer`` with ``words``; what it prints goes to ``log``."""
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "graftwork", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                start_new_session=True,
            )
        return Started(process.pid, log, process.poll)


class Warm:
    """The process that forks. It ends when :meth:`close` is called.

    Args:
        env: further environment variables.
        within: words of a command that starts it, such as one that gives it file systems of its own.
    """

    def __init__(self, env: Mapping[str, str] | None = None, within: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", "graftwork.testing.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.pid = self._process.pid

    def start(
        self,
        words: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        before: str | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Started:
        """Start ``trainer`` with ``words``.

        Args:
            words: of the command, after ``trainer``.
            log: file for what it prints; an earlier one is replaced.
            env: further environment variables, for libraries that read them when they are used.
            before: ``module:function`` that the new process calls first, with ``given`` as keywords.
        """
        order = {
            "words": list(words),
            "log": str(log),
            "env": dict(env or {}),
            "before": before,
            "given": given,
        }
        log.write_text("")
        pid = self._ask(order)
        return Started(pid, log, lambda: self._ask({"poll": pid}))

    def run(self, words: Sequence[str], log: Path, **options: Any) -> Started:
        """Start ``trainer``, wait for its end and return the process."""
        process = self.start(words, log, **options)
        process.wait()
        return process

    def close(self) -> None:
        """End the process that forks; calls that run still are not touched."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, order: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks has ended with code {self._process.wait()}")
        return json.loads(answer)


@contextlib.contextmanager
def warm(env: Mapping[str, str] | None = None, within: Sequence[str] = ()) -> Iterator[Warm]:
    """Yield a :class:`Warm` that is closed afterwards."""
    server = Warm(env, within)
    try:
        yield server
    finally:
        server.close()


# ---------------------------------------------------------------------- in the process that forks


def serve() -> None:
    """Import, then answer orders, one JSON object a line, until standard input ends."""
    import gc
    import importlib.util

    # What a library prints on import must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in USED:
        importlib.import_module(module)
    for module in IF_THERE:
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    # Or every collection in every child would go through all that was imported.
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        answer = _fork(order) if "words" in order else _ended(order["poll"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # Without what libraries do at the end: it takes long and prints.
    os._exit(0)


def _fork(order: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        # So that a signal to the group finds it, whoever of the two comes first.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    code = 70
    try:
        code = _called(order)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _called(order: Mapping[str, Any]) -> int:
    import importlib

    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(order["env"])
    if order["before"]:
        module, _, name = order["before"].partition(":")
        getattr(importlib.import_module(module), name)(**(order["given"] or {}))
    from graftwork.cli import main

    sys.argv = ["trainer", *order["words"]]
    try:
        main(order["words"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


if __name__ == "__main__":
    serve()
