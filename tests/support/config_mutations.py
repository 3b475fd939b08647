"""Seeded mutations of a small configuration, drawn from the schema's own types: what a hurried or hostile user may write.

A case is a set of files, overrides and a number of ranks. Nothing here knows whether the package should accept it.
"""

import random
import types
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from overtok_megatron.config.schema import RunConfig

SMALL = {
    "model": {"vocab_size": "257", "hidden_size": "32", "intermediate_size": "48", "num_layers": "2",
              "num_attention_heads": "2"},
    "tokenizer": {"type": "bytes"},
    "data": {"train": "set", "seq_length": "16"},
    "optimizer": {"learning_rate": "1e-3"},
    "training": {"output_directory": "run", "micro_batch_size": "2", "global_batch_size": "4", "train_iters": "8",
                 "precision": "fp32"},
}  # fmt: skip
TABLES = {"enabled": "true", "ngram_order": "3", "num_slices": "1", "table_rows": "3001"}
PATHS = ["set", "./set", "set", "missing", "a/b/c", "run.yaml", "/", "'set '", "ü", '"a\\0b"', "x" * 300, "y/" * 1500]
NUMBERS = ["0", "-1", "1", "2", "3", "7", "1e-4", "1E5", "1.0", "2.0", "-0.0", "0.1", "1e308", "1e999", "-1e39", "1e-320",
           ".inf", "-.inf", ".nan", "2147483647", "2147483648", "4294967296", "9223372036854775807", "18446744073709551616",
           "-9223372036854775809", "1000000000000000000", "9" * 400, "0x10", "0x" + "f" * 400, "0b11", "0o17", "010",
           "1_000", "1__0", "1:30", "+5", "1,000", "5%", "1e", "0x", "_1", "1.5.2", "٣"]  # fmt: skip
SCALARS = ["null", "~", "", "true", "True", "yes", "on", "off", "no", "'1'", '"2"', "none", "auto", "2024-01-01",
           "2024-01-01T10:00:00Z", "!!timestamp 2024-01-01", "!!binary aGk=", "!!binary '*'", "!!int x", "!!int ''",
           "!!float ''", "!!float x", "!!bool maybe", "!!null x", "!!str 3", "!!set {a, b}", "!!omap [a: 1]", "!!omap x",
           "!!python/object/apply:os.system ['true']", "!mine 3", "*nowhere", "&a 3", "&a [*a]", "&a {b: *a}", "<<",
           '"\\ud800"', '"\\x1b[31m"', '"a\\nb"', '"\\0"', "'ein \"Wort\"'", "|\n    block\n    text",
           ">-\n    folded\n    text", "'", '"', "`", "@", "%x", "- 1", "? a", "a: b", "#", "x" * 400, "ä" * 200,
           "\U0001f600", "\u2028", "{{}}", "${HOME}", "\x07", "\x00", "\ufeff"]  # fmt: skip
SHAPES = ["[]", "{}", "[1, 2]", "[[1], [2]]", "[null]", "{a: 1}", "{1: 2}", "{null: 1}", "{[1]: 2}", "{? {a: 1} : 2}",
          "[1, {a: 1, a: 2}]", "{a: {b: {c: {d: {}}}}}", "[" * 60 + "]" * 60, "[" * 3000, "{a: [1, .inf]}", "{a: .nan}",
          "{true: 1, 'true': 2}", "[a, b", "{a: 1", "]", "}", "{a, b}", "[" + "1, " * 3000 + "1]", "{<<: {a: 1}, b: 2}",
          "{<<: [{a: 1}, {b: 2}]}", "{<<: 3}", "{2024-01-01: x}", "{!!timestamp 2024-01-01: x}", "{'': 1}", "{a.b: 1}",
          "{a: &x {b: 1}, c: *x}"]  # fmt: skip
RAW = ["{}", "{steps_per_print: 5}", "{zero_optimization: {overlap_comm: false}}", "{zero_optimization: {stage: 3}}",
       "{gradient_clipping: 1.0}", "{wall_clock_breakdown: maybe}", "{zero_optimization: 3}", "{zero_optimization: {x: 1}}",
       "{fp16: {enabled: true}}", "{nonsense: {a: [1, 2]}}", "{aio: {block_size: 1}}", "{train_batch_size: 4}",
       "{zero_optimization: {reduce_bucket_size: -1}}", "{zero_optimization: {reduce_bucket_size: many}}",
       "{bf16: {enabled: 3}}", "{bf16: null}", "{data_types: {grad_accum_dtype: fp64}}", "{gradient_accumulation_steps: auto}",
       "{communication_data_type: fp16}", "{flops_profiler: 3}", "{comms_logger: {enabled: 'x'}}", "{elasticity: {}}",
       "{sparse_attention: {mode: odd}}", "{amp: {enabled: true}}", "{checkpoint: {tag_validation: loud}}",
       "{monitor_config: 3}", "{csv_monitor: {enabled: true}}", "{prescale_gradients: [1]}"]  # fmt: skip


