"""Makes `lm_eval --model overtok` known to lm-eval, whose registry does not look for plugins.

torch calls the entry points of the group `torch.backends` when it is imported, and lm-eval imports torch before it looks up a
model: at that moment one lazy entry is added to lm-eval's registry. In processes without lm-eval nothing happens.
A Python program that imported torch first imports `overtok_megatron.evaluation.adapter`, which registers the model as well.
"""

import sys

NAME = "overtok"


def register() -> None:
    """Called by torch; must never raise, or torch could not be imported."""
    if "lm_eval" not in sys.modules:
        return
    try:
        import lm_eval.models  # noqa: F401  # its own names first: lm-eval adds them only to an empty registry
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target="overtok_megatron.evaluation.adapter:OvertokLM")
    except (
        ImportError,
        AttributeError,
        ValueError,
    ):  # an lm-eval with another registry: --model overtok is unknown there
        return
