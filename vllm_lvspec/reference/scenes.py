"""Generated videos of moving coloured shapes, their captions, and a scorer that knows what is true.

A scene holds two or three shapes that stand still and move one after another. Everything follows from a seed, so a
scene, its frames and its captions can be made again anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import cv2
import numpy as np

SIZE = 112  # pixels, both sides
NUM_FRAMES = 16
FPS = 4.0
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (170, 50, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUMBERS = {1: "one", 2: "two", 3: "three"}
_REACH = 13  # pixels from a cell's centre to either end of a motion
_RADIUS = 13


@dataclass(frozen=True)
class SceneObject:
    colour: str
    shape: str
    direction: str
    cell: tuple[int, int]  # column and row of the 2 x 2 grid
    start: int  # frame in which the motion starts
    stop: int  # frame in which the motion has ended

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def centre(self, frame: float) -> tuple[float, float]:
        """Centre in pixels at `frame`."""
        share = min(max((frame - self.start) / max(self.stop - self.start, 1), 0.0), 1.0)
        dx, dy = DIRECTIONS[self.direction]
        offset = _REACH * (2 * share - 1)
        cell = SIZE // 2
        return (self.cell[0] + 0.5) * cell + dx * offset, (self.cell[1] + 0.5) * cell + dy * offset

    def moves_in(self, frame: float) -> bool:
        return self.start <= frame < self.stop


@dataclass(frozen=True)
class Scene:
    """Objects in the order in which they move."""

    objects: tuple[SceneObject, ...]
    background: int

    @classmethod
    def from_seed(cls, seed: int) -> Scene:
        rng = np.random.default_rng([seed, 7])
        count = int(rng.integers(2, 4))
        colours = rng.permutation(list(COLOURS))[:count]
        cells = rng.permutation(4)[:count]
        step = NUM_FRAMES // count
        objects = []
        for i in range(count):
            objects.append(
                SceneObject(
                    colour=str(colours[i]),
                    shape=str(rng.choice(SHAPES)),
                    direction=str(rng.choice(list(DIRECTIONS))),
                    cell=(int(cells[i]) % 2, int(cells[i]) // 2),
                    start=i * step + int(rng.integers(0, 2)),
                    stop=(i + 1) * step,
                )
            )
        return cls(tuple(objects), int(rng.integers(0, 50)))

    def render(self, num_frames: int = NUM_FRAMES) -> np.ndarray:
        """Frames `[num_frames, SIZE, SIZE, 3]`, uint8 RGB, evenly spread over the scene."""
        frames = np.full((num_frames, SIZE, SIZE, 3), self.background, np.uint8)
        for i in range(num_frames):
            for obj in self.objects:
                _draw(frames[i], obj, i * NUM_FRAMES / num_frames)
        return frames

    def words_at(self, frame: float, column: int, row: int, patch: int) -> tuple[str, ...]:
        """What the square of side `patch` pixels at `column`, `row` shows: colour, shape and motion, or nothing."""
        best: tuple[float, tuple[str, ...]] = (0.0, ())
        for obj in self.objects:
            x, y = obj.centre(frame)
            width = min(x + _RADIUS, (column + 1) * patch) - max(x - _RADIUS, column * patch)
            height = min(y + _RADIUS, (row + 1) * patch) - max(y - _RADIUS, row * patch)
            area = max(width, 0) * max(height, 0)
            if area > max(best[0], 0.06 * patch * patch):
                motion = obj.direction if obj.moves_in(frame) else "still"
                best = (area, (obj.colour, obj.shape, motion))
        return best[1]


def _draw(frame: np.ndarray, obj: SceneObject, time: float) -> None:
    x, y = obj.centre(time)
    colour = COLOURS[obj.colour]
    fixed = 16  # cv2 draws with sub-pixel precision in sixteenths
    if obj.shape == "circle":
        cv2.circle(frame, (round(x * fixed), round(y * fixed)), _RADIUS * fixed, colour, -1, cv2.LINE_AA, 4)
        return
    r = _RADIUS - 1
    corners = [(-r, -r), (r, -r), (r, r), (-r, r)] if obj.shape == "square" else [(0, -r), (r, r), (-r, r)]
    points = np.array([[(x + cx) * fixed, (y + cy) * fixed] for cx, cy in corners]).round().astype(np.int32)
    cv2.fillPoly(frame, [points], colour, cv2.LINE_AA, 4)


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


# Language -------------------------------------------------------------------------------------------------------------

_OPENINGS = (
    "The video shows", "In this clip we can see", "Here we see", "This short video presents",
    "The scene contains", "In the footage there are", "This recording displays",
)  # fmt: skip
_FIRST = ("First", "At the beginning", "To begin with", "Initially", "At the start of the clip")
_NEXT = ("Then", "After that", "Next", "A moment later", "Shortly afterwards", "Following this")
_LAST = ("Finally", "In the end", "At last", "Towards the end of the clip")
_VERBS = ("moves", "slides", "drifts", "glides", "travels")
_ADVERBS = ("slowly", "smoothly", "gently", "steadily", "")
_TARGETS = {
    "left": ("to the left", "towards the left side"),
    "right": ("to the right", "towards the right side"),
    "up": ("up", "towards the top"),
    "down": ("down", "towards the bottom"),
}
_CLOSINGS = (
    "The background stays dark during the whole clip.", "Nothing else happens in the scene.",
    "The camera does not move at all.", "The rest of the picture remains empty.", "Everything else keeps still.",
)  # fmt: skip
_DESCRIBE = ("Describe the video.", "What happens in this video?", "Describe this clip in detail.")
_DESCRIBE_IMAGE = ("Describe the image.", "What can you see in this picture?")


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _listed(names: list[str]) -> str:
    return ", ".join(f"a {n}" for n in names[:-1]) + f" and a {names[-1]}" if len(names) > 1 else f"a {names[0]}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many true captions of `scene`: fillers vary with `rng`, facts don't."""
    objects = sorted(scene.objects, key=lambda o: (o.cell[1], o.cell[0]))
    sentences = [f"{_pick(rng, _OPENINGS)} {NUMBERS[len(objects)]} objects, {_listed([o.name for o in objects])}."]
    for i, obj in enumerate(scene.objects):
        when = _FIRST if i == 0 else _LAST if i == len(scene.objects) - 1 and rng.random() < 0.5 else _NEXT
        adverb = _pick(rng, _ADVERBS)
        verb = _pick(rng, _VERBS)
        action = f"{adverb} {verb}" if adverb else verb
        sentences.append(f"{_pick(rng, when)}, the {obj.name} {action} {_pick(rng, _TARGETS[obj.direction])}.")
    sentences.append(_pick(rng, _CLOSINGS))
    return " ".join(sentences)