@dataclass
class Case:
    """What a user has written. files: contents by name, run.yaml first; keys: what was changed, for messages."""

    number: int
    files: dict[str, bytes]
    overrides: list[str]
    processes: int
    keys: list[str] = field(default_factory=list)


def schema_keys() -> list[tuple[str, FieldInfo]]:
    """Every dotted key of the schema with its type; those of sections within sections too."""
    found: list[tuple[str, FieldInfo]] = []
    for section, outer in RunConfig.model_fields.items():
        found.append((section, outer))
        if isinstance(outer.annotation, type) and issubclass(outer.annotation, BaseModel):
            for name, inner in outer.annotation.model_fields.items():
                found.append((f"{section}.{name}", inner))
                for kind in get_args(inner.annotation):
                    if (
                        isinstance(kind, type)
                        and issubclass(kind, BaseModel)
                        and get_origin(inner.annotation) is not list
                    ):
                        found += [(f"{section}.{name}.{last}", deep) for last, deep in kind.model_fields.items()]
    return found


class Mutator:
    """Draws cases; the same seed gives the same cases."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.draw = random.Random(seed)
        self.changed: list[str] = []
        self.keys = schema_keys()

    def case(self, number: int) -> Case:
        """The case of a number, whatever cases were drawn before."""
        self.draw = draw = random.Random(f"{self.seed} {number}")
        tree = {section: dict(keys) for section, keys in SMALL.items()}
        if draw.random() < 0.5:
            tree["over_encoding"] = dict(TABLES)
        self.changed = []
        overrides: list[str] = []
        style = draw.random()
        if style < 0.70:  # values that fit their types
            self._change(tree, overrides, draw.choice([1, 1, 1, 2, 2, 3]), sound=True)
        elif style < 0.82:
            self._change(tree, overrides, draw.choice([1, 1, 2]), sound=False)
        elif style < 0.87:
            self._misplace(tree)
        files = self._files(tree, odd=style >= 0.87)
        if draw.random() < 0.12:
            overrides.append(self._odd_override())
        processes = draw.choice([1] * 18 + [2, 2, 4, 3, 8, 1024, 10**9])
        return Case(number, files, overrides, processes, self.changed)

    # values

    def sound(self, annotation: Any, metadata: Any = ()) -> str:
        """A value of a type, as flow YAML; numbers mostly small."""
        draw = self.draw
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Literal:
            return str(draw.choice(arguments))
        if origin in (Union, types.UnionType):
            return self.sound(draw.choice(arguments))
        if hasattr(annotation, "__metadata__"):
            return self.sound(annotation.__origin__, [*annotation.__metadata__, *metadata])
        if origin is list:
            return "[" + ", ".join(self.sound(arguments[0]) for _ in range(draw.choice([0, 1, 2, 2, 3]))) + "]"
        if origin is tuple:
            return "[" + ", ".join(self.sound(one) for one in arguments) + "]"
        if origin is dict:
            if arguments[1] is Any:
                return draw.choice(RAW)
            return (
                "{"
                + ", ".join(f"{name}: {draw.choice(PATHS[:3])}" for name in draw.sample(["a", "b-2", "c_3"], 2))
                + "}"
            )
        if annotation is type(None):
            return draw.choice(["null", "~", ""])
        if annotation is bool:
            return draw.choice(["true", "false", "True", "FALSE"])
        if annotation is int:
            return self._integer(metadata)
        if annotation is float:
            return self._float(metadata)
        if annotation is str:
            return draw.choice(PATHS)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            inner = annotation.model_fields
            chosen = [name for name, one in inner.items() if one.is_required() or draw.random() < 0.3]
            return "{" + ", ".join(f"{name}: {self.value_of(inner[name])}" for name in chosen) + "}"
        raise AssertionError(f"the schema has a type that no mutation is known for: {annotation}")

    def value_of(self, info: FieldInfo) -> str:
        """A value that fits a field's type and bounds."""
        return self.sound(info.annotation, info.metadata)

    def _bounds(self, metadata: Any) -> tuple[float, float]:
        flat = [inner for one in metadata for inner in (getattr(one, "metadata", None) or [one])]
        low = next(
            (one.ge for one in flat if isinstance(one, Ge)), next((one.gt for one in flat if isinstance(one, Gt)), -9)
        )
        high = next(
            (one.le for one in flat if isinstance(one, Le)), next((one.lt for one in flat if isinstance(one, Lt)), 9)
        )
        return low, high  # type: ignore[return-value]

    def _integer(self, metadata: Any) -> str:
        low, high = self._bounds(metadata)
        if self.draw.random() < 0.1:
            return str(self.draw.choice([low, high, high - 1, high // 2 if high > 2 else high]))
        fitting = [number for number in (1, 2, 2, 3, 4, 4, 5, 8, 16, 32, 48, 64) if low <= number <= high] or [int(low)]
        return str(self.draw.choice(fitting))

    def _float(self, metadata: Any) -> str:
        low, high = self._bounds(metadata)
        if self.draw.random() < 0.1:
            return repr(float(self.draw.choice([low, high, high / 2])))
        forms = ["1e-4", "0.001", "1E-2", ".5", "0.9", "1.0", "1", "2.5", "10000.0", "1e-8"]
        fitting = [one for one in forms if low <= float(one) <= high] or [repr(float(low))]
        return self.draw.choice(fitting)

    def odd(self) -> str:
        """Any scalar, number or shape."""
        return self.draw.choice(self.draw.choice([NUMBERS, SCALARS, SHAPES]))

    # places

    def _change(self, tree: dict[str, Any], overrides: list[str], times: int, *, sound: bool) -> None:
        for _ in range(times):
            key, info = self.draw.choice(self.keys)
            if sound and key.count(".") != 1 and self.draw.random() < 0.7:  # a whole section seldom fits the others
                key, info = self.draw.choice(self.keys)
            value = self.value_of(info) if sound else self.odd()
            self.changed.append(f"{key}={value[:60]}")
            if self.draw.random() < 0.4:
                overrides.append(f"{key}={value}")
                continue
            section, _, name = key.partition(".")
            if not name:
                tree[section] = value
            elif isinstance(tree.setdefault(section, {}), dict):
                name, _, last = name.partition(".")
                tree[section][name] = f"{{type: yarn, factor: 2, {last}: {value}}}" if last else value

    def _misplace(self, tree: dict[str, Any]) -> None:
        """Misspell, move, drop or double keys and sections."""
        draw = self.draw
        section = draw.choice(sorted(tree))
        names = sorted(tree[section])
        name = draw.choice(names)
        kind = draw.choice(["misspell", "drop", "move", "dotted", "drop section", "flatten", "long", "odd key"])
        self.changed.append(f"{kind} {section}.{name}")
        if kind == "misspell":
            at = draw.randrange(len(name))
            tree[section][name[:at] + draw.choice(["", "x", "_", "-", "é"]) + name[at + 1 :]] = tree[section].pop(name)
        elif kind == "drop":
            del tree[section][name]
        elif kind == "move":
            tree.setdefault(draw.choice(["logging", "checkpoint", "parallel"]), {})[name] = tree[section].pop(name)
        elif kind == "dotted":
            tree[f"{section}.{name}"] = tree[section].pop(name)
        elif kind == "drop section":
            del tree[section]
        elif kind == "flatten":
            tree[name] = tree[section].pop(name)
        elif kind == "long":
            tree[section]["k" * draw.choice([90, 400, 2000])] = "1"
        else:
            tree[section][
                draw.choice(
                    ["1", "null", "true", "''", "? [1]", "a.0.b", "é", '"\\n"', "<<", "base", "=", "2024-01-01"]
                )
            ] = "1"

    def _files(self, tree: dict[str, Any], *, odd: bool) -> dict[str, bytes]:
        draw = self.draw
        text = written(tree)
        if not odd:
            if draw.random() < 0.15:  # the same, over a base
                names = sorted(tree)
                own = {name: tree[name] for name in draw.sample(names, 2)}
                rest = {name: tree[name] for name in names if name not in own}
                return {"run.yaml": f"base: base.yaml\n{written(own)}".encode(), "base.yaml": written(rest).encode()}
            return {"run.yaml": text.encode()}
        kind = draw.choice(["bom", "utf-16", "latin", "nul", "tabs", "cut", "twice", "empty", "comment", "list", "scalar",
                            "crlf", "documents", "directive", "cycle", "itself", "chain", "base odd", "bomb", "merge", "swap",
                            "bytes", "large", "folder", "base twice", "old mac"])  # fmt: skip
        self.changed.append(kind)
        own = f"base: base.yaml\n{text}"
        lines = text.splitlines(keepends=True)
        where = draw.randrange(len(lines))
        contents: dict[str, dict[str, bytes]] = {
            "bom": {"run.yaml": text.encode("utf-8-sig")},
            "utf-16": {"run.yaml": text.encode(draw.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]))},
            "latin": {"run.yaml": f"# café\n{text}".encode("latin-1")},
            "nul": {"run.yaml": text.encode().replace(b" ", b"\0", 3)},
            "tabs": {"run.yaml": text.replace("  ", "\t").encode()},
            "cut": {"run.yaml": text.encode()[: draw.randrange(len(text))]},
            "twice": {"run.yaml": (text + text).encode()},
            "empty": {"run.yaml": draw.choice([b"", b"\n", b"---\n", b"...\n", b"{}", b"[]", b"null\n"])},
            "comment": {"run.yaml": f"# {'x' * 900}\n{text}# end".encode()},
            "list": {"run.yaml": b"- a\n- b\n"},
            "scalar": {"run.yaml": self.odd().encode("utf-8", "surrogatepass")},
            "crlf": {"run.yaml": text.replace("\n", "\r\n").encode()},
            "old mac": {"run.yaml": text.replace("\n", "\r").encode()},
            "documents": {"run.yaml": f"{text}---\n{text}".encode()},
            "directive": {"run.yaml": f"%YAML {draw.choice(['1.1', '1.2', '3.0', 'x'])}\n---\n{text}".encode()},
            "cycle": {"run.yaml": own.encode(), "base.yaml": b"base: other.yaml\n", "other.yaml": b"base: run.yaml\n"},
            "itself": {"run.yaml": f"base: run.yaml\n{text}".encode()},
            "chain": chain(text, draw.choice([2, 5, 40, 1500])),
            "base odd": {"run.yaml": f"base: {self.odd()}\n{text}".encode("utf-8", "surrogatepass")},
            "base twice": {"run.yaml": f"base: base.yaml\nbase: base.yaml\n{text}".encode(), "base.yaml": text.encode()},
            "bomb": {"run.yaml": (text + bomb(draw.choice(["[{0}, {0}]", "{{x: {0}, y: {0}}}"]))).encode()},
            "merge": {"run.yaml": text.replace("model:\n", "model:\n  <<: {hidden_size: 64, num_layers: 1}\n").encode()},
            "swap": {"run.yaml": "".join([*lines[where:], *lines[:where]]).encode()},
            "bytes": {"run.yaml": bytes(draw.randrange(256) for _ in range(60))},
            "large": {"run.yaml": (text + "#" * 400_000).encode()},
            "folder": {"run.yaml": f"base: {draw.choice(['.', '..', '/dev/null', '~', 'base.yaml/'])}\n{text}".encode()},
        }  # fmt: skip
        return contents[kind]

    def _odd_override(self) -> str:
        draw = self.draw
        key, _ = draw.choice(self.keys)
        return draw.choice(
            [
                key, f"{key}=", f"={key}", f"{key}.=1", f".{key}=1", f"{key}.x=1", f"{key}.0=1", f"{key}:1", f"{key} = 1",
                f"{key}={self.odd()}", f"{key}=={self.odd()}", f"{key}={{{{}}}}", f"{key}=1=2", "base=run.yaml", "=", "",
                "a" * 500, f"{'a' * 500}=1", ".".join("abcdefghij" * 30) + "=1", f"{key.upper()}=1", f"{key}=\udcff",
                f"\udcff{key}=1", f"{key.rpartition('.')[2]}=1", f"{key}=[1", f"{key}=\n", f"{key}=1 # c", f"{key}='",
                f"{key}=null", f"{key}\n=1", "training.train_iters=2", "training.train_tokens=64", "model.num_layers=1",
                "data.validation.a=set",
            ]
        ).replace("\0", "")  # fmt: skip


def written(tree: dict[str, Any]) -> str:
    """A tree of flow values as block YAML."""
    lines = []
    for section, keys in tree.items():
        if isinstance(keys, str):
            lines.append(f"{section}: {keys}")
        else:
            lines += [f"{section}:", *(f"  {name}: {value}" for name, value in keys.items())]
    return "\n".join(lines) + "\n"


def chain(text: str, length: int) -> dict[str, bytes]:
    """Files of which each names the next as its base."""
    files = {"run.yaml": f"base: base1.yaml\n{text}".encode()}
    for place in range(1, length):
        files[f"base{place}.yaml"] = f"base: base{place + 1}.yaml\n".encode()
    files[f"base{length}.yaml"] = b"logging: {interval: 3}\n"
    return files


def bomb(form: str) -> str:
    """A few lines of aliases that stand for 2^40 values."""
    lines = ["deepspeed:", "  a0: &a0 {z: 1}"]
    lines += [f"  a{step}: &a{step} {form.format(f'*a{step - 1}')}" for step in range(1, 40)]
    return "\n".join(lines) + "\n"
