"""What is asked about a scene, one true answer of many, and which facts an answer must state.

Four tasks, after the data of LVSpec (arXiv 2604.05650): a long detailed caption, a description of the whole video, an
open question with a medium answer, and multiple choice with a short one. 15-20 % of a caption's words carry facts, as
the paper measures; the other tasks are denser, 35 % on average at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_lvspec.bench.videofacts import grammar
from vllm_lvspec.bench.videofacts.facts import Fact, absences, event_facts, object_facts, order_facts, scene_facts
from vllm_lvspec.bench.videofacts.grammar import LETTERS, NUMBERS, Text, expand, finish, named
from vllm_lvspec.bench.videofacts.scene import COLOURS, DIRECTIONS, SHAPES, Scene, relations

TASKS = ("caption", "description", "question", "choice")
CAPTION_DENSITY = (0.16, 0.195)  # each caption's share of fact words is drawn from this range

_ASK_CAPTION = (
    "Describe the video in full detail.", "Give a long, detailed caption of this clip.",
    "Write a detailed caption for the video.",
)  # fmt: skip
_ASK_DESCRIPTION = (
    "Describe what happens in the video.", "Summarise the whole video.", "What happens in this video?",
)  # fmt: skip
_ASK_IMAGE = ("Describe the image.", "What can you see in this picture?")


@dataclass(frozen=True)
class Task:
    """A question about a scene.

    `required`: for each fact that an answer must state, the set of facts of which any one will do.
    """

    kind: str
    prompt: str
    answer: Text
    required: tuple[frozenset[Fact], ...]


def make_task(scene: Scene, kind: str, rng: np.random.Generator) -> Task:
    """A task of `kind`; raises KeyError for an unknown one."""
    return _MAKERS[kind](scene, rng)


def image_task(scene: Scene, rng: np.random.Generator) -> Task:
    """The scene's first frame, in one sentence."""
    visible = [i for i in range(len(scene.objects)) if scene.is_visible(i, 0)]
    opening = "[the [image|picture] shows|in [this|the] [image|picture] there [is|can be seen]|we [can see|see]]"
    names = grammar.listed([named(scene, i, size=True) for i in visible]) if visible else "nothing"
    required = tuple(frozenset([f]) for i in visible for f in object_facts(scene, i))
    return Task("image", _pick(rng, _ASK_IMAGE), finish([f"{expand(opening, rng)} {names}."]), required)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _one_by_one(facts: set[Fact]) -> tuple[frozenset[Fact], ...]:
    return tuple(frozenset([fact]) for fact in sorted(facts))


def _whole_scene(scene: Scene, size: bool) -> set[Fact]:
    facts: set[Fact] = {("count", str(len(scene.objects)))}
    for i in range(len(scene.objects)):
        facts |= object_facts(scene, i, size)
    for event in scene.events:
        facts |= event_facts(scene, event)
    return facts | order_facts(scene, only_neighbours=True)


def _caption(scene: Scene, rng: np.random.Generator) -> Task:
    pairs = sorted(relations(scene))
    i, j = pairs[int(rng.integers(len(pairs)))]
    word = sorted(relations(scene)[i, j])[0]
    missing = sorted(absences(scene))
    absent = missing[int(rng.integers(len(missing)))]
    # Fillers stand between the parts, never before the first sentence, so that a caption opens with its subject.
    parts = [
        *grammar.opening(scene, rng, size=True, apart=True),
        grammar.relation_sentence(scene, i, j, word, rng),
        *grammar.event_sentences(scene, rng, wordy=True),
        grammar.absence_sentence(absent, rng),
    ]
    density = rng.uniform(*CAPTION_DENSITY)
    fillers = [int(f) for f in rng.permutation(len(grammar.FILLERS))]
    while fillers and finish(parts).fact_density > density:
        parts.insert(int(rng.integers(1, len(parts) + 1)), grammar.filler_sentence(fillers.pop(), rng))
    any_relation = frozenset(f for f in scene_facts(scene) if f[0] == "relation")
    any_absence = frozenset(f for f in scene_facts(scene) if f[0] == "negation")
    required = *_one_by_one(_whole_scene(scene, size=True)), any_relation, any_absence
    return Task("caption", _pick(rng, _ASK_CAPTION), finish(parts), required)


