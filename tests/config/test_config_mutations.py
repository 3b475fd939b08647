"""A thousand mutated configurations: each is accepted, or refused by lines; of the accepted ones thirty train two steps."""

import contextlib
import functools
import io
import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest
import torch

from overtok_megatron import cli
from overtok_megatron.config.counts import bytes_per_rank
from overtok_megatron.config.derived import accumulation_steps, train_iters
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.errors import OvertokError
from support.config_mutations import RAW, SMALL, Case, Mutator, written
from support.distributed_harness import run_ranks

SEED = 20250711
GUARD = 20  # seconds for one configuration
LONGEST = 300  # characters of an error
TRAINED = 30
SMALL_BYTES, SMALL_TOKENS, FEW_LAYERS = 2**23, 2**13, 6  # what a test trains


@dataclass
class Survey:
    """What became of the cases. faults: what must not happen, as text."""

    accepted: int = 0
    trained: int = 0
    refused_in_training: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class _TooSlow(BaseException):
    """Not an Exception: nothing on the way may take it for a mistake of the user."""


@contextlib.contextmanager
def guard() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(GUARD)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def wrong_line(text: str) -> str | None:
    """What is wrong with an error as the user sees it, a line for each problem, or None."""
    lines = text.removesuffix("\n").split("\n")
    for line in lines:
        if not line.startswith("error: "):
            return "a line that does not begin with error:"
        if len(line) >= LONGEST:
            return f"a line of {len(line)} characters"
        if not line.isprintable():
            return "characters that a terminal does not show"
    return None if len(set(lines)) == len(lines) else "a line comes twice"


