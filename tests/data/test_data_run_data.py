"""Whether tokenizer, sets and model fit together, as it is asked before a run."""

from pathlib import Path

import pytest

from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.indexed import IndexedWriter
from overtok_megatron.data.run_data import RunData, open_run_data
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.errors import DataError

BASE = Path(__file__).parent.parent.parent / "configs" / "quickstart_baseline.yaml"


def configuration(*overrides: str) -> RunConfig:
    bytes_only = ("tokenizer.type=bytes", "tokenizer.path=null", "data.validation=null", "model.vocab_size=257")
    return load_config(BASE, [*bytes_only, "data.seq_length=8", *overrides]).config


def write(prefix: Path, eod_id: int, fingerprint: str, tokens: int = 40) -> Path:
    with IndexedWriter(prefix, 257, eod_id, fingerprint) as writer:
        writer.add([*range(1, tokens), eod_id], tokens)
        writer.finish()
    return prefix


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good", 256, ByteTokenizer().fingerprint())


def test_a_blend_of_byte_sets_opens(good: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 256, ByteTokenizer().fingerprint(), 90)
    data = open_run_data(configuration(f"data.train=[{{path: {good}, weight: 1}}, {{path: {other}, weight: 0.5}}]"))
    assert [(one.dataset.num_tokens, one.weight) for one in data.train] == [(40, 1.0), (90, 0.5)]
    assert (data.eod_id, data.tokenizer_path) == (256, "bytes")
    assert [one.weight for one in open_run_data(configuration(f"data.train={good}")).train] == [1.0]


def test_what_does_not_fit_is_named_with_its_set(good: Path, tmp_path: Path) -> None:
    fingerprint = ByteTokenizer().fingerprint()
    for prefix, said in (
        (write(tmp_path / "foreign", 256, "f"), "was prepared with another tokenizer than bytes"),
        (write(tmp_path / "ends", 0, fingerprint), "its documents end with token 0, the tokenizer's with 256"),
        (write(tmp_path / "short", 256, fingerprint, 5), "5 tokens, too few for one sample"),
        (tmp_path / "absent", "no such file"),
    ):
        blend = f"data.train=[{{path: {good}, weight: 1}}, {{path: {prefix}, weight: 1}}]"
        with pytest.raises(DataError, match=said) as caught:
            open_run_data(configuration(blend))
        assert str(caught.value).startswith(str(prefix))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"tokenizer bytes: has 257 pieces, model\.vocab_size is 200"):
        open_run_data(configuration(f"data.train={good}", "model.vocab_size=200"))


def test_every_validation_set_is_checked_and_named_with_its_key(good: Path, tmp_path: Path) -> None:
    fingerprint = ByteTokenizer().fingerprint()
    other = write(tmp_path / "other", 256, fingerprint, 90)
    train = f"data.train={good}"
    data = open_run_data(configuration(train, f"data.validation={{b: {other}, a: {good}}}"))
    assert [(name, one.num_tokens) for name, one in data.validation.items()] == [("b", 90), ("a", 40)]
    assert list(open_run_data(configuration(train, f"data.validation={other}")).validation) == [""]
    assert open_run_data(configuration(train)).validation == {}
    for prefix, said in (
        (write(tmp_path / "foreign", 256, "f"), "was prepared with another tokenizer than bytes"),
        (write(tmp_path / "ends", 0, fingerprint), "its documents end with token 0, the tokenizer's with 256"),
        (write(tmp_path / "short", 256, fingerprint, 1), "holds 1 tokens, nothing to validate on"),
        (tmp_path / "absent", "no such file.*correct the path in the data section"),
    ):
        for sets, start in ((f"{{a: {good}, b: {prefix}}}", f"data.validation.b: {prefix}"), (prefix, str(prefix))):
            with pytest.raises(DataError, match=said) as caught:
                open_run_data(configuration(train, f"data.validation={sets}"))
            assert str(caught.value).startswith(start)
            assert "\n" not in str(caught.value)


def test_changed_sets_are_told_by_name(good: Path, tmp_path: Path) -> None:
    fingerprint = ByteTokenizer().fingerprint()
    for name in ("a", "b"):
        write(tmp_path / name, 256, fingerprint, 30)

    def opened(train: str, validation: str) -> RunData:
        return open_run_data(configuration(f"data.train={train}", f"data.validation={validation}"))

    a, b = tmp_path / "a", tmp_path / "b"
    both = f"[{{path: {a}, weight: 1}}, {{path: {b}, weight: 1}}]"
    before = opened(both, f"{{v: {good}}}").fingerprints()
    assert list(before) == ["train/a", "train/b", "validation/v"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    write(moved / "a", 256, fingerprint, 30)
    saved = Path("runs/r/checkpoints/step_00000007")
    same = opened(f"[{{path: {moved / 'a'}, weight: 3}}, {{path: {b}, weight: 1}}]", f"{{v: {good}, other: {a}}}")
    assert same.changes_since(before, saved) == []
    assert same.changes_since({}, saved) == []  # of a checkpoint that recorded none

    write(moved / "b", 256, fingerprint, 35)
    changed = opened(f"[{{path: {moved / 'b'}, weight: 1}}, {{path: {good}, weight: 1}}]", f"{{v: {moved / 'b'}}}")
    on = "; the run goes on at the same count of samples, in the sets as they are now"
    assert changed.changes_since(before, saved) == [
        f"data.train: a was a training set when {saved} was saved, and is not one now{on}",
        f"data.train: b holds other tokens than when {saved} was saved{on}",
        f"data.train: good was not a training set when {saved} was saved{on}",
        f"data.validation.v: holds other tokens than when {saved} was saved; its losses do not continue",
    ]
