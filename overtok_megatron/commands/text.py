"""`overtok generate`."""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from overtok_megatron.commands.model_arguments import add_model, add_speculative, load_model, speculation_of
from overtok_megatron.errors import InputError

if TYPE_CHECKING:
    from overtok_megatron.inference.loading import TrainedModel
    from overtok_megatron.inference.sampling import Sampling
    from overtok_megatron.inference.speculation import Speculation


def _generate(options: argparse.Namespace) -> int:
    from overtok_megatron.inference.generation import generate
    from overtok_megatron.inference.sampling import Sampling

    if options.interactive == bool(options.prompt):
        raise InputError("generate: give --prompt, or --interactive without one")
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    trained = load_model(options)
    speculation = speculation_of(options, trained)
    if options.interactive:
        _converse(trained, sampling, speculation)
    else:
        for prompt, text in zip(options.prompt, generate(trained, options.prompt, sampling, speculation), strict=True):
            print(f"{prompt}{text}")
    if speculation is not None:
        sys.stdout.flush()
        print(speculation.counts, file=sys.stderr)
    return 0


def _converse(trained: "TrainedModel", sampling: "Sampling", speculation: "Speculation | None") -> None:
    """Continue prompts from the terminal until it ends (Ctrl-D), printing text as it is decoded; Ctrl-C stops a text."""
    from overtok_megatron.inference.generation import stream_texts

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can then be edited and recalled
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # discards the line
            print()
            continue
        if not prompt:
            continue
        try:
            for piece in stream_texts(trained, prompt, sampling, speculation):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except InputError as error:
            print(f"error: {error}", end="")
        print()


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("generate", help="continue prompts with a trained model")
    add_model(verb)
    add_speculative(verb)
    verb.add_argument("--prompt", action="append", default=[], help="text to continue; may be repeated")
    verb.add_argument("--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a text, Ctrl-D leaves")
    verb.add_argument("--max-new-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    verb.add_argument("--top-k", type=int, default=0, help="0 = off")
    verb.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    verb.add_argument("--seed", type=int, default=0, help="of sampling")
    verb.set_defaults(work=_generate)
