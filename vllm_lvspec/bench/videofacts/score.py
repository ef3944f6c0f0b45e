"""Reads an answer back into facts and counts right and wrong ones, with no judge model.

The reader knows more words than the grammar writes (inflections, synonyms, other clause orders), because what is read
may come from any model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_lvspec.bench.videofacts.facts import KINDS, Fact, actor_of, event_name, scene_facts
from vllm_lvspec.bench.videofacts.scene import COLOURS, Scene
from vllm_lvspec.bench.videofacts.tasks import Task


def _lexicon(words: dict[str, str]) -> dict[str, str]:
    """Every spelling with the word it stands for."""
    return {spelling: word for word, spellings in words.items() for spelling in spellings.split("|")}


_OTHER_COLOURS = ("pink", "black", "brown", "grey", "magenta", "gold", "silver")  # no scene has them
_COLOUR = _lexicon(
    {c: c for c in (*COLOURS, *_OTHER_COLOURS)}
    | {"purple": "purple|violet", "cyan": "cyan|turquoise|teal|aqua|light blue", "grey": "grey|gray"}
)
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
    "appear": (
        "(?:appear(?:s|ed|ing)?|emerg(?:e|es|ed|ing)|pop(?:s|ped|ping)? up|show(?:s|ed|n|ing)? up)"
        "(?! (?:to|that|as|like)\\b)"
    ),
    "vanish": "vanish(?:es|ed|ing)?|disappear(?:s|ed|ing)?|fad(?:e|es|ed|ing) (?:away|out)|dissolv(?:e|es|ed|ing)",
    "change": "turn(?:s|ed|ing)?|chang(?:e|es|ed|ing)|becom(?:e|es|ing)|became|switch(?:es|ed|ing)?",
    "bounce": "bounc(?:e|es|ed|ing)|rebound(?:s|ed|ing)?|spring(?:s|ing)? back|sprang back",
    "collide": (
        "collid(?:e|es|ed|ing)|collisions?|crash(?:es|ed|ing)?|bump(?:s|ed|ing)?|run(?:s|ning)? into|ran into|"
        "hit(?:s|ting)?"
    ),
}


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_THING = "objects?|shapes?|figures?|items?|things?"
_ENTITY = re.compile(
    rf"\b((?:(?:{_any(_SIZE)}),? )*)({_any(_COLOUR)})(?:[ -]colou?red)?,? "
    rf"((?:(?:{_any(_SIZE)}) )*)(?:({_any(_SHAPE)})s?|ones?|{_THING})\b"
)
_PAIR = re.compile(rf"\b({_any(_COLOUR)}) and (?:the )?({_any(_COLOUR)}) ({_any(_SHAPE)})s\b")
_SIZE_WORD = re.compile(rf"\b({_any(_SIZE)})\b")
_NO_ADJECTIVE = rf"(?:of|is|are|more|other|can|could|finds|sees|{_any(_NUMBER)})"
_COUNT = re.compile(rf"\b((?:(?:{_any(_NUMBER)}) )+)(?:(?!{_NO_ADJECTIVE}\b)\w+ ){{0,3}}?(?:{_THING})\b")
_NUMBER_WORD = re.compile(rf"\b({_any(_NUMBER)})\b")
_BOUND = re.compile(r"(?<!\bno )\b(more|fewer|less) than $")
_VAGUE = re.compile(r"\b(?:at least|at most|no (?:more|fewer|less) than|up to|roughly|nearly|almost|not only) $")
_PART_OF_ALL = re.compile(r"\b(?:the|these|those|both|other|remaining|another)(?: (?:other|remaining|same))? $")
_RELATION = re.compile(rf"\b({_any(_PLACE)}) (?:the |an? )?@(\d+)@")
_NEIGHBOUR = re.compile(r"\b(?:next to|near|beside|close to) (?:the |an? )?@\d+@")
_EVENT = re.compile("|".join(rf"\b(?P<{kind}>{verb})(?!\w)" for kind, verb in _VERBS.items()))
_NOT = re.compile(r"\b(?:no|not|nothing|never|none|neither|nor|hardly any|barely any)\b|n't\b")
# Right before a verb these deny it; behind it, "vanishes without a trace", they don't.
_NOT_QUITE = re.compile(
    r"\b(?:(?:without|(?:fail|refuse)(?:s|d|ed|ing)? to)(?: \w+)?"
    r"|almost|nearly|barely|hardly|prevented from|instead of) $"
)
_NOT_BEFORE = re.compile(r"(?:\b(?:not|never|hardly|nowhere)|n't)(?! only)(?: \w+){0,2} $")
_LIGHT_WORDS = (
    rf"an?|any|single|of|the|these|those|is|are|be|to|there|actually|really|contains?|includes?|shows?|ha(?:s|ve)|"
    rf"features?|presents?|see|find|{_THING}"
)
_NONE_OF = re.compile(
    r"(?:\b(?:no|without|neither|nor|hardly any)(?: an?| any| single)*"
    rf"|(?:\b(?:not|never)|n't)(?: (?!the\b)(?:{_LIGHT_WORDS}))*|\bnone(?: (?:{_LIGHT_WORDS}))*) $"
)
_MISSING = re.compile(
    r" (?:is|are)(?:n't| not| never| nowhere)(?: to be)? (?:there|present|seen|shown|visible|found)\b"
    r"|(?: (?:is|are))? (?:absent|missing)\b"
)
_OR = re.compile(r"(?:,? (?:or|nor)|,)(?: an?| any)* $")
_GENERIC = re.compile(rf"\b(?:{_THING}|something|nothing|anything|none|it|they|two|any)\b")
_BARE_SHAPE = re.compile(rf"\b({_any(_SHAPE)})s?\b")
_COLOUR_WORD = re.compile(rf"\b({_any(_COLOUR)})\b")
_DIRECTIONS = _any(_DIRECTION)
_DIRECTION_WORD = re.compile(rf"\b(?!right (?:after|away|now|here|there)|left (?:behind|over))({_DIRECTIONS})\b")
# Where something is or comes from, or how it moves, is not where it goes.
_NO_GOAL = re.compile(
    rf"\bfrom (?:the )?(?:{_DIRECTIONS})\b(?: (?:side|part|edge|end))?"
    rf"|\b(?:in|at|on) the (?:(?:{_DIRECTIONS}) )+(?:corner|side|part|half|area|quarter)"
    r"|\b(?:speeds?|slows?) (?:up|down)"
)
_SPEED_WORD = re.compile(rf"\b({_any(_SPEED)})\b")
_WALL = re.compile(r"\b(?:wall|edge|border|side|frame)\b")
_BOUNDARY = re.compile(
    r"(?:,? and)?,? \b(?:shortly |soon |right )?(?:afterwards?|after (?:that|this|which))\b"
    r"|,? \b(and then|then|and|but|while|before|after|once|until)\b|,"
)
# None right before: "the previously still circle" moves no earlier.
_NO_ARTICLE = r"(?<!\bthe )(?<!\ban )(?<!\ba )"
_EARLIER = re.compile(
    rf"{_NO_ARTICLE}\b(?:before (?:that|this|then)|prior to (?:that|this)|earlier|previously|beforehand)\b"
)
_NO_EVENT = r"(?! (?:ones?|time|glance|sight|half|objects?|shapes?|figures?|items?|things)\b)"
_LEADS = {
    "next": re.compile(
        r"\b(?:then|next(?! to\b)|after (?:that|this|which)|later|(?:there)?afterwards?|following (?:this|that)"
        r"|subsequently|once this is over)\b"
    ),
    "first": re.compile(
        rf"\bfirst(?: of all)?\b(?! of\b){_NO_EVENT}|{_NO_ARTICLE}\binitially\b|\bto (?:begin|start) with\b"
        r"|\b(?:at|in) the (?:very )?(?:start|beginning|opening)\b|\bearly on\b"
    ),
    "last": re.compile(
        rf"\blast(?: of all)?\b(?! of\b){_NO_EVENT}|{_NO_ARTICLE}\b(?:finally|lastly|eventually)\b"
        r"|\b(?:in|at|near|towards?) the (?:very )?end\b(?! of (?!the (?:video|clip|recording|sequence|footage)\b))"
    ),
}
_LAST_WORD = re.compile(r"\b(first|last|earlier)$")
_OTHER_CLAUSE = re.compile(r"\b(?:after|once|following|when|while|until|before|(?:as|since) (?:the |an? )?$)")
_LETTER_ALONE = re.compile(r"\W*([a-dA-D])\W*")
_ARTICLE = rf"A (?:{_any({**_COLOUR, **_SHAPE, **_SIZE})}|{_THING})\b"
_LETTER = re.compile(r"(?<![\w'])(?!A (?!is|because|as|since|fits)[a-z])([A-D])(?![\w'])")
_LETTER_NAMED = re.compile(
    r"\b(?:[Aa]nswer|[Ll]etter|(?:[Rr]ight|[Cc]orrect|[Bb]est|[Ff]itting) (?:option|choice|one))"
    rf"(?: is| must be| would be| should be| option| letter|:)+\W*(?!{_ARTICLE})"
    r"(?:([A-D])(?![\w'])|(?<=[(\[])([a-d])(?=[)\]])|([a-d])(?=\W*(?:$|[.,;!?])))"
)
_LETTER_DENIED = re.compile(
    r"(?:\b[Nn]ot|n't)(?: (?:be|the|option|answer|letter|choice))* \W*[A-D](?![\w'])"
    r"|(?<![\w'])[A-D] (?:(?:is|does|can|could|would)(?:n't| not| never)|cannot"
    r"|(?:is|would be) (?:wrong|false|incorrect))\b"
)


@dataclass(frozen=True)
class Reading:
    """What an answer says: facts, and the events in the order in which it says they happen, repeats included.

    `leads`: for each event, whether it is said to come "first", "last" or "next"; else empty.
    """

    facts: frozenset[Fact]
    events: tuple[str, ...]
    leads: tuple[str, ...]


def read(text: str) -> Reading:
    """Facts of a free text.

    `("exists", shape or kind of event)` where it names no object, `("not", *fact)` where it denies one.
    """
    facts: set[Fact] = set()
    story = _Story()
    if letter := _read_letter(text):
        facts.add(("choice", letter))
    for sentence in re.split(r"[.!?;]", text.lower().replace("@", " ")):
        facts |= _read_sentence(" ".join(sentence.split()), story)
    return Reading(frozenset(facts), tuple(t.event for t in story.told), tuple(t.lead for t in story.told))


@dataclass(frozen=True)
class _Told:
    event: str
    lead: str


class _Story:
    """Events in the order of time; what is told as having been earlier goes before what was told last."""

    def __init__(self) -> None:
        self.told: list[_Told] = []
        self._flashback: tuple[int, int] | None = None  # where the last one stands

    def go_on(self, said: list[_Told]) -> None:
        self.told += said
        self._flashback = None

    def put_before_last(self, said: list[_Told]) -> None:
        self.told[-1:-1] = said

    def go_back(self, said: list[_Told]) -> None:
        """One flashback after another goes further back."""
        begin = self._flashback[0] if self._flashback else max(len(self.told) - 1, 0)
        self.told[begin:begin] = said
        self._flashback = begin, begin + len(said)

    def stay_back(self, said: list[_Told]) -> None:
        """Go on with what was told of earlier."""
        begin, end = self._flashback or (len(self.told), len(self.told))
        self.told[end:end] = said
        self._flashback = begin, end + len(said)


def _read_letter(text: str) -> str | None:
    """The last letter that is called the answer, else the last that stands for an option; "A circle ..." has none."""
    if alone := _LETTER_ALONE.fullmatch(text):
        return alone[1].upper()
    text = _LETTER_DENIED.sub("", text)
    if named := _LETTER_NAMED.findall(text):
        return "".join(named[-1]).upper()
    letters = _LETTER.findall(text)
    return letters[-1] if letters else None


def _read_sentence(sentence: str, story: _Story) -> set[Fact]:
    """The sentence's facts; its events go into the story."""
    facts: set[Fact] = set()
    colours: list[str] = []
    introduced: list[Fact] = []

    def name(match: re.Match[str]) -> str:
        before, colour, after, shape = match.groups()
        colour = _COLOUR[colour]
        said: list[Fact] = [("colour", colour)]
        if shape:
            said.append(("shape", colour, _SHAPE[shape]))
        if _NONE_OF.search(match.string[: match.start()]):
            facts.add(("not", *said[-1]))
            return "nobody"
        facts.update(said)
        if re.search(r"\ban? $", match.string[: match.start()]):
            introduced.append(said[-1])
        facts.update(("size", colour, _SIZE[size]) for size in _SIZE_WORD.findall(before + after))
        colours.append(colour)
        return f"@{len(colours) - 1}@"

    sentence = _PAIR.sub(r"\1 \3 and \2 \3", sentence)
    sentence = _ENTITY.sub(name, sentence)
    for match in _COUNT.finditer(sentence):
        subject_of_event = re.match(r" (?:\w+ly )?", sentence[match.end() :])
        rest = sentence[match.end() + (subject_of_event.end() if subject_of_event else 0) :]
        verb = _EVENT.match(rest)
        before = sentence[: match.start()]
        if _PART_OF_ALL.search(before) or _VAGUE.search(before) or (verb and verb.lastgroup != "appear"):
            continue
        bound = _BOUND.search(before)
        denied = _NOT_BEFORE.search(before)
        for number in _NUMBER_WORD.findall(match[1]):
            than = "" if bound is None else "more than " if bound[1] == "more" else "fewer than "
            count = ("count", than + _NUMBER[number])
            facts.add(("not", *count) if denied else count)
    if any(fact[0] == "count" for fact in facts) and len(set(introduced)) < len(introduced):
        # Who lists one object twice lists one less.
        facts.add(("count", str(len(set(introduced)))))
    sentence = _read_relations(sentence, colours, facts)
    _read_events(sentence, colours, facts, story)
    end, is_denied = 0, False
    for match in _BARE_SHAPE.finditer(sentence):
        before, behind = sentence[: match.start()], sentence[match.end() :]
        goes_on = is_denied and _OR.fullmatch(sentence[end : match.start()])
        is_denied = bool(_NONE_OF.search(before) or _MISSING.match(behind) or goes_on)
        facts.add(("negation" if is_denied else "exists", _SHAPE[match[1]]))
        end = match.end()
    return facts


