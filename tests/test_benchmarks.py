"""benchmarks/loader.py, memory.py and evaluation.py: they run, and count what they say."""

import evaluation
import loader
import memory
import pytest
import torch

import meanflow
import model
import train

pytestmark = pytest.mark.slow


def test_the_loader_runs(tmp_path, capsys):
    loader.random_latents(tmp_path, shards=2)
    loader.measure(tmp_path, batch=64)
    assert "2,048 latents of (4, 32, 32)" in capsys.readouterr().out


def test_memory_is_what_real_tensors_keep():
    """The same step of real tensors keeps as many bytes, and twice the images twice as many."""
    few, many = (memory.kept("T/2", batch) for batch in (8, 16))
    g = torch.Generator().manual_seed(0)
    params = model.init("T/2", channels=4, classes=1000, generator=g)
    params = {name: torch.nn.Parameter(p) for name, p in params.items()}
    owned, storages = {p.data_ptr() for p in params.values()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    guidance = train.RECIPES["T/2"].guidance
    method = train.dit_method("T/2", channels=4, classes=1000, guidance=guidance)
    objective = train.Objective(method.loss, params, "bfloat16")
    x, y = torch.randn(8, 4, 32, 32, generator=g), torch.arange(8)
    draws = meanflow.draw(x.shape, generator=g)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(x, y, draws, 6)
    assert few == pytest.approx(sum(s.nbytes() for s in storages.values()), rel=0.02)
    assert many == pytest.approx(2 * few, rel=0.05)


def test_an_evaluation_goes_on_where_memory_ends(monkeypatch, capsys):
    def greedy():
        raise torch.OutOfMemoryError("no")

    def few(device, batch):
        yield "one", lambda: lambda: None
        yield "two", lambda: greedy
        yield "three", lambda: lambda: None

    names = [name for name, _ in evaluation.parts(torch.device("cpu"), 4)]
    assert len(names) == 6 and "XL/2, one step, float32" in names
    monkeypatch.setattr(evaluation, "parts", few)
    monkeypatch.setattr(evaluation, "distance", lambda count: (1.0, 2.0, 1e-9))
    evaluation.main(["--seconds", "0", "--threads", "1"])
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")][1:]
    assert rows[1] == "| two | out of memory |" and float(rows[2].split(" | ")[1].strip(" |")) > 0
