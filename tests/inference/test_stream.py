"""Text as it comes: whole characters, nothing of a stop string, together what decoding at once gives, at a constant cost."""

import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.inference.stream import TextStream, continuation, token_text
from support.trained_runs import TrainedRuns

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["a", "b", "\u2581", "\u2581a", "\u2581\u2581", "\u2581the", "##b", "b</w>", "</w>", "the</w>", " ", " .", "n't",
         "\ufffd", "é", "🙂", "a\u2581b", "\u2581\u2581a", "<pad>", "|", ".", "0",
         "Ġa", "ðŁ", "Ļ", "ĤĢ", "ï¿½", "âĤ", "¬"]  # fmt: skip
LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS: dict[str, Any] = {
    "byte-level": decoders.ByteLevel(),
    "Llama's": decoders.Sequence(LLAMA),
    "Gemma's": decoders.Sequence(LLAMA[:3]),
    "three spaces off": decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 3, 0)]),
    "changed when joined": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "Q")]),
    "metaspace": decoders.Metaspace(),
    "metaspace, never first": decoders.Metaspace(prepend_scheme="never"),
    "WordPiece": decoders.WordPiece(),
    "ends of words": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "each token off its spaces": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)]),
    "none": None,
}
RULE = "sentencepiece, rewritten"  # "the" comes out as "THE", wherever it is put together
SENTENCES: dict[str, dict[str, Any]] = {
    "sentencepiece, prefixed": {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "byte_fallback": True},
    "sentencepiece, spaces removed": {"add_dummy_prefix": True, "byte_fallback": True},
    "sentencepiece, only removed": {"add_dummy_prefix": False, "byte_fallback": True},
    "sentencepiece, without bytes": {"add_dummy_prefix": True, "byte_fallback": False},
    RULE: {"byte_fallback": True, "denormalization_rule_tsv": "rule.tsv"},
}
LATE = {"changed when joined", "ends of words", "CTC", RULE}  # nothing is certain before the end
KINDS = ["ours", "bytes", *SENTENCES, *DECODERS]


def hugging_face(decoder: Any, path: Path) -> Tokenizer:
    """Every piece that could matter to a decoder, in a vocabulary with gaps."""
    vocabulary = {piece: 2 * index for index, piece in enumerate([*WORDS, *BYTES])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(path))
    return load_tokenizer("hugging_face", path)