def _read_relations(sentence: str, colours: list[str], facts: set[Fact]) -> str:
    """Note what stands where and take it out, so that its directions are nobody's motion."""
    objects = {int(m[2]) for m in _RELATION.finditer(sentence)}
    for match in _RELATION.finditer(sentence):
        before = sentence[: match.start()]
        subjects = [int(i) for i in re.findall(r"@(\d+)@", before) if int(i) not in objects]
        if clause := re.search(r"@(\d+)@,? (?:which|that) [^@]*$", before):
            subjects = [int(clause[1])]
        later = [int(i) for i in re.findall(r"@(\d+)@", sentence[match.end() :]) if int(i) not in objects]
        if subjects or later:
            subject = subjects[-1] if subjects else later[0]
            fact = ("relation", colours[subject], _PLACE[match[1]], colours[int(match[2])])
            facts.add(("not", *fact) if _NOT_BEFORE.search(before) else fact)
    return _NEIGHBOUR.sub("", _RELATION.sub("", sentence))


@dataclass
class _Clause:
    verb: re.Match[str]
    begin: int
    end: int
    word: str  # the conjunction before it


def _clauses(sentence: str) -> list[_Clause]:
    """One clause for each verb that may be an event's."""
    verbs = list(_EVENT.finditer(sentence))
    clauses: list[_Clause] = []
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
                mark = next((m for m in reversed(fitting) if m[1] in ("after", "before")), fitting[-1])
                end, following = verb.end() + mark.start(), mark[1] or ""
            else:
                end = verb.end() + (subject.start() if subject else len(between))
        clauses.append(_Clause(verb, begin, end, word))
        begin, word = end, following
    return clauses


