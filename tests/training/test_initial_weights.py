"""A run that starts from another checkpoint's weights: those weights, fresh optimizers, on every layout."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param

from overtok_megatron.checkpoint.changes import check_same_model
from overtok_megatron.checkpoint.inspection import describe_checkpoint
from overtok_megatron.checkpoint.starting_point import starting_point
from overtok_megatron.checkpoint.store import CheckpointStore, find_checkpoint, read_manifest, verify_checkpoint
from overtok_megatron.checkpoint.weights_only import (
    read_dense_weights,
    read_rows,
    weight_shapes,
    write_weights,
)
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.inference.loading import load_trained
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import load_weights
from overtok_megatron.training.saving import Saver
from overtok_megatron.training.trainer import Trainer
from support.assembling import cpu_model
from support.dataset_factory import write_dataset
from support.distributed_harness import run_ranks
from support.expect_error import expect_error
from support.layouts import CPU, EOD, Layout, layout, layout_config, own_tokens, stream
from support.reference import Reference, hugging_face_names

ADAM = {"optimizer": "adam"}
HALF = {"precision": "bf16"}
SINGLE = layout("z1", micro=6, over=ADAM)
CASES: dict[int, dict[str, Layout]] = {
    4: {"TP2xPP2": layout("tp2 pp2 z1", over=ADAM)},
    1: {"single": SINGLE, "single, bf16": layout("z1", micro=6, over=ADAM, training=HALF)},
    2: {
        "DP2, ZeRO 3": layout("z3", over=ADAM),
        "TP2, no ZeRO": layout("tp2", micro=6, over=ADAM),
        "CP2, ZeRO 2, bf16": layout("cp2 z2", micro=6, over=ADAM, training=HALF),
        "DP2, ZeRO 3, bf16": layout("z3", over=ADAM, training=HALF),
        "DP2, no ZeRO, bf16": layout("", micro=6, over=ADAM, training=HALF),
    },
}
STEPS = 3


def trained_reference() -> Reference:
    """A model that has been trained for a while, by other code than this project's."""
    reference = Reference(layout_config(SINGLE), EOD)
    for batch in stream()[-4:]:
        reference.step(batch)
    return reference


def our_weights(reference: Reference) -> dict[str, torch.Tensor]:
    model = cpu_model(reference.config)
    theirs = dict(reference.model.named_parameters())
    ours = {id(weight): name for name, weight in model.named_parameters()}
    found = {ours[id(weight)]: theirs[name].detach() for name, weight in hugging_face_names(model).items()}
    found["embedding.over_encoding.projection"] = torch.cat([part.detach() for part in reference.projections], dim=1)
    return found


