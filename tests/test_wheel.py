"""A wheel built from the tree, installed in an environment of its own, trains."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pangu_sigma", "rre", "parallel", "extract")


@pytest.mark.slow
def test_a_wheel_in_a_clean_environment_trains_and_lists_its_domains(tmp_path):
    # Built from a copy, because building writes into the tree.
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (*PACKAGES, "configs", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        shutil.copytree(source, tree / name) if source.is_dir() else shutil.copy(source, tree / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    # The dependencies are those of this environment: installing gigabytes again would test pip, not the wheel.
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    # Whoever runs this test may have the tree on PYTHONPATH, which would win over the wheel.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run([*map(str, words)], cwd=tmp_path, capture_output=True, text=True, env=clean)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import pangu_sigma, rre, parallel, extract; print(pangu_sigma.__file__)")
    assert str(environment) in where
    assert "default-src 'none'" in run(
        python, "-c", "from pangu_sigma.serving.browser_page import load_page; print(load_page().headers)"
    )
    command = environment / "bin/pangu-sigma"
    run(command, "corpora", "--out", "build/quickstart")
    assert "configs/lifelong/quickstart.yaml" in run(command, "config", "--list")
    run(command, "train", "configs/quickstart.yaml", "run.dir=run", "train.steps=2", "train.batch_size=4",
        "schedule.warmup_steps=1", "evaluate.every=0")  # fmt: skip
    assert "domains/code.safetensors" in run(python, "-m", "extract", "run")
    assert "report.html" in run(command, "report", "run")  # its templates and style sheets do too
    run(command, "export", "run", "--format", "hf", "--out", "hf")  # its modelling files travel in the wheel
    assert (tmp_path / "hf/modeling_pangu_sigma.py").is_file()