def _read_events(sentence: str, colours: list[str], facts: set[Fact], story: _Story) -> None:
    sentence = re.sub(r"\bpreceded by\b", "after", _EARLIER.sub("earlier", sentence))
    sentence = re.sub(r"\bprior to\b", "before", re.sub(r"\bfollowed by\b", "then", sentence))
    actors: list[str] = []  # of the clause before, for a verb without a subject of its own
    later: list[_Told] = []  # of a clause that the others of its sentence come before
    has_told, is_back = False, False
    clauses = _clauses(sentence)
    for clause in clauses:
        names, actors = _read_event(sentence, clause, colours, facts, actors)
        head = sentence[clause.begin : clause.verb.start()]
        lead = _lead(clause, sentence)
        if lead == "last" and clause is not clauses[-1]:
            lead = ""  # "in the end" all of them have happened
        told = story.told
        said = [_Told(n, lead.replace("earlier", "")) for n in names if lead or not told or n != told[-1].event]
        is_back = lead == "earlier" or (is_back and not lead)
        if lead == "earlier":
            story.go_back(said)
        elif is_back:
            story.stay_back(said)
        elif clause.word == "after" and has_told:
            story.put_before_last(said)
        elif clause is clauses[0] and re.search(r"\bbefore (?:the |an? )?@", head):
            later = said
        else:
            story.go_on(said)
        has_told |= bool(said)
    if later:
        story.go_on(later)