def _description(scene: Scene, rng: np.random.Generator) -> Task:
    parts = grammar.opening(scene, rng, size=False, apart=False) + grammar.event_sentences(scene, rng, wordy=True)
    for filler in rng.permutation(len(grammar.FILLERS))[: int(rng.integers(2))]:
        parts.insert(int(rng.integers(1, len(parts) + 1)), grammar.filler_sentence(int(filler), rng))
    return Task("description", _pick(rng, _ASK_DESCRIPTION), finish(parts), _one_by_one(_whole_scene(scene, False)))


# Open questions -------------------------------------------------------------------------------------------------------


def _ask_when(scene: Scene, rng: np.random.Generator) -> Task:
    which = ("first", "last")[int(rng.integers(2))]
    event = scene.events[0 if which == "first" else -1]
    lead = expand(f"[the {which} thing [that happens|to happen|we see|one sees]|what happens {which}] is that", rng)
    answer = finish([f"{lead} {grammar.happening(scene, event, rng, fancy=False)}."])
    return Task("question", f"What happens {which}?", answer, _one_by_one(event_facts(scene, event)))


def _ask_next(scene: Scene, rng: np.random.Generator) -> Task:
    i = int(rng.integers(len(scene.events) - 1))
    event, following = scene.events[i], scene.events[i + 1]
    clause = finish([grammar.happening(scene, event, rng, fancy=False)]).text
    lead = expand("[after that|then|next|right afterwards|the next thing is that]", rng)
    answer = finish([f"{lead}, {grammar.happening(scene, following, rng, fancy=False)}."])
    prompt = f"What happens after this: {clause[0].lower()}{clause[1:]}?"
    return Task("question", prompt, answer, _one_by_one(event_facts(scene, following)))


def _ask_about(scene: Scene, rng: np.random.Generator) -> Task:
    event = scene.events[int(rng.integers(len(scene.events)))]
    lead = expand("[in [the|this] [video|clip]|as [we|you] can see|here|at some [point|moment]]", rng)
    answer = finish([f"{lead}, {grammar.happening(scene, event, rng, fancy=False)}."])
    prompt = f"What happens to the {scene.objects[event.actor].name}?"
    return Task("question", prompt, answer, _one_by_one(event_facts(scene, event)))


def _ask_objects(scene: Scene, rng: np.random.Generator) -> Task:
    facts: set[Fact] = {("count", str(len(scene.objects)))}
    for i in range(len(scene.objects)):
        facts |= object_facts(scene, i)
    answer = finish(grammar.opening(scene, rng, size=True, apart=False))
    return Task("question", "How many objects are there, and what do they look like?", answer, _one_by_one(facts))


def _ask_where(scene: Scene, rng: np.random.Generator) -> Task:
    pairs = sorted(relations(scene))
    i, j = pairs[int(rng.integers(len(pairs)))]
    words = relations(scene)[i, j]
    word = sorted(words)[0]
    lead = expand("[in [the|this] [video|clip]|as [we|you] can see|here|looking at the [frame|picture]]", rng)
    answer = finish([f"{lead}, {grammar.relation_clause(scene, i, j, word, rng)}."])
    a, b = scene.objects[i].colour, scene.objects[j].colour
    prompt = f"Where is the {scene.objects[i].name}, seen from the {scene.objects[j].name}?"
    return Task("question", prompt, answer, (frozenset(("relation", a, w, b) for w in words),))


def _ask_whether(scene: Scene, rng: np.random.Generator) -> Task:
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    prompt = f"Is there a {shape} in the video?"
    having = [i for i, obj in enumerate(scene.objects) if obj.shape == shape]
    if having:
        lead = expand("[yes, there is|yes, one can see|yes, we see]", rng)
        answer = finish([f"{lead} {grammar.listed([named(scene, i, size=True) for i in having])}."])
        # Yes is enough; an object of that shape says yes, too.
        seen = {("exists", shape), *(("shape", scene.objects[i].colour, shape) for i in having)}
        return Task("question", prompt, answer, (frozenset(seen),))
    tail = expand("[in [the|this] [video|clip]|to be seen|at all|anywhere]", rng)
    answer = finish([expand(f"<no>, [there is|we see|one finds] <no> <{{shape}}> {tail}.", rng, shape=shape)])
    return Task("question", prompt, answer, (frozenset([("negation", shape)]),))


