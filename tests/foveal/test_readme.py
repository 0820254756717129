"""The README: its Python blocks run as written, its tables are up to date, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = re.findall(r"^foveal (\w+)", TEXT, re.M)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_python_block_runs_as_written(number, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_tables_are_drawn_from_the_data():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_and_config_in_it_exists():
    from typer.main import get_command

    from foveal.cli import app

    assert COMMANDS and set(COMMANDS) <= set(get_command(app).commands)
    for name in re.findall(r"^foveal (?:run|compare|inspect) (\w+)", TEXT, re.M):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name
