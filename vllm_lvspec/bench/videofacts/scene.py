"""Generated scenes: coloured shapes to which things happen one after another.

A scene follows from its seed, and so do its frames and everything that is true of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

SIDE = 112  # pixels of a frame, both ways
NUM_FRAMES = 24
FPS = 4.0
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (170, 50, 200),
    "white": (240, 240, 240),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 8, "large": 14}  # radius in pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
SPEEDS = {"quickly": 3, "slowly": 7}  # frames that a motion takes
EVENT_KINDS = ("move", "appear", "vanish", "change", "bounce", "collide")

_CELL = SIDE // 2  # objects live in the cells of a 2 x 2 grid
_REACH = 12.0  # pixels from a cell's centre to either end of a motion
_JITTER = 10  # largest offset of an object at rest from its cell's centre
_BOUNCE_FRAMES = 6
_TRACE_FRAMES = 4  # frames for which an appearance, a disappearance or a new colour is news
_AREA_SEEN = 0.06  # share of a square that an object must cover to be what the square shows

EventKind = Literal["move", "appear", "vanish", "change", "bounce", "collide"]


@dataclass(frozen=True)
class SceneObject:
    """`colour` is the one it has at first; `offset` is its distance in pixels from its cell's centre at rest."""

    colour: str
    shape: str
    size: str
    cell: tuple[int, int]  # column, row
    offset: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def home(self) -> tuple[float, float]:
        """Where it is before anything happens to it, in pixels."""
        return (self.cell[0] + 0.5) * _CELL + self.offset[0], (self.cell[1] + 0.5) * _CELL + self.offset[1]