_QUESTIONS: tuple[Callable[[Scene, np.random.Generator], Task], ...] = (
    _ask_when, _ask_next, _ask_about, _ask_objects, _ask_where, _ask_whether,
)  # fmt: skip


def _question(scene: Scene, rng: np.random.Generator) -> Task:
    return _QUESTIONS[int(rng.integers(len(_QUESTIONS)))](scene, rng)


# Multiple choice ------------------------------------------------------------------------------------------------------


def _choice(scene: Scene, rng: np.random.Generator) -> Task:
    """Four options, of which one is right; the answer names it and its letter."""
    question, right, wrong = _choice_parts(scene, rng)
    place = int(rng.integers(len(LETTERS)))
    options = [str(w) for w in rng.permutation(sorted(wrong))[: len(LETTERS) - 1]]
    options.insert(place, right)
    prompt = question + "".join(f" {letter}: {option}." for letter, option in zip(LETTERS, options, strict=True))
    marked = " ".join(f"<{w}>" if w not in ("the", "object", "to") else w for w in right.split())
    answer = finish(
        [
            expand(
                "[the [right|correct|fitting] [answer|option|choice] is|it is|this must be] {right}, "
                "[so|hence|therefore] the letter is {letter}.",
                rng,
                right=marked,
                letter=f"<{LETTERS[place]}>",
            )
        ]
    )
    return Task("choice", prompt, answer, (frozenset([("choice", LETTERS[place])]),))


def _choice_parts(scene: Scene, rng: np.random.Generator) -> tuple[str, str, set[str]]:
    """A question, its right option, and at least three wrong ones."""
    i = int(rng.integers(len(scene.objects)))
    obj = scene.objects[i]
    changed = {f"the {e.colour} {scene.objects[e.actor].shape}" for e in scene.events if e.kind == "change"}
    present = {f"the {o.name}" for o in scene.objects}
    invented = {f"the {c} {s}" for c in COLOURS for s in SHAPES} - present - changed
    moves = [e for e in scene.events if e.kind == "move"]
    ends = [e for e in (scene.events[0], scene.events[-1]) if e.other is None]
    kind = int(rng.integers(5))
    if kind == 0:
        subject = obj.shape if _only_shape(scene, i) else f"object {_place(obj.cell)}"
        return f"Which colour does the {subject} have at first?", obj.colour, set(COLOURS) - {obj.colour}
    if kind == 1:
        right = NUMBERS[len(scene.objects)]
        return "How many objects are there?", right, set(NUMBERS.values()) - {right}
    if kind == 2 and moves:
        event = moves[int(rng.integers(len(moves)))]
        wrong = {f"to the {d}" for d in DIRECTIONS if d != event.direction}
        return f"Where does the {scene.objects[event.actor].name} move?", f"to the {event.direction}", wrong
    if kind == 3 and ends:
        event = ends[int(rng.integers(len(ends)))]
        right = f"the {scene.objects[event.actor].name}"
        # Objects of the scene before invented ones: telling them apart takes the order of events.
        others = sorted(present - {right})
        others += [str(o) for o in rng.permutation(sorted(invented))[: 3 - len(others)]]
        which = "first" if event is scene.events[0] else "last"
        return f"To which object does something happen {which}?", right, set(others)
    return "Which object is in the video?", f"the {obj.name}", invented


def _only_shape(scene: Scene, index: int) -> bool:
    return sum(o.shape == scene.objects[index].shape for o in scene.objects) == 1


def _place(cell: tuple[int, int]) -> str:
    return f"at the {('top', 'bottom')[cell[1]]} {('left', 'right')[cell[0]]}"


_MAKERS: dict[str, Callable[[Scene, np.random.Generator], Task]] = {
    "caption": _caption, "description": _description, "question": _question, "choice": _choice,
}  # fmt: skip
