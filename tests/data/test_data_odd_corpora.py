"""`overtok prepare` on odd corpora by seed: every document is in, or named with its reason; every file is accounted for."""

import contextlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from overtok_megatron.cli import main
from support.odd_corpora import HIDDEN, OWN, Corpus, Maker, shown

CORPORA = 300
PARTS = 6
SUMS = re.compile(
    r"([\d,]+) files seen: ([\d,]+) read, (.*); ([\d,]+) documents seen: ([\d,]+) written, (.*)", re.DOTALL
)


@pytest.fixture(scope="module")
def ab_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces for two letters and nothing for what it does not know."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("ab") / "tokenizer.json"
    made.save(str(path))
    return path


def prepare(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["prepare", *words])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is most of the time of small sets, and not what is looked at."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("part", range(PARTS))
def test_every_document_is_in_or_named_with_its_reason(part: int, tmp_path: Path, ab_tokenizer: Path) -> None:
    hold(range(part, CORPORA, PARTS), tmp_path, ab_tokenizer)


@pytest.mark.ci
@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("part", range(PARTS))
def test_many_more(part: int, tmp_path: Path, ab_tokenizer: Path) -> None:
    hold(range(CORPORA + part, 5 * CORPORA, PARTS), tmp_path, ab_tokenizer)


def hold(seeds: range, folder: Path, ab_tokenizer: Path) -> None:
    """Make the corpus of each seed and hold the verb to it."""
    accepted = 0
    for seed in seeds:
        root = folder / str(seed)
        corpus = Maker(seed, root, ab_tokenizer).make()
        before = {path: path.lstat().st_mtime_ns for path in root.rglob("*") if not path.is_dir()}
        try:
            accepted += check(corpus)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {corpus.words}: {error}") from error
        assert all(path.lstat().st_mtime_ns == time for path, time in before.items()), (
            f"seed {seed}: an input was changed"
        )
    assert accepted > len(seeds) / 2


def check(corpus: Corpus) -> bool:
    """Whether it is accepted; asserts that it should be."""
    code, out, err = prepare(corpus.words)
    made = list(corpus.prefix.parent.glob("set*")) if corpus.prefix.parent.is_dir() else []
    if corpus.refused is not None:
        assert code == 2, out
        assert err.startswith("error: ") and err.count("\n") == 1
        assert len(err.replace(corpus.refused[0], "")) < 300
        assert all(part in err for part in corpus.refused), (corpus.refused, err)
        assert made == []
        return False
    assert (code, err) == (0, "")
    check_tokens(corpus)
    check_account(corpus, out)
    if corpus.prefix.parent.name == "in" and "**" not in corpus.words[-1]:  # its own output lies in the corpus now
        content = corpus.prefix.with_suffix(".bin").read_bytes()
        if corpus.words[-1] == str(corpus.prefix.parent):
            corpus.files[OWN] = [shown(corpus.prefix.with_suffix(suffix)) for suffix in (".bin", ".idx", ".json")]
        code, out, err = prepare(corpus.words)
        assert (code, err) == (0, "")
        assert corpus.prefix.with_suffix(".bin").read_bytes() == content
        check_account(corpus, out)
    return True


def check_tokens(corpus: Corpus) -> None:
    tokens = np.fromfile(corpus.prefix.with_suffix(".bin"), dtype=np.uint16)
    if corpus.tokenizer == "bytes":
        wanted = [[*text.encode(), 256] for text in corpus.documents]
    else:
        wanted = [[*("ab".index(one) for one in text if one in "ab"), 2] for text in corpus.documents]
    assert tokens.tolist() == [token for document in wanted for token in document]


def check_account(corpus: Corpus, out: str) -> None:
    *lines, last = out.splitlines()
    found = SUMS.fullmatch(last)
    assert found is not None, last
    counts = {reason: len(names) for reason, names in corpus.files.items()}
    if corpus.hidden:
        counts[HIDDEN] = corpus.hidden
    check_sums(found[1], found[2], found[3], corpus.num_read, counts)
    left = {reason: len(names) for reason, names in corpus.left.items()}
    check_sums(found[4], found[5], found[6], len(corpus.documents), left)
    for what, by_reason in (("files", corpus.files), ("documents", corpus.left)):
        said = {line for line in lines if line.startswith(f"{what} left out, ")}
        for reason, names in by_reason.items():
            (line,) = (line for line in said if line.startswith(f"{what} left out, {reason}: "))
            assert sum(name in line for name in names) >= min(10, len(names)), (line, names)
        assert len(said) == len(by_reason)
    told = " ".join(line for line in lines if line.startswith("the separator does not occur"))
    assert all(name in told for name in corpus.unsplit)
    assert bool(told) == bool(corpus.unsplit)


def check_sums(seen: str, kept: str, left: str, wanted: int, reasons: dict[str, int]) -> None:
    assert int(kept.replace(",", "")) == wanted
    assert int(seen.replace(",", "")) == wanted + sum(reasons.values())
    parts = re.findall(r"(?:\(|, )([\d,]+) ([^,()]+)", left.partition("(")[1] + left.partition("(")[2])
    assert {reason: int(count.replace(",", "")) for count, reason in parts} == reasons, left
