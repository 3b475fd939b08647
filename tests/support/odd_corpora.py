"""Odd corpora by seed, each with what `overtok prepare` has to make of it. Nothing of the package is used here.

A corpus is a folder of files of many kinds, given to the verb as a folder, as a pattern or file by file. The generator knows
the fate of everything it makes: documents in order, what is left out and why, or why the whole corpus is refused.
"""

import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}
MARK = b"\xef\xbb\xbf"
WORDS = [
    "a",
    "b",
    "ab",
    "naïve",
    "Ω",
    "日本",
    "\U0001f600",
    "\u2028",
    "\ufeff",
    "\x00",
    "\t",
    '"',
    "\\n",
    "</s>",
    " ",
    "xyz",
]
SEPARATORS = {"\\n\\n": "\n\n", "\\r\\n\\r\\n": "\r\n\r\n", "\\n=====\\n": "\n=====\n", "|": "|", "\\x1e": "\x1e"}
NAMES = [
    "plain",
    "two words",
    "naïve",
    "日本",
    "-x",
    "[1]",
    "*",
    "new\nline",
    "q'uote",
    "50%",
    "a.b",
    "#",
    "x" * 150,
    "\udcff\udce9",
]
HIDDEN, UNKNOWN, AGAIN = "hidden", "without a known suffix", "read already under another name"
BROKEN, SPECIAL, OWN = "behind a broken link", "not regular", "of a prepared set"
ABOVE, REPEATED, BLANK = "linked to a folder above", "linked to a folder read already", "without text"
EMPTY, NOTHING = "empty", "of which the tokenizer keeps nothing"


def shown(name: object) -> str:
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(name))


@dataclass
class Corpus:
    """words: arguments after `prepare`; documents in order; the rest by reason: names, or for hidden folders how many files.

    refused: parts of the one line that says so, None = it is accepted. unsplit: text files without the separator.
    """

    words: list[str]
    prefix: Path
    tokenizer: str
    documents: list[str] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)
    hidden: int = 0
    left: dict[str, list[str]] = field(default_factory=dict)
    unsplit: list[str] = field(default_factory=list)
    num_read: int = 0
    refused: list[str] | None = None


@dataclass
class File:
    """What a file that is read holds: texts with their places, empty ones included."""

    path: Path
    texts: list[tuple[str, str]]
    unsplit: bool = False


def keeps(tokenizer: str, text: str) -> bool:
    """The tokenizer `ab` has pieces for two letters and no piece for what it does not know."""
    return tokenizer == "bytes" or "a" in text or "b" in text


