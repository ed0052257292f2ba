"""The benchmarks' protocols, one file each: prompts, parsing and scores. No model code is imported here.

Every module defines
  load(data)       reads the official files in the folder `data` and returns the questions, one dict each:
                   question_id; image, a path relative to `data`, or None; text, everything after <image>;
                   prompt, which is recorded with the answer (default: <image> and text); what scoring needs
  score(questions, answers, ...)   scores records {"question_id", "prompt", "text"} and returns numbers:
                   `score` in percent with its 95% `interval` and `n`, and `groups`, the same for parts of the
                   questions; with a judge also `unread`, the number of unreadable verdicts, and
                   `unread_share`, their fraction of all verdicts in the score; `better`, "lower" where a high
                   score is bad
  report(scores)   formats these numbers as lines of text
and, where it applies,
  RULES, score(..., rule=)         where two official scorers differ; the first rule is the default
  read_answers(path), official(questions, answers)   read and write answers in the benchmark's own format
  judge(...), read_judged(paths), judged_files(judged)   ask a judge; read and write its published verdicts
  COMPLETE         whether every question needs an answer before there is a score
  GROUPED_BY       the question field whose values `--check` counts

tests/scorers/test_contract.py checks this interface; README.md in this folder is the user's guide.
"""