def _lead(clause: _Clause, sentence: str) -> str:
    """Whether a clause says, before its subject or as its last word, that its event is first, last, next or earlier."""
    text = sentence[clause.begin : clause.end]
    if last := _LAST_WORD.search(text.rstrip(" ,")):
        return last[1]
    before = f"{clause.word} {text[: text.index('@') if '@' in text else clause.verb.start() - clause.begin]}"
    if _EARLIER.search(before):
        return "earlier"
    rest = _LEADS["next"].sub("", before)
    if rest != before:
        return "next"
    if _OTHER_CLAUSE.search(rest):
        return ""  # "finally, after the circle moves": it is not the circle that comes last
    return next((lead for lead in ("first", "last") if _LEADS[lead].search(rest)), "")


def _read_event(
    sentence: str, clause: _Clause, colours: list[str], facts: set[Fact], inherited: list[str]
) -> tuple[list[str], list[str]]:
    """Note one clause's facts; the names of its events, and its actors."""
    verb, begin, end = clause.verb, clause.begin, clause.end
    kind = str(verb.lastgroup)
    text = sentence[begin:end]
    if kind == "move":
        text = _NO_GOAL.sub(lambda m: " " * len(m[0]), text)
    head, tail = text[: verb.start() - begin], text[verb.end() - begin :]
    piece = _piece_around(sentence, verb, begin, end)
    ahead = [colours[int(i)] for i in re.findall(r"@(\d+)@", head)]
    behind = [colours[int(i)] for i in re.findall(r"@(\d+)@", tail)]
    if kind == "collide" and len({*ahead[-2:], *behind[:1]}) < 2 and _WALL.search(tail):
        kind = "bounce"
    named = ahead or behind
    if kind == "change" and not ahead:
        named = []
    if not named and not _GENERIC.search(piece):
        named = inherited
    if kind == "collide" and named:
        pair = {*ahead[-2:], *behind[:1]} if len(ahead) == 1 else set(ahead[-2:] or behind[:2])
        named = [actor_of(pair)] if len(pair) == 2 else []
        if not named:
            return [], ahead or behind
    elif ahead:
        joined = re.search(r"@\d+@(?:,? (?:and|or|nor) (?:the |an? )?@\d+@)+ (?!that |which )(?:\w+ )?$", head)
        named = ahead if joined else ahead[-1:]
    elif behind and named is behind:
        named = behind[:1]
    new_colours = [_COLOUR[c] for c in _COLOUR_WORD.findall(re.sub(r"\bfrom \w+|\bon an? .*", "", tail))]
    if kind == "change":
        new_colours += [colours[int(i)] for i in re.findall(r"@(\d+)@", tail)]
        if not new_colours and not (re.search("colou?r", text) or (_NOT.search(piece) and not named)):
            return [], named  # something turns, but not into another colour
    if not named:
        several_appear = kind == "appear" and _NUMBER_WORD.search(piece)
        if kind != "move" and _GENERIC.search(piece) and not several_appear:
            facts.add(("negation" if _NOT.search(piece) else "exists", kind))
        return [], []
    if _NOT.search(piece) or _NOT_QUITE.search(head):
        facts.update(("not", "event", actor, kind) for actor in named)
        return [], named
    goals = _DIRECTION_WORD.findall(tail) or (_DIRECTION_WORD.findall(head) if kind == "move" else [])
    speeds = _SPEED_WORD.findall(text)
    for actor in named:
        facts.add(("event", actor, kind))
        if kind == "move":
            facts.update(("motion", actor, "to", _DIRECTION[d]) for d in goals)
            facts.update(("motion", actor, "pace", _SPEED[w]) for w in speeds)
        elif kind == "bounce":
            facts.update(("motion", actor, "off", _DIRECTION[d]) for d in goals)
        elif kind == "change":
            facts.update(("colour", actor, "becomes", colour) for colour in new_colours)
    return [f"{actor}:{kind}" for actor in named], named


