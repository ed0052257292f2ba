"""Small score files, as evaluate.py writes them."""

import json

SEVEN = ["scienceqa", "textvqa", "chartqa", "llavabench", "mmbench", "mmvet", "mathvista"]
JUDGED = {"model": "gpt-4", "served": ["gpt-4-0613"], "official": "gpt-4-0613"}
COMPARABLE, OWN_WORDS = JUDGED | {"comparable": True}, JUDGED | {"comparable": False}


def entry(score, n=100):
    return {"score": score, "interval": [score - 5, score + 5], "n": n}


def save(folder, benchmark, score, adapter=None, mode="direct", name="", run=None, **more):
    """A score file as evaluate.py writes it; `run` and `more` are what is special about it."""
    settings = {
        "mode": mode, "model": "llava-v1.6-mistral-7b", "adapter": adapter, "fingerprint": "0123456789ab",
        "template": "vicuna_v1", "image_mode": "anyres", "dtype": "bfloat16", "temperature": 0.0, "top_p": None,
        "max_new_tokens": 1024, "seed": 0, "limit": None, "prompt": "USER: <image>\nWhat? ASSISTANT:"}  # fmt: skip
    result = {"benchmark": benchmark, "run": settings | (run or {}), **entry(score), "missing": 0, "groups": {}} | more
    if benchmark == "scienceqa" and "groups" not in more:
        result["groups"] = {"average": entry(score + 1, 200), "IMG": entry(score)}
    path = folder / f"{benchmark}-{adapter or 'base'}-{mode}{name}.scores.json"
    path.write_text(json.dumps(result))
    return path


def save_all(folder):
    """Base and stage 2, direct and with DaR, on all seven: 10, 20, ... 70, one more from run to run."""
    groups = {
        "scienceqa": {"average": 1, "IMG": 0},
        "mmbench": dict.fromkeys(["LR", "AR", "RR", "FP-S", "FP-C", "CP"], 0),
        "mmvet": dict.fromkeys(["rec", "ocr", "know", "gen", "spat", "math"], 0),
    }
    runs = [(None, "direct"), (None, "dar"), ("stage2", "direct"), ("stage2", "dar")]
    for more, (adapter, mode) in enumerate(runs):
        for place, name in enumerate(SEVEN, 1):
            score = 10 * place + more
            parts = {group: entry(score + extra) for group, extra in groups.get(name, {}).items()}
            save(folder, name, score, adapter, mode, groups=parts)
