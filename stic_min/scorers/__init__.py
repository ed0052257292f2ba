"""The benchmarks' protocols, one file each: prompts, parsing and scores. No model code is imported here.

Every module has
  load(data)          the official files in the folder `data` -> questions, a dict each: question_id; image, a path
                      relative to `data`, or None; text, all that follows <image>; prompt, what is recorded, where that
                      is not <image> and text; and what scoring needs
  score(questions, answers, ...)   answers are records {"question_id", "prompt", "text"}. Returns numbers: `score` in
                      percent with its 95 % `interval` and `n`, and `groups`, the same for parts of the questions; with
                      a judge, `unread` and `unread_share`: verdicts that could not be read, also as a share of all
                      that the score is made of
  report(scores)      the numbers as lines of text
and where it applies
  RULES, score(..., rule=)         two official scorers differ; the first rule is the default
  read_answers(path), official(questions, answers)   answers as the benchmark's own tools exchange them, in and out
  judge(...), read_judged(paths), judged_files(judged)   what a judge model is asked; its verdicts as they are published
  COMPLETE            there is no score unless every question has an answer
  GROUPED_BY          the field of a question whose values are counted by `--check`
"""
