"""What a kernel is compiled for does not include the number of rows of a batch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "kernels"
ROWS = {"n", "angles"}
"""Arguments that change with every batch."""


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.stem)
def test_the_number_of_rows_is_no_part_of_a_program(file: Path) -> None:
    """Else a batch whose rows are a multiple of 16, or one row, would run another build than the one inspected ahead of
    time, after a pause to compile it."""
    for function in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        launched = any(one.startswith("triton.jit") for one in decorators) and "tl.program_id" in ast.unparse(function)
        changing = ROWS & {argument.arg for argument in function.args.args}
        if launched and changing:
            assert decorators == [f"triton.jit(do_not_specialize={sorted(changing)!r})"], function.name
