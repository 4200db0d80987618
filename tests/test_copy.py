"""The house: files import only from those above them, the first shelf's work when copied alone, and
all are short."""

import ast
import re
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from processes import finish, start

ROOT = Path(__file__).parent.parent
ORDER = "meanflow dual model imf vae fid runtime weights data sample evaluate train".split()
LOWEST = {name: [] for name in ("meanflow", "dual", "model", "vae", "fid", "runtime")}
ABOVE = {name: ORDER[:k] for k, name in enumerate(ORDER)} | LOWEST
ABOVE |= {"imf": ["meanflow", "dual", "model"], "data": ["runtime", "vae", "weights"]}
# dual.py has 812: one set of rules for all of torch, of which each needs the others' helpers.
LENGTHS = dict.fromkeys(ORDER, 600) | {"dual": 812}
ALONE = {  # files to copy: what must run beside nothing else
    ("meanflow",): "import meanflow; meanflow.toy(iterations=3, batch=8)",
    ("dual",): """
import torch, dual
x, net = torch.randn(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())
u, du = dual.jvp(net, (x,), (x,))
assert u.requires_grad and not du.requires_grad
assert torch.allclose(du, torch.func.jvp(net, (x,), (x,))[1], atol=1e-6)
""",
    ("model",): "import model; model.main()",
    ("imf", "meanflow", "dual", "model"): """
import torch, dual, imf
from functools import partial
imf.main()
g, x = torch.Generator().manual_seed(0), torch.randn(4, 1, 4, 4)
params = imf.init((64, 1, 1, 2), channels=1, classes=3, generator=g)
params = {name: p.requires_grad_() for name, p in params.items()}
draws, y = imf.draw(x.shape, generator=g), torch.arange(4) % 3
rows, _ = imf.fast_loss(partial(imf.imf, params), x, y, draws, null=3, jvp=dual.jvp)
rows.mean().backward()
""",
    ("vae",): """
import torch, vae
vae.main()
params = vae.convert({name: 0.01 * torch.randn(shape) for name, shape in vae.shapes().items()})
mean, std = vae.encode(params, torch.rand(1, 3, 16, 16))
assert mean.shape == std.shape == (1, 4, 2, 2)
assert vae.decode(params, mean).shape == (1, 3, 16, 16)
""",
    ("fid",): """
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
fid.main()
""",
}


@pytest.mark.slow
def test_the_first_shelf_works_alone(tmp_path):
    runs = []
    for files, code in ALONE.items():
        folder = tmp_path / files[0]
        folder.mkdir()
        for file in files:
            shutil.copy(ROOT / f"{file}.py", folder)
        words = [sys.executable, "-c", code]
        runs.append(subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True))
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors


@pytest.mark.slow
def test_scripts_answer_help():
    """evaluate.py as all scripts of the last shelf, fid.py though it takes no arguments."""
    scripts = "fid", "data", "sample", "evaluate", "train"
    for printed in finish(*(start(f"{name}.py", "--help") for name in scripts)):
        assert printed.startswith("usage: ") and "--help" in printed


def parse(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def imports(nodes):
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def test_all_files_are_in_the_order():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    """From files above alone, at the file's top, never inside a function."""
    tree, names = parse(name), set()
    first, *rest = tree.body  # after the docstring
    top = list(takewhile(lambda node: imports([node]), rest))
    assert ast.get_docstring(tree) and imports(ast.walk(tree)) == top
    for node in top:
        assert not isinstance(node, ast.ImportFrom) or node.level == 0
        module = node.module if isinstance(node, ast.ImportFrom) else None
        names |= {module} if module else {alias.name for alias in node.names}
    assert names & set(ORDER) <= set(ABOVE[name])


@pytest.mark.parametrize("name", ORDER)
def test_functions_and_files_are_short(name):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= LENGTHS[name]
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


def text_lines(tree):
    """Return the numbers of the lines that hold docstrings, or help texts of flags."""
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            texts += node.body[:1] if ast.get_docstring(node) else []
        if isinstance(node, ast.FunctionDef) and node.name in ("parse_arguments", "add_sampling"):
            raised = {
                id(c) for r in ast.walk(node) if isinstance(r, ast.Raise) for c in ast.walk(r)
            }
            strings = [c for c in ast.walk(node) if isinstance(c, ast.Constant | ast.JoinedStr)]
            texts += [c for c in strings if id(c) not in raised]
    return {k for node in texts for k in range(node.lineno, node.end_lineno + 1)}


@pytest.mark.parametrize("name", ["sample", "evaluate", "train"])
def test_few_lines_ask_for_an_imf(name):
    """None where checkpoints are drawn from and scored; where they are trained, imports and those
    that know a size."""
    texts = text_lines(parse(name))
    for k, line in enumerate((ROOT / f"{name}.py").read_text().splitlines(), 1):
        if k not in texts and re.search(r"\bimf\b", line, re.IGNORECASE):
            assert name == "train" and (line == "import imf" or "imf.SIZES" in line), line
