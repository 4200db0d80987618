"""README.md: its code runs, and .ci/run runs its test command."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_of_the_readme_runs():
    names = {}
    exec(README.split("```python\n")[1].split("```")[0], names)
    assert names["images"].shape == names["x"].shape == (8, 4, 32, 32)
    assert all(p.grad is not None for p in names["params"].values())


def test_ci_runs_the_test_command_of_the_readme():
    commands = [
        line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")
    ]
    assert len(commands) == 2 and "python train.py" in commands[0]
    assert commands[1].split("activate && ")[1] in (ROOT / ".ci/run").read_text()