@dataclass(frozen=True)
class Event:
    """Something that happens to object `actor` (an index) from frame `start` until frame `stop`.

    `other`: the object it collides with. `direction`: of a motion, or the edge that is bounced off. `speed`: of a
    motion. `colour`: the new one.
    """

    kind: EventKind
    actor: int
    start: int
    stop: int
    other: int | None = None
    direction: str | None = None
    speed: str | None = None
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """Objects in reading order of their cells, and events in order of time, at most one an object."""

    objects: tuple[SceneObject, ...]
    events: tuple[Event, ...]
    background: int

    @classmethod
    def from_seed(cls, seed: int) -> Scene:
        """Two to four objects and two or three events."""
        rng = np.random.default_rng([seed, 41])
        count = int(rng.integers(2, 5))
        colours = [str(c) for c in rng.permutation(list(COLOURS))]
        cells = sorted((int(c) // 2, int(c) % 2) for c in rng.permutation(4)[:count])
        objects = [
            SceneObject(
                colour=colours.pop(),
                shape=str(rng.choice(SHAPES)),
                size=str(rng.choice(list(SIZES))),
                cell=(column, row),
                offset=(float(rng.integers(-_JITTER, _JITTER + 1)), float(rng.integers(-_JITTER, _JITTER + 1))),
            )
            for row, column in cells
        ]
        events: list[Event] = []
        waiting = [int(i) for i in rng.permutation(count)]
        num_events = int(rng.integers(2, min(count, 3) + 1))
        while waiting and len(events) < num_events:
            kind = str(rng.choice(EVENT_KINDS, p=[0.35, 0.13, 0.13, 0.13, 0.13, 0.13]))
            actor = waiting.pop()
            if kind == "collide":
                neighbours = [i for i in waiting if _adjacent(objects[i], objects[actor])]
                if not neighbours or len(waiting) - 1 < num_events - len(events) - 1:
                    kind = "move"
                else:
                    waiting.remove(neighbours[0])
                    events.append(Event("collide", actor, 0, _BOUNCE_FRAMES, other=neighbours[0]))
            if kind == "move":
                direction, speed = str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(SPEEDS)))
                events.append(Event("move", actor, 0, SPEEDS[speed], direction=direction, speed=speed))
            elif kind == "bounce":
                column, row = objects[actor].cell
                edge = ("left", "right")[column] if rng.random() < 0.5 else ("top", "bottom")[row]
                events.append(Event("bounce", actor, 0, _BOUNCE_FRAMES, direction=edge))
            elif kind == "change":
                events.append(Event("change", actor, 0, _TRACE_FRAMES, colour=colours.pop()))
            elif kind in ("appear", "vanish"):
                events.append(Event("appear" if kind == "appear" else "vanish", actor, 0, _TRACE_FRAMES))
        slot = (NUM_FRAMES - 2) // len(events)
        timed = []
        for i, event in enumerate(events):
            start = 2 + i * slot + int(rng.integers(0, slot - max(SPEEDS.values()) + 1))
            timed.append(Event(**{**vars(event), "start": start, "stop": start + event.stop}))
            if event.kind == "move":
                objects[event.actor] = _at_start_of_motion(objects[event.actor], str(event.direction))
        return cls(tuple(objects), tuple(timed), int(rng.integers(0, 50)))

    def event_of(self, index: int) -> Event | None:
        """What happens to object `index`."""
        return next((e for e in self.events if index in (e.actor, e.other)), None)

    def is_visible(self, index: int, frame: float) -> bool:
        event = self.event_of(index)
        if event is None or event.kind not in ("appear", "vanish"):
            return True
        return (frame >= event.start) == (event.kind == "appear")

    def colour_at(self, index: int, frame: float) -> str:
        event = self.event_of(index)
        if event is not None and event.kind == "change" and frame >= event.start:
            return str(event.colour)
        return self.objects[index].colour

    def centre(self, index: int, frame: float) -> tuple[float, float]:
        """Centre of object `index` in pixels at `frame`."""
        obj, event = self.objects[index], self.event_of(index)
        x, y = obj.home
        if event is None or event.kind not in ("move", "bounce", "collide"):
            return x, y
        share = min(max((frame - event.start) / (event.stop - event.start), 0.0), 1.0)
        if event.kind == "move":
            dx, dy = DIRECTIONS[str(event.direction)]
            return x + 2 * _REACH * share * dx, y + 2 * _REACH * share * dy
        there = 1 - abs(2 * share - 1)  # out and back
        goal_x, goal_y = self._turning_point(index, event)
        return x + there * (goal_x - x), y + there * (goal_y - y)

    def _turning_point(self, index: int, event: Event) -> tuple[float, float]:
        """Where a bouncing or colliding object turns back: at the edge of the frame, or of its neighbour."""
        obj = self.objects[index]
        radius = SIZES[obj.size]
        x, y = obj.home
        if event.kind == "bounce":
            dx, dy = DIRECTIONS[str(event.direction)]
        else:
            partner = self.objects[event.other if index == event.actor else event.actor]  # type: ignore[index]
            dx, dy = partner.cell[0] - obj.cell[0], partner.cell[1] - obj.cell[1]
            # They meet on the line between their cells, half way between their other coordinates.
            px, py = partner.home
            x, y = (x, (y + py) / 2) if dx else ((x + px) / 2, y)
        half = _CELL / 2 - radius
        return (
            (obj.cell[0] + 0.5) * _CELL + dx * half if dx else x,
            (obj.cell[1] + 0.5) * _CELL + dy * half if dy else y,
        )

    def render(self, num_frames: int = NUM_FRAMES) -> np.ndarray:
        """Frames `[num_frames, SIDE, SIDE, 3]`, uint8 RGB, evenly spread over the scene."""
        frames = np.full((num_frames, SIDE, SIDE, 3), self.background, np.uint8)
        for i in range(num_frames):
            frame = i * NUM_FRAMES / num_frames
            for index, obj in enumerate(self.objects):
                if self.is_visible(index, frame):
                    _draw(frames[i], obj, self.centre(index, frame), COLOURS[self.colour_at(index, frame)])
        return frames

    def words_at(self, frame: float, patch: int) -> list[tuple[str, ...]]:
        """What each square of `patch` pixels shows, row by row: colour, shape, size, what happens, how fast.

        Nothing: an empty tuple. What has just vanished is still named where it was.
        """
        side = SIDE // patch
        edges = np.arange(side) * patch
        words: list[tuple[str, ...]] = [()] * side**2
        largest = np.full(side**2, _AREA_SEEN * patch * patch)
        for index, obj in enumerate(self.objects):
            state = self._state(index, frame)
            if not self.is_visible(index, frame) and state != "vanishes":
                continue
            (x, y), radius = self.centre(index, frame), SIZES[obj.size]
            width = np.clip(np.minimum(x + radius, edges + patch) - np.maximum(x - radius, edges), 0, None)
            height = np.clip(np.minimum(y + radius, edges + patch) - np.maximum(y - radius, edges), 0, None)
            area = (height[:, None] * width[None, :]).ravel()
            event = self.event_of(index)
            speed = event.speed if event is not None and event.speed and state != "still" else "still"
            for square in np.flatnonzero(area > largest):
                largest[square] = area[square]
                words[square] = (self.colour_at(index, frame), obj.shape, obj.size, state, str(speed))
        return words

    def _state(self, index: int, frame: float) -> str:
        event = self.event_of(index)
        if event is None or not event.start - 0.5 <= frame < event.stop + 0.5:
            return "still"
        if event.kind in ("bounce", "collide") and frame < (event.start + event.stop) / 2:
            if event.kind == "bounce":
                return str(event.direction)
            obj = self.objects[index]
            partner = self.objects[event.other if index == event.actor else event.actor]  # type: ignore[index]
            step = (partner.cell[0] - obj.cell[0], partner.cell[1] - obj.cell[1])
            return next(name for name, vector in DIRECTIONS.items() if vector == step)
        words = {"appear": "appears", "vanish": "vanishes", "change": "turns", "bounce": "bounces"}
        return {**words, "collide": "collide", "move": str(event.direction)}[event.kind]


