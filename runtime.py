"""What every script shares: seeded generators, files, processes, the command line.

Under torchrun several processes run one script together; `launch` starts each of them, and what
fails is told in one line. Files are written under another name and then renamed, so that a kill at
any moment leaves them whole or as they were. Whatever a file of somebody else provokes is one line,
with its path, the reason and the way out.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from numpy.random import SeedSequence  # here: NumPy's own late import loses a Ctrl-C
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

STREAMS = ("order", "draws", "samples", "init", "views", "classes")  # one for each use
TEMPORARY = ".meanflow-", ".tmp"  # around eight letters: folders of files that are being written
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def generator(seed, stream, k):
    """Return the generator of item k >= 0 (an epoch, a step, a sample) of one of STREAMS.

    Torch's CPU generator, a Mersenne Twister, uses only 32 bits of a seed, too few for millions of
    generators. Its whole state is filled here with a hash of (seed, stream, k). Raises ValueError
    for a seed of more than 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed {seed} is out of range: give one of 64 bits")
    key = np.array((seed % 2**64, STREAMS.index(stream), k), np.uint64).view(np.uint32)
    words = SeedSequence(key).generate_state(624)
    g = torch.Generator()
    state = g.get_state()
    state.view(torch.int64)[3:627] = torch.from_numpy(words.astype(np.int64))
    return g.set_state(state)


# --- files ---


@contextmanager
def reading(path, hint):
    """Yield a regular file, open to read. What it provokes becomes a line that ends in `hint`:

    FileNotFoundError, OSError for a bad disk or a missing permission, or else ValueError.
    """
    if not os.path.isfile(path):  # nor is a folder, a device, a pipe that would wait for ever
        raise FileNotFoundError(f"{path} is not a file: {hint}")
    try:
        with open(path, "rb") as file:
            yield file
    except Exception as error:  # a format's reader raises many types, some with pages of text
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        machine = getattr(error, "errno", None) or isinstance(error, MemoryError)
        kind = OSError if machine else ValueError
        raise kind(f"{path} cannot be read ({reason(error)}): {hint}") from None


def reason(error):
    """Return what an exception says, in one short line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())[:200]


def sha256(path):
    with reading(path, "give a file that can be read") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path, *, new=False):
    """Yield a temporary path of the same name to write to, which then becomes `path`.

    Whenever the process is killed, `path` is whole or as before. Raises OSError if it cannot be
    written, is no regular file, or is there although it should be `new`.
    """
    path = Path(path)
    prefix, suffix = TEMPORARY
    try:
        if path.exists() and (new or not path.is_file()):
            raise FileExistsError("it exists")
        with TemporaryDirectory(suffix, prefix, path.parent) as folder:
            temporary, lock = Path(folder, path.name), folder_lock(folder)
            with suppress(NotImplementedError):  # where a disk knows no locks
                lock.acquire()
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if new and path.exists():
                raise FileExistsError("another process has written it meanwhile")
            os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        full = any(word in str(error) for word in ("No space", "quota", "too large"))
        way_out = "make room and run the same command again, or " * full + "choose another place"
        raise OSError(f"{path} cannot be written ({reason(error)}): {way_out}") from None


def save_tensors(path, tensors, metadata=None):
    """Write a safetensors file. It does not fix the order of metadata: give at most one entry where
    the checksum must not vary."""
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's; safetensors lets only the owner read
        tensors = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)


def read_tensors(path, hint):
    """Return the tensors, {name: tensor}, and the metadata, {key: str}, of a safetensors file.

    Raises FileNotFoundError or ValueError with one line that ends in `hint`.
    """
    with reading(path, hint), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, file.metadata() or {}


def check_tensors(path, tensors, shapes, hint, dtypes=FLOATS):
    """Raise ValueError unless `tensors` are those of `shapes`, {name: shape}, dense, of one of
    `dtypes` and finite."""
    found = {name: tuple(p.shape) for name, p in tensors.items()}
    for name in shapes | found:
        got, wanted = found.get(name, "missing"), shapes.get(name, "absent")
        if got != wanted:
            raise ValueError(f"{path}: {name} is {got}, should be {wanted}: {hint}")
        p = tensors[name]
        if p.dtype not in dtypes or p.layout != torch.strided or p.is_meta:
            known = " or ".join(map(str, dtypes))
            found = f"{p.dtype}, {p.layout}, on {p.device}"
            raise ValueError(f"{path}: {name} is {found}, should be dense {known}: {hint}")
        if not p.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite: {hint}")


def read_lines(path):
    """Return the JSON objects of a file with one a line. Skip lines that a kill cut short."""
    lines, values = [], []
    if os.path.lexists(path):
        with reading(path, "choose another file") as file:
            lines = file.read().decode(errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError, TypeError, RecursionError):
            values.append(dict(json.loads(line)))
    return values


def append_line(path, value):
    """Append a JSON object to a file as a line of its own, after any line that a kill cut short."""
    with open(path, "ab+") as file:
        cut = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(cut) + json.dumps(value).encode() + b"\n")


def folder_lock(folder):
    return FileLock(Path(folder, ".lock"), blocking=False, thread_local=False)


def lock_folder(folder):
    """Create the folder and return its lock, held until it is released or the process ends.

    Changes nothing that is there. Raises ValueError if another process holds the lock.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another folder to write")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder_lock(folder)
        lock.acquire()
    except Timeout:
        way_out = "wait until it ends, or choose another folder"
        raise ValueError(f"another process is writing to {folder}: {way_out}") from None
    except (OSError, NotImplementedError) as error:  # of network disks
        way_out = "choose one on another disk"
        raise OSError(f"{folder} cannot be locked ({reason(error)}): {way_out}") from None
    return lock