def pieces(rows: torch.Tensor, size: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    start = 0
    for part in rows.split(size):
        yield start, {"weight": part.clone()}
        start += part.shape[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    reference, run = trained_reference(), tmp_path_factory.mktemp("source")
    dense, rows = our_weights(reference), reference.rows()
    write_weights(run, reference.config, dense.items(), pieces(rows, 100), eod_id=EOD, tokenizer_fingerprint="none")
    return run, reference


def start_from(cases: dict[str, Layout], runs: list[Path], saved: Path | None) -> list[tuple[float, list[float], bool]]:
    """One rank's work: validation loss before a step, losses, and whether master weights and rows are those of the file.

    All cases start from the first run, the first of them from each. saved: where a case is saved as
    it starts, with its optimizer state.
    """
    results = []
    first, *others = cases.values()
    for case, run in [*((first, run) for run in runs), *((case, runs[0]) for case in others)]:
        path = find_checkpoint(run)
        dense = dict(read_dense_weights(path, read_manifest(path)))
        rows = torch.cat([values["weight"] for _, values in read_rows(path)])
        config = layout_config(case)
        engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
        load_weights(engine, path)
        same = True
        if config.parallel.tensor_parallel_size == 1:
            state = engine.dense_weights()
            for name, parameter in engine.model.named_parameters():
                low = config.training.precision == "bf16" and config.parallel.zero_stage > 0
                master = safe_get_full_fp32_param(parameter) if low else None
                given = dense[name].to(torch.bfloat16).float() if config.training.precision == "bf16" else dense[name]
                same &= master is None or torch.equal(master, dense[name])
                same &= torch.equal(state[name].float(), given)
        assert engine.tables is not None
        store = engine.tables.store
        same &= torch.equal(store.rows.weight, rows[store.start : store.stop]) and engine.tables.num_ever_updated() == 0
        batch = own_tokens(engine, stream()[0])
        both = batch.flatten(0, 1)[:, :-1], batch.flatten(0, 1)[:, 1:]
        validation, _ = engine.evaluate([both, both])
        if saved is not None:
            saver = Saver(engine, CheckpointStore(saved), eod_id=EOD, tokenizer_fingerprint="none")
            saver.save(0, 0)
            saver.finish()
        losses = [engine.step(own_tokens(engine, batch), 3e-3).loss for batch in stream()[:STEPS]]
        results.append((validation, losses, same))
    return results


@pytest.mark.ci
def test_every_layout_starts_from_the_weights(source: tuple[Path, Reference], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run, reference = source
    full = tmp_path / "full"  # with optimizer state, of four ranks: as good a start
    before = reference.loss(stream()[0])
    expected = restarted(reference)
    for world, cases in CASES.items():
        runs = [run, full] if world == 2 else [run]
        names = [*([next(iter(cases))] * (len(runs) - 1)), *cases]
        for rank in run_ranks(world, start_from, cases, runs, full if world == 4 else None, timeout=200):
            for name, (validation, losses, same) in zip(names, rank, strict=True):
                tolerance = 1e-5 if cases[name].training.get("precision") != "bf16" else 4e-3
                assert same, name
                assert validation == pytest.approx(before, rel=tolerance), name
                assert losses == pytest.approx(expected, rel=tolerance), name


def restarted(reference: Reference) -> list[float]:
    """Losses of first steps from a model's weights, with optimizers that know of no step before."""
    fresh = Reference(reference.config, EOD)
    fresh.model.load_state_dict(reference.model.state_dict())
    with torch.no_grad():
        for mine, theirs in ((fresh.tables, reference.tables), (fresh.projections, reference.projections)):
            for own, other in zip(mine, theirs, strict=True):
                own.copy_(other)
    return [fresh.step(batch) for batch in stream()[:STEPS]]


def test_what_is_written_is_a_checkpoint(source: tuple[Path, Reference]) -> None:
    run, reference = source
    path = find_checkpoint(run)
    manifest = verify_checkpoint(path)
    assert "weights only" in describe_checkpoint(path)
    assert {name.split("/")[0] for name in manifest.files} == {"dense", "tables"}
    dense = dict(read_dense_weights(path, manifest))
    assert {name: tuple(weight.shape) for name, weight in dense.items()} == weight_shapes(reference.config)
    for name, weight in our_weights(reference).items():
        assert torch.equal(dense[name], weight), name


def test_what_does_not_fit_leaves_nothing(source: tuple[Path, Reference], tmp_path: Path) -> None:
    run, reference = source
    dense, rows = our_weights(reference), reference.rows()
    name = "head.norm.weight"

    def written(weights: dict[str, torch.Tensor], values: torch.Tensor = rows, folder: Path = tmp_path) -> None:
        chunks = pieces(values, 100)
        write_weights(folder, reference.config, weights.items(), chunks, eod_id=EOD, tokenizer_fingerprint="none")

    expect_error(lambda: written({key: value for key, value in dense.items() if key != name}), name, "missing")
    expect_error(lambda: written(dense | {name: torch.ones(5)}), name, "[5]", "[48]")
    expect_error(lambda: written(dense | {"other": torch.ones(5)}), "other", "no weight of this model")
    expect_error(lambda: written(dense, rows[:-1]), f"{len(rows) - 1} of {len(rows)} rows")
    expect_error(lambda: written(dense, rows[:, :4]), "of width 4")
    expect_error(lambda: written(dense, folder=run), "holds checkpoints already")
    assert not CheckpointStore(tmp_path).complete() and not list((tmp_path / "checkpoints").iterdir())


def test_another_model_is_named(source: tuple[Path, Reference], tmp_path: Path) -> None:
    path = find_checkpoint(source[0])
    other = layout_config(replace(SINGLE, over={**SINGLE.over, "table_rows": 107})).model_dump(mode="json")
    message = "over_encoding.table_rows is 97 there and 107 in this run; set it to 97, or start elsewhere"
    expect_error(lambda: check_same_model(other, read_manifest(path), path, "start elsewhere"), str(path), message)
    nowhere = run_config(tmp_path, "run", 1, initial_checkpoint=str(tmp_path / "nowhere"))
    expect_error(lambda: starting_point(nowhere), "training.initial_checkpoint", "nowhere", "no checkpoint here")


def run_config(folder: Path, name: str, steps: int, **training: str) -> RunConfig:
    plain = layout_config(SINGLE)
    values = plain.model_dump(mode="json")
    values["tokenizer"]["path"] = str(folder / "tokenizer.model")
    values["data"] |= {"train": str(folder / "set"), "validation": str(folder / "set")}
    values["training"] |= {"output_directory": str(folder / name), "train_iters": steps, "validation_interval": 1}
    values["training"] |= training
    values["model"]["vocab_size"] = 300
    values["logging"]["tensorboard"] = False
    return RunConfig.model_validate(values)


def whole_runs(folder: Path) -> list[tuple[int, float, float]]:
    """(first step, validation loss before it, validation loss at the end) of runs that follow each other."""
    first = run_config(folder, "first", 2)
    second = run_config(folder, "second", 1, initial_checkpoint=str(folder / "first"))
    longer = run_config(folder, "second", 2, initial_checkpoint=str(folder / "first"))
    results = []
    for config in (first, second, longer):
        Path(config.training.output_directory).mkdir(exist_ok=True)
        run = Trainer(config, device=CPU, num_threads=1)
        resume, before = run._resume, []

        def watched(resume=resume, run=run, before=before) -> int:  # type: ignore[no-untyped-def]
            first_step: int = resume()
            before += [first_step, run._validate(0)["validation/loss"]]
            return first_step

        run._resume = watched  # type: ignore[method-assign]
        run.run()
        results.append((*before, run._validate(0)["validation/loss"]))
    trained = load_trained(folder / "second", CPU)
    assert trained.step == 2
    return results


def test_a_run_starts_from_another_and_goes_on_from_itself(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the people of the united states in order to form a more perfect union\n" * 40)
    train_sentencepiece([text], 300, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "tokenizer.model")
    documents = [[*tokenizer.encode(line), 0] for line in text.read_text().splitlines()]
    write_dataset(tmp_path / "set", documents, 300, tokenizer.fingerprint())
    (first, second, longer) = run_ranks(1, whole_runs, tmp_path)[0]
    assert [first[0], second[0], longer[0]] == [0, 0, 1]
    assert second[1] == first[2]  # bit for bit the model that the first run ended with
    assert longer[1] == second[2]