def _piece_around(sentence: str, verb: re.Match[str], begin: int, end: int) -> str:
    """What stands around a verb between commas: negations reach no further."""
    first = max(sentence.rfind(",", begin, verb.start()), sentence.rfind(":", begin, verb.start()), begin - 1) + 1
    last = sentence.find(",", verb.end(), end)
    return sentence[first : end if last < 0 else last]


def _order(events: Iterable[tuple[str, str]]) -> set[Fact]:
    """What is told before what, and as the first or last (`("order", "first", event)`, `("order", event, "last")`).

    An event that is told again begins the story anew, unless it is said to come next.
    """
    facts: set[Fact] = set()
    telling: list[str] = []
    for event, lead in events:
        if event in telling and (lead != "next" or event == telling[-1]):
            telling = []
        facts |= {("order", earlier, event) for earlier in telling if earlier != event}
        telling.append(event)
        if lead == "first":
            facts.add(("order", "first", event))
        elif lead == "last":
            facts.add(("order", event, "last"))
    return facts


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
        total = sum(self.required.values()) + sum(self.wrong.values())
        return sum(self.right.values()) / total if total else 1.0


def score_answer(scene: Scene, task: Task, text: str) -> Score:
    """Score `text` as an answer to `task` about `scene`."""
    reading = read(text)
    true = _sayable(scene)
    said = set(reading.facts)
    asked = {fact for options in task.required for fact in options}
    if answered := re.match(r"\W*(yes|no)\b", text.lower()):
        # To a question that can be answered so, a bare yes or no says it all.
        about = {fact[1] for fact in asked if fact[0] in ("exists", "negation")} if task.kind == "question" else set()
        said |= {("exists" if answered[1] == "yes" else "negation", shape) for shape in about}
    happened = {event_name(scene, event) for event in scene.events}
    said |= _order(
        (event, lead) for event, lead in zip(reading.events, reading.leads, strict=True) if event in happened
    )
    letters = {fact for fact in asked if fact[0] == "choice"}
    if not letters:
        said = {fact for fact in said if fact[0] != "choice"}
    false = {f for f in said if (f[1:] in true if f[0] == "not" else f not in true | letters)}
    required, right, wrong = Counter[str](), Counter[str](), Counter[str]()
    for options in task.required:
        kind = min(options)[0]
        kind = "shape" if kind == "exists" else kind
        required[kind] += 1
        right[kind] += bool(options & said)
    for fact in false:
        kind = fact[1] if fact[0] == "not" else fact[0]
        wrong["negation" if kind == "exists" else kind] += 1
    order_right = None
    if required["order"]:
        expected = sum(f[0] == "event" for options in task.required for f in options)
        order_right = (
            right["order"] == required["order"] and not wrong["order"] and len(set(reading.events)) == expected
        )
    return Score(dict(required), dict(right), dict(wrong), order_right)


