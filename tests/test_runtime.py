"""runtime.py: seeds, files that are whole or as before, locks, processes, the command line."""

import argparse
import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import ENVIRONMENT, LAUNCH, ROOT, finish, free_port, run, start, wait_until
from safetensors import SafetensorError
from safetensors.torch import save
from torch._dynamo.exc import TorchDynamoException

import runtime
from runtime import generator

seeds = st.integers(0, 2**20)
slow = pytest.mark.slow  # starts processes

# --- random numbers ---


def test_the_cpu_generator_takes_no_more_than_32_bits_of_a_seed():
    """This is why `generator` fills its whole state."""
    a, b = (torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert (a == b).all()


@given(seeds, st.integers(0, 2**40))
def test_random_numbers_of_different_things_differ(seed, k):
    """Also of seeds 2,584 or 2^32 apart, which shared streams while a seed had 32 bits."""
    seeds, places = (seed, seed + 1, seed + 2584, seed + 2**32), (*range(k, k + 5), k + 2**32)
    keys = [(seed, use, place) for seed in seeds for use in runtime.STREAMS for place in places]
    firsts = [tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys]
    assert len(set(firsts)) == len(keys)
    assert firsts[7] == tuple(torch.rand(4, generator=generator(*keys[7])).tolist())


@given(seeds, st.integers(0, 2**40))
def test_random_numbers_are_those_of_numpys_mersenne_twister_in_the_same_state(seed, k):
    """So all 624 words lie where torch keeps them, and the first number is made from them."""
    halves = [part for number in (seed, 4, k) for part in (number % 2**32, number // 2**32)]
    twister, words = np.random.RandomState(), np.random.SeedSequence(halves).generate_state(624)
    twister.set_state(("MT19937", words, 624))
    want = torch.from_numpy(twister.randint(2**32, size=1500, dtype=np.uint64).astype(np.int64))
    g = generator(seed, runtime.STREAMS[4], k)
    assert torch.equal(torch.randint(2**20, (1500,), generator=g), want % 2**20)


def test_a_seed_has_64_bits_and_may_be_negative():
    """2^64 was taken for 0."""
    ends = (-(2**63), -1, 0, 1, 2**63 - 1)
    firsts = {torch.rand(3, generator=generator(seed, "init", 0))[0].item() for seed in ends}
    assert len(firsts) == len(ends)
    for seed in (2**64, 2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"^seed {seed} is out of range: give one of 64 bits$"):
            generator(seed, "init", 0)


@slow
def test_making_a_generator_imports_nothing():
    """NumPy's random numbers, imported late, lost one Ctrl-C in twenty that came meanwhile."""
    code = (
        "import runtime, sys\n"
        "before = set(sys.modules)\n"
        "runtime.generator(0, 'samples', 0)\n"
        "print(set(sys.modules) - before)"
    )
    assert run("-c", code) == "set()\n"


# --- files ---


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "x.txt"
    for text in ("one", "two"):
        with runtime.atomic_write(path) as temporary:
            temporary.write_text(text)
            assert temporary.name == path.name  # so formats that look at it do as with `path`
            assert re.fullmatch(r"\.meanflow-\w{8}\.tmp", temporary.parent.name)
            assert temporary.parent.parent == tmp_path
            assert not path.exists() if text == "one" else path.read_text() == "one"
        assert path.read_text() == text
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((OSError, KeyboardInterrupt)), runtime.atomic_write(path) as temporary:
            temporary.write_text("thr")
            raise error
        assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device): make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded): make room and run"),
        (SafetensorError("I/O: No space left on device (os error 28)"), "28)): make room and run"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied): choose another place"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error): choose another place"),
    ],
)
def test_what_keeps_a_file_from_being_written_is_named(tmp_path, error, words):
    with pytest.raises(OSError) as found, runtime.atomic_write(tmp_path / "x.txt"):
        raise error
    message = str(found.value)
    assert message.startswith(f"{tmp_path / 'x.txt'} cannot be written (") and words in message


def test_only_regular_files_are_replaced_and_links_are_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo", "/dev/null", "missing/x"):
        words = "No such file" if name == "missing/x" else "it exists"
        with pytest.raises(OSError, match=f"{name} cannot be written .{words}.*: choose another p"):
            with runtime.atomic_write(tmp_path / name):
                pass
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "link").symlink_to("thesis")
    with runtime.atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("ours")
    assert (tmp_path / "thesis").read_text() == "mine" and (tmp_path / "link").read_text() == "ours"


