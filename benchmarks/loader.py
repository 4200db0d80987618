"""What the loader sustains, from shards in the page cache: never what a GPU waits for.

python benchmarks/loader.py [FOLDER]     what data.py wrote there, or else 20,480 random latents
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import runtime  # noqa: E402
import train  # noqa: E402


def random_latents(folder, shards=20):
    """Write shards as data.py does for images of 256 x 256, of 1,000 classes."""
    g = torch.Generator().manual_seed(0)
    paths = [folder / f"shard-{k:05}.safetensors" for k in range(shards)]
    for path in paths:
        moments = torch.rand(data.SHARD, 2, 2, 4, 32, 32, generator=g).half()
        labels = torch.arange(data.SHARD) % 1000
        data.save_shard(path, "latents", moments, labels, "random")
    about = {"kind": "latents", "resolution": 256, "mirror": True, "source": "random"}
    data.write_index(folder, paths, about | {"classes": [str(c) for c in range(1000)]})


def rate(step, batch, seconds=3.0):
    """Items/s of step(0), step(1), ...: the median of nine parts of the time."""
    rates, k, end = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began, first = time.perf_counter(), k
        while time.perf_counter() < began + seconds / 9:
            step(k)
            k += 1
        rates.append((k - first) * batch / (time.perf_counter() - began))
    return statistics.median(rates)


def measure(folder, batch=256):
    began = time.perf_counter()
    dataset = data.load_data(folder)
    print(
        f"{len(dataset.labels):,} {dataset.kind} of {dataset.shape}, opened and checked in "
        f"{time.perf_counter() - began:.1f} s; torch {torch.__version__}; "
        f"items/s at batch {batch}, one thread:"
    )
    channels, *_ = dataset.shape
    method = train.dit_method("B/2", channels=channels, classes=len(dataset.classes))
    plan = train.Plan(lr=1e-4, batch=batch, steps=1)
    batches = train.stream(method, dataset, plan, 0, runtime.World())
    for name, step in {
        "batches alone": lambda k: data.batch(dataset, batch, seed=0, step=k),
        "with noise and times, made ahead, as training takes them": lambda k: next(batches),
    }.items():
        print(f"{rate(step, batch):10,.0f}  {name}")


def main(argv):
    torch.set_num_threads(1)  # as torchrun gives each process
    if argv:
        measure(argv[0])
    else:
        with tempfile.TemporaryDirectory() as folder:
            random_latents(Path(folder))
            measure(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
