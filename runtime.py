"""What every script shares: seeded generators, files, processes, the command line.

Under torchrun several processes run one script together; `launch` starts each of them, and what
fails is told in one line. Files are written under another name and then renamed, so that a kill at
any moment leaves them whole or as they were.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event
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
TEMPORARY = "meanflow-tmp-"  # begins the names of files that are being written


def generator(seed, stream, k):
    """Return the generator of item k >= 0 (an epoch, a step, a sample) of one of STREAMS.

    Torch's CPU generator, a Mersenne Twister, uses only 32 bits of a seed, too few for millions of
    generators. Its whole state is filled here with a hash of (seed, stream, k).
    """
    key = np.array((seed % 2**64, STREAMS.index(stream), k), np.uint64).view(np.uint32)
    words = SeedSequence(key).generate_state(624)
    g = torch.Generator()
    state = g.get_state()
    state.view(torch.int64)[3:627] = torch.from_numpy(words.astype(np.int64))
    return g.set_state(state)


# --- files ---


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to, which then becomes `path`.

    Whenever the process is killed, `path` is whole or as before. Raises OSError on a full disk.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        way_out = "make room and run the same command again, or choose another place"
        raise OSError(f"{path} cannot be written ({error}): {way_out}") from None


def save_tensors(path, tensors, metadata=None):
    """Write a safetensors file. It does not fix the order of metadata: give at most one entry where
    the checksum must not vary."""
    with atomic_write(path) as temporary:
        tensors = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)  # safetensors lets only the owner read


def read_tensors(path, hint):
    """Return the tensors, {name: tensor}, and the metadata, {key: str}, of a safetensors file.

    Raises FileNotFoundError or ValueError with one line that ends in `hint`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file: {hint}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): {hint}") from None


def check_tensors(path, tensors, shapes, hint):
    """Raise ValueError unless `tensors` are finite and those of `shapes`, {name: shape}."""
    found = {name: tuple(p.shape) for name, p in tensors.items()}
    for name in shapes | found:
        got, wanted = found.get(name, "missing"), shapes.get(name, "absent")
        if got != wanted:
            raise ValueError(f"{path}: {name} is {got}, should be {wanted}: {hint}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite: {hint}")


def read_lines(path):
    """Return the JSON objects of a file with one a line. Skip lines that a kill cut short."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return lines


def append_line(path, value):
    """Append a JSON object to a file as a line of its own, after any line that a kill cut short."""
    with open(path, "ab+") as file:
        cut = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(cut) + json.dumps(value).encode() + b"\n")


def lock_folder(folder):
    """Create the folder and return its lock, held until it is released or the process ends.

    Removes the files that a process killed while writing left there. Raises ValueError if another
    process holds the lock.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another folder to write")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        way_out = "wait until it ends, or choose another folder"
        raise ValueError(f"another process is writing to {folder}: {way_out}") from None
    except (OSError, NotImplementedError) as error:  # of network disks
        raise OSError(f"{folder} cannot be locked ({error}): choose one on another disk") from None
    for leftover in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(".tmp??????")):  # safetensors' own
        if leftover.is_file():
            leftover.unlink()
    return lock


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


def say(*words, file=None):
    """Print in the first process alone, at once."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, file=file, flush=True)


@contextmanager
def noted_signals():
    """Yield an Event that SIGTERM and Ctrl-C set, in place of what they do otherwise."""
    event = Event()
    before = {
        number: signal.signal(number, lambda *_: event.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def launch(main):
    """Run main(argv, world) in this process, which torchrun may have started with others.

    A ValueError or OSError ends the script with one line on stderr. Of several processes the first
    to fail prints it; the others end silently, whether they fail alike or lose their peer to it.
    Processes leave together, by os._exit: gloo's threads now and then abort a normal exit.
    """
    store, rank, size, status = None, 0, 1, 0
    try:
        if "WORLD_SIZE" in os.environ:
            store, rank, size = next(rendezvous("env://"))
            # For control and statistics, not gradients; whoever is done first may wait for days.
            group = dict(store=store, rank=rank, world_size=size, timeout=timedelta(days=7))
            dist.init_process_group("gloo", **group)
        device = pick_device(int(os.environ.get("LOCAL_RANK", 0)))
        main(sys.argv[1:], World(rank, size, device))
        barrier()
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            way_out = "free it, or give train.py --accumulate 2 or more"
            error = ValueError(f"the GPU is out of memory: {way_out}")
        foreseen = isinstance(error, ValueError | OSError)
        if not foreseen and not (store and count_failure(store, 0)):
            raise
        message = f"{Path(sys.argv[0]).name}: {error}"
        if not store:
            sys.exit(message)
        if count_failure(store, 1) == 1:
            tqdm.write(message, file=sys.stderr)
        status = 1
    if store:
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# --- the command line ---


def parser(description):
    """Return an argument parser that reports bad arguments in one line, without the usage."""

    def error(message):
        raise ValueError(message)

    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=description, formatter_class=layout)
    result.error = error
    return result


def number(kind, least):
    """Return an argparse type: a finite number, at least `least`, or above 0 if that is 0."""

    def parse(text):
        value = kind(text)
        if not (least <= value < math.inf and value > 0):
            hint = f"give {least} or more" if least else "give a number above 0"
            raise argparse.ArgumentTypeError(f"{text}: {hint}")
        return value

    parse.__name__ = kind.__name__  # in argparse's message for what is no number
    return parse


def numbers(kind, example, count=None):
    """Return an argparse type: numbers, `count` of them if given, separated by commas."""

    def parse(text):
        try:
            values = [kind(word) for word in text.split(",")]
        except ValueError:
            values = []
        if not values or count not in (None, len(values)):
            raise argparse.ArgumentTypeError(f"{text}: give numbers, {example}")
        return values

    return parse


def refuse(why, **flags):
    """Raise ValueError if one of these flags, which would be ignored, was given."""
    for name, value in flags.items():
        if value is not None and value is not False:
            name = name.replace("_", "-")
            raise ValueError(f"--{name} would be ignored {why}: leave it out")