def test_what_should_be_new_is_never_replaced(tmp_path):
    """Neither what was there before, nor what another process finished first."""
    path = tmp_path / "x.npz"
    with pytest.raises(OSError, match="x.npz cannot be written .another process has .*: choose a"):
        with runtime.atomic_write(path, new=True) as mine:
            with runtime.atomic_write(path, new=True) as other:
                other.write_text("first")
            mine.write_text("second")
    with pytest.raises(OSError, match="x.npz cannot be written .it exists.: choose another place"):
        with runtime.atomic_write(path, new=True):
            raise AssertionError("the work is done in vain")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def umask():
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_files_are_read_by_whom_the_user_lets(tmp_path, umask, mask):
    umask(mask)
    runtime.save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    with runtime.atomic_write(tmp_path / "x.txt") as temporary:
        temporary.write_text("x")
    runtime.append_line(tmp_path / "x.jsonl", {})
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
    runtime.lock_folder(tmp_path).release()
    assert not (tmp_path / ".lock").stat().st_mode & mask


def test_tensors_are_read_as_they_were_written(tmp_path):
    path, p = tmp_path / "x.safetensors", torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    runtime.save_tensors(path, {"turned": p.T, "whole": torch.tensor(3)}, {"a": "b"})
    tensors, metadata = runtime.read_tensors(path, "redo it")
    assert torch.equal(tensors["turned"], p.T) and tensors["whole"] == 3 and metadata == {"a": "b"}
    runtime.save_tensors(path, {"x": torch.ones(1)})
    assert runtime.read_tensors(path, "redo it")[1] == {}


FOREIGN = {
    "cut": lambda path: path.write_bytes(save({"x": torch.ones(9)})[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "a header that claims 2^60 bytes": lambda path: path.write_bytes(b"\0" * 7 + b"\x10{}"),
    "text": lambda path: path.write_text("thesis"),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "loop of links": lambda path: path.symlink_to(path.name),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_whatever_a_file_provokes_is_one_line(tmp_path, kind):
    """Nothing hangs, either: a pipe waits for ever, a device never ends."""
    path = tmp_path / "x.safetensors"
    FOREIGN[kind](path)
    readable = path.is_file()
    what = "cannot be read (" if readable else "is not a file: redo it"
    with pytest.raises(ValueError if readable else FileNotFoundError) as error:
        runtime.read_tensors(path, "redo it")
    message = str(error.value)
    assert message.startswith(f"{path} {what}") and message.endswith(": redo it")
    assert "\n" not in message and len(message) < len(str(path)) + 250
    if not readable and kind != "missing":
        with pytest.raises(
            FileNotFoundError, match="x.safetensors is not a file: choose another f"
        ):
            runtime.read_lines(path)
        with pytest.raises(FileNotFoundError, match="x.safetensors is not a file: give a file"):
            runtime.sha256(path)


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), OSError, "Permission denied"),
        (OSError("image file is truncated"), ValueError, "image file is truncated"),
        (KeyError("mu"), ValueError, "'mu'"),
        (MemoryError(), OSError, "MemoryError"),
        (TypeError("two\nlines " + 300 * "x"), ValueError, "two lines " + 190 * "x"),
    ],
)
def test_a_bad_disk_is_told_from_a_bad_file(tmp_path, error, kind, words):
    (tmp_path / "x").write_text("x")
    with pytest.raises(kind) as found, runtime.reading(tmp_path / "x", "redo it"):
        raise error
    assert str(found.value) == f"{tmp_path / 'x'} cannot be read ({words}): redo it"
    assert isinstance(found.value, OSError) == (kind is OSError)


def test_other_tensors_are_named():
    shapes, tensors = {"a": (2,), "b": ()}, {"a": torch.zeros(2), "b": torch.tensor(1.0)}
    runtime.check_tensors("x", tensors, shapes, "redo it")
    for change, words in (
        ({"a": torch.zeros(3)}, r"x: a is \(3,\), should be \(2,\): redo it"),
        ({"c": torch.zeros(3)}, r"x: c is \(3,\), should be absent: redo it"),
        ({"a": torch.tensor([1, torch.nan])}, "x: a has values that are not finite: redo it"),
    ):
        with pytest.raises(ValueError, match=f"^{words}$"):
            runtime.check_tensors("x", tensors | change, shapes, "redo it")
    with pytest.raises(ValueError, match="^x: b is missing, should be .*: redo it$"):
        runtime.check_tensors("x", {"a": torch.zeros(2)}, shapes, "redo it")


