"""The house: files import only from their left, and the first five work when copied alone."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["meanflow", "dual", "model", "data", "fid", "imf", "sample", "train"]
ALONE = {  # files to copy: what must run beside nothing else
    ("meanflow.py",): "import meanflow; meanflow.toy(iterations=3, batch=8)",
    ("dual.py",): """
import torch, dual
x, net = torch.randn(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())
u, du = dual.jvp(net, (x,), (x,))
assert u.requires_grad and not du.requires_grad
assert torch.allclose(du, torch.func.jvp(net, (x,), (x,))[1], atol=1e-6)
""",
    ("model.py",): "import model; model.main()",
    ("data.py", "digits.npz"): "import data; data.batch(data.digits(), 8, seed=0, step=3)",
    ("fid.py",): """
import torch, fid
tensors = {name: 0.01 * torch.rand(shape) for name, shape in fid.inception_shapes().items()}
images = torch.randint(256, (3, 3, 20, 30), dtype=torch.uint8)
features, logits = fid.inception(fid.fold(tensors), images)
assert features.shape == (3, 2048) and fid.inception_score(logits, 1)
mu, sigma = fid.statistics(fid.accumulate(None, torch.randn(50, 9)))
assert fid.frechet_distance(mu, sigma, mu, sigma) < 1e-9
torch.save(tensors, "weights.pth")
try:
    fid.load_inception("weights.pth")
except ValueError as error:
    assert "not the published" in str(error)
""",
}


@pytest.mark.slow
def test_the_first_five_files_work_alone(tmp_path):
    runs = []
    for files, code in ALONE.items():
        folder = tmp_path / files[0]
        folder.mkdir()
        for file in files:
            shutil.copy(ROOT / file, folder)
        words = [sys.executable, "-c", code]
        runs.append(subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True))
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    """The first five import none at import time; fid.py takes helpers from data.py when it reads
    files."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    allowed = ORDER[: ORDER.index(name)] if name in ("sample", "train") else []
    allowed = ["meanflow", "dual", "model"] if name == "imf" else allowed
    for scope, statements in (("file", tree.body), ("functions", ast.walk(tree))):
        for node in statements:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            extra = ["data"] if name == "fid" and scope == "functions" else []
            assert not set(names) & set(ORDER) - set(allowed) - set(extra), (scope, names)