class Maker:
    """Makes the corpus of a seed below a folder."""

    def __init__(self, seed: int, root: Path, ab_tokenizer: Path) -> None:
        self.random = random.Random(seed)
        self.root = root
        self.folder = root / "in"
        self.folder.mkdir(parents=True)
        self.key = self.random.choice(["text", "text", "body"])
        self.written, self.separator = self.random.choice([("", None), ("", None), *SEPARATORS.items()])
        inside = self.random.random() < 0.3
        tokenizer = self.random.choice(["bytes", "bytes", "bytes", "ab"])
        prefix = (self.folder if inside else root / "out") / "set"
        words = ["--tokenizer", "bytes" if tokenizer == "bytes" else str(ab_tokenizer), "--output", str(prefix)]
        words += ["--workers", "1", "--key", self.key]
        words += [] if self.separator is None else ["--separator", self.written]
        self.corpus = Corpus(words, prefix, tokenizer)
        self.used: set[Path] = set()
        self.files: list[File] = []

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def name(self, suffix: str, folder: Path | None = None) -> Path:
        """A path that nothing has yet, in the corpus or below it."""
        folder = folder or self.random.choice(
            [self.folder, self.folder, self.folder / "deep", self.folder / "d e" / "f"]
        )
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            stem = self.random.choice(NAMES) + self.random.choice(["", "", "1", "22"])
            path = folder / (stem + suffix)
            if path not in self.used and str(path).lower() not in {str(one).lower() for one in self.used}:
                self.used.add(path)
                return path

    def case(self, suffix: str) -> str:
        return self.random.choice([suffix, suffix, suffix.upper(), suffix.title()])

    def text(self) -> str:
        if self.chance(0.03):
            return "long " * self.random.randrange(1, 200_000)
        words = self.random.choices(
            WORDS if self.corpus.tokenizer == "bytes" or self.chance(0.5) else ["xyz", "Ω"], k=4
        )
        return "".join(words[: self.random.randrange(1, 5)])

    # Files that are read

    def plain(self, folder: Path | None = None) -> File:
        texts = [self.text() for _ in range(self.random.randrange(4))]
        if self.separator is None:
            content = "".join(texts)
        else:
            texts = [text.replace(self.separator, "_").strip("\r\n") for text in texts]
            content = self.separator.join(texts)
        marked = self.chance(0.2)
        content = content if marked else content.lstrip("\ufeff")  # which would be a mark
        places, place = [], 3 if marked else 0
        parts = [content] if self.separator is None else content.split(self.separator)
        for part in parts:
            if part:
                places.append((part, f"byte {place}"))
            place += len(part.encode()) + (len(self.separator.encode()) if self.separator else 0)
        raw = MARK * marked + content.encode()
        suffix = self.random.choice(list(COMPRESS))
        path = self.name(self.case(".txt") + self.case(suffix), folder)
        path.write_bytes(COMPRESS[suffix](raw))
        return File(path, places, bool(raw) and self.separator is not None and self.separator not in content)

    def json_lines(self, folder: Path | None = None) -> File:
        lines, texts = [], []
        for _ in range(self.random.randrange(5)):
            if self.chance(0.15):
                lines.append(self.random.choice([b"", b"  ", b"\t"]))
                continue
            text = "" if self.chance(0.2) else self.text()
            values = {"id": len(lines), self.key: text, "other": None}
            if self.chance(0.3):
                values = dict(reversed(values.items()))
            lines.append(json.dumps(values, ensure_ascii=self.chance(0.5)).encode())
            if self.chance(0.1):
                lines[-1] = MARK + lines[-1]  # as in files that were joined
            texts.append((text, f"line {len(lines)}"))
        end = self.random.choice([b"\n", b"\r\n"])
        raw = end.join(lines) + end * self.chance(0.7)
        if raw and not raw.startswith(MARK) and self.chance(0.2):
            raw = MARK + raw
        suffix = self.random.choice(list(COMPRESS))
        path = self.name(self.case(self.random.choice([".jsonl", ".json", ".ndjson"])) + self.case(suffix), folder)
        path.write_bytes(COMPRESS[suffix](raw))
        return File(path, texts)

    def parquet(self, folder: Path | None = None) -> File:
        texts = ["" if self.chance(0.2) else self.text() for _ in range(self.random.randrange(1, 4))]
        path = self.name(self.case(".parquet"), folder)
        table = pyarrow.table({"id": range(len(texts)), self.key: pyarrow.array(texts, pyarrow.string())})
        with path.open("wb") as file:
            pyarrow.parquet.write_table(table, file)
        return File(path, [(text, f"row {number}") for number, text in enumerate(texts)])

    def readable(self, folder: Path | None = None) -> File:
        kinds = [self.plain, self.plain, self.json_lines, self.json_lines, self.parquet]
        return self.random.choice(kinds)(folder)

    # What a folder has besides

    def leave(self, reason: str, name: object) -> None:
        self.corpus.files.setdefault(reason, []).append(shown(name))

    def oddity(self) -> None:
        kind = self.random.randrange(8)
        if kind == 0:
            path = self.folder / self.random.choice([".hidden.txt", "._a.txt", ".x.jsonl", ".DS_Store"])
            if not path.exists():
                path.write_text("hidden")
                self.leave(HIDDEN, path)
                self.corpus.hidden += 1
        elif kind == 1:
            folder = self.folder / self.random.choice([".git", ".ipynb_checkpoints"])
            if not folder.exists():
                count = self.random.randrange(1, 4)
                (folder / "sub").mkdir(parents=True)
                for number in range(count):
                    (folder / "sub" / f"{number}.txt").write_text("hidden")
                self.leave(HIDDEN, f"{folder}/")
                self.corpus.hidden += count
        elif kind == 2:
            path = self.name(self.random.choice(["", ".md", ".csv", ".jsonl~", ".txt.bak", ".bz2", ".tar.gz", ".tmp"]))
            path.write_bytes(self.random.randbytes(5))
            self.leave(UNKNOWN, path)
        elif kind == 3:
            path = self.name(self.random.choice([".txt", ".jsonl", ""]))
            path.symlink_to(self.random.choice(["nowhere", path.name]))
            self.leave(BROKEN, path)
        elif kind == 4:
            path = self.name(self.random.choice([".txt", ""]))
            os.mkfifo(path)
            self.leave(SPECIAL, path)
        elif kind == 5 and self.files:
            path = self.name(".txt")
            path.symlink_to(self.random.choice(self.files).path)
            self.leave(AGAIN, path)
        elif kind == 6:
            path = self.name("")
            path.symlink_to(self.random.choice([self.folder, self.root]))
            self.leave(ABOVE, f"{path}/")
        elif kind == 7:
            outside = self.root / f"outside{self.random.random()}"
            found = [self.readable(outside) for _ in range(self.random.randrange(1, 3))]
            path = self.name("")
            path.symlink_to(outside)
            self.files += [File(path / one.path.name, one.texts, one.unsplit) for one in found]
            if self.chance(0.3):
                again = path.with_name(path.name + "zz")
                again.symlink_to(outside)
                self.leave(REPEATED, f"{again}/")

    def damage(self) -> None:
        """One file for which the whole corpus is refused."""
        good = json.dumps({self.key: "fine"}).encode()
        text = "a text in another encoding" * 3
        path, content, said = self.random.choice(
            [
                (".txt", text.encode("utf-16"), "UTF-16"),
                (".jsonl", (good.decode() + "\n").encode("utf-16"), "UTF-16"),
                (".txt", text.encode("utf-16-le"), "UTF-16LE"),
                (".jsonl", good.decode().encode("utf-16-be"), "UTF-16BE"),
                (".txt", text.encode("utf-32"), "UTF-32"),
                (".txt", b"na\xefve", "not UTF-8 at byte 2"),
                (".txt", MARK + b"na\xefve", "not UTF-8 at byte 5"),
                (".txt.gz", gzip.compress(random.Random(1).randbytes(999))[:-9], "cut short"),
                (".txt.xz", lzma.compress(b"x" * 99)[:-9], "cut short"),
                (".txt.zst", COMPRESS[".zst"](b"x" * 99)[:-2], "cut short"),
                (".txt", gzip.compress(b"x" * 99), ".gz"),
                (".jsonl.gz", b"no archive", "damaged"),
                (".jsonl", good + b"\n" + good[:-3], "line 2 (byte"),
                (".jsonl", good + b"\n[1]", "line 2 (byte"),
                (".jsonl", b'{"oth\\ner": 1}', "line 1 (byte 0): has no key"),
                (".jsonl", json.dumps({self.key: 5}).encode(), "of type int"),
                (".jsonl", b'{"%s": "\\ud800"}' % self.key.encode(), "surrogate"),
                (".parquet", b"PAR1 no more", "damaged"),
            ]
        )
        place = self.name(self.case(path))
        place.write_bytes(content)
        self.corpus.refused = [shown(place), said]

    # The whole

    def make(self) -> Corpus:
        self.files += [self.readable() for _ in range(self.random.randrange(1, 6))]
        way = self.random.choice(["folder", "folder", "folder", "named", "pattern"])
        if way == "folder":
            for _ in range(self.random.randrange(6)):
                self.oddity()
            inputs = [str(self.folder)]
        elif way == "named":
            self.random.shuffle(self.files)
            if self.chance(0.3):
                path = self.name(self.random.choice(["", ".md", ".dat"]))
                self.files.append(self._without_suffix(path))
            inputs = [str(one.path) for one in self.files]
            if self.chance(0.3):
                inputs.append(inputs[0])
                self.leave(AGAIN, inputs[0])
        else:
            inputs = [f"{self.folder}/**"]
        if self.corpus.refused is None and self.chance(0.2):
            self.damage()
            if way == "named":
                inputs.append(str(next(path for path in self.used if shown(path) == self.corpus.refused[0])))  # type: ignore[index]
        self._settle(way)
        dash = [] if self.chance(0.5) else ["--"]
        self.corpus.words = [*self.corpus.words, *dash, *inputs]
        return self.corpus

    def _without_suffix(self, path: Path) -> File:
        if self.chance(0.5):
            path.write_text(json.dumps({self.key: "taken for text"}))
            self.corpus.refused = [shown(path), "--format jsonl"]
            return File(path, [])
        path.write_text("ab is a text without a suffix")
        return File(path, [("ab is a text without a suffix", "byte 0")], self.separator is not None)

    def _settle(self, way: str) -> None:
        corpus = self.corpus
        files = self.files if way == "named" else sorted(self.files, key=lambda one: one.path.parts)
        for one in files:
            if not any(text for text, _ in one.texts):
                self.leave(BLANK, one.path)
            else:
                corpus.num_read += 1
            if one.unsplit:
                corpus.unsplit.append(shown(one.path))
            for text, place in one.texts:
                if text and keeps(corpus.tokenizer, text):
                    corpus.documents.append(text)
                else:
                    name = shown(f"{one.path}: {place}")
                    corpus.left.setdefault(NOTHING if text else EMPTY, []).append(name)
        if corpus.refused is None and not corpus.documents:
            corpus.refused = ["the corpus is empty"]
