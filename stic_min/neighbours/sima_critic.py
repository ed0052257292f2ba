"""SIMA's in-context self-critic (arXiv 2405.15973): its prompt, verdicts and position bias. No model code.

The prompt has the authors' structure: task, three criteria, two demonstrations, case. Its sentences and both
demonstrations are ours. Its fixed part takes about 700 tokens, so that an image of 576 and answers of usual
length still fit into LLaVA-1.5's 2,048.
"""

import re
from collections import Counter

from stic_min import InputError
from stic_min.runtime.files import read_text
from stic_min.text import without_marks

# Responses 1 and 2. The authors have the first order only: the sampled answer is always response 1.
ORDERS = ("sampled", "greedy"), ("greedy", "sampled")

# ---------------------------------------------------------------- the prompt

TASK = (
    "You see an image, a question about it and two responses{and_reference}. "
    "Decide which response agrees better with {standard}. Check each response on three points:\n"
    "1. Objects: does it mention objects that are missing from {standard}, or get wrong what an object is?\n"
    "2. Relations: does it get wrong where objects are, or how they relate to each other? "
    "Prefer the response with fewer such mistakes.\n"
    "3. Attributes: does it give objects colors, numbers, sizes, materials or actions that differ from "
    "{standard}?\n"
    "First write down your reasons in a few sentences. Then end with your verdict in double square brackets: "
    "[[1]] if response 1 is better, [[2]] if response 2 is better."
)

# (question, reference answer, response 1, response 2, reasons, verdict)
DEMONSTRATIONS = (
    (
        "Why might the man hold an umbrella although it is not raining?",
        "The man stands on a sunny beach next to a stroller with a baby in it. He holds the umbrella over "
        "the stroller, so he probably wants to keep the baby out of the sun.",
        "The sun shines on the beach, and the umbrella is above the stroller. The man most likely protects "
        "the baby from the heat.",
        "Dark clouds are moving in over the beach, so the man expects rain. The umbrella is large enough for "
        "him and for the two children who walk beside him.",
        "Objects: the clouds and the two children of response 2 are not in {standard}; everything in "
        "response 1 is. Relations: response 1 has the umbrella above the stroller, which is right, while "
        "response 2 has it above people who walk. Attributes: the weather is sunny, as in response 1.",
        1,
    ),
    (
        "Describe the image in detail.",
        "A brown dog lies on a gray sofa with its head on a striped cushion. On the floor in front of the "
        "sofa, a black cat sits and looks up at the dog. A lamp on the small table to the left is switched "
        "on.",
        "A brown dog and a black cat lie side by side on a gray sofa. Several books are piled up on a table "
        "next to a lamp, and a woman is reading in the background.",
        "A brown dog rests on a gray sofa, its head on a cushion. A black cat looks up at it from the floor. "
        "To the left, a lamp is lit on a round table.",
        "Objects: response 1 adds books and a woman that are not in {standard}; response 2 adds nothing. "
        "Relations: the cat sits on the floor, but response 1 puts it on the sofa next to the dog. "
        "Attributes: the shape of the table in response 2 is not certain, which matters less.",
        2,
    ),
)


def one_line(text: str) -> str:
    """Without line breaks, and without <image>, which would stand for a second image."""
    return " ".join(without_marks(text).split())


def case(question: str, reference: str | None, responses: list[str]) -> str:
    """What is judged, one line per field: a line break within a field would look like the next one."""
    fields = {"Question": question, "Reference answer": reference}
    fields |= {f"Response {number}": response for number, response in enumerate(responses, 1)}
    return "\n".join(f"{name}: {one_line(text)}" for name, text in fields.items() if text is not None)


def read_template(path, label_free: bool) -> str:
    """A prompt of the user's own, with the fields {question}, {reference}, {response_1} and {response_2}."""
    template = without_marks(read_text(path))
    for field in ("response_1", "response_2", *(() if label_free else ("reference",))):
        if f"{{{field}}}" not in template:
            raise InputError(f"{path}: no {{{field}}} in the prompt")
    if label_free and "{reference}" in template:
        raise InputError(f"{path}: {{reference}} in the prompt; --label-free has no reference answer")
    return template


