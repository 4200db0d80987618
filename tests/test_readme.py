"""README.md: its code and its job script run, and .ci/run runs its test command."""

import json
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ENVIRONMENT, free_port, started, wait_until

import data
import weights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code(language, number=0):
    """Return a block of code of the README, without its indentation."""
    indented = README.split(f"```{language}\n")[number + 1].split("```")[0]
    return textwrap.dedent(indented.rstrip(" "))


def test_the_python_of_the_readme_runs():
    names = {}
    exec(code("python", 1), names)
    samples = names["samples"]
    assert (samples.mean(0) - 1).abs().max() < 0.15 and (samples.std(0) < 0.4).all()


def test_latents_in_the_layout_of_repa_become_shards(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    g, files, latents = torch.Generator().manual_seed(0), [], []
    for k in range(7):
        path = Path("vae-sd", "00000", f"img-mean-std-{k:08}.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        latents.append(torch.rand(8, 4, 4, generator=g))
        np.save(path, latents[-1].numpy())
        files.append([str(path.relative_to("vae-sd")), k % 3])
    Path("vae-sd", "dataset.json").write_text(json.dumps({"labels": files}))
    monkeypatch.setattr(data, "SHARD", 4)
    exec(code("python", 0), {})
    dataset = data.load_data("data/latents")
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert dataset.shape == (4, 4, 4) and not dataset.mirror and len(dataset.items.datasets) == 2
    for item, latent in zip(dataset.items, latents, strict=True):
        assert torch.equal(item[0].flatten(0, 1), latent.half())
    assert data.batch(dataset, 5, seed=0, step=0)[0].shape == (5, 4, 4, 4)


SRUN = """#!/bin/bash
exec python -m torch.distributed.run "${@:2}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" > requeued; fi
"""


@pytest.mark.slow
def test_the_job_script_saves_and_is_queued_again(tmp_path):
    """On one machine, with stand-ins for Slurm's commands."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = (
        code("bash").replace("=eth0", "=lo").replace("--nproc-per-node 8", "--nproc-per-node 2")
    )
    words = f"{ROOT}/train.py --batch 16 --save 7 --out run --steps"
    environment = ENVIRONMENT | {
        "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "one",
    }

    def job(steps):
        text = script.replace("train.py --size XL", f"{words} {steps}").replace(
            ":29500", f":{free_port()}"
        )
        assert text.count(str(ROOT)) == 1
        options = dict(cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(["bash", "-c", text], **options))
        return started[-1]

    process = job(100_000)
    wait_until(lambda: weights.newest(tmp_path / "run"), process)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert (tmp_path / "requeued").read_text() == "requeue 42\n", errors
    step = weights.newest(tmp_path / "run")
    assert step >= 7 and not list((tmp_path / "run").glob("*tmp*"))
    (tmp_path / "requeued").unlink()
    _, errors = job(step + 3).communicate(timeout=120)
    assert weights.newest(tmp_path / "run") == step + 3, errors
    assert not (tmp_path / "requeued").exists()


def test_ci_runs_the_test_command_of_the_readme():
    commands = [
        line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")
    ]
    assert len(commands) == 2 and "python train.py" in commands[0]
    assert commands[1].split("activate && ")[1] in (ROOT / ".ci/run").read_text()
