"""The layers and their allowed imports, as a table; any other import fails here."""

import ast
from collections.abc import Iterator
from graphlib import CycleError
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmsrv"
GROUND = {"config", "errors", "log", "options", "timing", "version"}

ENGINE = {"engine.client", "engine.generation", "engine.messages"}  # for the server process
# Layer -> what it may import besides ground and itself; a dotted name allows only that module.
MAY_IMPORT = {
    "app": {"runtime", "http_app", "asgi.types"},
    "runtime": {"http_app", "registry", "api", "asgi.types"},
    "http_app": {"registry", "api", "asgi"},
    "server": {"asgi.types"},
    "registry": {"text", "files", *ENGINE},
    "api": {"asgi", "text", "files", "registry", *ENGINE},
    "asgi": set(),
    "files": set(),
    "text": {"files"},
    "selftest": {"engine", "model", "backend"},
    "engine": {"text.grammar", "files", "model", "backend"},
    "model": {"files", "backend"},
    "backend": set(),
}
# The server process never loads numpy; the engine process never loads HTTP modules.
NOT_IN = {
    "server": {"numpy"},
    "registry": {"numpy"},
    "api": {"numpy"},
    "asgi": {"numpy", "orjson", "msgspec", "h11"},
    "files": {"numpy"},
    "text": {"numpy"},
    "model": {"asyncio", "h11"},
    "backend": {"asyncio", "h11"},
}
STANDARD_ONLY = {"asgi"}


def modules() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module in ("llmsrv", *(f"llmsrv.{layer}" for layer in MAY_IMPORT)):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", modules(), ids=str)
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    layer = path.parts[0] if len(path.parts) > 1 else None
    if path.stem in MAY_IMPORT and len(path.parts) == 1:
        layer = path.stem
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "llmsrv":
            assert parts[0] not in NOT_IN.get(layer or "", set()), f"{path} imports {name}"
            continue
        if layer is None and path.stem not in GROUND:
            continue  # cli, commands, serve and bundle may import anything
        allowed = GROUND | ({layer} | MAY_IMPORT[layer] if layer else set())
        inside = ".".join(parts[1:])
        assert any(inside == a or inside.startswith(a + ".") for a in allowed), (
            f"{path} imports {name}; {layer or 'ground'} may import {sorted(allowed)}"
        )


@pytest.mark.parametrize(
    "path", [p for p in modules() if p.parts[:2] == ("api", "generation")], ids=str
)
def test_the_generation_of_an_answer_knows_no_dialect_and_no_route(path: Path) -> None:
    for name in imports_of(path):
        if name.startswith("llmsrv.api."):
            assert name.split(".")[2] == "generation", f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in modules() if p.parts[0] in STANDARD_ONLY], ids=str)
def test_the_asgi_toolkit_needs_only_the_standard_library(path: Path) -> None:
    import sys

    for name in imports_of(path):
        top = name.split(".")[0]
        assert top == "llmsrv" or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_every_package_of_the_program_is_installed() -> None:
    import configparser

    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {
        ".".join(("llmsrv", *path.parent.parts)) for path in modules() if path.name == "__init__.py"
    }
    assert listed == found | {"llmsrv.kernels"}


def module_level_imports(path: Path) -> Iterator[str]:
    """The modules of llmsrv that a module imports outside functions, for type checking too."""
    pending: list[ast.AST] = [ast.parse((PACKAGE / path).read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The imported name may itself be a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module or ""


def test_the_modules_import_each_other_without_a_circle() -> None:
    graph = {
        ".".join(("llmsrv", *path.with_suffix("").parts)).removesuffix(".__init__"): set(
            module_level_imports(path)
        )
        for path in modules()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}")
