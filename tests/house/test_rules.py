# SPDX-License-Identifier: Apache-2.0
"""The rules of docs/design.md that a machine can check, file by file."""

import ast
import re
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL = 5
ENVIRONMENT = {"LISSOM_CPU_ISA", "LISSOM_AUTOLOAD", "LISSOM_TORCH_DIR"}

# Letters in brackets keep these patterns from finding themselves.
REGISTRY = re.compile(
    r"py[p]i\.org|python[h]osted|debia[n]\.org|npm[j]s\.|ana[c]onda\.(org|com)|crate[s]\.io"
)
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:hom[e]|roo[t]|wor[k]|tm[p])/\w")
HEAVY_INCLUDE = re.compile(r"#include\s*[<\"]torch/(extension|all)\.h")
ISA_MAY_INCLUDE = {"immintrin.h", "stdint.h", "stddef.h", "string.h"}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_file_is_short_and_has_one_licence_line(code):
    lines = text_of(code).splitlines()
    assert len(lines) <= MAX_FILE_LINES, f"{len(lines)} lines; split it along a natural seam"
    found = [line for line in lines[:3] if "SPDX-License-Identifier: Apache-2.0" in line]
    assert len(found) == 1, "the SPDX line is missing in the first three lines"


def test_functions_are_short(python):
    long = {f.name: f.end_lineno - f.lineno for f in functions_of(python)}
    long = {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def test_functions_take_few_positional_parameters(library):
    wide = []
    for function in functions_of(library):
        names = [
            a.arg for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")
        ]
        # An operator's twin, fake and wrapper take what its schema says, a benchmark its pytest parameters.
        follows_schema = {"reference", "ops"} & set(library.parts) or function.name.startswith("test_")
        if len(names) > MAX_POSITIONAL and not follows_schema:
            wide.append(f"{function.name}({', '.join(names)})")
    assert not wide, f"more than {MAX_POSITIONAL} positional parameters: {wide}"


def test_no_exception_is_swallowed(python):
    for node in ast.walk(ast.parse(python.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), (
                f"line {node.lineno}: except: pass"
            )


def test_nothing_names_a_registry_or_a_machine(text_file):
    for number, line in enumerate(text_of(text_file).splitlines(), 1):
        assert not REGISTRY.search(line), f"line {number} names a package registry: {line.strip()[:90]}"
        assert not MACHINE_PATH.search(line), (
            f"line {number} names a path of one machine: {line.strip()[:90]}"
        )


def test_no_environment_zoo(package_code):
    used = re.findall(r"(?:getenv\(|environ(?:\.get\(|\[))\s*\"(LISSOM_\w+)\"", text_of(package_code))
    assert set(used) <= ENVIRONMENT, f"environment variables beside {ENVIRONMENT}: {set(used) - ENVIRONMENT}"


def test_includes_are_cheap(code):
    assert not HEAVY_INCLUDE.search(text_of(code)), (
        "torch/extension.h costs 20 s a unit; include ATen headers"
    )


def test_kernels_do_not_know_torch(isa_unit, root):
    """An instruction-set unit sees intrinsics and our own plain headers, through all levels of inclusion."""
    queue, seen = [isa_unit], set()
    while queue:
        for name in re.findall(r"#include\s*[<\"]([^>\"]+)[>\"]", queue.pop().read_text(encoding="utf-8")):
            own = root / "csrc" / name
            if own.exists() and name not in seen:
                queue.append(own)
            assert own.exists() or name in ISA_MAY_INCLUDE, f"includes <{name}>, directly or not"
            seen.add(name)
    assert "immintrin.h" in seen
