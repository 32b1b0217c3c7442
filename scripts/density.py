"""Measures how densely the library's code is written.

    python scripts/density.py [--files] [PATH ...]

A mirror, not a fence: the numbers say where a reader has to unpack a line, not what is good code.
The default paths are the library (`wam_policy/`, `hub/`, `wrappers/`). `--files` also prints one
row per file.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

LIBRARY = ("wam_policy", "hub", "wrappers")
MAX_COLUMNS = 100
MAX_FUNCTION_LINES = 60
CONTEXTS = (ast.Load, ast.Store, ast.Del)  # nodes that no reader sees
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


@dataclass
class Counts:
    """Sums over one file or over many."""

    files: int = 0
    lines: int = 0  # neither blank nor only white space
    code_lines: int = 0  # neither blank, comment nor docstring
    nodes: int = 0  # of the syntax tree
    tuple_assignments: int = 0  # `a, b = c, d`
    conditional_expressions: int = 0  # `a if b else c`
    comment_lines: int = 0  # nothing but a comment
    wide_lines: int = 0  # over MAX_COLUMNS
    functions: int = 0
    long_functions: int = 0  # over MAX_FUNCTION_LINES
    typed_functions: int = 0  # every argument and the result annotated
    public: int = 0  # modules, classes and functions whose name has no leading underscore
    documented: int = 0  # of those, the ones with a docstring
    longest_function: int = 0
    longest_file: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of another file; the longest stay the longest."""
        for field in fields(self):
            mine = getattr(self, field.name)
            theirs = getattr(other, field.name)
            combine = max if field.name.startswith("longest") else int.__add__
            setattr(self, field.name, combine(mine, theirs))

    def rows(self) -> dict[str, str]:
        """The measures by name, formatted."""
        code = max(1, self.code_lines)
        return {
            "files": f"{self.files}",
            "code lines": f"{self.code_lines}",
            "nodes per code line": f"{self.nodes / code:.2f}",
            "tuple assignments per 1,000 code lines": f"{1000 * self.tuple_assignments / code:.1f}",
            "conditional expressions per 1,000 code lines": (
                f"{1000 * self.conditional_expressions / code:.1f}"
            ),
            "full-line comments per 1,000 code lines": f"{1000 * self.comment_lines / code:.1f}",
            f"lines over {MAX_COLUMNS} columns": f"{self.wide_lines / max(1, self.lines):.1%}",
            f"functions over {MAX_FUNCTION_LINES} lines": f"{self.long_functions}",
            "longest function": f"{self.longest_function} lines",
            "longest file": f"{self.longest_file} lines",
            "functions typed": f"{self.typed_functions / max(1, self.functions):.1%}",
            "public names documented": f"{self.documented / max(1, self.public):.1%}",
        }


def docstring_lines(node: ast.AST) -> range:
    """The lines of a node's docstring; empty where it has none."""
    body = getattr(node, "body", None)
    if not isinstance(node, DOCUMENTED) or not body or not isinstance(body[0], ast.Expr):
        return range(0)
    value = body[0].value
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
        return range(0)
    return range(body[0].lineno, (body[0].end_lineno or body[0].lineno) + 1)


def is_tuple_assignment(node: ast.AST) -> bool:
    """Whether a statement assigns several values to several names at once."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def is_typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether every argument but `self` and `cls`, and the result, has an annotation."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    annotated = all(argument.annotation or argument.arg in ("self", "cls") for argument in every)
    return annotated and function.returns is not None


def count_file(path: Path) -> Counts:
    """Count one file."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    counts = Counts(files=1, longest_file=len(lines))

    in_docstring: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        counts.nodes += not isinstance(node, CONTEXTS)
        counts.tuple_assignments += is_tuple_assignment(node)
        counts.conditional_expressions += isinstance(node, ast.IfExp)
        in_docstring.update(docstring_lines(node))
        if isinstance(node, DOCUMENTED) and not getattr(node, "name", "").startswith("_"):
            counts.public += 1
            counts.documented += len(docstring_lines(node)) > 0
        if isinstance(node, FUNCTIONS):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            counts.functions += 1
            counts.long_functions += length > MAX_FUNCTION_LINES
            counts.longest_function = max(counts.longest_function, length)
            counts.typed_functions += is_typed(node)

    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        is_comment = line.strip().startswith("#")
        counts.lines += 1
        counts.wide_lines += len(line) > MAX_COLUMNS
        counts.comment_lines += is_comment and number not in in_docstring
        counts.code_lines += not is_comment and number not in in_docstring
    return counts


def python_files(paths: list[str]) -> Iterator[Path]:
    """The Python files under some paths, each once, links not followed."""
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(path.rglob("*.py"))
        yield from (file for file in found if not any(part.is_symlink() for part in file.parents))


def main() -> None:
    """Print the measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", default=LIBRARY, help="files or folders")
    parser.add_argument("--files", action="store_true", help="also print one row per file")
    options = parser.parse_args()

    total = Counts()
    for path in python_files(list(options.paths)):
        counts = count_file(path)
        total.add(counts)
        if options.files:
            code = max(1, counts.code_lines)
            print(
                f"{path}: {len(path.read_text().splitlines())} lines, "
                f"{counts.nodes / code:.2f} nodes per line, "
                f"{counts.tuple_assignments} tuple assignments, "
                f"{counts.conditional_expressions} conditional expressions, "
                f"{counts.comment_lines} comments, "
                f"longest function {counts.longest_function}"
            )
    for name, value in total.rows().items():
        print(f"{name:46} {value}")


if __name__ == "__main__":
    main()
