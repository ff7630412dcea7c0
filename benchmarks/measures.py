"""How dense the package is, and on how many floors it stands: `python benchmarks/measures.py` prints a table.

Counted from the code as it is; nothing of it is run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "densenas"
FOLDED = {"zip", "iter", "next", "map", "chain"}  # calls that say much in little


def lines_of(folder: Path) -> dict[Path, list[str]]:
    """The lines that are not blank of every module."""
    lines = {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines[path.relative_to(REPOSITORY)] = [line for line in text.splitlines() if line.strip()]
    return lines


def lines_of_all(folder: Path = PACKAGE) -> int:
    return sum(len(lines) for lines in lines_of(folder).values())


def long_lines(folder: Path = PACKAGE) -> float:
    """Percent of lines over 100 characters."""
    lines = [line for module in lines_of(folder).values() for line in module]
    return 100 * sum(len(line) > 100 for line in lines) / len(lines)


def longest_file(folder: Path = PACKAGE) -> tuple[int, str]:
    """Lines that are not blank, and the file that has them."""
    return max((len(lines), str(path)) for path, lines in lines_of(folder).items())


def folded_calls(folder: Path = PACKAGE) -> float:
    """Calls of zip, iter, next, map and chain in 100 lines."""
    lines = calls = 0
    for path, module in lines_of(folder).items():
        lines += len(module)
        for node in ast.walk(_tree(path)):
            calls += isinstance(node, ast.Call) and _name(node.func) in FOLDED
    return 100 * calls / lines


def longest_function(folder: Path = PACKAGE) -> tuple[int, str]:
    """Lines from its first to its last, docstring included, and where it is."""
    longest = (0, "")
    for path in lines_of(folder):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                longest = max(longest, (length, f"{path}:{node.lineno} {node.name}"))
    return longest


def _tree(path: Path) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))


def _name(function: ast.expr) -> str:
    """Of what is called: `chain` for itertools.chain and for chain.from_iterable."""
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        owner = _name(function.value)
        return owner if owner == "chain" else function.attr
    return ""


def imports() -> dict[str, set[str]]:
    """What every module of the package imports of the package, from the root downwards."""
    graph = grimp.build_graph("densenas", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def floors(imported: dict[str, set[str]]) -> tuple[list[str], list[str]]:
    """The longest chain of modules that import one another, and the modules that stand in a circle."""
    chains: dict[str, list[str]] = {}
    circles: set[str] = set()

    def longest(module: str, above: list[str]) -> list[str]:
        if module in above:
            circles.update(above[above.index(module) :])
            return []
        if module not in chains:
            below: list[str] = []
            for other in sorted(imported[module]):
                below = max(below, longest(other, [*above, module]), key=len)
            chains[module] = [module, *below]
        return chains[module]

    for module in sorted(imported):
        longest(module, [])
    return max(chains.values(), key=len), sorted(circles)


def broken_contracts() -> int:
    """Of those in pyproject.toml: what imports from above, or from the other wing."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    lint = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    kept, _, broken = lint.stdout.rpartition("Contracts: ")[2].partition(" kept, ")
    if not kept.isdecimal():
        raise RuntimeError(f"lint-imports did not count its contracts: {lint.stdout}{lint.stderr}")
    return int(broken.partition(" ")[0])


def main() -> None:
    chain, circles = floors(imports())
    length, function = longest_function()
    lines, file = longest_file()
    rows = {
        "lines of the method, not blank": lines_of_all(PACKAGE / "method"),
        "lines of the package, not blank": lines_of_all(),
        "lines over 100 characters": f"{long_lines():.1f} %",
        "zip, iter, next, map, chain in 100 lines": f"{folded_calls():.2f}",
        "longest function": f"{length} lines ({function})",
        "longest file": f"{lines} lines ({file})",
        "floors of imports": f"{len(chain)} ({' → '.join(chain)})",
        "modules in a circle": len(circles),
        "contracts of imports broken": broken_contracts(),
    }
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
