"""Sentences of a small grammar, for trying the whole study out in a minute without any data."""

from __future__ import annotations

import random

from edgeopt.case_studies.corpus import Corpus, Task, TextPair

#: English noun -> German noun and its indefinite article.
_NOUNS = {
    "dog": "ein Hund", "cat": "eine Katze", "child": "ein Kind", "woman": "eine Frau", "man": "ein Mann",
    "horse": "ein Pferd", "bird": "ein Vogel", "singer": "eine Sängerin", "boy": "ein Junge", "girl": "ein Mädchen",
}  # fmt: skip
_VERBS = {
    "runs": "läuft", "sleeps": "schläft", "waits": "wartet", "plays": "spielt", "stands": "steht", "sits": "sitzt",
}  # fmt: skip
_PLACES = {
    "in the garden": "im Garten", "on the beach": "am Strand", "in the city": "in der Stadt",
    "at the table": "am Tisch", "under a tree": "unter einem Baum", "near the house": "beim Haus",
}  # fmt: skip
_TIMES = {"today": "heute", "in the evening": "am Abend", "in winter": "im Winter", "at noon": "am Mittag"}


def load(task: Task, count: int, seed: int = 0) -> Corpus:
    """`count` pairs to train on, and a tenth as many to validate and to test with; the same seed gives the same ones.

    Of a summary's text the first sentence tells who does what, and the rest is to be left out.
    """
    chance = random.Random(seed)
    make = _translation if task == "translation" else _summary
    others = max(4, count // 10)
    pairs = tuple(make(chance) for _ in range(count + 2 * others))
    return Corpus(
        title=f"made-up sentences, seed {seed}",
        task=task,
        train=pairs[:count],
        validation=pairs[count : count + others],
        test=pairs[count + others :],
        files={},
    )


def _translation(chance: random.Random) -> TextPair:
    noun, verb, place, time = (chance.choice(sorted(words)) for words in (_NOUNS, _VERBS, _PLACES, _TIMES))
    german = _NOUNS[noun]
    article = "An" if noun[0] in "aeiou" else "A"
    return (
        f"{article} {noun} {verb} {place} {time}.",
        f"{german[0].upper()}{german[1:]} {_VERBS[verb]} {_TIMES[time]} {_PLACES[place]}.",
    )


def _summary(chance: random.Random) -> TextPair:
    first, second = _translation(chance)[0], _translation(chance)[0]
    noun, verb = first.split()[1:3]
    return f"{first} {second}", f"{noun} {verb}"
