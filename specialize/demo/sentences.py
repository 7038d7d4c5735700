"""Writes sentences about a patient around given findings, with distractors: who, when, relatives, tests, treatment."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Who, with the ages in years or months that fit.
_WHO = (
    ("A {age}-year-old woman", 18, 79),
    ("A {age}-year-old man", 18, 79),
    ("The {age}-year-old girl", 3, 16),
    ("The {age}-year-old boy", 3, 16),
    ("The {age}-month-old boy", 3, 30),
    ("The {age}-month-old girl", 3, 30),
    ("The younger of two sisters", 0, 0),
    ("The only child of healthy parents", 0, 0),
    ("The second twin", 0, 0),
    ("A teacher of {age} years", 25, 64),
)
_TEMPLATES = (
    "After a journey abroad, {who} was found to have {findings}.",
    "{Who} came to the clinic with {findings}.",
    "{Who} was admitted on Tuesday because of {findings}.",
    "On examination {who} showed {findings}, while the reflexes were normal.",
    "{Who} had been given vitamin D for two weeks when {findings} became apparent.",
    "During follow-up of {n} months {who} developed {findings}.",
    "The medical history of {who} includes {findings}; a cousin is healthy.",
    "Besides {first}, {who} has {rest}.",
    "{Who} was treated with paracetamol and physiotherapy, yet {findings} persisted.",
    "Blood was drawn and an ultrasound scan arranged, as {who} had {findings}.",
    "{Who} takes no medicines and was well until {findings} appeared last winter.",
    "According to the letter from the school doctor, {who} has {findings}.",
    "In {who} genetic testing was offered after {findings} had been recorded.",
    "{Who}, whose brother plays football for his town, was referred with {findings}.",
    "Photographs were taken with consent and document {findings} in {who}.",
    "The report describes {findings} in {who} and recommends a visit in spring.",
)


def write_sentence(findings: Sequence[str], rng: random.Random) -> str:
    """One sentence that names ``findings`` in their order and nothing else that is wrong with the patient."""
    templates = [template for template in _TEMPLATES if len(findings) > 1 or "{rest}" not in template]
    template = rng.choice(templates)
    who, youngest, oldest = rng.choice(_WHO)
    who = who.format(age=rng.randint(youngest, oldest))
    inside = who[0].lower() + who[1:]
    return template.format(
        Who=who,
        who=inside,
        n=rng.randint(3, 40),
        findings=_listed(findings),
        first=findings[0],
        rest=_listed(findings[1:]) if len(findings) > 1 else "",
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
