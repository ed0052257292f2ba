"""Triplets of image, question and answer (triangular.py): as the three tasks, in files, and which of them are
consistent. No model code. Prompts, form and score are ours, because the authors' (arXiv 2510.10487) are not
public.
"""

import random
import re
import statistics
from dataclasses import dataclass

from stic_min import InputError
from stic_min.runtime.files import brief, read_records, text_field
from stic_min.runtime.work import row_seed, subset
from stic_min.text import with_image, without_marks

TASKS = "answer", "question", "both"  # IQ -> A, IA -> Q, I -> QA
# The prompt of "answer" is the question itself, as in LLaVA.
QUESTION_PROMPT = "Which question about this image has the following answer?\n{answer}"
BOTH_PROMPT = "Ask a question about this image and answer it, in this form:\nQuestion: ...\nAnswer: ..."
FORM = "Question: {question}\nAnswer: {answer}"

# ---------------------------------------------------------------- the three tasks


@dataclass(frozen=True)
class Triplet:
    """(I, Q, A), the texts without <image>."""

    key: str
    image: str  # name in the image folder
    question: str
    answer: str

    def turn(self, task: str) -> tuple[str, str]:
        """A task as (user text, response)."""
        if task == "answer":
            return self.question, self.answer
        if task == "question":
            return QUESTION_PROMPT.format(answer=self.answer), self.question
        return BOTH_PROMPT, FORM.format(question=self.question, answer=self.answer)


def parse_form(text: str) -> tuple[str, str] | None:
    """(question, answer) of a response in FORM; None if it is malformed. Both may have several lines, but no
    other line may start like one of FORM's. All on one line is accepted, too: some models leave out the line
    break, and some tokenizers have none."""
    if "\n" not in text:
        text = text.replace(" Answer: ", "\nAnswer: ")
    before, *parts = re.split(r"^(Question|Answer): ", text, flags=re.MULTILINE)
    if before or parts[::2] != ["Question", "Answer"]:
        return None
    question, answer = map(without_marks, parts[1::2])
    return (question, answer) if question and answer else None


def instruction_record(triplet: Triplet, mixture: list[float], seed: int) -> dict:
    """A record of LLaVA's instruction data. Its task is sampled with the weights `mixture` and depends on
    (seed, key) only."""
    [task] = random.Random(row_seed(seed, triplet.key, "task")).choices(TASKS, mixture)
    user, response = triplet.turn(task)
    turns = [{"from": "human", "value": with_image(user)}, {"from": "gpt", "value": response}]
    return {"id": triplet.key, "image": triplet.image, "conversations": turns, "task": task}


# ---------------------------------------------------------------- in files


def read_triplets(path) -> dict[str, tuple[Triplet, dict]]:
    """{key: (triplet, its record)} of a file; malformed ones are left out."""
    triplets = {}
    for where, record in read_records(path):
        names = "id", "image", "question", "answer"
        if not set(names) <= record.keys():
            raise InputError(f"{where}: not a triplet; expected: {', '.join(names)}")
        if record["question"] is None and record["answer"] is None:
            continue
        key, image, question, answer = (text_field(record, name, where) for name in names)
        if key in triplets:
            raise InputError(f"{where}: {brief(key)} appears twice")
        triplets[key] = Triplet(key, image, without_marks(question), without_marks(answer)), record
    if not triplets:
        raise InputError(f"{path}: every response is malformed")
    return triplets


# ---------------------------------------------------------------- the consistent ones


def standardize(values: list[float]) -> list[float]:
    """To mean 0 and standard deviation 1; equal values become 0."""
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]


def consistency_scores(logps: list[tuple[float, float]]) -> list[float]:
    """min(z_A, z_Q) of each triplet, where z_A and z_Q are log p(A | I, Q) and log p(Q | I, A) per token,
    each standardized over the data set.

    The score is ours. The minimum demands that both corners can be reconstructed. Without standardizing, it
    would nearly always be that of the same direction, because the two differ in scale. It favors generic
    triplets, which are likely whatever the image shows.
    """
    return [min(pair) for pair in zip(*map(standardize, zip(*logps)))]


def select(scores: list[float], count: int, seed: int, at_random: bool = False) -> list[int]:
    """Indices of the `count` best (of equal ones, the first), or of as many sampled at random, in order."""
    indices = list(range(len(scores)))
    if at_random:
        return subset(indices, count, seed)
    return sorted(sorted(indices, key=lambda i: -scores[i])[:count])
