"""Reads an answer back into facts and counts right and wrong ones, with no judge model.

The reader knows more words than the grammar writes (inflections, synonyms, other clause orders), because what is read
may come from any model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_lvspec.bench.videofacts.facts import KINDS, Fact, actor_of, scene_facts
from vllm_lvspec.bench.videofacts.scene import COLOURS, Scene
from vllm_lvspec.bench.videofacts.tasks import Task


def _lexicon(words: dict[str, str]) -> dict[str, str]:
    """Every spelling with the word it stands for."""
    return {spelling: word for word, spellings in words.items() for spelling in spellings.split("|")}


_COLOUR = _lexicon({c: c for c in COLOURS} | {"purple": "purple|violet", "cyan": "cyan|turquoise|teal"})
_SHAPE = _lexicon({"circle": "circle|disc|disk|ball", "square": "square|box", "triangle": "triangle"})
_SIZE = _lexicon({"small": "small|little|tiny", "large": "large|big|huge"})
_NUMBER = _lexicon({"1": "one|a single|1", "2": "two|2", "3": "three|3", "4": "four|4", "5": "five|5", "6": "six|6"})
_DIRECTION = _lexicon(
    {
        "left": "left|leftwards|leftward",
        "right": "right|rightwards|rightward",
        "top": "top|up|upwards|upward|upper",
        "bottom": "bottom|down|downwards|downward|lower",
    }
)
_SPEED = _lexicon({"quickly": "quickly|fast|rapidly|swiftly|quick|rapid", "slowly": "slowly|slow|leisurely|gradually"})
_PLACE = _lexicon(
    {"left": "left of", "right": "right of", "above": "above|over", "below": "below|under|beneath|underneath"}
)
_VERBS = {
    "move": "(?:mov|slid|drift|glid|travel|float|shift|head)(?:e|es|ed|s|ing|ling|led)?",
    "appear": "appear(?:s|ed|ing)?|emerg(?:e|es|ed|ing)|pop(?:s|ped|ping)? up|show(?:s|ed|n|ing)? up",
    "vanish": "vanish(?:es|ed|ing)?|disappear(?:s|ed|ing)?|fad(?:e|es|ed|ing) away|dissolv(?:e|es|ed|ing)",
    "change": "turn(?:s|ed|ing)?|chang(?:e|es|ed|ing)|becom(?:e|es|ing)|became|switch(?:es|ed|ing)?",
    "bounce": "bounc(?:e|es|ed|ing)|rebound(?:s|ed|ing)?|spring(?:s|ing)? back|sprang back",
    "collide": (
        "collid(?:e|es|ed|ing)|crash(?:es|ed|ing)?|bump(?:s|ed|ing)?|run(?:s|ning)? into|ran into|hit(?:s|ting)?"
    ),
}


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_THING = "objects?|shapes?|figures?|items?|things?"
_ENTITY = re.compile(
    rf"\b(?:({_any(_SIZE)}),? )?({_any(_COLOUR)})(?: colou?red)? (?:({_any(_SHAPE)})s?|ones?|{_THING})\b"
)
_COUNT = re.compile(rf"\b({_any(_NUMBER)}) (?:\w+ )?(?:{_THING})\b")
_RELATION = re.compile(rf"\b({_any(_PLACE)}) (?:the |an? )?@(\d+)@")
_EVENT = re.compile("|".join(rf"\b(?P<{kind}>{verb})\b" for kind, verb in _VERBS.items()))
_NOT = re.compile(r"\b(?:no|not|nothing|never|none|neither|nor)\b|n't\b")
_GENERIC = re.compile(rf"\b(?:{_THING}|something|nothing|anything|none|it|they|two|any)\b")
_BARE_SHAPE = re.compile(rf"\b({_any(_SHAPE)})s?\b")
_COLOUR_WORD = re.compile(rf"\b({_any(_COLOUR)})\b")
_DIRECTION_WORD = re.compile(rf"\b(?!right (?:after|away|now|here|there))({_any(_DIRECTION)})\b")
_SPEED_WORD = re.compile(rf"\b({_any(_SPEED)})\b")
_BOUNDARY = re.compile(r",? \b(and then|then|and|but|while|before|after|once|until)\b|,")
_LETTER = re.compile(r"\b(?:letter|option|answer|choice)\b[^.]*?\b([A-D])\b|^\s*\(?([A-D])\)?[.:]?(?:\s|$)")


@dataclass(frozen=True)
class Reading:
    """What an answer says: facts, and the events in the order in which it says they happen."""

    facts: frozenset[Fact]
    events: tuple[str, ...]


def read(text: str) -> Reading:
    """Facts of a free text; `("exists", shape or kind of event)` where it names no object."""
    facts: set[Fact] = set()
    events: list[str] = []
    if letter := _LETTER.search(text):
        facts.add(("choice", letter[1] or letter[2]))
    for sentence in re.split(r"[.!?;]", text.lower().replace("@", " ")):
        said, happened = _read_sentence(" ".join(sentence.split()))
        facts |= said
        events += [event for event in happened if event not in events]
    return Reading(frozenset(facts), tuple(events))


def _read_sentence(sentence: str) -> tuple[set[Fact], list[str]]:
    facts: set[Fact] = set()
    colours: list[str] = []

    def name(match: re.Match[str]) -> str:
        size, colour, shape = match.groups()
        colour = _COLOUR[colour]
        facts.add(("colour", colour))
        if shape:
            facts.add(("shape", colour, _SHAPE[shape]))
        if size:
            facts.add(("size", colour, _SIZE[size]))
        colours.append(colour)
        return f"@{len(colours) - 1}@"

    sentence = _ENTITY.sub(name, sentence)
    for match in _COUNT.finditer(sentence):
        facts.add(("count", _NUMBER[match[1]]))
    sentence = _read_relations(sentence, colours, facts)
    events = _read_events(sentence, colours, facts)
    for piece in re.split("[,:]", sentence):
        for match in _BARE_SHAPE.finditer(piece):
            facts.add(("negation" if _NOT.search(piece) else "exists", _SHAPE[match[1]]))
    return facts, events


def _read_relations(sentence: str, colours: list[str], facts: set[Fact]) -> str:
    """Note what stands where and take it out, so that its directions are nobody's motion."""
    objects = {int(m[2]) for m in _RELATION.finditer(sentence)}
    for match in _RELATION.finditer(sentence):
        subjects = [int(i) for i in re.findall(r"@(\d+)@", sentence[: match.start()]) if int(i) not in objects]
        later = [int(i) for i in re.findall(r"@(\d+)@", sentence[match.end() :]) if int(i) not in objects]
        if subjects or later:
            subject = subjects[-1] if subjects else later[0]
            facts.add(("relation", colours[subject], _PLACE[match[1]], colours[int(match[2])]))
    return _RELATION.sub("", sentence)