def sweep(folder):
    """Remove what processes killed while writing left in a folder, but not what one is writing."""
    for leftover in folder.glob(("?" * 8).join(TEMPORARY)):
        with suppress(OSError, Timeout):
            if not leftover.is_symlink():
                with folder_lock(leftover):
                    shutil.rmtree(leftover)


def commit():
    """Return this file's git commit, with a "+" if files differ from it, or None."""
    git = "git describe --always --abbrev=40 --dirty=+ --exclude=*".split()
    where = Path(__file__).parent
    try:
        return subprocess.run(git, cwd=where, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


# --- processes ---


class World(NamedTuple):
    """The processes that run a script together, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


def barrier():
    """Wait for all processes. If one fails, the others do not get past this."""
    if dist.is_initialized():
        dist.barrier()


def all_gather(value):
    """Return a list of every process's value. Uses gloo, so it does not wait for a GPU."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(value, what):
    """Raise ValueError in all processes unless each has the same JSON value."""
    values = {json.dumps(value, sort_keys=True) for value in all_gather(value)}
    if len(values) > 1:
        raise ValueError(f"processes see different {what}: put it on a disk that all of them share")


def printable(text):
    """Escape what a terminal might obey instead of showing it, such as in the name of a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(*words, file=None):
    """Print a line in the first process alone, at once, and above its progress bar."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        file = file or sys.stdout
        tqdm.write(printable(" ".join(map(str, words))), file=file)
        file.flush()


class Output(io.TextIOWrapper):
    """A standard stream that drops what nobody can read, or what no disk can hold."""

    error = None

    def attempt(self, act, *args):
        try:
            return act(*args)
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())

    def write(self, text):
        return self.attempt(super().write, text)

    def flush(self):
        self.attempt(super().flush)


def open_streams():
    """Make both standard streams take all text, also where they are closed or break."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # or a file opened later would take its place
            setattr(sys, name, open(os.devnull, "r+", errors="backslashreplace"))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            options = dict(encoding=stream.encoding, errors="backslashreplace")
            setattr(sys, name, Output(stream.detach(), **options, line_buffering=True))


@contextmanager
def signals(handler, notice):
    """At the first SIGTERM or Ctrl-C say `notice` and call handler(). The second does what it did
    before, and so does the first once this is over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}

    def put_back():
        for number, old in before.items():
            signal.signal(number, old)

    def first(*_):
        put_back()
        with suppress(OSError):  # not through sys.stderr, which may be in the midst of a line
            os.write(2, f"\n{notice}; the next signal ends at once\n".encode())
        handler()

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        put_back()


def interrupt():
    """End what is half done and remove it, which SIGTERM's own way to end a process would not."""
    raise KeyboardInterrupt


