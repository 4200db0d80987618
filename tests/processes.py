"""Ways to run a script: as a command, as a fork that starts in milliseconds, or in this process."""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

import data

ROOT = Path(__file__).parent.parent
# Runs are equal bit for bit on the CPU only, with the same number of threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


# --- commands ---


def start(*words):
    """Start python with these arguments."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


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
NO_REPORT = {"train.report": nothing}


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
    data.launch(importlib.import_module(Path(words[0]).stem).main)


class Fork:
    """A script in a process of its own, with the methods of subprocess.Popen that tests use."""

    def __init__(self, words, changes):
        self.output = tempfile.NamedTemporaryFile("r")
        args = [str(word) for word in words], self.output.name, changes
        self.process = context.Process(target=script, args=args, daemon=True)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": path}):
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
    return Fork(words, changes)


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