def _read_events(sentence: str, colours: list[str], facts: set[Fact]) -> list[str]:
    verbs = list(_EVENT.finditer(sentence))
    clauses: list[tuple[re.Match[str], int, int, str]] = []
    begin, word = 0, ""
    for i, verb in enumerate(verbs):
        end, following = len(sentence), ""
        if i + 1 < len(verbs):
            # Between two verbs the last boundary before the next verb's subject parts their clauses.
            between = sentence[verb.end() : verbs[i + 1].start()]
            marks = list(_BOUNDARY.finditer(between))
            subject = re.search(r"(?:the |an? )?@\d+@", between)
            if marks:
                fitting = [m for m in marks if subject is None or m.start() <= subject.start()] or marks[:1]
                mark = fitting[-1]
                end, following = verb.end() + mark.start(), mark[1] or ""
            else:
                end = verb.end() + (subject.start() if subject else len(between))
        clauses.append((verb, begin, end, word))
        begin, word = end, following
    events: list[str] = []
    for verb, begin, end, word in clauses:
        names = _read_event(sentence, verb, begin, end, colours, facts)
        if word == "after":
            events[-1:-1] = names
        else:
            events += names
    if sentence.startswith("before ") and len(events) == 2:
        events.reverse()
    return events


def _read_event(
    sentence: str, verb: re.Match[str], begin: int, end: int, colours: list[str], facts: set[Fact]
) -> list[str]:
    kind = str(verb.lastgroup)
    clause = sentence[begin:end]
    ahead = [colours[int(i)] for i in re.findall(r"@(\d+)@", sentence[begin : verb.start()])]
    behind = [colours[int(i)] for i in re.findall(r"@(\d+)@", sentence[verb.end() : end])]
    named = ahead or behind
    if kind == "collide" and named:
        named = [actor_of({*ahead[-2:], *behind[:1]} if len(ahead) == 1 else ahead[-2:] or behind[:2])]
    elif kind != "collide":
        joined = re.search(r"@\d+@(?: and (?:the |an? )?@\d+@)+ (?:\w+ )?$", sentence[begin : verb.start()])
        named = named if joined else named[-1:] if ahead else named[:1]
    piece = _piece_around(sentence, verb, begin, end)
    new_colours = _COLOUR_WORD.findall(sentence[verb.end() : end])
    if kind == "change" and not new_colours and not (re.search("colou?r", clause) or _NOT.search(piece)):
        return []  # something turns, but not into another colour
    if not named:
        if kind != "move" and _GENERIC.search(piece):
            facts.add(("negation" if _NOT.search(piece) else "exists", kind))
        return []
    if _NOT.search(piece):
        return []  # "the red circle does not vanish": nothing is claimed that could be false here
    direction, speed = _DIRECTION_WORD.findall(clause), _SPEED_WORD.search(clause)
    for actor in named:
        facts.add(("event", actor, kind))
        if kind == "move":
            facts.update(("motion", actor, "to", _DIRECTION[d]) for d in direction[:1])
            facts.update([("motion", actor, "pace", _SPEED[speed[1]])] if speed else [])
        elif kind == "bounce":
            facts.update(("motion", actor, "off", _DIRECTION[d]) for d in direction[:1])
        elif kind == "change" and new_colours:
            facts.add(("colour", actor, "becomes", _COLOUR[new_colours[-1]]))
    return [f"{actor}:{kind}" for actor in named]


