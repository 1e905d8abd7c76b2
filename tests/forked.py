"""Scripts in processes of their own that need no fresh interpreter.

Python's fork server imports everything once and computes nothing. What is forked from it starts in milliseconds, where
a new interpreter takes seconds to import torch, and is as separate: it may change modules, and it may be killed.
"""
import faulthandler
import gc
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload([
    'timm_dynamic.evaluation', 'timm_dynamic.training', 'torch._dynamo', 'matplotlib.backends.backend_agg',
    'matplotlib.figure'])


class Forked:
    """A script in one process, or in several that know of each other as if torchrun had started them.

    Args:
        script: Function that takes a list of words and returns an exit status. It must be importable.
        *args: Of the script, as words.
        folder: Where its output goes, as a file.
        processes: How many.
        env: Further environment variables.
    """

    def __init__(
            self, script: Callable, *args: Any, folder: Path, processes: int = 1, env: Mapping[str, str] | None = None,
    ) -> None:
        self._output = next(path for i in itertools.count() if not (path := folder / f'output-{i}.txt').exists())
        self._output.touch()
        environment = dict(env or {})
        if processes > 1:
            with socket.create_server(('127.0.0.1', 0)) as free:
                environment.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]))
        self.processes = []
        for rank in range(processes):
            if processes > 1:
                environment.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
            self.processes.append(_context.Process(target=_run, args=(
                script, [str(a) for a in args], self._output, dict(environment), multiprocessing.get_start_method())))
            self.processes[-1].start()

    @property
    def output(self) -> str:
        """What all processes have printed so far."""
        return self._output.read_text()

    def send_signal(self, signum: int) -> None:
        """Send a signal to the first process and its children, such as a loader's workers."""
        os.killpg(self.processes[0].pid, signum)

    def wait(self, timeout: float = 500) -> list[int]:
        """Wait for the end and return the exit statuses; -N for a process that signal N ended.

        Raises:
            AssertionError: It takes longer. The message has the output and where each process stood.
        """
        end = time.monotonic() + timeout
        while (alive := [p for p in self.processes if p.is_alive()]) and time.monotonic() < end:
            if any(p.exitcode for p in self.processes):
                end = min(end, time.monotonic() + 30)  # the others notice that one is gone
            alive[0].join(0.1)
        late = [p for p in self.processes if p.is_alive()]
        for process in late:
            process_group = process.pid
            os.killpg(process_group, signal.SIGABRT)  # it says where it stood
            process.join(5)
            if process.is_alive():
                os.killpg(process_group, signal.SIGKILL)
        if late:
            raise AssertionError(f'{len(late)} of {len(self.processes)} processes did not end\n{self.output[-12000:]}')
        return [p.exitcode for p in self.processes]


def run_forked(script: Callable, *args: Any, check: bool = True, **kwargs: Any) -> Forked:
    """Run a script to its end.

    Args:
        script: See `Forked`.
        *args: Of the script.
        check: Fail if a process does not end with status 0.
        **kwargs: See `Forked`.
    """
    forked = Forked(script, *args, **kwargs)
    statuses = forked.wait()
    assert not check or not any(statuses), f'exit status {statuses}\n{forked.output[-8000:]}'
    return forked


def _run(
        script: Callable, args: list[str], output: Path, environment: Mapping[str, str], start_method: str,
) -> None:
    os.setsid()
    multiprocessing.set_start_method(start_method, force=True)  # not that of this process: loaders' workers are forked
    gc.freeze()  # see conftest.py
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    os.environ.update(environment)
    sys.exit(script(args))
