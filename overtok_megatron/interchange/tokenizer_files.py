"""A run's tokenizer as files that transformers' AutoTokenizer loads: the same ids on text, or none at all.

Hugging Face's tokenizer.json is copied. A sentencepiece model of pieces by merges, and plain bytes, are written as a
tokenizer.json that does the same; the sentencepiece model lies beside it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers, pre_tokenizers

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.tokenizers.loading import configured_tokenizer
from overtok_megatron.files import read_text
from overtok_megatron.interchange.passage import PASSAGE

_FILE = "tokenizer.json"
_SPACE = "\u2581"  # sentencepiece's sign for a space


def write_tokenizer(config: RunConfig, folder: Path, eod_id: int) -> list[str]:
    """Write the tokenizer's files into an exported folder; returns notes for the user where it cannot be had in full."""
    section = config.tokenizer
    tokenizer = configured_tokenizer(section)
    if section.type == "hugging_face":
        assert section.path is not None
        path = Path(section.path)
        text = read_text(
            path / _FILE if path.is_dir() else path
        )  # without a byte-order mark, which the library refuses
        (folder / _FILE).write_bytes(text.encode())
    elif section.type == "sentencepiece":
        assert section.path is not None
        shutil.copyfile(section.path, folder / "tokenizer.model")
        made = from_sentencepiece(Path(section.path))
        if made is None:
            return ["the sentencepiece model is not one of merges (BPE): only tokenizer.model is written"]
        made.save(str(folder / _FILE))
    else:
        from_bytes(eod_id).save(str(folder / _FILE))
    theirs = tokenizers.Tokenizer.from_file(str(folder / _FILE))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.data.seq_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": theirs.id_to_token(eod_id),
        "pad_token": theirs.id_to_token(eod_id),
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if theirs.encode(PASSAGE, add_special_tokens=False).ids == tokenizer.encode(PASSAGE):
        return []
    if section.type == "hugging_face":
        return ["transformers gives other ids for a text that holds special tokens"]
    (folder / _FILE).unlink()
    return ["tokenizer.json would give other ids than the run's tokenizer: only tokenizer.model is written"]


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer | None:
    """The same pieces and merges for `tokenizers`; None where the model is not one of merges."""
    processor = SentencePieceProcessor(model_file=str(path))
    pieces = [processor.IdToPiece(number) for number in range(processor.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    control = [number for number in ids.values() if processor.IsControl(number)]
    unknown = processor.unk_id()
    text = [n for n in ids.values() if not (processor.IsByte(n) or processor.IsControl(n) or n == unknown)]
    # Pieces that a user defined have score 0 and are no merges; those of merges are numbered downwards from 0 on.
    ranks = {pieces[n]: processor.GetScore(n) for n in text}
    user = _user_defined(path)
    merges = []
    for piece, score in ranks.items():
        if len(piece) < 2 or piece in user:
            continue
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        ways = [pair for pair in ways if pair[0] in ids and pair[1] in ids]
        if not ways:
            return None
        merges += [(-score, ids[left], ids[right], (left, right)) for left, right in ways]
    merges.sort(key=lambda merge: merge[:3])
    model = models.BPE(
        vocab=ids, merges=[merge[3] for merge in merges], unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    prefix = processor.EncodeAsPieces("a")[0][0] == _SPACE
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    added = [tokenizers.AddedToken(piece, normalized=False) for piece in user]
    made.add_tokens(added)
    made.add_special_tokens([tokenizers.AddedToken(pieces[n], special=True, normalized=False) for n in control])
    return made


def _user_defined(path: Path) -> list[str]:
    """Pieces that a user defined, longest first: they are cut out of a text before anything else."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED  # type: ignore[attr-defined]
    return sorted((piece.piece for piece in content.pieces if piece.type == kind), key=len, reverse=True)


def from_bytes(eod_id: int) -> tokenizers.Tokenizer:
    """Token b is byte b; the one that ends documents is called <|endoftext|>."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters, beyond = {}, 256
    for byte in range(256):  # the letters that byte-level tokenizers write for bytes
        letters[byte] = chr(byte) if byte in printable else chr(beyond)
        beyond += byte not in printable
    made = tokenizers.Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True, normalized=False)])
    assert made.token_to_id("<|endoftext|>") == eod_id
    return made
