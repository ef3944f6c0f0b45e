"""What is true of a scene, as plain tuples: the kind of fact first, then its arguments.

| kind | arguments |
|---|---|
| `count` | number of objects |
| `colour` | colour of an object; or `actor`, `"becomes"`, new colour |
| `shape`, `size` | colour of the object (which names it: no two share one), value |
| `event` | actor, kind of event |
| `motion` | actor, direction, speed or edge (`"to"`, `"pace"`, `"off"` come second) |
| `relation` | colour, word, colour of the object it relates to |
| `negation` | a shape that no object has, or a kind of event that does not happen |
| `order` | event, later event, each as `actor:kind` |
| `choice` | letter of the right option |

An actor is a colour, and for a collision both, sorted and joined by `+`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from vllm_lvspec.bench.videofacts.scene import EVENT_KINDS, SHAPES, Event, Scene, relations

Fact = tuple[str, ...]
KINDS = ("count", "colour", "shape", "size", "event", "motion", "relation", "negation", "order", "choice")


def actor_of(colours: Iterable[str]) -> str:
    return "+".join(sorted(colours))


def event_name(scene: Scene, event: Event) -> str:
    indices = [event.actor] + ([] if event.other is None else [event.other])
    return f"{actor_of(scene.objects[i].colour for i in indices)}:{event.kind}"


def object_facts(scene: Scene, index: int, size: bool = True) -> set[Fact]:
    obj = scene.objects[index]
    facts: set[Fact] = {("colour", obj.colour), ("shape", obj.colour, obj.shape)}
    return facts | ({("size", obj.colour, obj.size)} if size else set())


def event_facts(scene: Scene, event: Event) -> set[Fact]:
    actor, kind = event_name(scene, event).split(":")
    facts: set[Fact] = {("event", actor, kind)}
    if event.kind == "move":
        facts |= {("motion", actor, "to", str(event.direction)), ("motion", actor, "pace", str(event.speed))}
    elif event.kind == "bounce":
        facts.add(("motion", actor, "off", str(event.direction)))
    elif event.kind == "change":
        facts.add(("colour", actor, "becomes", str(event.colour)))
    return facts


def order_facts(scene: Scene, only_neighbours: bool = False) -> set[Fact]:
    names = [event_name(scene, event) for event in scene.events]
    pairs = itertools.pairwise(names) if only_neighbours else itertools.combinations(names, 2)
    return {("order", *pair) for pair in pairs}


def absences(scene: Scene) -> set[str]:
    """Shapes that no object has, and kinds of events that do not happen (motion apart)."""
    shapes = set(SHAPES) - {o.shape for o in scene.objects}
    return shapes | (set(EVENT_KINDS) - {"move"} - {e.kind for e in scene.events})


def scene_facts(scene: Scene) -> frozenset[Fact]:
    """Everything that is true of `scene` and can be said in these terms."""
    facts: set[Fact] = {("count", str(len(scene.objects)))}
    for i in range(len(scene.objects)):
        facts |= object_facts(scene, i)
    for event in scene.events:
        facts |= event_facts(scene, event)
    for (i, j), words in relations(scene).items():
        facts |= {("relation", scene.objects[i].colour, word, scene.objects[j].colour) for word in words}
    facts |= {("negation", absent) for absent in absences(scene)}
    return frozenset(facts | order_facts(scene))
