"""Text as it comes: whole characters, nothing of a stop string, and together what decoding at once gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_runs import VOCAB, TrainedRuns

from overtok_megatron.data.tokenizer import Tokenizer, load_tokenizer
from overtok_megatron.inference.stream import TextStream

tokens_of = st.lists(st.integers(1, VOCAB - 1) | st.integers(2, 258), max_size=40)  # the latter are mostly bytes


@pytest.fixture(scope="module")
def tokenizer(trained_runs: TrainedRuns) -> Tokenizer:
    return load_tokenizer("sentencepiece", trained_runs.folder / "tokenizer.model")


def pieces(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    told = []
    for token in tokens:
        told.append(stream.add(token))
        if stream.stopped:
            break
    return [*told, stream.finish()], stream


@settings(max_examples=200)
@given(tokens=tokens_of)
def test_pieces_are_the_text(tokenizer: Tokenizer, tokens: list[int]) -> None:
    told, stream = pieces(tokenizer, tokens, [])
    assert "".join(told) == stream.text == tokenizer.decode(tokens)


@settings(max_examples=200)
@given(tokens=tokens_of, data=st.data())
def test_nothing_behind_a_stop_string(tokenizer: Tokenizer, tokens: list[int], data: st.DataObject) -> None:
    whole = tokenizer.decode(tokens)
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    inside = whole[begin : begin + data.draw(st.integers(1, 6))]
    stops = data.draw(st.lists(st.sampled_from([inside, inside[:1] + "Q", "the", " ", "\n\n"]), max_size=3))
    told, stream = pieces(tokenizer, tokens, stops)
    text = "".join(told)
    assert text == stream.text
    assert whole.startswith(text) or stream.stopped  # bytes of a character that a stop string cut off decode anew
    assert not any(stop in text for stop in stops if stop)
    if not any(stop in tokenizer.decode(tokens[:end]) for stop in stops if stop for end in range(len(tokens) + 1)):
        assert text == whole


@pytest.mark.parametrize("letter", ["é", "中", "🙂"])
def test_no_half_character_is_told(tokenizer: Tokenizer, letter: str) -> None:
    tokens = tokenizer.encode(f"we {letter}{letter} the")
    told, _ = pieces(tokenizer, tokens, [])
    assert "".join(told) == f"we {letter}{letter} the"
    assert not any("\ufffd" in piece for piece in told)


def test_a_stop_string_in_pieces(tokenizer: Tokenizer) -> None:
    tokens = [token for letter in "abcabXabcd" for token in tokenizer.encode(letter)]
    assert pieces(tokenizer, tokens, ["abXabcd"])[0] == ["", "", "abc", *[""] * 4, "", "", "", ""]
    told, stream = pieces(tokenizer, tokens, ["cabX", "Xa"])
    assert ("".join(told), stream.stopped) == ("ab", True)
    assert "".join(pieces(tokenizer, tokens, ["Xabce"])[0]) == "abcabXabcd"