def pick_device(local_rank):
    """Return this process's GPU, made the current one, or the CPU where there is none."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ValueError(f"process {local_rank} has no GPU: give --nproc-per-node {gpus} or fewer")
    torch.cuda.set_device(local_rank)
    # The default on H100 since torch 2.11, with gradients that were NaN (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local_rank)


def count_failure(store, one):
    """Add `one` to the number of processes that failed, and return it."""
    try:
        return store.add("failed", one)
    except RuntimeError:  # the store has ended with the process that failed
        return 2


def explain(error):
    """Return the line that tells a failure which is not a mistake of ours, or None."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU is out of memory: free it, or give train.py --accumulate 2 or more"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory ({reason(error)}): give a smaller --batch or size"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"the network cannot be compiled ({reason(error)}): give train.py --no-compile"
    return str(error) if isinstance(error, ValueError | OSError) else None


@contextmanager
def waiting():
    """Let Ctrl-C end the process at once, as SIGTERM does: Python's own way waits for torch's."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def meet():
    """Return the store, rank and number of the processes that torchrun started together."""
    found = [os.environ.get(name, "0") for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE")]
    if not all(map(str.isdecimal, found)) or not int(found[0]) <= int(found[1]) < int(found[2]):
        found = "LOCAL_RANK is {!r}, RANK {!r} and WORLD_SIZE {!r}".format(*found)
        raise ValueError(f"{found}: start it with torchrun")
    try:
        return next(rendezvous("env://"))
    except dist.DistError as error:
        hint = "give torchrun another --master-port"
        raise ValueError(f"the processes cannot meet ({reason(error)}): {hint}") from None


def join(store, rank, size):
    """Let processes that have met talk, not of gradients. Whoever is done may wait for days."""
    days = timedelta(days=7)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=days)


def launch(main):
    """Run main(argv, world) in this process, which torchrun may have started with others.

    A failure that `explain` knows ends the script with one line on stderr. Of several processes the
    first to fail prints it; the others end silently, whether they fail alike or lose their peer to
    it. Processes leave together, by os._exit: gloo's threads now and then abort a normal exit.
    """
    store, rank, size, status = None, 0, 1, 0
    open_streams()
    try:
        if "WORLD_SIZE" in os.environ:
            with waiting():
                store, rank, size = meet()
                join(store, rank, size)
        with signals(interrupt, "ending"):
            device = pick_device(int(os.environ.get("LOCAL_RANK") or 0))
            main(sys.argv[1:], World(rank, size, device))
            barrier()
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        why = explain(error)
        if not why and not (store and count_failure(store, 0)):
            raise
        message = printable(f"{Path(sys.argv[0]).name}: {why or reason(error)}")
        if not store:
            sys.exit(message)
        if count_failure(store, 1) == 1:
            tqdm.write(message, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    lost = getattr(sys.stdout, "error", None)
    if lost and not isinstance(lost, BrokenPipeError):
        tqdm.write(f"what was printed is lost ({reason(lost)})", file=sys.stderr)
        status = 1
    if store or status == 130:  # which waits for no thread
        os._exit(status)
    if status:
        sys.exit(status)


# --- the command line ---


class Parser(argparse.ArgumentParser):
    """A parser that reports bad arguments in one line, without the usage."""

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, argv):
        for k, (before, word) in enumerate(pairwise(("", *argv)), 1):
            word = word.strip()  # nothing is left of a shell's variable that is not set
            if not word or word.startswith("--") and word.endswith("="):
                name = word or (before if before.startswith("-") else f"argument {k}")
                raise ValueError(f"{name} is empty: give a value, or leave it out")
        return super().parse_args(argv)


def parser(description):
    """Return a Parser whose help is this text, as it stands."""
    layout = argparse.RawDescriptionHelpFormatter
    return Parser(description=description, formatter_class=layout)


def number(kind, least, most=2**31):
    """Return an argparse type: an int from `least` to `most`, or a float above `least`."""

    def parse(text):
        value = kind(text)
        if kind is int and not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: give {least} to {most}")
        if kind is float and not least < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: give a number above {least}")
        return value

    parse.__name__ = kind.__name__  # in argparse's message for what is no number
    return parse


def numbers(kind, example, count=None):
    """Return an argparse type: numbers, `count` of them if given, separated by commas."""

    def parse(text):
        try:
            values = [kind(word) for word in text.split(",")]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)) or count not in (None, len(values)):
            raise argparse.ArgumentTypeError(f"{text}: give numbers, {example}")
        return values

    return parse


def refuse(why, **flags):
    """Raise ValueError if one of these flags, which would be ignored, was given."""
    for name, value in flags.items():
        if value is not None and value is not False:
            name = name.replace("_", "-")
            raise ValueError(f"--{name} would be ignored {why}: leave it out")
