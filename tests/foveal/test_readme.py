"""The README and the pages of docs/: their Python blocks run as written, tables are up to date, commands exist.

A block that imports what it uses is a whole program; one that imports nothing goes on with the reader's own pipeline.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^foveal (\w+)", TEXT, re.M)
BLOCKS = {
    f"{page.name}-{number}": block
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
}
PROGRAMS = {name: block for name, block in BLOCKS.items() if re.search(r"^(import|from) ", block, re.M)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_python_program_runs_as_written(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - PROGRAMS.keys()))
def test_every_other_block_is_python_and_not_in_the_readme(name):
    ast.parse(BLOCKS[name])
    assert not name.startswith("README")


def test_the_tables_are_drawn_from_the_data():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_and_config_in_it_exists():
    from typer.main import get_command

    from foveal.cli import app

    assert COMMANDS and set(COMMANDS) <= set(get_command(app).commands)
    for name in re.findall(r"^foveal (?:run|compare|inspect) (\w+)", TEXT, re.M):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name