ODD = [torch.zeros(2).to(dtype) for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)]
ODD += [torch.zeros(2).to(torch.float8_e4m3fn), torch.zeros(2, device="meta")]
ODD += [torch.zeros(2).to_sparse()]


@pytest.mark.parametrize("p", ODD, ids=lambda p: f"{p.dtype} {p.layout} {p.device}")
def test_tensors_are_dense_numbers_of_the_dtypes_wanted(p):
    for dtype in runtime.FLOATS:
        runtime.check_tensors("x", {"a": torch.zeros(2, dtype=dtype)}, {"a": (2,)}, "redo it")
    words = (
        f"^x: a is {p.dtype}, {p.layout}, on {p.device}, should be dense torch.float16 or .*64: r"
    )
    with pytest.raises(ValueError, match=words):
        runtime.check_tensors("x", {"a": p}, {"a": (2,)}, "redo it")
    with pytest.raises(
        ValueError, match="torch.float16, .*, should be dense torch.float32: redo it"
    ):
        half = {"a": torch.zeros(2).half()}
        runtime.check_tensors("x", half, {"a": (2,)}, "redo it", [torch.float32])


def test_lines_that_a_kill_cut_short_are_none_and_spoil_none(tmp_path):
    path = tmp_path / "log.jsonl"
    assert runtime.read_lines(path) == []
    for k in range(3):
        runtime.append_line(path, {"step": k})
        with open(path, "a") as file:
            file.write('{"step": 5')
    assert runtime.read_lines(path) == [{"step": k} for k in range(3)]
    runtime.append_line(path, {"step": 3})
    assert path.read_text().endswith('{"step": 5\n{"step": 3}\n')
    path.write_bytes(b"[1]\n3\n\xff\n" + b"[" * 100_000 + b'\n{"a": 1}\n')
    assert runtime.read_lines(path) == [{"a": 1}]


def test_lines_are_appended_without_empty_ones(tmp_path):
    path = tmp_path / "log.jsonl"
    for k in range(3):
        runtime.append_line(path, {"step": k})
    lines = path.read_text().split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [0, 1, 2] and lines[-1] == ""


def test_the_commit_is_named_whatever_the_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commit = runtime.commit()
    assert commit is None or len(commit.removesuffix("+")) == 40

    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(runtime.subprocess, "run", missing)
    assert runtime.commit() is None


# --- locks ---


def contents(folder):
    """Return what is in a folder, and in the folders in it."""
    return {str(p.relative_to(folder)): p.is_file() and p.read_text() for p in folder.rglob("*")}


def test_locking_a_folder_changes_nothing_in_it(tmp_path):
    """The folder may be somebody else's, as its lock may."""
    for name in (".lock", ".tmpBackup", ".tmp123456", "meanflow-tmp-mine", "ema-1.safetensors"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".meanflow-abcdefgh.tmp").mkdir()
    before = contents(tmp_path)
    runtime.lock_folder(tmp_path).release()
    assert contents(tmp_path) == before


def test_a_lock_does_not_follow_links(tmp_path):
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to("../thesis")
    with pytest.raises(OSError, match="run cannot be locked .*links.*: choose one on another disk"):
        runtime.lock_folder(tmp_path / "run")
    assert (tmp_path / "thesis").read_text() == "mine"


