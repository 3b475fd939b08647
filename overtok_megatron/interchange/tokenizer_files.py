"""A run's tokenizer as files that transformers' AutoTokenizer loads: the same ids on text, or none at all.

Hugging Face's tokenizer.json is copied. A sentencepiece model of pieces by merges, and plain bytes, are written as a
tokenizer.json that gives the same ids; the sentencepiece model lies beside it.
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
from overtok_megatron.interchange.sample_text import SAMPLE_TEXT
from overtok_megatron.run_folder import TOKENIZER_FILES

_FILE, _MODEL_FILE = TOKENIZER_FILES["hugging_face"], TOKENIZER_FILES["sentencepiece"]
_SPACE = "\u2581"  # sentencepiece's sign for a space


def write_tokenizer(config: RunConfig, folder: Path, eod_id: int) -> list[str]:
    """Write the tokenizer's files into an exported folder; returns notes for the user where they do not give the same ids."""
    section = config.tokenizer
    tokenizer = configured_tokenizer(section)
    if not _write_tokenizer_json(section.type, section.path, folder, eod_id):
        return [f"the sentencepiece model is not one of merges (BPE): only {_MODEL_FILE} is written"]
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
    if theirs.encode(SAMPLE_TEXT, add_special_tokens=False).ids == tokenizer.encode(SAMPLE_TEXT):
        return []
    if section.type == "hugging_face":
        return ["transformers gives other ids for a text that holds special tokens"]
    (folder / _FILE).unlink()
    return [f"{_FILE} would give other ids than the run's tokenizer: only {_MODEL_FILE} is written"]


def _write_tokenizer_json(kind: str, path: str | None, folder: Path, eod_id: int) -> bool:
    """Write tokenizer.json, and the sentencepiece model beside it; False where the model cannot be written as one."""
    if kind == "bytes":
        from_bytes(eod_id).save(str(folder / _FILE))
        return True
    assert path is not None
    source = Path(path)
    if kind == "hugging_face":
        source = source / _FILE if source.is_dir() else source
        (folder / _FILE).write_bytes(read_text(source).encode())  # without a byte-order mark, which the library refuses
        return True
    shutil.copyfile(source, folder / _MODEL_FILE)
    converted = from_sentencepiece(source)
    if converted is None:
        return False
    converted.save(str(folder / _FILE))
    return True


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer | None:
    """A tokenizer of `tokenizers` with the same pieces and merges; None where the model is not one of merges."""
    processor = SentencePieceProcessor(model_file=str(path))
    pieces = [processor.IdToPiece(number) for number in range(processor.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    user_defined = _user_defined(path)
    merges = _merges(processor, ids, set(user_defined))
    if merges is None:
        return None
    unknown = pieces[processor.unk_id()]
    model = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    converted = tokenizers.Tokenizer(model)
    prefix = processor.EncodeAsPieces("a")[0][0] == _SPACE  # whether a text begins with a space of its own
    prepend: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    converted.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    converted.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [pieces[number] for number in ids.values() if processor.IsControl(number)]
    converted.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in user_defined])
    converted.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in control])
    return converted


def _merges(
    processor: SentencePieceProcessor, ids: dict[str, int], user_defined: set[str]
) -> list[tuple[str, str]] | None:
    """The merges (left piece, right piece) of a sentencepiece model, first ones first; None where a piece has no merge.

    Pieces are ranked by score: those of merges are numbered downwards from 0. Pieces that a user defined have score 0 too, but
    are not merges.
    """
    found = []
    for piece, number in ids.items():
        special = processor.IsByte(number) or processor.IsControl(number) or number == processor.unk_id()
        if special or len(piece) < 2 or piece in user_defined:
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
        if not pairs:
            return None
        rank = -processor.GetScore(number)
        found += [(rank, ids[left], ids[right], (left, right)) for left, right in pairs]
    found.sort(key=lambda merge: merge[:3])
    return [pair for *_, pair in found]


def _user_defined(path: Path) -> list[str]:
    """Pieces that a user defined, longest first: they are cut out of a text before anything else."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED  # type: ignore[attr-defined]
    return sorted((piece.piece for piece in content.pieces if piece.type == kind), key=len, reverse=True)


def from_bytes(eod_id: int) -> tokenizers.Tokenizer:
    """Token b is byte b; the token that ends documents is called <|endoftext|>."""
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
