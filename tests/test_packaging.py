"""The project as it leaves the house: wheel and sdist built for real, opened, installed; and what CI relies on."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_selortho

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest_plugins = ["pytester"]  # runs pytest within pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_selortho"
TEMPLATE = "hf_selortho/hub/model_card_template.md"
KINDS = ("*.py", "*.json", "*.md", "*.txt", "*.html", "*.css", "*.js")  # of the files of the package

# Run where only the installed wheel can be found: everything a user of the package needs from files beside the code.
USE_THE_INSTALLED_PACKAGE = """
import sys
from pathlib import Path
import hf_selortho
from hf_selortho.hub.model_card import default_template, render_model_card
from hf_selortho.training.arguments import list_presets, load_preset

for file in (hf_selortho.__file__, default_template()):
    assert Path(file).is_relative_to(sys.argv[1]), file
config = hf_selortho.SelOrthoConfig(d_in=4, d_sae=8)
assert "SelOrthoSAE.from_pretrained" in str(render_model_card(config.own_settings(), metrics={}, run={}))
for name in list_presets():
    assert load_preset(name)
    sys.stdout.write(name + "\\n")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that has to succeed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout; without isolation, since isolation would fetch the build backend from the network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist_and_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it alone: what `pip install` of an sdist does."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    [sdist], [built] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    files = [path for kind in KINDS for path in (ROOT / PACKAGE).rglob(kind)]
    expected = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}
    for pattern in (
        r"presets/[\w-]+\.json",
        r"evaluation/sae_metrics/README\.md",
        r"browser/templates/\w+\.html",
        r"hub/\w+_card_template\.md",
    ):
        assert any(re.fullmatch(f"hf_selortho/{pattern}", name) for name in expected), pattern
    expected[TEMPLATE] = (ROOT / "model_card_template.md").read_bytes()
    app = [path for path in (ROOT / "spaces_app").iterdir() if path.is_file()]
    expected |= {f"{PACKAGE}/spaces_app/{path.name}": path.read_bytes() for path in app}
    assert held.keys() == expected.keys()
    assert held == expected


def test_wheel_carries_version_and_license(wheel: Path) -> None:
    metadata = {Path(name).name: data for name, data in contents(wheel).items() if ".dist-info/" in name}
    assert f"\nVersion: {hf_selortho.__version__}\n" in metadata["METADATA"].decode()
    assert metadata["LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_sdist_builds_the_same_wheel(wheel: Path, sdist_and_wheel: tuple[Path, Path]) -> None:
    sdist, wheel_of_sdist = sdist_and_wheel
    assert contents(wheel_of_sdist) == contents(wheel)
    with tarfile.open(sdist) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames()}
    assert {"scripts", "tests", "model_card_template.md", "README.md", "LICENSE", "pyproject.toml"} <= tops
    assert tops & {"runs", ".venv", ".git", ".ci"} == set()


@pytest.mark.slow
def test_installed_wheel_finds_its_presets_and_its_template(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    found = run(sys.executable, "-c", USE_THE_INSTALLED_PACKAGE, target, cwd=tmp_path, PYTHONPATH=str(target))
    presets = {path.stem for path in (ROOT / PACKAGE / "presets").glob("*.json")}
    assert set(found.split()) == presets
    assert {"demo", "gemma2-2b-l5", "gemma2-2b-l12", "gemma2-2b-l19", "gemma2-2b-l12-paper"} <= presets


@pytest.mark.slow
def test_the_wheel_alone_trains_indexes_publishes_and_browses_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)

    def selortho(*arguments: str) -> str:
        return run(sys.executable, site / "bin" / "selortho", *arguments, cwd=elsewhere, PYTHONPATH=str(site))

    small = (
        "--buffer_contexts",
        "96",
        "--refresh_every",
        "2",
        "--eval_samples",
        "20",
        "--eval_ce_samples",
        "2",
        "--probes",
        "none",
    )
    said = selortho("train", "--preset", "demo", "--max_steps", "5", *small)
    assert "Next:" in said and (elsewhere / "runs/demo/layer_9/model.safetensors").is_file()
    assert "never fired" in selortho("index", "runs/demo", "--tokens", "2000", "--concepts", "none")
    listed = selortho("push", "runs/demo", "--repo_id", "org/sae", "--dry_run")
    assert "configuration_selortho.py" in listed and "## Limits and hazards" in listed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, site / "bin" / "selortho", "browse", "runs/demo", "--lm", "none", "--port", port]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    with subprocess.Popen(command, cwd=elsewhere, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            page = first_answer(f"http://127.0.0.1:{port}/", server)
        finally:
            server.terminate()
    assert "gradio" in page


def first_answer(address: str, server: subprocess.Popen[str]) -> str:
    """The first answer of a server that is starting."""
    for _ in range(240):
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.5)
    raise AssertionError(f"{address} does not answer")


