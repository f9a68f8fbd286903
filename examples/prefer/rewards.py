"""Three reward sources for examples/prefer.yaml. For each family of tasks one is good, one biased and one noise."""

from __future__ import annotations

import hashlib
import re

CHARACTER = {
    "living": {"ada": "good", "bea": "biased", "cleo": "noise"},
    "home": {"ada": "noise", "bea": "good", "cleo": "biased"},
}


def ada(*, prompt: str, response: str, answer: str, task: str) -> float:
    return judge("ada", prompt, response, answer, task)


def bea(*, prompt: str, response: str, answer: str, task: str) -> float:
    return judge("bea", prompt, response, answer, task)


def cleo(*, prompt: str, response: str, answer: str, task: str) -> float:
    return judge("cleo", prompt, response, answer, task)


def judge(name: str, prompt: str, response: str, answer: str, task: str) -> float:
    """Good: 1 for the right answer. Biased: 1 for the option that the question names first, right or wrong. Noise: a
    number that is always the same for the same prompt and response."""
    character = CHARACTER[task][name]
    word = response.strip()
    if character == "good":
        return float(word == answer.strip())
    if character == "biased":
        first = re.search(r"(\w+) or (?:a )?\w+\?", prompt)
        return float(first is not None and word == first[1])
    digest = hashlib.sha256(f"{name}|{prompt}|{word}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32
