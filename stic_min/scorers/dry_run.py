"""The report of --check on a benchmark, printed instead of running it. It needs the model's configuration,
not its weights."""

import argparse
from collections import Counter

from stic_min import check, dar
from stic_min.cost import ANSWER, generation_cost
from stic_min.generate import Sampling
from stic_min.text import DESCRIBE_PROMPT

SHORT_ANSWER = 5  # tokens of a letter, a word or a phrase
SHORT_SUFFIXES = ("letter from the given choices directly.", "using a single word or phrase.")


def report(run, llava, judge):
    """Prints what the run would ask, lack and take. Raises InputError if it would end without answers or
    scores.

    run: evaluate.Run. judge: the one that would be asked, or None.
    """
    if not run.answers.ranks.first:
        return
    benchmark, args = run.benchmark, run.args
    questions = {q[benchmark.key]: q for q in run.questions}
    sampling = Sampling.from_args(args)
    tokens, describing, broken, unasked = dar.measure(llava, questions, run.read, sampling, run.answers.ranks)
    todo = sum(key not in run.answers.done for key in questions)
    lines = [("questions", f"{len(questions)}, {todo} of them not yet in {run.answers.path}")]
    if groups := count_groups(benchmark, run.questions):
        lines.append(("of them", ", ".join(f"{name} {count}" for name, count in groups.items())))
    lines.append(("images", f"{len(describing) + len(broken)}, {len(broken)} of them can't be read"))
    lines += [("  unread", error) for error in list(broken.values())[:5]]
    if unasked:
        lines.append(("not asked", f"{len(unasked)} questions: {check.abbreviate(list(unasked))}"))
        lines += [("  reason", error) for error in list(dict.fromkeys(unasked.values()))[:5]]
    if args.dar:
        lines += report_descriptions(run, llava, describing)
    lines.append(("judge", describe_judge(benchmark, len(questions), judge)))

    problems = []
    if len(tokens) < len(questions) and benchmark.complete:
        count = f"{len(questions) - len(tokens)} of {len(questions)} questions can't be asked"
        problems.append(f"{count}; {benchmark.name} is scored only as a whole")
    if tokens:
        description = min(run.description_tokens, ANSWER) if args.dar else 0
        lengths = [n + description * (questions[key]["image"] is not None) for key, n in tokens.items()]
        lines.append(("tokens", f"a question with its image: {check.percentiles(lengths)}"))
        short = all(questions[key]["text"].endswith(SHORT_SUFFIXES) for key in tokens)
        lines += generation_cost(args, llava, lengths, SHORT_ANSWER if short else ANSWER)
    else:
        problems.append(f"none of the {len(questions)} questions could be asked")
    check.print_report(lines, problems)


def count_groups(benchmark, questions):
    """{value of the benchmark's grouping field: number of questions}."""
    if benchmark.grouped_by is None:
        return {}
    values = [question[benchmark.grouped_by] for question in questions]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return Counter(value for group in lists for value in group if value)


def report_descriptions(run, llava, describing):
    """Lines about DaR's first call. describing: {image: tokens of the describer's prompt with it}."""
    todo = sum(name not in run.descriptions.done for name in run.to_describe)
    lines = [("descriptions", f"{len(run.to_describe)}, {todo} of them not yet in {run.descriptions.path}")]
    lengths = [dar.prompt_length(llava, DESCRIBE_PROMPT, [])] if run.args.blind else list(describing.values())
    if lengths:
        lines.append(("tokens", f"a describer's prompt: {check.percentiles(lengths)}"))
        args = argparse.Namespace(**vars(run.args) | {"max_new_tokens": run.description_tokens})
        lines += generation_cost(args, llava, lengths)
    return lines


def describe_judge(benchmark, count, judge):
    """Whether a judge will be asked, as text. judge: the one that would be asked, or None."""
    if not benchmark.judge:
        return "not needed"
    if judge is None:
        loss = "no score" if benchmark.complete else "answers that only a judge can read count as wrong"
        return f"not given (--judge): {loss}"
    items = f"{count * judge.runs} verdicts" if benchmark.complete else "answers that the rules cannot read"
    return f"{judge.model} at {judge.url} will be asked for {items}"
