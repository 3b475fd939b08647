"""The rooms know each other in one direction only, and only the engine's files know DeepSpeed."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "overtok_megatron"
ROOMS = {
    "config": set(),
    "kernels": set(),
    "parallel": {"config", "kernels"},
    "ngram": {"config", "kernels", "parallel"},
    "model": {"config", "kernels", "parallel", "ngram"},
    "data": {"config", "kernels", "parallel", "ngram", "model"},
    "checkpoint": {"config", "kernels", "parallel", "ngram", "model", "data"},
    "inference": {"config", "kernels", "parallel", "ngram", "model", "data", "checkpoint"},
    "evaluation": {"config", "kernels", "parallel", "ngram", "model", "data", "checkpoint", "inference"},
    "training": {"config", "kernels", "parallel", "ngram", "model", "data", "checkpoint"},
}
ROOMS["serving"] = ROOMS["inference"] | {"inference"}
ROOMS["commands"] = set(ROOMS)


def imported(path: Path) -> set[str]:
    """Absolute names that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_is_known_here() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == ROOMS.keys()


def test_rooms_import_in_one_direction() -> None:
    wrong = []
    for room, allowed in ROOMS.items():
        for path in (PACKAGE / room).rglob("*.py"):
            for name in imported(path):
                parts = name.split(".")
                if (
                    parts[0] == PACKAGE.name
                    and len(parts) > 1
                    and parts[1] in ROOMS
                    and parts[1] not in {room, *allowed}
                ):
                    wrong.append(f"{room}/{path.name} imports {name}")
    assert not wrong, wrong


def test_only_what_touches_the_engine_imports_deepspeed() -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")
             if any(name.split(".")[0] == "deepspeed" for name in imported(path))}  # fmt: skip
    assert users == {"training/engine.py", "training/pipeline.py", "training/dense_state.py"}


def test_models_do_not_touch_torch_distributed_but_for_its_types() -> None:
    for path in (PACKAGE / "model").rglob("*.py"):
        attributes = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
        ]
        used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "dist"}
        assert used <= {"ProcessGroup", "get_rank", "get_world_size"}, (path.name, used)


def test_library_reads_no_environment() -> None:
    readers = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")
               if "os.environ" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert readers == {"launch.py", "cli.py", "training/entry.py"}


def test_files_fit_in_a_head() -> None:
    long = {path.name: count for path in PACKAGE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_no_test_imports_another() -> None:
    """What tests share lies in tests/support; what a conftest.py has comes as a fixture."""
    files = [*TESTS.rglob("*.py"), *(TESTS.parent / "tools").rglob("*.py")]
    tests = {path.stem for path in files if path.name.startswith("test_")} | {"conftest"}
    wrong = [f"{path.relative_to(TESTS.parent)} imports {name}" for path in files for name in imported(path)
             if tests & set(name.split("."))]  # fmt: skip
    assert not wrong, wrong