def resolve(case: Case, survey: Survey) -> bool:
    """Ask `overtok config`; whether it accepts the case."""
    for name, content in case.files.items():
        Path(name).write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    arguments = ["config", "run.yaml", *case.overrides, "--processes", str(case.processes)]
    story = f"case {case.number} {case.keys} {arguments[2:]}"
    try:
        with guard(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
        out.getvalue().encode()  # what a terminal gets
    except _TooSlow:
        survey.faults.append(f"{story}: not done after {GUARD} s")
        return False
    except BaseException:
        survey.faults.append(f"{story}: {traceback.format_exc()}")
        return False
    finally:
        for name in case.files:
            if name != "run.yaml":
                Path(name).unlink()
    if code == 0:
        if err.getvalue() or not out.getvalue():
            survey.faults.append(f"{story}: exit code 0 and {err.getvalue()!r}")
        return True
    text = err.getvalue()
    survey.messages.append(text)
    wrong = "printed something beside" if out.getvalue() else wrong_line(text)
    if code != 2 or wrong:
        survey.faults.append(f"{story}: exit code {code}, {wrong}: {text}")
    return False


def small_run(case: Case) -> RunConfig | None:
    """Two steps of an accepted case, if it is small enough for a test."""
    for name, content in case.files.items():
        Path(name).write_bytes(content)
    config = load_config("run.yaml", case.overrides).config
    for name in case.files:
        Path(name).unlink()
    training = config.training
    ranks_fit = case.processes == 1 and config.model.num_layers <= FEW_LAYERS
    tokens = training.micro_batch_size * accumulation_steps(config, 1) * config.data.seq_length if ranks_fit else 0
    if not ranks_fit or bytes_per_rank(config, 1).total > SMALL_BYTES or tokens > SMALL_TOKENS:
        return None
    steps = {"train_iters": min(2, train_iters(config)), "train_tokens": None}
    output = {"output_directory": f"runs/{case.number}", "num_threads": 1}
    config = config.model_copy(update={"training": training.model_copy(update=steps | output)})
    try:
        validate(config, 1, lambda key: "place")  # a warm-up may be longer than two steps
    except OvertokError:
        return None
    return config


def train(case: Case, config: RunConfig, survey: Survey, *, guarded: bool) -> None:
    """Two steps. Compiling may take longer than the guard allows: the first run compiles, and each with kernels: compile."""
    from overtok_megatron.training.trainer import Trainer

    folder = Path(config.training.output_directory)
    folder.mkdir(parents=True)
    err = io.StringIO()
    try:
        guarded = guarded and config.training.kernels != "compile"
        with guard() if guarded else contextlib.nullcontext(), contextlib.redirect_stderr(err):
            survey.trained += Trainer(config, device=torch.device("cpu"), num_threads=1).run()
    except OvertokError as error:
        survey.refused_in_training.append(str(error))
        wrong = wrong_line("\n".join(f"error: {line}" for line in error.lines))
        if wrong:
            survey.faults.append(f"training case {case.number} {case.keys} {case.overrides}: {wrong}: {error}")
    except _TooSlow:
        survey.faults.append(f"training case {case.number} {case.keys} {case.overrides}: not done after {GUARD} s")
    except BaseException:
        survey.faults.append(f"training case {case.number} {case.keys} {case.overrides}: {traceback.format_exc()}")
    finally:
        shutil.rmtree(folder)


def survey_cases(folder: Path, count: int, to_train: int) -> Survey:
    """Try all cases in `folder`; train accepted ones, spread over all, until `to_train` have."""
    os.chdir(folder)
    cli.build_parser = functools.cache(cli.build_parser)  # it takes longer than a configuration does
    mutator, survey = Mutator(SEED), Survey()
    small = []
    for number in range(count):
        case = mutator.case(number)
        if resolve(case, survey):
            survey.accepted += 1
            config = small_run(case)
            if config is not None:
                small.append((case, config))
    stride = max(1, len(small) // (to_train + to_train // 2))
    for case, config in [one for start in range(stride) for one in small[start::stride]]:
        if survey.trained >= to_train:
            break
        train(case, config, survey, guarded=survey.trained > 1)
    return survey


def survey_raw_keys(folder: Path) -> Survey:
    """Train with every form of DeepSpeed's own keys that a configuration accepts: only DeepSpeed knows what they may hold."""
    os.chdir(folder)
    survey = Survey()
    for number, raw in enumerate(RAW):
        case = Case(number, {"run.yaml": written(SMALL).encode()}, [f"deepspeed={raw}"], 1)
        if resolve(case, survey):
            config = small_run(case)
            assert config is not None
            survey.accepted += 1
            train(case, config, survey, guarded=survey.trained > 1)
    return survey


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes a dull set. " * 40, encoding="utf-8")
    prepare([text], tmp_path / "set", ByteTokenizer())
    return tmp_path


def check(workplace: Path, count: int, to_train: int, timeout: float) -> None:
    (survey,) = run_ranks(1, survey_cases, workplace, count, to_train, timeout=timeout)
    assert not survey.faults, "\n".join([f"{len(survey.faults)} faults", *survey.faults[:20]])
    assert survey.accepted * 3 >= count
    assert len(survey.messages) * 4 >= count
    assert survey.trained >= to_train, survey.refused_in_training


@pytest.mark.timeout(480)  # on a busy machine; otherwise a third of a minute
def test_a_thousand_configurations(workplace: Path) -> None:
    check(workplace, 1000, TRAINED, timeout=450)


def test_raw_deepspeed_keys(workplace: Path) -> None:
    (survey,) = run_ranks(1, survey_raw_keys, workplace)
    assert not survey.faults, "\n".join(survey.faults)
    assert survey.trained + len(survey.refused_in_training) == survey.accepted
    assert survey.trained >= 5
    told = "\n".join(survey.refused_in_training)
    for words in (
        "zero_optimization: DeepSpeed says: x: 1:",
        "data_types: DeepSpeed says: 'fp64'",
        "amp: DeepSpeed says: ",
    ):
        assert words in told


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_twenty_thousand_configurations(workplace: Path) -> None:
    check(workplace, 20_000, 4 * TRAINED, timeout=1100)