def _adjacent(a: SceneObject, b: SceneObject) -> bool:
    return abs(a.cell[0] - b.cell[0]) + abs(a.cell[1] - b.cell[1]) == 1


def _at_start_of_motion(obj: SceneObject, direction: str) -> SceneObject:
    dx, dy = DIRECTIONS[direction]
    offset = (-_REACH * dx if dx else obj.offset[0], -_REACH * dy if dy else obj.offset[1])
    return SceneObject(obj.colour, obj.shape, obj.size, obj.cell, offset)


def _draw(frame: np.ndarray, obj: SceneObject, centre: tuple[float, float], colour: tuple[int, int, int]) -> None:
    x, y = centre
    radius = SIZES[obj.size]
    fixed = 16  # cv2 draws with sub-pixel precision in sixteenths
    if obj.shape == "circle":
        cv2.circle(frame, (round(x * fixed), round(y * fixed)), radius * fixed, colour, -1, cv2.LINE_AA, 4)
        return
    r = radius - 1
    corners = [(-r, -r), (r, -r), (r, r), (-r, r)] if obj.shape == "square" else [(0, -r), (r, r), (-r, r)]
    points = np.array([[(x + cx) * fixed, (y + cy) * fixed] for cx, cy in corners]).round().astype(np.int32)
    cv2.fillPoly(frame, [points], colour, cv2.LINE_AA, 4)


def relations(scene: Scene) -> dict[tuple[int, int], set[str]]:
    """Which words hold between objects `(i, j)`: `i` is left of, right of, above or below `j`."""
    result: dict[tuple[int, int], set[str]] = {}
    for i, j in itertools.permutations(range(len(scene.objects)), 2):
        (ci, ri), (cj, rj) = scene.objects[i].cell, scene.objects[j].cell
        words = {"left": ci < cj, "right": ci > cj, "above": ri < rj, "below": ri > rj}
        result[i, j] = {word for word, holds in words.items() if holds}
    return result


def write_mp4(path: str, frames: np.ndarray, fps: float = FPS) -> None:
    """Write RGB `frames [num_frames, height, width, 3]` as an MPEG-4 file."""
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), fps, (frames.shape[2], frames.shape[1]))
    if not writer.isOpened():
        raise OSError(f"cannot write a video to {path}")
    for frame in frames:
        writer.write(frame[:, :, ::-1])
    writer.release()


def video_item(frames: np.ndarray, fps: float = FPS) -> tuple[np.ndarray, dict]:
    """The pair that vLLM takes as `multi_modal_data["video"]`."""
    count = len(frames)
    return frames, {
        "fps": fps,
        "duration": count / fps,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "do_sample_frames": False,
        "video_backend": "opencv",
    }
