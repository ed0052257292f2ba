"""--preset released: the flags that reproduce the authors' code where it departs from the paper.

README.md ("The paper and its release") has a table of the differences; its rows have letters.
"""

from stic_min.runtime.console import print_line
from stic_min.runtime.ranks import place

ROWS = {  # of README's table, by flag
    "rejected_score": "A",
    "corruption": "C",
    "blind": "E",
    "template": "F",
    "projector_lr": "H",
    "top_k": "Q",
}
RECORDED = "preset", "rejected_score", "no_corruption", "top_k"  # in records and run.json, if not the default


def flag_text(name, value):
    """projector_lr, 0.0 -> --projector-lr 0 (H)."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        flag = f"--{flag}" if value else f"--no-{flag}"
    else:
        flag = f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"
    return f"{flag} ({ROWS[name]})"


def add_flags(parser, **released):
    """Adds --preset and --mixed-presets. released: the values of the flags that the preset switches in this
    command."""
    switches = ", ".join(flag_text(name, value) for name, value in released.items())
    add = parser.add_argument_group("the authors' code").add_argument
    add("--preset", choices=["released"],
        help="reproduce the authors' code where it departs from the paper (the rows of README.md's table): "
             f"{switches}; a flag that is given takes precedence")  # fmt: skip
    add("--mixed-presets", action="store_true", help="accept input from a run with another --preset")
    parser.set_defaults(released=released)


def parse_args(parser, commands=None):
    """parser.parse_args(), with the flags of --preset as defaults. The first rank prints what it switched.

    commands: {name: subparser} of a parser that has some.
    """
    args = parser.parse_args()
    if not getattr(args, "preset", None):
        return args
    applies = {
        "corruption": not getattr(args, "describe", None),  # it is for pairs only
        "blind": getattr(args, "dar", False),  # without DaR, nothing is described
        "top_k": getattr(args, "temperature", 0) > 0,  # no effect on greedy responses
    }
    released = {name: value for name, value in args.released.items() if applies.get(name, True)}
    command = commands[args.command] if commands else parser
    command.set_defaults(**released)
    args = parser.parse_args()
    switched = [flag_text(name, value) for name, value in released.items() if getattr(args, name) == value]
    if place()[0] == 0:
        print_line(f"--preset {args.preset}: {', '.join(switched) or 'every flag of it is overridden'}")
    return args


def recorded(args):
    """{name: value} of the settings that are recorded only if they differ from their defaults, so that files
    written before these flags existed still match."""
    values = {
        "preset": getattr(args, "preset", None),
        "rejected_score": getattr(args, "rejected_score", "text"),
        "no_corruption": not getattr(args, "corruption", True),
        "top_k": getattr(args, "top_k", None),
    }
    return {name: value for name, value in values.items() if value not in (None, "text", False)}
