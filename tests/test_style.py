"""What the code's form promises its reader: files that fit in a head, and constructors whose calls name their values."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST_FILE = 400
MOST_POSITIONAL = 4


def sources(*folders: str, endings: tuple[str, ...] = (".py",)) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in endings)


def test_files_fit_in_a_head() -> None:
    everything = sources("overtok_megatron", "tests", "tools", "launchers", endings=(".py", ".cpp", ".h", ".sh"))
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in everything
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def positional_values(node: ast.ClassDef) -> int:
    """How many values the class's constructor takes by position: its own __init__'s, or a dataclass's fields."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return len(item.args.posonlyargs) + len(item.args.args) - 1
    decorators = [decorator for decorator in node.decorator_list if "dataclass" in ast.unparse(decorator)]
    if not decorators or "kw_only=True" in ast.unparse(decorators[0]):
        return 0
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and "init=False" not in ast.unparse(item)]
    return sum("ClassVar" not in ast.unparse(item.annotation) for item in fields)


def test_constructors_of_many_values_are_called_by_name() -> None:
    long = {}
    for path in sources("overtok_megatron"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and (count := positional_values(node)) > MOST_POSITIONAL:
                long[f"{path.relative_to(ROOT).as_posix()}: {node.name}"] = count
    assert not long
