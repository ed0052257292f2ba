"""The benchmarks' protocols, one file each: prompts, parsing and scores. No model code is imported here."""

from stic_min import InputError


def match_answers(name, questions, answers):
    """{question id: record} of an answers file, checked against its questions.

    Raises InputError: no questions, a repeated id, an answer to no question, a record without text.
    """
    ids, records = {q["question_id"] for q in questions}, {}
    if not questions or len(ids) != len(questions):
        raise InputError(f"{name}: " + ("a question id is repeated" if questions else "no questions"))
    for record in answers:
        qid = str(record.get("question_id"))
        if qid not in ids or qid in records:
            fault = "repeated" if qid in ids else "no question's id"
            raise InputError(f"{name} answers: {qid!r} is {fault}")
        if not isinstance(record.get("text"), str):
            raise InputError(f"{name} answers: {qid!r} has no 'text'")
        records[qid] = record
    return records
