"""Sentences about a scene: facts are given, fillers are drawn from many equally good ones.

Templates are plain text with `[one|of|these]`, which may be nested, and `{named}` parts. Whatever stands between `<`
and `>` in a part is a fact; `Text` keeps where facts stand, so that their density is counted and not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_lvspec.bench.videofacts.scene import Event, Scene

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
LETTERS = ("A", "B", "C", "D")
EVENT_VERBS = {
    "appear": ("appears", "emerges", "pops up", "shows up"),
    "vanish": ("vanishes", "disappears", "fades away", "dissolves"),
    "change": ("turns", "changes to", "becomes", "switches to"),
    "bounce": ("bounces off", "rebounds from", "springs back from"),
    "collide": ("collide", "crash into each other", "bump together", "run into each other"),
}
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Text:
    """`fact_spans`: where in `text` facts stand, as pairs of character offsets."""

    text: str
    fact_spans: tuple[tuple[int, int], ...]

    @property
    def fact_density(self) -> float:
        """Share of words and punctuation marks that carry facts."""
        facts = sum(len(_WORD.findall(self.text[a:b])) for a, b in self.fact_spans)
        return facts / len(_WORD.findall(self.text))


def expand(template: str, rng: np.random.Generator, **parts: str) -> str:
    """Choose among alternatives, innermost first, and put the parts in."""
    while match := _CHOICE.search(template):
        options = match[1].split("|")
        template = template[: match.start()] + options[int(rng.integers(len(options)))] + template[match.end() :]
    return template.format(**parts)


def finish(sentences: Iterable[str]) -> Text:
    """Join marked sentences: capitals, single spaces, and where the facts are."""
    marked = " ".join(_capital(re.sub(r"\s+([,.;?])", r"\1", " ".join(s.split()))) for s in sentences)
    text, spans, begin = "", [], 0
    for piece in re.split(r"([<>])", marked):
        if piece == "<":
            begin = len(text)
        elif piece == ">":
            spans.append((begin, len(text)))
        else:
            text += piece
    return Text(text, tuple(spans))


def _capital(sentence: str) -> str:
    for i, letter in enumerate(sentence):
        if letter.isalpha():
            return sentence[:i] + letter.upper() + sentence[i + 1 :]
    return sentence


# Parts ----------------------------------------------------------------------------------------------------------------


def named(scene: Scene, index: int, size: bool = False, shape: bool = True) -> str:
    obj = scene.objects[index]
    words = [f"<{obj.size}>"] * size + [f"<{obj.colour}>", f"<{obj.shape}>" if shape else "one"]
    return " ".join(words)


def listed(names: Sequence[str]) -> str:
    names = [f"{'an' if re.sub('<', '', n)[0] in 'aeiou' else 'a'} {n}" for n in names]
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def happening(scene: Scene, event: Event, rng: np.random.Generator, fancy: bool = True) -> str:
    """A clause for one event, in present tense, without a full stop."""
    actor = named(scene, event.actor)
    if event.kind == "move":
        goal = "[towards|to] the {direction} [side|part|edge|end] [of the [frame|picture|image|screen]|]"
        orders = [f"the {{actor}} {{verb}} {{speed}} {goal}", f"the {{actor}} {{speed}} {{verb}} {goal}"]
        if fancy:
            orders.append(f"{{speed}} and [evenly|smoothly|calmly|silently] the {{actor}} {{verb}} {goal}")
        return expand(
            orders[int(rng.integers(len(orders)))],
            rng,
            actor=actor,
            speed=f"<{event.speed}>",
            direction=f"<{event.direction}>",
            verb=expand("[slides|drifts|glides|travels|moves|floats]", rng),
        )
    verbs = EVENT_VERBS[event.kind]
    verb = f"<{verbs[int(rng.integers(len(verbs)))]}>"
    ending = {
        "appear": "[on the [dark|empty] [ground|background]|out of nowhere|all at once|in its place|]",
        "vanish": "[from [the view|sight|the picture|the screen]|without a trace|for good|all at once|]",
        "change": "{colour}",
        "bounce": "the {direction} [edge|border|side|wall] [of the [frame|picture|image|screen]|]",
        "collide": "[[near|around] the [middle|centre]|half way|and part again|and go back|]",
    }[event.kind]
    subject = "the {actor}" if event.other is None else "the {actor} and the {other}"
    return expand(
        f"{subject} {{verb}} {ending}",
        rng,
        actor=actor,
        other="" if event.other is None else named(scene, event.other),
        verb=verb,
        colour=f"<{event.colour}>",
        direction=f"<{event.direction}>",
    )


_FIRST = "[first|initially|to begin with|at the start|at the beginning|in the opening [moments|seconds]|early on]"
_NEXT = (
    "[then|after that|next|a moment later|[shortly|soon] afterwards|following this|subsequently|[a little|somewhat] "
    "later|once this is over]"
)
_LAST = "[finally|in the end|at last|eventually|towards the end|as the last thing|[near|at] the very end]"
_ASIDE = (
    "[as [the clip|the video|time] goes on|as [you|we|one] can [clearly|easily|plainly] see|[quite|rather] "
    "[suddenly|unexpectedly|calmly|naturally]|without any [hurry|warning|sound]|in plain [view|sight]|"
    "as if [on cue|by itself|by magic]|to [our|the viewer's] surprise]"
)


def event_sentences(scene: Scene, rng: np.random.Generator, wordy: bool) -> list[str]:
    """One sentence an event, in order of time."""
    sentences = []
    for i, event in enumerate(scene.events):
        last = i == len(scene.events) - 1 and rng.random() < 0.6
        lead = expand(_FIRST if i == 0 else _LAST if last else _NEXT, rng)
        aside = f", {expand(_ASIDE, rng)}" if wordy and rng.random() < 0.7 else ""
        sentences.append(f"{lead}{aside}, {happening(scene, event, rng)}.")
    return sentences


_OPENINGS = (
    "[the|this] [video|clip|recording|footage|short film|sequence] "
    "[shows|presents|features|contains|displays|is about] {count} [objects|shapes|figures|items]",
    "[in|throughout] [the|this] [video|clip|recording|footage|sequence] [we|you|one] can "
    "[see|watch|observe|make out|find] {count} [objects|shapes|figures|items]",
    "[here|in this scene], {count} [objects|shapes|figures|items] [can be seen|are shown|are visible|come into view]",
    "what [we|you] [see|get|have] here is a [video|clip|recording|sequence] [with|of] {count} "
    "[objects|shapes|figures|items]",
)


def opening(scene: Scene, rng: np.random.Generator, size: bool, apart: bool) -> list[str]:
    """How many objects there are and which, in one sentence or in several (`apart`)."""
    count = f"<{NUMBERS[len(scene.objects)]}>"
    first = expand(_OPENINGS[int(rng.integers(len(_OPENINGS)))], rng, count=count)
    names = [named(scene, i, size) for i in range(len(scene.objects))]
    if not apart:
        return [expand(f"{first}[, namely|:|, which are|, to be exact] {listed(names)}.", rng)]
    sentences = [f"{first}."]
    for i, name in enumerate(names):
        lead = (
            "[one of them|the first [one|of them]|to start with, there]"
            if i == 0
            else "[another [one|of them]|the [next|other] one|besides, there|in addition, there|then there|also there]"
        )
        tail = "[, [easy|simple] to [spot|recognise|make out]|, in [one|a single] [plain|flat|even] [colour|tone]|]"
        sentences.append(expand(f"{lead} is {listed([name])}{tail}.", rng))
    return sentences


_RELATIONS = {
    "left": "[to the|on the|] {word} of",
    "right": "[to the|on the|] {word} of",
    "above": "{word}",
    "below": "{word}",
}


def relation_clause(scene: Scene, i: int, j: int, word: str, rng: np.random.Generator) -> str:
    where = expand(_RELATIONS[word], rng, word=f"<{word}>")
    verb = expand("[is|is found|is placed|sits|stands|lies|can be found]", rng)
    return f"the {named(scene, i)} {verb} {where} the {named(scene, j)}"


def relation_sentence(scene: Scene, i: int, j: int, word: str, rng: np.random.Generator) -> str:
    lead = "[[as for|concerning|regarding] the [layout|arrangement|placement],|in [the|this] [frame|picture|scene],|]"
    return f"{expand(lead, rng)} {relation_clause(scene, i, j, word, rng)}."


_ABSENCE = {
    "appear": "<no> [object|shape|figure|item] <{verb}>",
    "vanish": "<no> [object|shape|figure|item] <{verb}>",
    "change": "<no> [object|shape|figure|item] <changes> its colour",
    "bounce": "<no> [object|shape|figure|item] <bounces> off [a border|a wall|an edge]",
    "collide": "<no> [objects|shapes|figures|items] <collide>",
}


def absence_sentence(absent: str, rng: np.random.Generator) -> str:
    """`absent`: a shape that no object has, or a kind of event that does not happen."""
    if absent in _ABSENCE:
        verb = EVENT_VERBS[absent][int(rng.integers(2))]
        clause = expand(_ABSENCE[absent], rng, verb=verb)
    else:
        clause = expand("[there is|one finds|we find|you will see] <no> <{shape}>", rng, shape=absent)
    lead = "[at no time is this broken:|on the other hand,|by contrast,|it should be [said|noted] that|]"
    tail = "[in [the|this] [video|clip|recording|sequence|footage]|at any [time|point|moment]|anywhere|]"
    return expand(f"{lead} {{clause}} {tail}.", rng, clause=clause)


FILLERS = (
    "[the|this] [camera|viewpoint|point of view] [stays|remains|is kept] [perfectly|completely|entirely|absolutely] "
    "[still|steady|fixed|static] [all the time|from start to finish|throughout|the whole time]",
    "the [background|backdrop|setting] [is|stays|remains] [plain|dark|uniform|simple] and [empty|quiet|even|calm], "
    "[so|which means] [nothing|little] [distracts|draws attention] from the [action|scene|events]",
    "the [light|lighting|illumination] is [soft|even|flat|constant], and [the colours|all tones] [look|seem|are] "
    "[clean|clear|vivid|bright|strong]",
    "[overall|all in all|taken together], the [mood|atmosphere|feeling|impression] is [calm|peaceful|quiet|playful] "
    "and [a bit|slightly|somewhat|rather] [abstract|dreamy|strange|minimal]",
    "the [picture|image] [quality|resolution] is [low|modest|limited], but "
    "[everything|each detail|all of it] [is|stays] [sharp|clear|visible|recognisable] [enough|throughout|to the eye]",
    "[it|this] [looks|feels|seems] like [an animation|a drawing|a simple game|a test pattern|a lesson] "
    "[made|meant|produced] [by a computer|for teaching|for an experiment|by hand]",
    "the [pace|rhythm|tempo] of the [clip|video|recording|sequence] is [easy|simple|pleasant|comfortable] to follow "
    "[for anyone|for the eye|from the beginning|even without sound]",
    "[there are|we hear|one hears] neither [words|voices|music] nor [captions|sounds|letters] "
    "[in it|to be heard|at all]",
    "[each|every] [detail|part|step] of [it|the scene|the action] [has|takes|gets] its own [time|place|space] and "
    "[reads|comes across] [well|clearly|plainly|easily]",
    "[people|animals|buildings|landscapes] are [absent|missing] here, [it is|this is] [purely|only|just] "
    "[a play|a study|a matter] of [form|geometry|simple forms] and [colour|motion|timing]",
    "the [whole|entire|complete] [thing|clip|recording|sequence] [lasts|takes|runs for] [only|just|about] "
    "[a few|some|several] [seconds|moments]",
    "[someone|a viewer|anybody] who [looks|watches] [closely|carefully|attentively] will [notice|catch|enjoy] "
    "[all of it|the small details|what is going on]",
    "the [composition|layout|arrangement] [is|feels] [balanced|tidy|orderly|open], with [plenty|a lot|lots] of "
    "[free|dark|empty] space [around|in between|left over]",
    "[no|hardly any] [text|writing|shadow|texture] is [added|used|needed], which [keeps|makes] the [style|look|design] "
    "[simple|plain|clean|modern]",
    "[one|you|we] [could|might|may] [call|describe] the [style|look|design] [as|of it as] [minimal|geometric|sober|"
    "modern|graphic]",
    "[that|this] [sums up|covers|is] [more or less|nearly|roughly] [all|everything] [there is to say|one can tell|that "
    "matters] about [it|the clip|the scene]",
    "the [edges|outlines|contours] [are|look|stay] [crisp|smooth|soft|neat], [even|also] when [something is going on|"
    "there is action|the scene gets busy]",
    "[in|with] its [quiet|modest|simple|own] way the [clip|video|scene|recording] is [pleasant|nice|interesting|"
    "soothing] to [watch|look at|follow]",
)


def filler_sentence(index: int, rng: np.random.Generator) -> str:
    return expand(FILLERS[index], rng) + "."