def image_caption(scene: Scene, rng: np.random.Generator) -> str:
    names = [o.name for o in sorted(scene.objects, key=lambda o: (o.cell[1], o.cell[0]))]
    return f"{_pick(rng, ('The image shows', 'In this picture there is', 'We can see'))} {_listed(names)}."


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A short question about `scene` and its answer."""
    kind = int(rng.integers(4))
    if kind == 0:
        return "Which object moves first?", f"The {scene.objects[0].name} moves first."
    if kind == 1:
        return "Which object moves last?", f"The {scene.objects[-1].name} moves last."
    if kind == 2:
        return "How many objects are there?", f"There are {NUMBERS[len(scene.objects)]} objects."
    obj = scene.objects[int(rng.integers(len(scene.objects)))]
    return f"Where does the {obj.name} move?", f"The {obj.name} moves {_TARGETS[obj.direction][0]}."


def dialogue(scene: Scene, rng: np.random.Generator, image: bool = False) -> list[tuple[str, str]]:
    """One to three questions about the scene's video (or its first frame) with their answers."""
    if image:
        return [(_pick(rng, _DESCRIBE_IMAGE), image_caption(scene, rng))]
    turns = [(_pick(rng, _DESCRIBE), caption(scene, rng))] if rng.random() < 0.8 else [question(scene, rng)]
    while len(turns) < 3 and rng.random() < 0.3:
        turns.append(question(scene, rng))
    return turns


# Scoring --------------------------------------------------------------------------------------------------------------

_NAME = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_MOTION = re.compile(
    rf"the ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:\w+ )?(?:{'|'.join(_VERBS)}) "
    r"(?:to the |towards the )?(left|right|up|top|down|bottom)\b"
)


@dataclass(frozen=True)
class Score:
    """Facts of a scene, and how many of them an answer states; false statements are counted against it."""

    right: int
    total: int
    order_right: bool

    @property
    def accuracy(self) -> float:
        return self.right / self.total


def score_caption(scene: Scene, text: str) -> Score:
    """Count the facts of `scene` in `text`: the number of objects, each object, each motion, and their order.

    A wrong object or motion in `text` costs one right fact; the score is never below zero.
    """
    names = {o.name for o in scene.objects}
    said = {f"{c} {s}" for c, s in _NAME.findall(text)}
    canonical = {"top": "up", "bottom": "down"}
    motions = [(f"{c} {s}", canonical.get(d, d)) for c, s, d in _MOTION.findall(text)]
    true_motions = [(o.name, o.direction) for o in scene.objects]
    right = len(names & said) - len(said - names)
    right += len(set(motions) & set(true_motions)) - len(set(motions) - set(true_motions))
    right += f"{NUMBERS[len(names)]} objects" in text
    movers = [name for name, _ in motions]
    return Score(
        right=max(right, 0),
        total=2 * len(names) + 1,
        order_right=movers == [o.name for o in scene.objects],
    )
