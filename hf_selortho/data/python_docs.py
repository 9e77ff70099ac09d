"""English prose that every Python installation carries: the embedded corpus "python-docs"."""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib
import inspect
import os
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

PYTHON_DOCS = "python-docs"

# Tests and third-party packages differ between installations, and their docstrings are hardly prose.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_MAX_CHARS = 12_000  # about 3000 tokens; longer documents are split between paragraphs
_MIN_WORDS = 5
_COMMON_WORDS = frozenset(
    "a an and are as at be but by can for from has if in is it not of on or that the then this to was when which will "
    "with you".split()
)
_PARAGRAPH_END = re.compile(r"\n\s*\n")


@functools.cache
def python_docs() -> tuple[str, ...]:
    """Collect the texts, in an order that depends on the Python installation alone; no paragraph occurs twice.

    They are Python's help topics, the docstrings and comments of the standard library (read from the source, nothing is
    imported for them), and the docstrings of the modules built into the interpreter. What an installation lacks is left
    out. Takes a few seconds, then stays in memory.
    """
    collecting = gc.isenabled()
    gc.disable()  # beside torch it takes two thirds of the time, walking over millions of live syntax nodes
    try:
        seen: set[str] = set()
        return tuple(text for document in _documents() for text in _pieces(document, seen) if _is_prose(text))
    finally:
        if collecting:
            gc.enable()


def python_docs_revision() -> str:
    """Name the interpreter's version and a hash of the texts, since distributions trim them."""
    digest = hashlib.sha256("\0".join(python_docs()).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{sys.implementation.name}-{platform.python_version()}-sha256:{digest[:16]}"


def _documents() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions have none
        topics = {}
    yield from (topics[name] for name in sorted(topics))
    yield from _built_in_docstrings()
    for path in _library_sources():
        try:
            with tokenize.open(path) as file:  # heeds the file's encoding line
                source = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's strings
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        yield from _docstrings(tree)
        yield _comments(source)


def _library_sources() -> list[Path]:
    root = sysconfig.get_paths()["stdlib"]
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Make one document of the module, one of each of its functions, and one of each class with its methods."""
    yield ast.get_docstring(tree) or ""
    for definition in _definitions(tree.body):
        parts = [definition, *(_definitions(definition.body) if isinstance(definition, ast.ClassDef) else ())]
        yield "\n\n".join(filter(None, map(ast.get_docstring, parts)))


def _definitions(statements: Iterable[ast.AST]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Find classes and functions among the statements, also those under an `if` or a `try`."""
    for statement in statements:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement
        elif isinstance(statement, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            yield from _definitions(ast.iter_child_nodes(statement))


def _comments(source: str) -> str:
    """Collect the comments of two lines or more, a paragraph each; shorter ones are remarks or switched-off code."""
    blocks: list[list[str]] = [[]]
    for line in source.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            blocks[-1].append(stripped.lstrip("#").strip())
        elif blocks[-1]:
            blocks.append([])
    paragraphs = ("\n".join(block).strip() for block in blocks if len(block) > 1)
    return "\n\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


def _built_in_docstrings() -> Iterator[str]:
    """Read the modules compiled into the interpreter, which have no source; importing them runs no Python code."""
    for name in sorted(sys.builtin_module_names, key=lambda name: (name != "builtins", name)):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield inspect.cleandoc(module.__doc__ or "")
        for _, value in sorted(vars(module).items()):
            if isinstance(value, type) or inspect.isroutine(value):
                members = sorted(vars(value).items()) if isinstance(value, type) else []
                yield "\n\n".join(filter(None, map(_own_doc, [value, *(member for _, member in members)])))


def _own_doc(thing: object) -> str:
    doc = getattr(thing, "__doc__", None)
    own = isinstance(doc, str) and (isinstance(thing, type) or doc != type(thing).__doc__)
    return inspect.cleandoc(doc or "") if own else ""


def _pieces(document: str, seen: set[str]) -> Iterator[str]:
    """Join the paragraphs not `seen` before to texts of at most `_MAX_CHARS` (or of one longer paragraph)."""
    current: list[str] = []
    length = 0
    for paragraph in _PARAGRAPH_END.split(document):
        key = " ".join(paragraph.split())
        if not key or key in seen:
            continue
        seen.add(key)
        paragraph = paragraph.strip("\n").rstrip()
        if current and length + len(paragraph) > _MAX_CHARS:
            yield "\n\n".join(current)
            current, length = [], 0
        current.append(paragraph)
        length += len(paragraph) + 2
    yield "\n\n".join(current)


def _is_prose(text: str) -> bool:
    """Tell whether a text is mostly words, and among them those that no English sentence does without."""
    words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text)
    common = sum(word.lower() in _COMMON_WORDS for word in words)
    letters = sum(map(len, words)) + len(re.findall(r"\s", text))
    return len(words) >= _MIN_WORDS and common >= 0.12 * len(words) and letters >= 0.7 * len(text)