def _piece_around(sentence: str, verb: re.Match[str], begin: int, end: int) -> str:
    """What stands around a verb between commas: negations reach no further."""
    first = max(sentence.rfind(",", begin, verb.start()), sentence.rfind(":", begin, verb.start()), begin - 1) + 1
    last = sentence.find(",", verb.end(), end)
    return sentence[first : end if last < 0 else last]


# Counting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Per kind of fact: how many are required, how many of these are said, and how many false ones are said.

    `order_right`: all events are told, in their order; None where the task does not ask for an order.
    """

    required: dict[str, int]
    right: dict[str, int]
    wrong: dict[str, int]
    order_right: bool | None

    @property
    def accuracy(self) -> float:
        """Required facts that are said over required ones and false ones together: 1 only for a faultless answer."""
        return sum(self.right.values()) / (sum(self.required.values()) + sum(self.wrong.values()))


def score_answer(scene: Scene, task: Task, text: str) -> Score:
    """Score `text` as an answer to `task` about `scene`."""
    reading = read(text)
    true = _sayable(scene)
    said = set(reading.facts)
    happened = [e for e in reading.events if ("event", *e.split(":")) in true]
    said |= {("order", a, b) for i, a in enumerate(happened) for b in happened[i + 1 :]}
    letter = {f for options in task.required for f in options if f[0] == "choice"}
    false = {f for f in said if f not in true and not (f[0] == "choice" and (f in letter or not letter))}
    required, right, wrong = Counter[str](), Counter[str](), Counter[str]()
    for options in task.required:
        kind = next(iter(options))[0]
        required[kind] += 1
        right[kind] += bool(options & said)
    for fact in false:
        wrong["negation" if fact[0] == "exists" else fact[0]] += 1
    order_right = None
    if required["order"]:
        expected = sum(f[0] == "event" for options in task.required for f in options)
        order_right = right["order"] == required["order"] and not wrong["order"] and len(reading.events) == expected
    return Score(dict(required), dict(right), dict(wrong), order_right)


def _sayable(scene: Scene) -> set[Fact]:
    """`scene_facts`, and what an answer may say of them in other words."""
    facts = set(scene_facts(scene))
    for obj in scene.objects:
        facts.add(("exists", obj.shape))
    for event in scene.events:
        facts.add(("exists", event.kind))
        if event.kind == "change":  # from then on the object may go by its new colour
            obj, new = scene.objects[event.actor], str(event.colour)
            facts |= {("colour", new), ("shape", new, obj.shape), ("size", new, obj.size)}
    return facts


def totals(scores: Iterable[Score]) -> dict[str, dict[str, int]]:
    """`{kind: {"required", "right", "wrong"}}` over many answers, in the order of `KINDS`."""
    result = {kind: Counter[str]() for kind in KINDS}
    for score in scores:
        for name in ("required", "right", "wrong"):
            for kind, count in getattr(score, name).items():
                result[kind][name] += count
    return {k: {n: c[n] for n in ("required", "right", "wrong")} for k, c in result.items() if sum(c.values())}