@pytest.fixture(scope="module")
def tokenizer_of(trained_runs: TrainedRuns, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    folder = tmp_path_factory.mktemp("kinds")
    made = {
        "ours": load_tokenizer("sentencepiece", trained_runs.folder / "tokenizer.model"),
        "bytes": load_tokenizer("bytes", None),
    }
    lines = "".join(path.read_text(encoding="utf-8") for path in sotu_files()[:2]).splitlines()
    rule = folder / "rule.tsv"
    rule.write_text("74 68 65\t54 48 45\n")
    for kind, choices in SENTENCES.items():
        choices = {key: str(rule) if value == rule.name else value for key, value in choices.items()}
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=400, minloglevel=2,
            control_symbols=["<one>", "<two>"], user_defined_symbols=["\u2581", "\u2581\u2581", "\n"], **choices,
        )  # fmt: skip
        path = folder / f"{len(made)}.model"
        path.write_bytes(model.getvalue())
        made[kind] = load_tokenizer("sentencepiece", path)
    for kind, decoder in DECODERS.items():
        made[kind] = hugging_face(decoder, folder / f"{len(made)}.json")
    return made.__getitem__


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(tokenizer_of: Callable[[str], Tokenizer], request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer_of(request.param)


@pytest.fixture
def ours(tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_of("ours")


def pieces(
    tokenizer: Tokenizer, tokens: list[int], stops: list[str], prompt: Sequence[int] = ()
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops, prompt)
    told = []
    for token in tokens:
        told.append(stream.add(token))
        if stream.stopped:
            break
    return [*told, stream.finish()], stream


def runs_of_tokens(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Few distinct tokens, so that they repeat and meet often, with runs long enough to stay undecided for long."""
    few = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=6))
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(few), st.sampled_from([1, 1, 1, 1, 2, 3, 50])), max_size=30))
    return [token for token, count in drawn for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_are_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40)
    tokens = data.draw(some) if data.draw(st.booleans()) else runs_of_tokens(data, tokenizer)
    told, stream = pieces(tokenizer, tokens, [])
    whole = tokenizer.decode(tokens)
    assert "".join(told) == stream.text == whole
    assert stream.length == len(whole)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab .\n\ufffd\u2581é中🙂") | st.characters(exclude_categories=["Cs"])))
@example(text="  a  b")
@example(text="\u2581\u2581a")
def test_pieces_of_an_encoded_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, tokens, [])[0]) == tokenizer.decode(tokens)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_behind_a_stop_string(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Of tokens few enough to be looked at one by one."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    whole = tokenizer.decode(tokens)
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    inside = whole[begin : begin + data.draw(st.integers(1, 6))]
    stops = data.draw(st.lists(st.sampled_from([inside, inside[:1] + "Q", "the", " ", "\n\n"]), max_size=3))
    told, stream = pieces(tokenizer, tokens, stops)
    text = "".join(told)
    assert text == stream.text
    assert stream.length == len(text)
    assert whole.startswith(text) or stream.stopped  # bytes of a character that a stop string cut off decode anew
    for end in range(len(tokens) + 1):  # as the whole text would be searched after each token
        so_far = tokenizer.decode(tokens[:end])
        if places := [so_far.index(stop) for stop in stops if stop and stop in so_far]:
            assert (text, stream.stopped) == (so_far[: min(places)], True)
            return
    assert (text, stream.stopped) == (whole, False)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_text_behind_a_prompt(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Is what decoding both adds to decoding the prompt; with whole characters, to the prompt less one that it only begins."""
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)
    text = st.text(st.sampled_from("ab .\n\ufffd\u2581é中🙂"), max_size=12).map(tokenizer.encode)
    both = data.draw(text | some) if data.draw(st.booleans()) else runs_of_tokens(data, tokenizer)
    cut = data.draw(st.integers(0, len(both)))
    prompt, tokens = both[:cut], both[cut:]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(both)
    expected = continuation(tokenizer, prompt, tokens)
    assert whole.endswith(expected)
    if whole.startswith(before):
        assert expected == whole[len(before) :]
    stream = TextStream(tokenizer, [], prompt)
    told = [stream.add(token) for token in tokens]
    assert "".join([*told, stream.finish()]) == stream.text == expected
    assert stream.length == len(expected)
    stream = TextStream(tokenizer, [], prompt, whole_characters=True)
    told = [stream.add(token) for token in tokens]
    behind = "".join([*told, stream.finish()])
    shown = before.rstrip("\ufffd")
    if whole.startswith(shown):
        assert shown + behind == whole


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stop_string_behind_a_prompt(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Is looked for in the continuation alone."""
    both = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=25))
    cut = data.draw(st.integers(1, len(both)))
    prompt, tokens = both[:cut], both[cut:]
    whole = continuation(tokenizer, prompt, tokens)
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stops = [stop for stop in (whole[begin : begin + data.draw(st.integers(1, 4))], " ") if stop]
    stream = TextStream(tokenizer, stops, prompt)
    for token in tokens:
        if not stream.stopped:
            stream.add(token)
    stream.finish()
    for end in range(1, len(tokens) + 1):
        so_far = continuation(tokenizer, prompt, tokens[:end])
        if places := [so_far.index(stop) for stop in stops if stop in so_far]:
            assert (stream.text, stream.stopped) == (so_far[: min(places)], True)
            return
    assert (stream.text, stream.stopped) == (whole, False)


@pytest.mark.parametrize("letter", ["é", "中", "🙂"])
def test_a_character_on_both_sides_of_the_prompts_end(letter: str) -> None:
    tokenizer = load_tokenizer("bytes", None)
    tokens = list(f"a{letter}b".encode())
    for cut in range(2, len(letter.encode()) + 1):
        told = pieces(tokenizer, tokens[cut:], [], tokens[:cut])[0]
        assert "".join(told) == f"{letter}b"  # and behind the prompt's text, which ends before the character
        assert not any("\ufffd" in piece for piece in told)
        wrong = [*tokens[:cut], ord("b")]
        assert continuation(tokenizer, wrong[:cut], wrong[cut:]) == "b"
        stream = TextStream(tokenizer, [], wrong[:cut], whole_characters=True)
        assert stream.add(wrong[cut]) + stream.finish() == "\ufffdb"


@pytest.mark.parametrize("kind", ["Llama's", "metaspace"])
def test_a_space_begins_a_continuation(tokenizer_of: Callable[[str], Tokenizer], kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("a")[-1:]
    spaced, text = next(
        (token, both[1:])
        for token in range(tokenizer.vocab_size)
        if (both := tokenizer.decode([*prompt, token])).startswith("a ")
    )
    assert pieces(tokenizer, [spaced], [], prompt)[0] == [text, ""]
    assert token_text(tokenizer, spaced, begins=False) == continuation(tokenizer, prompt, [spaced]) == text
    assert token_text(tokenizer, spaced, begins=True) == text[1:]


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.tokens = tokenizer, 0
        self.vocab_size, self.eod_id = tokenizer.vocab_size, tokenizer.eod_id
        self.encode, self.encode_batch = tokenizer.encode, tokenizer.encode_batch
        self.undecided, self.fingerprint = tokenizer.undecided, tokenizer.fingerprint

    def decode(self, tokens: list[int]) -> str:
        self.tokens += len(tokens)
        return self._tokenizer.decode(tokens)


def sequences(tokenizer: Tokenizer, size: int) -> dict[str, list[int]]:
    """Texts of `size` tokens, and what could keep a text undecided: bytes in no order, one token for ever."""
    draw = random.Random(0)
    text = tokenizer.encode(sotu_files()[3].read_text(encoding="utf-8")[:2000])
    alike = [token for letter in (" ", "\u2581", "\n", "é", "🙂") for token in tokenizer.encode(letter)]
    return {
        "text": (text * size)[:size],
        "random": [draw.randrange(tokenizer.vocab_size) for _ in range(size)],
        **{f"only {token}": [token] * size for token in {*alike, tokenizer.eod_id}},
    }


@pytest.mark.parametrize("stops", [[], ["\ufffd" * 300 + "Q", "the people QQ"]], ids=["", "with stop strings"])
def test_the_cost_of_a_token_does_not_grow(tokenizer: Tokenizer, stops: list[str]) -> None:
    counting = Counting(tokenizer)
    for name, tokens in sequences(tokenizer, 2000).items():
        counting.tokens = 0
        told, _ = pieces(counting, tokens, stops)
        assert "".join(told) == tokenizer.decode(tokens), name
        assert counting.tokens < 30 * len(tokens), name  # all at each token: 1000 times


def test_the_cost_of_a_token_does_not_grow_with_its_prompt(tokenizer: Tokenizer) -> None:
    """A hundred tokens behind two thousand."""
    counting = Counting(tokenizer)
    for name, tokens in sequences(tokenizer, 2100).items():
        counting.tokens = 0
        told, _ = pieces(counting, tokens[2000:], [], tokens[:2000])
        assert "".join(told) == continuation(tokenizer, tokens[:2000], tokens[2000:]), name
        assert counting.tokens < 60 * len(tokens), name  # all at each token: 100 times


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LATE])
def test_text_comes_with_its_tokens(tokenizer_of: Callable[[str], Tokenizer], kind: str) -> None:
    """Not merely at the end; and a token costs two."""
    counting = Counting(tokenizer_of(kind))
    tokens = counting.encode("a a ab b a b a b" * 50)
    stream = TextStream(counting)
    counting.tokens, lags = 0, []
    for end, token in enumerate(tokens, 1):
        stream.add(token)
        lags.append(len(counting._tokenizer.decode(tokens[:end])) - stream.length)
    assert max(lags) == 0
    assert counting.tokens < 2.1 * len(tokens)


def test_decoders_that_know_no_certain_text(tmp_path: Path) -> None:
    """What takes spaces off the end of a text is tried without decoding: the library panics on texts of spaces."""
    for index, (steps, undecided) in enumerate([
        ([*LLAMA[:3], decoders.Strip(" ", 1, 1)], True),
        ([decoders.Fuse(), decoders.Metaspace()], True),
        ([decoders.Sequence(LLAMA[:3]), decoders.CTC()], True),
        ([decoders.Strip(" ", 1, 1), decoders.Sequence(LLAMA)], False),
    ]):  # fmt: skip
        made = hugging_face(decoders.Sequence(steps), tmp_path / f"{index}.json")
        assert made.undecided(0) == undecided
        assert made.undecided(1)  # no piece
        assert made.undecided(2 * len(WORDS))  # a byte


def test_a_rule_reaches_over_tokens(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    prefixed, rewritten = tokenizer_of("sentencepiece, prefixed"), tokenizer_of(RULE)
    assert (prefixed.undecided(5), rewritten.undecided(5)) == (False, True)
    # behind unknown, begin, end, two control pieces and three of ours
    tokens = [BYTES.index(f"<0x{byte:02X}>") + 8 for byte in b"of the"]
    assert pieces(prefixed, tokens, [])[0] == [*"of the", ""]
    assert pieces(rewritten, tokens, [])[0] == [""] * 6 + ["of THE"]


@pytest.mark.parametrize("letter", ["é", "中", "🙂"])
def test_no_half_character_is_told(ours: Tokenizer, letter: str) -> None:
    tokens = ours.encode(f"we {letter}{letter} the")
    told, _ = pieces(ours, tokens, [])
    assert "".join(told) == f"we {letter}{letter} the"
    assert not any("\ufffd" in piece for piece in told)


@pytest.fixture
def letters(ours: Tokenizer) -> list[int]:
    """Tokens of "abcabXabcd", each of one letter."""
    return [token for letter in "abcabXabcd" for token in ours.encode(letter)]


def test_what_may_begin_a_stop_string_is_held_back(ours: Tokenizer, letters: list[int]) -> None:
    told, _ = pieces(ours, letters, ["abXabcd"])
    assert told == ["", "", "abc", *[""] * 4, "", "", "", ""]


def test_the_first_of_two_stop_strings_ends_the_text(ours: Tokenizer, letters: list[int]) -> None:
    told, stream = pieces(ours, letters, ["cabX", "Xa"])
    assert ("".join(told), stream.stopped) == ("ab", True)


def test_what_only_resembles_a_stop_string_is_told_at_the_end(ours: Tokenizer, letters: list[int]) -> None:
    told, stream = pieces(ours, letters, ["Xabce"])
    assert ("".join(told), stream.stopped) == ("abcabXabcd", False)
