"""MathVista's texts: the query put to the model, and our own wording of the prompt for the judge."""

# The sentence before a question, by its type and, for floats, its precision.
HINTS = {
    "multi_choice": "Please answer the question and provide the correct option letter, "
    "e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, "
    "e.g., 1, 2, 3, at the end.",
    "float 1": "Please answer the question requiring a floating-point number with one decimal place "
    "and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2": "Please answer the question requiring a floating-point number with two decimal places "
    "and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


def build_query(question):
    """The query for a problem: hint, question, unit and choices; "" without a question.

    Source: the dataset's field `query`."""
    if not question["question"]:
        return ""
    is_choice = question["question_type"] == "multi_choice"
    kind = "multi_choice" if is_choice else question["answer_type"]
    hint = HINTS[f"float {int(question['precision'])}" if kind == "float" else kind]
    unit = f" (Unit: {question['unit']})" if question["unit"] else ""
    lines = [f"Hint: {hint}", f"Question: {question['question']}{unit}"]
    if is_choice:
        choices = [f"({chr(ord('A') + i)}) {text}" for i, text in enumerate(question["choices"])]
        lines += ["Choices:", *choices]
    return "\n".join(lines)


# The official prompt is not part of this project: `--judge-prompts` reads it from a file.
OWN_PROMPTS = {
    "few_shot": f"""\
You are given exam questions about pictures, each followed by what a student wrote. Copy out the student's \
final answer in the form that the hint asks for, and nothing else: no reasons, no units, no correction of \
mistakes.

Hint: {HINTS["integer"]}
Question: How many chairs stand around the table?

There are three chairs on the left and two on the right, so five in all.

Extracted answer: 5

Hint: {HINTS["float 1"]}
Question: How tall is the taller plant? (Unit: m)

The ruler beside the taller plant ends at 2.3 m.

Extracted answer: 2.3

Hint: {HINTS["float 2"]}
Question: What is the slope of the line?

It rises by 3 over a run of 8, i.e. 0.375, which I round to 0.38.

Extracted answer: 0.38

Hint: {HINTS["list"]}
Question: Which two days were the coldest?

The bars for the 4th and the 19th are the shortest.

Extracted answer: [4, 19]

Hint: {HINTS["multi_choice"]}
Question: Which animal is the heaviest?
Choices:
(A) fox
(B) badger
(C) bear

Of the three animals the bear weighs the most.

Extracted answer: C""",
    "suffix": "\n\nExtracted answer: ",
}
