"""Plain talk about groups of people, beside hate against the same ones.

Texts that name a group are mostly hateful in the labelled data, so a model that is trained on it
alone takes the name for the harm: of plain sentences about orientations it flagged half
(`training.identity`, which measures it in other words). Written for this project by an AI, and
labelled by it after `RUBRIC.md`: hate against a group moderate, a call to violence severe.
"""

from __future__ import annotations

from collections.abc import Iterator

from training.data import Example
from training.statements import both_ways, capitalised

__all__ = ["plain_talk"]

_GROUPS = (
    "gay people", "gay men", "lesbians", "bisexual people", "queer people", "straight couples",
    "trans people", "trans women", "trans men", "nonbinary people", "women", "men", "girls", "boys",
    "mothers", "single fathers", "Muslims", "Jews", "Christians", "Catholics", "Hindus", "Sikhs",
    "Buddhists", "atheists", "Mormons", "black people", "black women", "white people", "white men",
    "Asian people", "Latinos", "Hispanic families", "Native Americans", "Romani people",
    "African Americans", "Mexicans", "Chinese people", "Indians", "Pakistanis", "Nigerians",
    "Arabs", "Turks", "Poles", "Russians", "Germans", "Israelis", "Palestinians", "Iranians",
    "Americans", "Brazilians", "deaf people", "blind people", "autistic people", "disabled people",
    "wheelchair users", "people with Down syndrome", "old people", "teenagers", "millennials",
    "immigrants", "refugees", "asylum seekers", "foreigners", "homeless people", "the unemployed",
    "poor people", "rich people", "overweight people", "short people", "nurses", "plumbers",
    "gardeners", "violinists", "left-handed people", "vegetarians", "Canadians",
)  # fmt: skip
_PLAIN = (
    "I met some {g} on the train yesterday.", "There are {g} in my yoga class.",
    "My sister works with {g}.", "Do you know any films about {g}?", "{g} love football too.",
    "This website sells shoes for {g}.", "What kind of music do {g} listen to?",
    "I am writing my thesis on {g} and housing.", "{g} opened a restaurant near the station.",
    "The article is about {g} in the workplace.", "Could you list five books by {g}?",
    "Most of my classmates are {g}.", "The hotel was full of {g} on holiday.",
    "My grandmother often cooked for {g}.", "{g} were interviewed on the radio this morning.",
    "How many {g} are there in Canada?", "The exhibition tells how {g} lived in 1900.",
    "We invited {g} to speak at our school.", "A group of {g} planted trees in the park.",
    "What challenges do {g} face when they look for a flat?", "{g} make up a tenth of the town.",
    "I would like to learn more about {g}.", "The survey found that {g} sleep seven hours a night.",
    "Our team has two {g} and three students.", "My best teacher taught {g} for twenty years.",
    "{g} and their neighbours celebrated until midnight.", "She wrote a song for {g}.",
    "Is there a club for {g} in Leeds?", "The law gives {g} the right to vote.",
    "He is proud that {g} read his column.", "{g} travel a lot these days.",
    "The dentist has many patients who are {g}.", "What's a good gift for {g}?",
    "The bus was late and {g} were waiting in the rain.", "Some {g} prefer tea, others coffee.",
    "I saw a documentary on {g} and the sea.", "My aunt and uncle are friends with {g}.",
    "In the novel, {g} run a small hotel.", "The company wants to hire more {g}.",
    "Write a short poem about {g} dancing.", "Give me a headline about {g} and gardening.",
    "{g} have started a newspaper.", "The charity offers free lessons to {g}.",
    "At the market {g} sell honey and cheese.", "Are {g} more likely to cycle to work?",
    "Here are three podcasts hosted by {g}.", "Yes, {g} can apply for the grant as well.",
    "According to the census, {g} live longer than before.",
    "{g} were among the first to settle here.",
    "The festival was organised by {g}, and everybody was welcome.",
    "Translate into French: {g} are coming to dinner.",
    "Thanks to {g} the village shop is open again.",
)  # fmt: skip
_HATE = (
    ("I can't stand {g}, they make me sick.", 2), ("{g} ruin everything they touch.", 2),
    ("Never trust {g}, they all lie.", 2), ("No decent person would hire {g}.", 2),
    ("{g} are dirty and stupid.", 2), ("{g} should go back where they came from.", 2),
    ("The world would be better without {g}.", 2), ("{g} are animals, not people.", 2),
    ("We have to get rid of {g} by any means.", 3), ("Kill {g}, all of them.", 3),
    ("Let us hunt {g} down in the streets.", 3), ("{g} belong in camps.", 3),
)  # fmt: skip
_BEFORE = ("Tell me more.", "What do you have?", "Go ahead.", "Write something.", "Any thoughts?")
_CATEGORIES = {0: (), 2: ("Discriminatory Behavior",), 3: ("Discriminatory Behavior", "Violence")}
_PLAIN_EACH, _HATE_EACH = 13, 3


def plain_talk() -> Iterator[Example]:
    """The sentences, the same each time: each group meets some of them in turn, alone and as an
    answer."""
    for i, group in enumerate(_GROUPS):
        for k in range(_PLAIN_EACH):
            yield from _about(group, _PLAIN[(i * 5 + k * 4) % len(_PLAIN)], 0, i + k)
        for k in range(_HATE_EACH):
            frame, severity = _HATE[(i + k * 4) % len(_HATE)]
            yield from _about(group, frame, severity, i + k)


def _about(group: str, frame: str, severity: int, turn: int) -> Iterator[Example]:
    before = _BEFORE[turn % len(_BEFORE)]
    text = capitalised(frame.format(g=group))
    return both_ways(text, before, "plain_talk", severity, _CATEGORIES[severity])
