"""`overtok generate`."""

import argparse
from pathlib import Path
from typing import Any


def _generate(options: argparse.Namespace) -> int:
    import torch

    from overtok_megatron.inference.generation import Sampling, generate
    from overtok_megatron.inference.loading import load_trained

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(Path(options.run), device, options.storage)
    for prompt, text in zip(options.prompt, generate(trained, options.prompt, sampling), strict=True):
        print(f"{prompt}{text}")
    return 0


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("generate", help="continue prompts with a trained model")
    verb.add_argument("run", help="a run's output folder, or one of its checkpoints")
    verb.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    verb.add_argument("--max-new-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    verb.add_argument("--top-k", type=int, default=0, help="0 = off")
    verb.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    verb.add_argument("--seed", type=int, default=0, help="of sampling")
    verb.add_argument(
        "--storage",
        choices=("device", "host", "mapped"),
        default="device",
        help="n-gram tables beside the model, in host memory, or left on disk (memory then does not depend on their size)",
    )
    verb.set_defaults(work=_generate)
