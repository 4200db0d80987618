import os

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from PIL import Image
from processes import kill_all

# test_gpu.py needs a GPU; GPU=cpu runs what a CPU can run of it.
HAS_GPU = torch.cuda.is_available() or os.environ.get("GPU")
collect_ignore = [] if HAS_GPU else ["test_gpu.py"]


def pytest_report_header():
    return [] if HAS_GPU else "no GPU: tests/test_gpu.py is left out"


def pytest_runtest_teardown():
    kill_all()


def pytest_sessionfinish():
    kill_all()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, request):
    """Hide the GPU from all other tests."""
    if request.module.__name__ != "test_gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# Most tensors here are small: threads would spend more time waiting than computing.
torch.set_num_threads(1)

# No shrinking: most examples are seeds, and no seed is simpler than another.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
)
settings.load_profile("default")


def paint(folder, classes, each, side=None):
    """Write `each` JPEGs of smooth random pictures to each of `classes` folders.

    Their sizes vary unless `side` is given, one is grey, and some lie in a subfolder.
    """
    for c in range(classes):
        for k in range(each):
            random = np.random.default_rng(1000 * c + k)
            size = (side, side) if side else tuple(random.integers(16, 70, 2).tolist())
            picture = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            path = folder / f"class{c}" / ("more" if k % 4 == 3 else "") / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            (picture.convert("L") if k == 1 else picture).save(path, quality=90)
