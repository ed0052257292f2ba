"""The benchmarks' protocols, one file each: prompts, parsing and scores. No model code is imported here."""

import json
from pathlib import Path

from stic_min import InputError


def read_entries(path, form, key=None):
    """The JSON list in a data file (or at its `key`) -> (its entries, the whole content), checked against `form`.

    form: {field: type} that every entry has to have; other fields are left out. Raises InputError naming the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = content[key] if key else content
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    except (KeyError, TypeError):
        raise InputError(f"{path}: has no {key!r}") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: is not a list with something in it")
    for number, entry in enumerate(entries):
        for field, kind in form.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                raise InputError(f"{path}, entry {number}: {field!r} is missing or no {kind.__name__}")
    return [{field: entry[field] for field in form} for entry in entries], content


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
