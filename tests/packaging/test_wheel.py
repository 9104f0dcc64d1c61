"""The wheel is what users get: built from the sdist, installed with only what it declares."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("backends", "codecs", "engine_adapters", "kernels")
# Modules that only an extra makes importable, by what they need.
NEEDS_EXTRA = ("kvstore.kernels.", "kvstore.engine_adapters.", "kvstore.testing")
# make test-vllm installs it into an environment of its own.
NEEDS_VLLM = "kvstore.engine_adapters.vllm"
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import kvstore

def skipped(name):
    return name.endswith("__main__") or name.startswith(tuple(sys.argv[1:]))

found = [module.name for module in pkgutil.walk_packages(kvstore.__path__, "kvstore.")]
names = ["kvstore", *(name for name in found if not skipped(name))]
for name in names:
    importlib.import_module(name)
print(kvstore.__file__)
print(*names)
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    return python


def test_the_wheel_holds_real_folders_where_the_checkout_has_links(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in LINKED:
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert sources
        assert {f"kvstore/{source}" for source in sources} <= set(names)
    assert {"kvstore/py.typed", "kvstore/cli/page.css"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"kvstore", wheel.name.split("-py3")[0] + ".dist-info"}


@pytest.mark.timeout(240)
def test_a_clean_install_imports_every_module_that_needs_no_extra(clean_python: Path) -> None:
    imported_from, *_ = run(clean_python, "-c", IMPORT_EVERYTHING, *NEEDS_EXTRA).splitlines()
    assert imported_from.startswith(str(clean_python.parents[1]))


@pytest.mark.timeout(240)
def test_with_the_extras_present_it_imports_every_module(clean_python: Path) -> None:
    # torch is too large to install again: lend the clean environment this one's packages, behind
    # its own. Links of this environment to the checkout are not followed from there.
    own = Path(run(clean_python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    lent = own / "lent.pth"
    lent.write_text(sysconfig.get_path("purelib") + "\n")
    try:
        imported_from, names = run(clean_python, "-c", IMPORT_EVERYTHING, NEEDS_VLLM).splitlines()
    finally:
        lent.unlink()
    assert imported_from.startswith(str(own))
    assert "kvstore.kernels.torch_copier" in names
    assert "kvstore.engine_adapters.transformers" in names


def test_the_command_line_tool_is_installed(clean_python: Path) -> None:
    assert "doctor" in run(clean_python.parent / "kvstore", "--help")