def test_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, flags=re.MULTILINE)[1] == hf_selortho.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def pinned(constraints: str) -> dict[str, str]:
    """Name to specifier of a constraints file, which names nothing twice."""
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in requirements}
    assert len(pins) == len(requirements)
    return pins


def test_the_lowest_versions_are_the_declared_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    bounds: dict[str, str] = {}
    for requirement in map(Requirement, declared):
        [bound] = requirement.specifier
        assert bound.operator in {">=", "=="}, requirement
        bounds[canonicalize_name(requirement.name)] = f"=={bound.version}"
    assert len(bounds) == len(declared)
    # Not the lower bound of torch: one CPU build serves both.
    assert pinned("constraints-lowest.txt") == bounds | {"torch": pinned("constraints.txt")["torch"]}


def test_with_the_index_that_the_readme_names_pip_takes_the_cpu_build(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\nexport PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu\n" in readme
    for index, version in (("pypi", "2.13.0"), ("cpu", "2.13.0+cpu")):
        folder = tmp_path / index / "torch"
        folder.mkdir(parents=True)
        name, info = f"torch-{version}-py3-none-any.whl", f"torch-{version}.dist-info"
        (folder / "index.html").write_text(f"<!DOCTYPE html><a href='{name}'>{name}</a>")
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    taken = {}
    for case, extra in (("without", ""), ("with", (tmp_path / "cpu").as_uri())):
        plain = {name: "" for name in os.environ if name.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--index-url", (tmp_path / "pypi").as_uri()]
        command = [*pip, "-c", ROOT / "constraints.txt", "-d", tmp_path / case, "torch"]
        run(*command, cwd=tmp_path, **plain, PIP_EXTRA_INDEX_URL=extra)
        taken[case] = [path.name.split("-")[1] for path in (tmp_path / case).iterdir()]
    assert taken == {"without": ["2.13.0"], "with": ["2.13.0+cpu"]}


SKIPPING_TESTS = """
import pytest
def test_passes(): pass
def test_skips(): pytest.skip("no reason")
@pytest.mark.skipif(True, reason="not here")
def test_is_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_fails_as_known(): assert False
"""


@pytest.mark.parametrize(
    ("ci", "outcomes"),
    [
        ("0", {"passed": 1, "skipped": 3, "xfailed": 1}),
        ("1", {"passed": 1, "failed": 1, "errors": 2, "xfailed": 1}),
    ],
)
def test_a_skip_is_a_failure_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, outcomes: dict[str, int]
) -> None:
    monkeypatch.setenv("HF_SELORTHO_CI", ci)
    pytester.makeconftest("from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport")
    pytester.makepyfile(SKIPPING_TESTS, test_skipped_module="import pytest\npytest.importorskip('no_such_module')")
    result = pytester.runpytest_inprocess("--continue-on-collection-errors", "-p", "no:cacheprovider")
    result.assert_outcomes(**outcomes)
