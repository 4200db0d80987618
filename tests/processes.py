"""Ways to run a script: as a command, as a fork that starts in milliseconds, or in this process."""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

import runtime

ROOT = Path(__file__).parent.parent
# The commands of this Python, such as torchrun, are found whatever the shell's PATH is. Runs are
# equal bit for bit on the CPU only, with the same number of threads.
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


# --- what is started is ended ---

started = []  # what `start` and `fork` returned, during one test or fixture


@contextmanager
def default_signals():
    """Let Ctrl-C end new processes, also where a shell has made this one ignore it.

    A new process inherits what is ignored; what has a handler gets its default.
    """
    ignored = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def children(pid):
    """Return the ids of a process's children, oldest first."""
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def kill(process):
    """Kill a process with its children, and theirs, at once."""
    pids = [process.pid]
    for pid in pids:
        pids += children(pid)
    process.kill()
    for pid in pids[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def kill_all():
    """Kill what a test that failed, or was interrupted, has left running."""
    while started:
        process = started.pop()
        if process.poll() is None:
            kill(process)
        process.wait()


def wait_until(condition, *processes, timeout=240):
    """Return once condition() holds. Fail if one of the processes ends before, or time is up."""
    end = time.monotonic() + timeout
    while not condition():
        for process in processes:
            assert process.poll() is None, f"it ended too early: {process.communicate()}"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)


def free_port():
    """Return a port that nobody listens to."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


# --- commands ---


def start(*words, **options):
    """Start python with these arguments."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    options = dict(cwd=ROOT, env=ENVIRONMENT, text=True) | pipes | options
    with default_signals():
        started.append(subprocess.Popen([sys.executable, *map(str, words)], **options))
    return started[-1]


def finish(*processes):
    """Wait for processes, which must succeed, and return what each printed."""
    printed = []
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        printed.append(out)
    return printed


def run(*words):
    """Run python with these arguments, and return what it prints."""
    return finish(start(*words))[0]


# --- forks ---

# They are forked from a process that has imported what takes seconds to import.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch._dynamo", "train"])


def nothing(*_):
    pass


# A short run takes less time than the report on its samples.
NO_REPORT = {"evaluate.report": nothing}


def script(words, output, changes):
    """Do what `python SCRIPT ARGUMENTS` does, and print to the file `output`."""
    file = open(output, "w", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    sys.argv = words
    os.chdir(ROOT)
    for name, value in changes.items():
        module, attribute = name.split(".")
        setattr(importlib.import_module(module), attribute, value)
    runtime.launch(importlib.import_module(Path(words[0]).stem).main)


class Fork:
    """A script in a process of its own, with the methods of subprocess.Popen that tests use."""

    def __init__(self, words, changes):
        self.output = tempfile.NamedTemporaryFile("r")
        args = [str(word) for word in words], self.output.name, changes
        self.process = context.Process(target=script, args=args, daemon=True)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": path}), default_signals():
            self.process.start()  # the first start also starts the process that forks
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=240):
        self.process.join(timeout)
        return self.process.exitcode

    returncode = property(poll)

    def communicate(self, timeout=240):
        """Return what it printed to stdout and stderr, twice."""
        self.wait(timeout)
        printed = self.output.read()
        return printed, printed


def fork(*words, changes=NO_REPORT):
    """Start a script with its arguments, after `changes` of globals, {"module.name": value}."""
    started.append(Fork(words, changes))
    return started[-1]


# --- in this process ---


def fails(monkeypatch, *argv):
    """Run the script in this process and return the one line with which it ends."""
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(argv[0], run_name="__main__")
    code = end.value.code
    assert isinstance(code, str) and "\n" not in code and code.startswith(f"{argv[0]}: ")
    return code