def critic_prompt(
    question: str, reference: str | None, responses: list[str], template: str | None = None
) -> str:
    """The user text, without <image>. Without a reference answer, it is label-free: the image is the standard
    (ours). template: another prompt, from `read_template`."""
    if template is not None:
        fields = {"question": question, "reference": reference}
        fields |= {f"response_{number}": response for number, response in enumerate(responses, 1)}
        pattern = r"\{(question|reference|response_1|response_2)\}"
        return re.sub(pattern, lambda match: one_line(fields[match[1]]), template)
    label_free = reference is None
    standard = "the image" if label_free else "the reference answer"
    and_reference = "" if label_free else ", and a reference answer that is correct"
    parts = [TASK.format(standard=standard, and_reference=and_reference)]
    for number, example in enumerate(DEMONSTRATIONS, 1):
        example_question, example_reference, first, second, reasons, verdict = example
        judged = case(example_question, None if label_free else example_reference, [first, second])
        reasons = reasons.format(standard=standard)
        heading = f"Example {number}, about another image"
        parts.append(f"{heading}\n{judged}\nReasons: {reasons}\nVerdict: [[{verdict}]]")
    parts.append(f"Your case, about the image above\n{case(question, reference, responses)}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- verdicts


def bracketed_numbers(critique: str) -> list[str]:
    """The texts in double square brackets that contain a digit."""
    return [text for text in re.findall(r"\[\[([^\[\]]*)\]\]", critique) if re.search(r"\d", text)]


def parse_verdict(critique: str) -> tuple[int | None, str]:
    """(1 or 2, ""), or (None, why there is no verdict).

    The last number in double brackets counts. It must be exactly [[1]] or [[2]]. The authors' code takes what
    follows the last [[, closed or not, and gives no verdict if that is other text.
    """
    numbers = bracketed_numbers(critique)
    if not numbers:
        return None, "no number in double brackets"
    if numbers[-1] not in ("1", "2"):
        return None, "neither [[1]] nor [[2]]"
    return int(numbers[-1]), ""


def has_both_verdicts(critique: str) -> bool:
    return {"1", "2"} <= set(bracketed_numbers(critique))


def preferences(record: dict) -> list[str | None]:
    """The preferred answer in each order, "sampled" or "greedy"; None without a verdict."""
    verdicts = [parse_verdict(critique["text"])[0] for critique in record["critiques"]]
    return [order[verdict - 1] if verdict else None for verdict, order in zip(verdicts, ORDERS)]


def decide(record: dict, agreeing: bool = False) -> tuple[str | None, str]:
    """(the preferred answer, ""), or (None, why the record gives no pair).

    The first order decides, as in SIMA. With `agreeing`, the second one must agree.
    """
    if record["unjudged"]:
        return None, record["unjudged"]
    orders = 2 if agreeing else 1
    for critique in record["critiques"][:orders]:
        verdict, reason = parse_verdict(critique["text"])
        if verdict is None:
            return None, reason
    preferred, *others = preferences(record)[:orders]
    return (preferred, "") if others in ([], [preferred]) else (None, "the two orders disagree")


def position_bias(records: list[dict]) -> tuple[int, float, float, float] | None:
    """Of the records with a verdict in both orders: their number, the share of verdict 1 in either order, and
    the share that prefers the same answer in both. None if there are no such records.

    Without position bias, the two shares of verdict 1 add up to 1.
    """
    both = [pair for pair in map(preferences, records) if len(pair) == 2 and None not in pair]
    if not both:
        return None
    share = lambda test: sum(map(test, both)) / len(both)
    first_order, second_order = ORDERS
    return (
        len(both),
        share(lambda pair: pair[0] == first_order[0]),
        share(lambda pair: pair[1] == second_order[0]),
        share(lambda pair: pair[0] == pair[1]),
    )


def report_lines(records: list[dict], agreeing: bool = False) -> list[str]:
    """How many records have a preference, why the others have none, and the position bias."""
    decisions = [decide(record, agreeing) for record in records]
    preferred = [answer for answer, _ in decisions if answer]
    lines = [f"{len(preferred)} of {len(records)} records have a preference"]
    if preferred:
        lines[0] += f"; {preferred.count('sampled') / len(preferred):.1%} prefer the sampled answer"
    reasons = Counter(reason for _, reason in decisions if reason)
    lines += [f"  {count} have none: {reason}" for reason, count in reasons.most_common()]
    critiques = [critique["text"] for record in records for critique in record["critiques"]]
    if count := sum(map(has_both_verdicts, critiques)):
        lines.append(f"{count} of {len(critiques)} critiques contain both verdicts: the last one counts")
    if bias := position_bias(records):
        count, sampled_first, greedy_first, same = bias
        lines += [
            f"position bias, {count} records with a verdict in both orders:",
            f"  {sampled_first:.1%} prefer response 1 when it is the sampled answer, {greedy_first:.1%} when "
            "it is the greedy one (without bias, these add up to 100%)",
            f"  {same:.1%} prefer the same answer in both orders",
        ]
    return lines
