"""STIC, Self-Training on Image Comprehension (arXiv 2405.19716), for LLaVA models in plain PyTorch.

Shapes in comments: B batch, T tokens, C width (Cv: CLIP's), H heads, K key-value heads, D head width, V
vocabulary, P prompt and R response tokens, G scored groups, N tiles, S patches per tile. w (winner) is the
chosen response, l (loser) the rejected one.
"""

try:
    import fcntl  # noqa: F401
except ImportError:
    raise SystemExit("error: stic_min needs Linux or macOS (Python's fcntl); on Windows use WSL") from None


class InputError(ValueError):
    """Something the user gave us is wrong: a file, a flag, a sample.

    The message is one line that names it. The commands print that line and exit with status 1;
    every other exception is a bug and keeps its traceback.
    """


def first_line(error):
    """The first line of another library's exception, short enough to be part of a message."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
