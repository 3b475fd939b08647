"""What the expression that pytest's -m is given asks for."""


def asks_for_gpu(expression: str) -> bool:
    """Whether the expression of -m asks for tests marked gpu: `gpu and not slow` does, `slow and not gpu` does not."""
    words = expression.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and before != "not" for before, word in zip(["", *words], words, strict=False))
