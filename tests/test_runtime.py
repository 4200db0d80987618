"""runtime.py: seeds, files that are whole or as before, locks, processes, the command line."""

import argparse
import errno
import json
import signal
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import LAUNCH, ROOT, finish, run, start

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


def test_a_seed_may_be_negative():
    a, b = (torch.rand(3, generator=generator(seed, "init", 0)) for seed in (-1, 1))
    assert (a != b).all()


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
            assert temporary.name.startswith(runtime.TEMPORARY) and temporary.parent == tmp_path
            assert not path.exists() if text == "one" else path.read_text() == "one"
        assert path.read_text() == text
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="x.txt cannot be written .*No space.*: make room and run"):
        with runtime.atomic_write(path) as temporary:
            temporary.write_text("thr")
            raise full
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_tensors_are_read_as_they_were_written(tmp_path):
    path, p = tmp_path / "x.safetensors", torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    runtime.save_tensors(path, {"turned": p.T, "whole": torch.tensor(3)}, {"a": "b"})
    tensors, metadata = runtime.read_tensors(path, "redo it")
    assert torch.equal(tensors["turned"], p.T) and tensors["whole"] == 3 and metadata == {"a": "b"}
    assert path.stat().st_mode & 0o777 == 0o644
    runtime.save_tensors(path, {"x": torch.ones(1)})
    assert runtime.read_tensors(path, "redo it")[1] == {}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole safetensors .*: redo it$"):
        runtime.read_tensors(path, "redo it")
    with pytest.raises(FileNotFoundError, match="no.safetensors is not a file: redo it$"):
        runtime.read_tensors(tmp_path / "no.safetensors", "redo it")


def test_other_tensors_are_named():
    shapes, tensors = {"a": (2,), "b": ()}, {"a": torch.zeros(2), "b": torch.tensor(1)}
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
    path.write_bytes(b'[1]\n3\n\xff\n{"a": 1}\n')
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


def test_locking_a_folder_sweeps_up_leftovers_and_nothing_else(tmp_path):
    leftovers = ["meanflow-tmp-ema-00000010.safetensors", ".tmpAb12cD"]
    others = ["tmp-notes.txt", "tmp.png", ".tmp", "ema-00000010.safetensors"]
    for name in leftovers + others:
        (tmp_path / name).write_text("x")
    for name in ("meanflow-tmp-mine", ".tmp123456"):
        (tmp_path / name).mkdir()
    runtime.lock_folder(tmp_path).release()
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {*others, "meanflow-tmp-mine", ".tmp123456", ".lock"}


def test_a_folder_has_one_lock_at_a_time(tmp_path):
    lock = runtime.lock_folder(tmp_path / "run")
    (tmp_path / "run" / "meanflow-tmp-x").write_text("being written")
    words = "another process is writing to .*run: wait until it ends, or choose another folder"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            runtime.lock_folder(tmp_path / "run")
    assert (tmp_path / "run" / "meanflow-tmp-x").exists()
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


def test_signals_are_noted_and_handlers_put_back():
    def own(*_):
        raise AssertionError("the handler from before")

    numbers = signal.SIGTERM, signal.SIGINT
    first = [signal.getsignal(number) for number in numbers]
    try:
        for handler in (own, signal.SIG_IGN, signal.SIG_DFL):
            for number in numbers:
                signal.signal(number, handler)
            for number in numbers:
                with runtime.noted_signals() as event:
                    assert not event.is_set()
                    signal.raise_signal(number)
                    assert event.is_set()
            with pytest.raises(ZeroDivisionError), runtime.noted_signals():
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


SCRIPT = """
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
        (runtime.number(int, 1), "0", "argument --x: 0: give 1 or more"),
        (runtime.number(int, 2), "1", "argument --x: 1: give 2 or more"),
        (runtime.number(int, 1), "1.5", "argument --x: invalid int value: '1.5'"),
        (runtime.number(float, 0), "0", "argument --x: 0: give a number above 0"),
        (runtime.number(float, 0), "-1", "argument --x: -1: give a number above 0"),
        (runtime.number(float, 0), "nan", "argument --x: nan: give a number above 0"),
        (runtime.number(float, 0), "inf", "argument --x: inf: give a number above 0"),
        (runtime.number(float, 0), "x", "argument --x: invalid float value: 'x'"),
        (runtime.numbers(int, "as 3,1,4"), "3,1,4", [3, 1, 4]),
        (runtime.numbers(int, "as 3,1,4"), "3", [3]),
        (runtime.numbers(int, "as 3,1,4"), "", "argument --x: : give numbers, as 3,1,4"),
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


def test_what_would_be_ignored_is_refused():
    runtime.refuse("here", one=None, two=False)
    for value in (0, "", True, [], 1.5):
        with pytest.raises(ValueError, match="^--save-stats would be ignored here: leave it out$"):
            runtime.refuse("here", one=None, save_stats=value)
