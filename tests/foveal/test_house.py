"""The rules of the house: who imports whom, what importing costs, and that no stray top-level module comes into being."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "plugins", "video", "vision", "pipelines")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "plugins": {"kernels", "plugins"},
    "vision": {"kernels", "plugins", "vision"},
    "video": {"kernels", "plugins", "video"},
    "pipelines": set(ROOMS),
}
# Heavy guests and the only rooms that may name them at all.
MAY_NAME = {
    "diffusers": ("plugins/diffusers_host", "video", "pipelines", "vision"),
    "timm": ("plugins/timm_host", "vision", "pipelines/metrics"),
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            assert node.level == 0, f"{path} uses a relative import; imports are absolute"
    return found


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / room).is_dir()])
def test_rooms_import_only_what_they_may(room):
    for path in modules(room):
        for name in imports(path):
            if name.startswith("foveal."):
                other = name.split(".")[1]
                assert other in MAY_IMPORT[room] or other == "__init__", f"{path.relative_to(ROOT)} imports {name}"
            guest = name.split(".")[0]
            if guest in MAY_NAME:
                where = str(path.relative_to(ROOT))
                assert where.startswith(MAY_NAME[guest]), f"{where} names {guest}"
            if room == "kernels":
                known = guest in {"torch", "triton", "foveal"} or guest in sys.stdlib_module_names
                assert known, f"{path.relative_to(ROOT)} imports {name}; kernels know torch and triton only"


def test_no_file_hides_a_library():
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts:
            assert path.name not in {"diffusers.py", "timm.py", "torch.py", "triton.py", "utils.py"}, path
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code: str, folder: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={**os.environ, **env}, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_no_top_level_module_other_than_foveal_comes_into_being(tmp_path):
    code = (
        "import sys, foveal; foveal.block_sparse_attention, foveal.GRAT, foveal.accelerate; import foveal.pipelines.shipped\n"
        f"print([m for m in {(*ROOMS, 'configs')!r} if m in sys.modules])"
    )
    for folder in (ROOT, tmp_path):
        assert run(code, folder) == "[]"


def test_transformers_and_diffusers_import_from_the_repository_root():
    assert run("import transformers, diffusers; from diffusers import WanTransformer3DModel; print('ok')", ROOT) == "ok"


def test_importing_foveal_costs_little_beyond_torch(tmp_path):
    code = "import torch, time; t = time.perf_counter(); import foveal; print(time.perf_counter() - t)"
    assert min(float(run(code, tmp_path)) for _ in range(3)) < 0.3


def test_foveal_works_without_triton_diffusers_and_timm(tmp_path):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'triton', 'diffusers', 'timm'}: raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, p=None: None if n in {'triton', 'diffusers', 'timm'} else real(n, p)\n"
        "import torch, foveal\n"
        "q = torch.randn(1, 2, 64, 16)\n"
        "from foveal.plugins.functional import grat_attention\n"
        "print(grat_attention(q, q, q, (8, 8), foveal.GRAT(group=4)).shape)"
    )
    assert run(code, tmp_path).startswith("torch.Size([1, 2, 64, 16])")
