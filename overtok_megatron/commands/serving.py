"""`overtok serve`."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overtok_megatron.commands.arguments import port, positive
from overtok_megatron.commands.model_arguments import add_model, add_speculative, load_model, speculation_of
from overtok_megatron.errors import InputError


def _serve(options: argparse.Namespace) -> int:
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise InputError("serve: needs starlette and uvicorn; pip install 'overtok_megatron[serve]'")
    from overtok_megatron.serving.app import ServerSettings, build_app
    from overtok_megatron.serving.requests import Limits
    from overtok_megatron.serving.server import is_loopback, open_socket, serve, server_config

    trained = load_model(options)
    speculation = speculation_of(options, trained)
    context = trained.config.data.seq_length
    settings = ServerSettings(
        model=options.model_name or Path(options.run).resolve().name,
        max_body=options.max_body,
        seconds=options.timeout,
        hosts=("localhost", "127.0.0.1") if options.host in ("localhost", "127.0.0.1") else (),
    )
    limits = Limits(context, min(options.max_tokens or context, context), options.max_choices)
    app = build_app(
        trained,
        settings,
        limits,
        max_batch=options.max_batch,
        max_waiting=options.max_waiting,
        prefill_chunk=options.prefill_chunk,
        speculation=speculation,
    )
    listening = open_socket(options.host, options.port)
    if not is_loopback(options.host):
        print(
            f"warning: {options.host} may be reached from other machines, and whoever reaches it can use the model: there is "
            "no authentication",
            file=sys.stderr,
        )
    address = f"http://{listening.getsockname()[0]}:{listening.getsockname()[1]}"
    print(f"{settings.model} (step {trained.step}) at {address}/v1/completions", flush=True)
    serve(server_config(app, options.max_connections), listening)
    return 0


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("serve", help="answer OpenAI's completions API over HTTP")
    add_model(verb)
    add_speculative(verb)
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    verb.add_argument("--port", type=port, default=8000, help="0 = a free one")
    verb.add_argument("--model-name", default=None, help="name that requests give (default: the folder's)")
    verb.add_argument("--max-batch", type=positive, default=8, help="sequences decoded together")
    verb.add_argument(
        "--prefill-chunk",
        type=positive,
        default=256,
        help="tokens of prompts that are fed at most between two steps of the running texts: fewer, and a long prompt holds "
        "the others up less, but is itself slower to its first token",
    )
    verb.add_argument("--max-waiting", type=positive, default=64, help="sequences that may wait for a place")
    verb.add_argument("--max-choices", type=positive, default=16, help="texts of one request: prompts times n")
    verb.add_argument("--max-tokens", type=positive, default=None, help="new tokens of a text (default: the context)")
    verb.add_argument("--max-body", type=positive, default=1 << 20, help="bytes of a request's body")
    verb.add_argument("--max-connections", type=positive, default=256, help="open at once")
    verb.add_argument("--timeout", type=positive, default=300, help="seconds of a request, waiting included")
    verb.set_defaults(work=_serve)