@dataclass(frozen=True)
class Claim:
    """What one sentence says, its place in the order of events apart: it begins at `begin`, in characters."""

    begin: int
    right: int
    wrong: int


def claims(scene: Scene, text: str) -> list[Claim]:
    """What each sentence of `text` says of `scene`, so that what becomes of long answers can be seen."""
    true = _sayable(scene)
    found, begin = [], 0
    for sentence in re.split(r"(?<=[.!?;])", text):
        said = {fact for fact in read(sentence).facts if fact[0] != "choice"}
        wrong = sum(f[1:] in true if f[0] == "not" else f not in true for f in said)
        found.append(Claim(begin, len(said) - wrong, wrong))
        begin += len(sentence)
    return found


def _sayable(scene: Scene) -> set[Fact]:
    """`scene_facts`, and what an answer may say of them in other words."""
    facts = set(scene_facts(scene))
    facts |= {("exists", obj.shape) for obj in scene.objects}
    count = len(scene.objects)
    facts |= {("count", f"more than {n}") for n in range(1, count)}
    facts |= {("count", f"fewer than {n}") for n in range(count + 1, 7)}
    facts |= {("order", "first", event_name(scene, scene.events[0]))}
    facts |= {("order", event_name(scene, scene.events[-1]), "last")}
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