def test_sweeping_removes_leftovers_of_ours_and_nothing_else(tmp_path):
    leftover = tmp_path / ".meanflow-a1b2c3_d.tmp"
    leftover.mkdir()
    (leftover / "ema-00000010.safetensors").write_text("half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    (tmp_path / ".meanflow-a1b2c3d4.tmp").symlink_to("mine")
    (tmp_path / ".meanflow-notes.tmp").mkdir()
    for name in (".tmpBackup", ".meanflow-notes.tmp/x", ".meanflow-file1234.tmp", "meanflow-tmp-x"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    runtime.sweep(tmp_path)
    gone = {leftover.name, f"{leftover.name}/ema-00000010.safetensors"}
    assert before.keys() - contents(tmp_path).keys() == gone


def test_sweeping_keeps_what_another_is_writing(tmp_path):
    """Such as a picture or samples, which anybody may write into a run's folder."""
    with runtime.atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("mine")
        runtime.sweep(tmp_path)
        assert temporary.read_text() == "mine"
    assert (tmp_path / "x").read_text() == "mine"


@slow
def test_a_killed_process_leaves_what_the_next_one_sweeps_up(tmp_path):
    code = "import pathlib, runtime, sys\n"
    code += "with runtime.atomic_write(pathlib.Path(sys.argv[1], 'x')) as temporary:\n"
    code += "    temporary.write_text('half'); print('writing', flush=True); sys.stdin.read()"
    process = start("-c", code, tmp_path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    runtime.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_has_one_lock_at_a_time(tmp_path):
    lock = runtime.lock_folder(tmp_path / "run")
    words = "another process is writing to .*run: wait until it ends, or choose another folder"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            runtime.lock_folder(tmp_path / "run")
    lock.release()
    runtime.lock_folder(tmp_path / "run").release()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file: choose another folder to write"):
        runtime.lock_folder(tmp_path / "file")


@slow
def test_a_lock_ends_with_its_process(tmp_path):
    code = "import pathlib, runtime, sys; "
    code += "lock = runtime.lock_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); "
    code += "sys.stdin.read()"
    process = start("-c", code, tmp_path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is writing"):
        runtime.lock_folder(tmp_path)
    process.kill()
    process.wait()
    runtime.lock_folder(tmp_path).release()


def test_a_disk_without_locks_is_named(monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(OSError, match=f"{tmp_path} cannot be locked .*No locks.*: choose one on a"):
        runtime.lock_folder(tmp_path)


def test_files_lock_where_there_is_no_fcntl(tmp_path):
    """On Windows filelock has another way; without either, it leaves a file while it holds."""
    code = (
        "import sys\n"
        "sys.modules['fcntl'] = None\n"
        "import pathlib, runtime\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "lock = runtime.lock_folder(folder)\n"
        "try:\n    runtime.lock_folder(folder)\n"
        "except ValueError as error:\n    print(error)\n"
        "lock.release()\n"
        "runtime.lock_folder(folder).release()\n"
    )
    printed = run("-W", "ignore", "-c", code, tmp_path / "folder")
    assert f"another process is writing to {tmp_path / 'folder'}: wait" in printed


# --- processes ---


def test_more_processes_than_gpus(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert runtime.pick_device(1) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.pick_device(1) == torch.device("cuda", 1) and current == [1]
    with pytest.raises(ValueError, match="process 2 has no GPU: give --nproc-per-node 2 or fewer"):
        runtime.pick_device(2)


def test_the_first_signal_is_noted_and_the_second_does_what_it_did(capfd):
    numbers, seen, noted = (signal.SIGTERM, signal.SIGINT), [], []

    def own(number, _):
        seen.append(number)

    first = [signal.getsignal(number) for number in numbers]
    try:
        for number in numbers:
            signal.signal(number, own)
        for number in numbers:
            for second in numbers:
                with runtime.signals(lambda: noted.append(1), "saving"):
                    signal.raise_signal(number)
                    assert noted == [1] and not seen
                    assert capfd.readouterr().err == "\nsaving; the next signal ends at once\n"
                    signal.raise_signal(second)
                    assert noted == [1] and seen == [second]
                    noted.clear(), seen.clear()
        for handler in (own, signal.SIG_IGN, signal.SIG_DFL):
            for number in numbers:
                signal.signal(number, handler)
            with pytest.raises(ZeroDivisionError), runtime.signals(list, "saving"):
                changed = [signal.getsignal(number) is not handler for number in numbers]
                assert changed == 2 * [handler is not signal.SIG_IGN]
                raise ZeroDivisionError
            assert [signal.getsignal(number) for number in numbers] == [handler, handler]
    finally:
        for number, handler in zip(numbers, first):
            signal.signal(number, handler)


def test_one_process_is_the_first_and_only_one(capsys):
    assert runtime.World() == (0, 1, torch.device("cpu"))
    assert runtime.all_gather({"a": 1}) == [{"a": 1}]
    runtime.barrier()
    runtime.say("one", 2)
    runtime.say("error", file=sys.stderr)
    assert capsys.readouterr() == ("one 2\n", "error\n")


SCRIPT = r"""
import os, sys, torch
sys.path.insert(0, {root!r})
import runtime

def main(argv, world):
    [what] = argv
    values = runtime.all_gather(10 * world.rank)
    assert values == [10 * k for k in range(world.size)]
    runtime.say("processes", world.size)
    last = world.rank == world.size - 1
    if what == "foreseen" and last:
        raise ValueError("bad input: give another")
    if what == "alike":
        raise OSError("no disk: give another")
    if what == "memory" and last:
        raise torch.OutOfMemoryError("pages of text")
    if what == "escape" and last:
        raise ValueError("\x1b[2Jb\udce9d")
    if what == "interrupt" and last:
        raise KeyboardInterrupt
    if what == "unforeseen" and last:
        raise TypeError("a slip")

runtime.launch(main)
"""


@slow
@pytest.mark.parametrize("world", [1, 2])
def test_how_a_script_ends(tmp_path, world):
    """Whatever goes wrong is told once, in one line if it was foreseen."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    cases = {
        "well": "",
        "foreseen": "script.py: bad input: give another",
        "alike": "script.py: no disk: give another",
        "memory": "script.py: the GPU is out of memory: free it, or give train.py --accumulate 2",
        "escape": r"script.py: \x1b[2Jb\udce9d",
        "unforeseen": "TypeError: a slip",
    }
    launcher = [*LAUNCH, world] if world > 1 else []
    processes = {what: start(*launcher, path, what) for what in cases}
    for what, process in processes.items():
        printed, errors = process.communicate(timeout=240)
        ours = errors.split("failed (exitcode")[0]  # what follows is torchrun's own
        assert printed == f"processes {world}\n"
        assert (process.returncode == 0) == (what == "well"), errors
        assert ours.count("script.py: ") == (what not in ("well", "unforeseen"))
        assert cases[what] in ours and ("Traceback" in ours) == (what == "unforeseen")


def failing(build):
    try:
        build()
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("bad: give another"), "bad: give another"),
        (OSError(5, "Input/output error", "x"), "[Errno 5] Input/output error: 'x'"),
        (torch.OutOfMemoryError("pages"), "the GPU is out of memory: free it, or give train.py"),
        (MemoryError(), "out of memory (MemoryError): give a smaller --batch or size"),
        (failing(lambda: torch.empty(2**55)), "out of memory ([enforce fail at alloc_cpu.cpp:"),
        (
            TorchDynamoException("no g++"),
            "the network cannot be compiled (no g++): give train.py --",
        ),
        (TypeError("a slip"), None),
        (RuntimeError("a slip"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_that_are_no_mistake_of_ours_are_explained(error, line):
    assert line is None or runtime.explain(error).startswith(line)
    assert line or runtime.explain(error) is None


@pytest.mark.parametrize("failed", [0, 1])
def test_a_peer_that_fails_before_all_have_met_is_told_by_itself_alone(monkeypatch, failed):
    """What is left of it here is a closed connection."""

    class Store:
        add = staticmethod(lambda name, one: failed + one)

    def closed(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(runtime, "rendezvous", lambda _: iter([(Store, 0, 1)]))
    monkeypatch.setattr(runtime.dist, "init_process_group", closed)
    ended = []
    monkeypatch.setattr(runtime.os, "_exit", ended.append)
    if failed:
        monkeypatch.setattr(runtime.sys, "exit", lambda status: None)
        runtime.launch(lambda argv, world: None)
        assert ended == [1]
    else:
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            runtime.launch(lambda argv, world: None)


@pytest.mark.parametrize(
    "local, rank, size",
    [("0", "5", "1"), ("0", "-1", "2"), ("0", "0", "0"), ("0", "0", "x"), ("", "0", "1"), *["110"]],
)
def test_processes_that_could_only_wait_for_ever_are_refused(monkeypatch, local, rank, size):
    for name, value in dict(LOCAL_RANK=local, RANK=rank, WORLD_SIZE=size).items():
        monkeypatch.setenv(name, value)
    words = (
        f"LOCAL_RANK is '{local}', RANK '{rank}' and WORLD_SIZE '{size}': start it with torchrun"
    )
    with pytest.raises(ValueError, match=words):
        runtime.meet()


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_process_whose_peers_never_come_ends_at_a_signal(number, ignored):
    """Unless a shell has told it to ignore it, as Ctrl-C in the background."""
    port = free_port()
    here = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    code = f"import signal, runtime; signal.signal({number:d}, signal.SIG_IGN)\n" * ignored
    code += "import runtime; runtime.launch(print)"
    process = start("-c", code, env=ENVIRONMENT | here)
    wait_until(lambda: socket.socket().connect_ex(("localhost", port)) == 0, process)
    time.sleep(0.5)
    process.send_signal(number)
    if ignored:
        time.sleep(1)
        assert process.poll() is None
        process.kill()
    else:
        assert process.wait(20) == -number


def test_a_port_in_use_is_told_in_one_line(monkeypatch):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        port = str(server.getsockname()[1])
        for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ValueError, match="cannot meet .*: give torchrun another --master-port"):
            runtime.meet()


def test_processes_must_agree(monkeypatch):
    runtime.agree({"a": 1}, "data")
    monkeypatch.setattr(runtime, "all_gather", lambda value: [value, {"b": 2, "a": 1}])
    runtime.agree({"a": 1, "b": 2}, "data")
    with pytest.raises(
        ValueError, match="^processes see different data: put it on a disk that all"
    ):
        runtime.agree({"a": 1, "b": 3}, "data")


STREAMS = r"""
import runtime, os, sys, torch
def main(argv, world):
    runtime.say("d\xe9j\xe0 \udce9 \x1b[2J \u65e5")
    print("d\xe9j\xe0 \udce9", flush=True)
    print("error \xe9", file=sys.stderr)
    open("ended", "w").write("well")
runtime.launch(main)
"""


@slow
@pytest.mark.parametrize(
    "how, status",
    [
        ("PYTHONIOENCODING=ascii:strict {}", 0),
        ("PYTHONIOENCODING=utf-8:strict {}", 0),
        ("{} 2>&-", 0),
        ("{} 0>&- >&- 2>&-", 0),
        ("{} 2>/dev/full", 0),
        ("{} >/dev/full", 1),  # what was asked for is lost
        ("set -o pipefail; {} | true", 0),
        ("set -o pipefail; {} 2>&1 | true", 0),
    ],
)
def test_no_stream_ends_what_matters(tmp_path, how, status):
    (tmp_path / "script.py").write_text(STREAMS)
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = how.format(f"{sys.executable} script.py")
    options = dict(cwd=tmp_path, env=environment, capture_output=True, errors="replace")
    done = subprocess.run(["bash", "-c", command], **options)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "ended").read_text() == "well"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if "utf-8" in how:
        assert done.stdout == "d\xe9j\xe0 \\udce9 \\x1b[2J \u65e5\nd\xe9j\xe0 \\udce9\n"
    if "/dev/full" in how and status:
        assert "what was printed is lost (No space left on device)" in done.stderr


@slow
def test_a_second_signal_ends_what_the_first_cannot(tmp_path):
    """The first takes back what is half done; a thread that hangs does not keep the process."""
    (tmp_path / "script.py").write_text(
        "import runtime, pathlib, threading, time\n"
        "def main(argv, world):\n"
        "    with runtime.atomic_write(pathlib.Path('x')) as temporary:\n"
        "        temporary.write_text('half')\n"
        "        try:\n"
        "            print('working', flush=True); time.sleep(100)\n"
        "        except KeyboardInterrupt:\n"
        "            print('hanging', flush=True); time.sleep(100)\n"
        "runtime.launch(main)\n"
    )
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    process = start("script.py", cwd=tmp_path, env=environment)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "\nending; the next signal ends at once\n"
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_processes_wait_for_each_other_for_days(monkeypatch):
    """One may be done with its share of 50,000 samples long before another."""
    seen = {}
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(runtime, "rendezvous", lambda _: iter([("store", 0, 1)]))
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda *_, **group: seen.update(group))
    monkeypatch.setattr(runtime.os, "_exit", lambda status: seen.update(status=status))
    runtime.launch(lambda argv, world: None)
    assert seen.pop("timeout") >= timedelta(days=2)
    assert seen == {"store": "store", "rank": 0, "world_size": 1, "status": 0}


@slow
def test_an_interrupted_script_ends_silently(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    process = start(path, "interrupt")
    assert process.communicate(timeout=120) == ("processes 1\n", "")
    assert process.returncode == 130


@slow
def test_a_script_without_torchrun_prints_what_it_does(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    assert finish(start(path, "well")) == ["processes 1\n"]


# --- the command line ---


def parse(kind, text):
    arguments = runtime.parser("what it does")
    arguments.add_argument("--x", type=kind)
    return arguments.parse_args(["--x", text]).x


@pytest.mark.parametrize(
    "kind, text, want",
    [
        (runtime.number(int, 1), "1", 1),
        (runtime.number(int, 2), "7", 7),
        (runtime.number(float, 0), "1e-9", 1e-9),
        (runtime.number(int, -3, 3), "-3", -3),
        (runtime.number(int, 0), "0", 0),
        (runtime.number(int, 1), "0", "argument --x: 0: give 1 to 2147483648"),
        (runtime.number(int, 2, 9), "1", "argument --x: 1: give 2 to 9"),
        (runtime.number(int, 2, 9), "10", "argument --x: 10: give 2 to 9"),
        (runtime.number(int, 1), "9" * 20, f"argument --x: {'9' * 20}: give 1 to 2147483648"),
        (runtime.number(int, 1), "1.5", "argument --x: invalid int value: '1.5'"),
        (runtime.number(float, 0), "0", "argument --x: 0: give a number above 0"),
        (runtime.number(float, 0), "-1", "argument --x: -1: give a number above 0"),
        (runtime.number(float, 0), "nan", "argument --x: nan: give a number above 0"),
        (runtime.number(float, 0), "inf", "argument --x: inf: give a number above 0"),
        (runtime.number(float, 0), "x", "argument --x: invalid float value: 'x'"),
        (runtime.numbers(int, "as 3,1,4"), "3,1,4", [3, 1, 4]),
        (runtime.numbers(int, "as 3,1,4"), "3", [3]),
        (runtime.numbers(float, "as 3"), "1,nan", "argument --x: 1,nan: give numbers, as 3"),
        (runtime.numbers(float, "as 3"), "inf", "argument --x: inf: give numbers, as 3"),
        (runtime.numbers(int, "as 3,1,4"), "3,,4", "argument --x: 3,,4: give numbers, as 3,1,4"),
        (runtime.numbers(float, "two", 2), "0.4,1", [0.4, 1.0]),
        (runtime.numbers(float, "two", 2), "0.4", "argument --x: 0.4: give numbers, two"),
    ],
)
def test_numbers_of_the_command_line(kind, text, want):
    if not isinstance(want, str):
        assert parse(kind, text) == want
        return
    with pytest.raises(ValueError) as error:
        parse(kind, text)
    assert str(error.value) == want


def test_bad_arguments_are_told_in_one_line():
    arguments = runtime.parser("what it does\n    as it stands")
    assert isinstance(arguments, argparse.ArgumentParser)
    assert "what it does\n    as it stands" in arguments.format_help()
    with pytest.raises(ValueError, match="^unrecognized arguments: --speed 9$"):
        arguments.parse_args(["--speed", "9"])


@pytest.mark.parametrize(
    "argv, what",
    [
        (["--fid", ""], "--fid"),
        (["--fid", " \t"], "--fid"),
        (["--fid="], "--fid="),
        (["--fid", "x", "--out="], "--out="),
        (["", "--fid", "x"], "argument 1"),
        (["--fid", "x", "a", ""], "argument 4"),
    ],
)
def test_an_empty_value_is_an_error(argv, what):
    """As of a shell's variable that is not set."""
    arguments = runtime.parser("what it does")
    arguments.add_argument("what", nargs="?")
    arguments.add_argument("--fid")
    arguments.add_argument("--out")
    assert arguments.parse_args(["--fid", "a=", "--out=b"]).fid == "a="
    with pytest.raises(ValueError, match=f"^{what} is empty: give a value, or leave it out$"):
        arguments.parse_args(argv)


def test_what_would_be_ignored_is_refused():
    runtime.refuse("here", one=None, two=False)
    for value in (0, "", True, [], 1.5):
        with pytest.raises(ValueError, match="^--save-stats would be ignored here: leave it out$"):
            runtime.refuse("here", one=None, save_stats=value)
