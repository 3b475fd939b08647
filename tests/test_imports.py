"""The rooms know each other in one direction only, and only one room knows DeepSpeed."""

import ast
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from overtok_megatron.training.deepspeed import KNOWN_RELEASE

PACKAGE = Path(__file__).parent.parent / "overtok_megatron"
TESTS = Path(__file__).parent
LOWEST = {"errors", "files", "environment", "loss_metrics", "placement", "run_folder", "run_lock"}
MODEL = {"config", "kernels", "parallel", "ngram", "model"}
CHECKPOINT = MODEL | {"data", "checkpoint"}
# What each room, or file at the top of the package, may import besides itself.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "environment": {"errors"},
    "loss_metrics": {"errors"},
    "run_folder": {"errors", "files"},
    "run_lock": {"errors", "files"},
    "placement": set(),
    "watching": {"errors", "run_folder", "placement"},
    "config": LOWEST,
    "kernels": LOWEST | {"config"},
    "parallel": LOWEST | {"config", "kernels"},
    "ngram": LOWEST | {"config", "kernels", "parallel"},
    "model": LOWEST | MODEL - {"model"},
    "data": LOWEST | {"config"},
    "trackers": LOWEST | {"config"},
    "planning": LOWEST | {"config"},
    "reports": LOWEST | {"config"},
    "checkpoint": LOWEST | CHECKPOINT - {"checkpoint"},
    "launching": LOWEST | {"config", "kernels", "parallel", "data", "checkpoint", "watching"},
    "studies": LOWEST | {"config", "parallel", "data", "launching", "reports"},
    "doctor": LOWEST | {"config", "parallel", "data", "launching"},
    "training": LOWEST | CHECKPOINT | {"trackers", "launching", "watching"},
    "inference": LOWEST | CHECKPOINT,
    "interchange": LOWEST | CHECKPOINT | {"inference"},
    "evaluation": LOWEST | CHECKPOINT | {"inference", "trackers"},
    "serving": LOWEST | CHECKPOINT | {"inference"},
}
ROOMS["commands"] = set(ROOMS)
ROOMS["cli"] = {"commands", "parallel", *LOWEST}


def imported(path: Path) -> set[str]:
    """Absolute names that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_is_known_here() -> None:
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == ROOMS.keys()


def test_rooms_import_in_one_direction() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        for name in imported(path):
            parts = name.split(".")
            known = parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in ROOMS
            if known and parts[1] != room and parts[1] not in ROOMS[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_data_knows_no_torch() -> None:
    """Arrays are numpy's: preparing a corpus, and checking a run's data before it starts, need not wait for torch."""
    users = {path.name for path in (PACKAGE / "data").rglob("*.py")
             if {"torch", "deepspeed"} & {name.split(".")[0] for name in imported(path)}}  # fmt: skip
    assert not users


def test_imports_inside_data_go_one_way() -> None:
    sets = {"index_file", "manifest", "partial_set", "indexed"}
    known: dict[str, set[str]] = {
        "tokenizers": set(),
        "sotu": set(),
        "preparing": sets | {"tokenizers"},
    } | dict.fromkeys(sets, sets)
    reading = {"sampler", "blending", "batches", "run_data"}
    known |= dict.fromkeys(reading, sets | reading | {"tokenizers"})
    for path in (PACKAGE / "data").rglob("*.py"):
        own = path.relative_to(PACKAGE / "data").parts[0].removesuffix(".py")
        parts = [name.split(".") for name in imported(path) if name.startswith("overtok_megatron.data.")]
        assert own == "__init__" or {one[2] for one in parts} <= known[own] | {own}, path.name


def outside_deepspeed() -> dict[str, str]:
    """The text of every file of the package but those that know DeepSpeed's internals, by name."""
    files = (path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "training" / "deepspeed"))
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_one_folder_imports_deepspeed() -> None:
    users = [name for name in outside_deepspeed()
             if any(module.split(".")[0] == "deepspeed" for module in imported(PACKAGE / name))]  # fmt: skip
    assert not users


# DeepSpeed's classes, attributes and the keys of its files that the adapters know; they change without notice.
PRIVATE_NAMES = [
    "DeepSpeedZeroOptimizer", "BF16_Optimizer", "FP16_",
    "scaled_global_norm", "_get_norm_groups", "get_grads_for_norm", "fp32_groups_gradient_flat_partition",
    "_update_hp_grad", "fp32_groups_gradients", "fp32_groups_has_gradients", "clear_lp_grads",
    "unscale_and_clip_grads", "_global_grad_norm",
    "get_global_grad_norm", "clip_fp32_gradients", "clip_grad", "_hp_mapping", "hp_fragment", "lp_fragment",
    "single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat", "fp16_groups",
    "fp32_groups", "fp32_flat_groups", "param_slice_mappings", "param_shapes", "base_optimizer_state", "ds_tensor",
    "_get_param_partition_rank", "grad_position", "get_param_id", "sub_group_to_group_id", "checkpoint_engine",
    "global_steps", "global_samples", "GatheredParameters", "__compatible_ops__",
    "init_distributed", "_partition_layers", "_index_tied_modules", "tied_comms", "ds_pipe_replicated",
    "universal_checkpoint", "parameter_with_", "tp_replicated_parameter_patterns",
]  # fmt: skip


def test_one_folder_knows_deepspeeds_private_names() -> None:
    """Two files must know some of them: the reader of DeepSpeed's files, which may not import training, and the metadata on
    parameters, which DeepSpeed reads."""

    def known(text: str) -> set[str]:
        return {word for word in PRIVATE_NAMES if re.search(rf"(?<![A-Za-z_]){re.escape(word)}", text)}

    found = {name: words for name, text in outside_deepspeed().items() if (words := known(text))}
    inside = (path.read_text(encoding="utf-8") for path in (PACKAGE / "training" / "deepspeed").glob("*.py"))
    assert set.union(*found.values(), *map(known, inside)) == set(PRIVATE_NAMES), "names that nobody uses any more"
    assert found == {
        "checkpoint/deepspeed_state.py": {
            "base_optimizer_state", "fp32_flat_groups", "fp32_groups", "param_shapes", "param_slice_mappings",
            "single_partition_of_fp32_groups",
        },
        "parallel/splits.py": {"ds_pipe_replicated"},
    }  # fmt: skip


def test_the_adapters_know_the_installed_and_the_pinned_deepspeed() -> None:
    root = PACKAGE.parent
    pins = (root / "launchers" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"deepspeed=={KNOWN_RELEASE}" in pins
    needed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (allowed,) = (line.removeprefix("deepspeed") for line in needed if line.startswith("deepspeed"))
    major, minor = (int(part) for part in KNOWN_RELEASE.split(".")[:2])
    assert allowed == f">={KNOWN_RELEASE},<{major}.{minor + 1}"
    assert version("deepspeed").split("+")[0].startswith(f"{major}.{minor}.")


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
    assert readers == {"launching/local.py", "cli.py", "training/entry.py", "doctor/starting.py", "doctor/one_host.py"}


def test_no_test_imports_another() -> None:
    """What tests share lies in tests/support; what a conftest.py has comes as a fixture."""
    files = [*TESTS.rglob("*.py"), *(TESTS.parent / "tools").rglob("*.py")]
    tests = {path.stem for path in files if path.name.startswith("test_")} | {"conftest"}
    wrong = [f"{path.relative_to(TESTS.parent)} imports {name}" for path in files for name in imported(path)
             if tests & set(name.split("."))]  # fmt: skip
    assert not wrong, wrong
