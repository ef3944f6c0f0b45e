"""Train the reference pairs on generated scenes.

    python -m vllm_lvspec.reference.train qwen2_5_vl target --out DIR
    python -m vllm_lvspec.reference.train llava_onevision target --out DIR2 --start-from DIR

Four losses: the usual one on the answers; one on looking up options of multiple choice, in text alone; one that makes
every visual token's last state predict, through the language head, the words for what its patch shows; and one that
makes its states inside the text model tell where the patch is, when, and how many events there have been. Large
Video-LLMs have this alignment from pre-training; without it a small model learns to caption fluently and blindly. Data
follow from the step's number, so a run that was stopped goes on from its last state (`DIR/state.pt`) exactly where it
was.
"""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from vllm_lvspec.bench.videofacts.scene import DIRECTIONS, SIDE, Scene
from vllm_lvspec.bench.videofacts.tasks import Task, image_task, make_task
from vllm_lvspec.draft.pruning import VideoView, VisualGrid
from vllm_lvspec.draft.pruning.uniform import keep_uniform
from vllm_lvspec.reference.families import FAMILIES, Family
from vllm_lvspec.reference.tokenizer import ASSISTANT_TURN, USER_TURN, build_tokenizer

SEED_OFFSET = 1_000_000  # training scenes start here; seeds below are for evaluation
SQUARE = 28  # pixels of a scene that one visual token shows, both ways, in either family
NUM_WORDS = 5  # what `Scene.words_at` says of a square
SQUARES = SIDE // SQUARE  # to a side
MAX_EVENTS = 3
DIALOGUE_SHARE = 0.1  # of the videos, whose questions are turns of one conversation
FACT_WEIGHT = 3.0
IMAGE_EVERY = 16  # batches
WARMUP_STEPS = 100
CHECKPOINT_STEPS = 100
LETTERS_A_STEP = 24
STATES = ("background", "still", *DIRECTIONS, "appears", "vanishes", "turns", "bounces", "collide")


class Batch:
    """`size` videos (or single images) and what is asked about each, padded on the right.

    A video stands once before several conversations that do not see each other, each at the positions that follow the
    video, as if it were alone: `ids [size, length]`, `offsets` (a token's place in its conversation) and `talks`
    (its conversation's number, from 1; 0 before and in the video, -1 for padding).
    """

    def __init__(
        self, family: Family, tokenizer: PreTrainedTokenizerFast, step: int, size: int, image: bool, long_answers: bool
    ):
        rng = np.random.default_rng([step, 23])
        self.num_frames = 1 if image else family.VIDEO_FRAMES
        self.num_visual = family.num_visual_tokens(self.num_frames)
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>" if image else "<|video_pad|>")
        head = tokenizer(USER_TURN + family.BEFORE_VISUAL).input_ids
        end = tokenizer("<|im_end|>\n").input_ids
        self.num_before = len(head)
        videos, rows, words, facts = [], [], [], []
        for i in range(size):
            scene = Scene.from_seed(SEED_OFFSET + step * size + i)
            videos.append(scene.render()[:1] if image else scene.render(self.num_frames))
            row = _Row()
            row.add(head + [pad] * self.num_visual, talk=0)
            for talk, tasks in enumerate(_conversations(scene, rng, image, long_answers), start=1):
                for turn, task in enumerate(tasks):
                    lead = USER_TURN if turn else family.AFTER_VISUAL
                    row.add(tokenizer(lead + task.prompt + ASSISTANT_TURN).input_ids, talk)
                    encoded = tokenizer(task.answer.text, return_offsets_mapping=True)
                    row.add(encoded.input_ids, talk, _weights(task, encoded.offset_mapping))
                    row.add(end[:1], talk, [1.0])
                    row.add(end[1:], talk)
            rows.append(row)
            shown = self._patch_words(family, scene)
            words.append(torch.tensor([[_token(tokenizer, word) for word in square] for square in shown]))
            facts.append(self._patch_facts(family, scene, shown))
        self.pixels = family.pixel_values(videos)
        self.ids = _padded([row.ids for row in rows], tokenizer.pad_token_id)
        self.weights = _padded([row.weights for row in rows], 0.0)
        self.talks = _padded([row.talks for row in rows], -1)
        self.offsets = _padded([row.offsets for row in rows], 0)
        self.still = _token(tokenizer, "still")
        self.words = torch.stack(words)  # [size, num_visual, NUM_WORDS]: words, or as many times background
        self.facts = torch.stack(facts)  # [size, num_visual, 5]: what the probe asks for

    def to(self, device: torch.device) -> Batch:
        for name in ("pixels", "ids", "weights", "talks", "offsets", "words", "facts"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def _patch_words(self, family: Family, scene: Scene) -> list[tuple[str, ...]]:
        background = ("background",) * NUM_WORDS
        moments = family.moments(self.num_frames)
        squares = [words or background for moment in moments for words in scene.words_at(moment, SQUARE)]
        return squares + [background] * (self.num_visual - len(squares))  # a line end shows nothing

    def _patch_facts(self, family: Family, scene: Scene, shown: list[tuple[str, ...]]) -> torch.Tensor:
        """Column, row, moment, what happens there, and how many events there have been: `[num_visual, 5]`."""
        moments = family.moments(self.num_frames)
        begun = [sum(event.start - 0.5 <= moment for event in scene.events) for moment in moments]
        facts = []
        for i, square in enumerate(shown):
            place, moment = i % SQUARES**2, min(i // SQUARES**2, len(moments) - 1)
            facts.append((place % SQUARES, place // SQUARES, moment, STATES.index(square[3]), begun[moment]))
        return torch.tensor(facts)


@cache
def _token(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    (idx,) = tokenizer(f" {word}").input_ids
    return idx


class _Row:
    """One video's tokens with their weights in the loss (0: given, not to be predicted)."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.talks: list[int] = []
        self.offsets: list[int] = []

    def add(self, ids: list[int], talk: int, weights: list[float] | None = None) -> None:
        first = self.offsets[-1] + 1 if self.talks and self.talks[-1] == talk else 0
        self.ids += ids
        self.weights += weights or [0.0] * len(ids)
        self.talks += [talk] * len(ids)
        self.offsets += range(first, first + len(ids))


def _padded(rows: list[list[int]] | list[list[float]], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class LetterBatch:
    """Text alone: an answer begins with any one of the options, and its letter is wanted.

    Looking an option up takes a small model tens of thousands of examples; these cost a hundredth of a video's. The
    option must not be told before the others are read, else their reading finds it, which no video's does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, step: int, size: int):
        rng = np.random.default_rng([step, 29])
        ids, weights = [], []
        for i in range(size):
            task = make_task(Scene.from_seed(SEED_OFFSET + step * size + i), "choice", rng)
            # Its right answer could be guessed from how often what is asked; any option is as good here.
            options = {part[0]: part[3:] for part in re.findall(r"[A-D]: [^.]*", task.prompt)}
            letter = str(rng.choice(sorted(options)))
            answer = re.sub(
                r"\b(is|be) [^,]*, (\w+ the letter is) \w", rf"\1 {options[letter]}, \2 {letter}", task.answer.text
            )
            ask = tokenizer(USER_TURN + task.prompt + ASSISTANT_TURN).input_ids
            reply = tokenizer(answer).input_ids
            ids.append(ask + reply)
            weights.append([0.0] * (len(ask) + len(reply) - 2) + [1.0, 0.0])  # the letter, before a full stop
        self.ids = _padded(ids, tokenizer.pad_token_id)
        self.weights = _padded(weights, 0.0)

    def to(self, device: torch.device) -> LetterBatch:
        self.ids, self.weights = self.ids.to(device), self.weights.to(device)
        return self


def _conversations(scene: Scene, rng: np.random.Generator, image: bool, long_answers: bool) -> list[list[Task]]:
    if image:
        return [[image_task(scene, rng)]]
    # Events and their order are the hardest to learn: descriptions tell them in half of a caption's words.
    long = [("caption", "description")[int(rng.random() < 0.6)]] if long_answers else []
    kinds = [*long, "question", "question", ("question", "choice")[int(rng.integers(2))], "choice"]
    tasks = [make_task(scene, kind, rng) for kind in kinds]
    if rng.random() < DIALOGUE_SHARE:
        return [[tasks[i] for i in rng.permutation(len(tasks))]]
    return [[task] for task in tasks]


def _weights(task: Task, offsets: list[tuple[int, int]]) -> list[float]:
    """Facts weigh more than the fillers among which they stand; the best prediction of either stays the same."""
    spans = task.answer.fact_spans
    return [FACT_WEIGHT if any(begin < b and a < end for a, b in spans) else 1.0 for begin, end in offsets]


def letter_loss(family: Family, model: Any, batch: LetterBatch) -> torch.Tensor:
    """Loss on the letters of options that are told."""
    size, length = batch.ids.shape
    positions = torch.arange(length, device=batch.ids.device).expand(*family.POSITION_AXES, size, -1)
    hidden = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(batch.ids), position_ids=positions, use_cache=False
    ).last_hidden_state
    mask = batch.weights[:, 1:] > 0
    return F.cross_entropy(model.lm_head(hidden[:, :-1][mask]).float(), batch.ids[:, 1:][mask])


class Probe(torch.nn.Module):
    """What visual tokens' states inside the text model must tell: where, when and what; later, how many events so far.

    Later layers compare places and follow the order of events only if these are there to be read. Training alone needs
    the probe; no checkpoint has it.
    """

    def __init__(self, shape: dict[str, Any], num_moments: int):
        super().__init__()
        num_layers, width = shape["num_hidden_layers"], shape["hidden_size"]
        self.layers = num_layers // 2, max(num_layers // 2, num_layers * 2 // 3)
        self.sizes = [SQUARES, SQUARES, num_moments, len(STATES)]
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(width) for _ in self.layers)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in (sum(self.sizes), MAX_EVENTS + 1))

    def loss(self, states: list[torch.Tensor], facts: torch.Tensor) -> torch.Tensor:
        """`states`: after each of `layers`, `[size, num_kept, hidden]`; `facts [size, num_kept, 5]`."""
        first, second = (
            head(norm(state)).float() for head, norm, state in zip(self.heads, self.norms, states, strict=True)
        )
        parts = (*first.split(self.sizes, dim=-1), second)
        each = [
            F.cross_entropy(part.flatten(0, 1), facts[..., i].flatten(), reduction="none")
            for i, part in enumerate(parts)
        ]
        happens = (facts[..., 3] > STATES.index("still")).flatten()
        halves = [
            torch.stack([loss[part].mean() for part in (happens, ~happens) if part.any()]).mean() for loss in each
        ]
        return torch.stack(halves).mean()


@dataclass(frozen=True)
class Losses:
    answers: torch.Tensor
    patches: torch.Tensor
    probe: torch.Tensor
    right: torch.Tensor  # share of the answers' fact tokens predicted right


def losses(family: Family, model: Any, probe: Probe, batch: Batch, kept: torch.Tensor | None) -> Losses:
    """`kept`: indices of the visual tokens the model sees (`None`: all), with their original positions."""
    size, length = batch.ids.shape
    first, after = batch.num_before, batch.num_before + batch.num_visual
    visual = family.encode_visual(model, batch.pixels, batch.num_frames, size)
    if kept is None:
        kept = torch.arange(batch.num_visual)
    columns = torch.cat([torch.arange(first), first + kept, torch.arange(after, length)])
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = torch.cat([embeds[:, :first], visual[:, kept].to(embeds.dtype), embeds[:, after:]], 1)
    ids, weights, talks = batch.ids[:, columns], batch.weights[:, columns], batch.talks[:, columns]
    places = batch.offsets + after * (batch.talks > 0)
    positions = family.text_positions(first, batch.num_frames, length - after, size).to(ids.device)
    positions = positions.gather(-1, places[:, columns].expand(*positions.shape[:-1], -1))
    # A conversation sees itself and what stands before all of them.
    sees = (talks[:, :, None] == talks[:, None, :]) | (talks[:, None, :] == 0)
    sees = sees.tril()[:, None]
    output = model.model.language_model(
        inputs_embeds=embeds, attention_mask=sees, position_ids=positions, use_cache=False, output_hidden_states=True
    )
    hidden = output.last_hidden_state
    mask = weights[:, 1:] > 0
    wanted, weights = ids[:, 1:][mask], weights[:, 1:][mask]
    logits = model.lm_head(hidden[:, :-1][mask]).float()
    answers = (F.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == wanted)[weights == FACT_WEIGHT].float().mean()
    words = batch.words[:, kept]
    shown = slice(first, first + len(kept))
    seen = model.lm_head(hidden[:, shown]).float().log_softmax(-1)
    per_token = -seen.gather(-1, words).mean(-1)
    # Most patches show background, and most others something that stands still: each of the three weighs the same.
    is_object = words[..., 0] != words[..., 1]
    is_still = is_object & (words[..., 3] == batch.still)
    parts = (~is_object, is_still, is_object & ~is_still)
    patches = torch.stack([per_token[part].mean() for part in parts if part.any()]).mean()
    inside = [output.hidden_states[layer][:, shown] for layer in probe.layers]
    probed = probe.loss(inside, batch.facts[:, kept])
    return Losses(answers, patches, probed, right)


def build_optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, biases, norms and convolutions."""
    parameters = dict(model.named_parameters())
    matrices = [p for n, p in parameters.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]


def start_from(model: Any, checkpoint: Path) -> None:
    """Take a checkpoint's weights; of another family's, the text model: LLaVA-OneVision, too, starts from a Qwen2."""
    from transformers import AutoModelForImageTextToText

    source = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    ours, theirs = (
        (model, source) if type(source) is type(model) else (model.model.language_model, source.model.language_model)
    )
    try:
        ours.load_state_dict(theirs.state_dict())
    except RuntimeError as error:
        raise typer.BadParameter(f"start_from={str(checkpoint)!r}: has another shape: {error}") from None


def main(
    family_name: Annotated[str, typer.Argument(metavar="FAMILY", help=" or ".join(FAMILIES))],
    role: Annotated[str, typer.Argument(help="target, draft, or another of the family's shapes")],
    out: Annotated[Path, typer.Option(help="checkpoint's folder; state.pt in it is what a stopped run goes on from")],
    steps: int = 2000,
    batch_size: int = 12,
    learning_rate: float = 2e-3,
    short_share: Annotated[
        float, typer.Option(help="share of the steps, at first, that have short answers only")
    ] = 0.1,
    patch_weight: float = 1.0,
    start: Annotated[
        Path | None, typer.Option("--start-from", help="checkpoint to start from; of another family, its text model")
    ] = None,
    seed: int = 0,
    threads: int = 2,
) -> None:
    if family_name not in FAMILIES:
        raise typer.BadParameter(f"family={family_name!r}: must be one of {', '.join(FAMILIES)}")
    family: Family = FAMILIES[family_name]
    if role not in family.SHAPES:
        raise typer.BadParameter(f"role={role!r}: must be one of {', '.join(family.SHAPES)}")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = family.build_model(family.SHAPES[role], tokenizer, seed)
    family.prepare_for_training(model)
    if start is not None:
        start_from(model, start)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    probe = Probe(family.SHAPES[role], len(family.moments(family.VIDEO_FRAMES))).to(device)
    optimizers = build_optimizers(torch.nn.ModuleList([model, probe]), learning_rate)
    first, log = 0, []
    # Data follow from these; a run that goes on with others would see scenes twice, or none.
    fixed = {"family": family_name, "role": role, "seed": seed, "batch_size": batch_size}
    planned = {"steps": steps, "learning_rate": learning_rate, "short_share": short_share, "patch_weight": patch_weight}
    runs = [{"from_step": 0, **planned, "start_from": start and str(start)}]
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        for key, value in fixed.items():
            if (theirs := state.get("fixed", {}).get(key)) != value:
                raise typer.BadParameter(
                    f"{key}={value!r}: the run in {str(out)!r} has {theirs!r}; go on with that, or in another folder"
                )
        runs = state["runs"]
        if planned != {key: runs[-1][key] for key in planned}:
            runs.append({"from_step": state["step"], **planned})
        model.load_state_dict(state["model"])
        probe.load_state_dict(state["probe"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, log = state["step"], state["log"]
    started = time.time()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task(role, total=steps, completed=first)
        for step in range(first, steps):
            image = family.SEES_IMAGES and step % IMAGE_EVERY == IMAGE_EVERY - 1
            batch = Batch(family, tokenizer, step, batch_size, image, long_answers=step >= short_share * steps)
            batch.to(device)
            kept = _pruned_view(family, step) if role != "target" and not image else None
            rate = _learning_rate(learning_rate, step, steps)
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = rate
            letters = LetterBatch(tokenizer, step, LETTERS_A_STEP).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                found = losses(family, model, probe, batch, kept)
                looked_up = letter_loss(family, model, letters)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (found.answers + patch_weight * found.patches + found.probe + looked_up).backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *probe.parameters()], 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if step % 20 == 0 or step == steps - 1:
                figures = dict(
                    answer_loss=found.answers, patch_loss=found.patches, probe_loss=found.probe, letter_loss=looked_up,
                    right=found.right,
                )  # fmt: skip
                log.append({"step": step} | {name: figure.item() for name, figure in figures.items()})
                text = role + "".join(f" {name.split('_')[0]} {figure:.3f}" for name, figure in figures.items())
                progress.update(bar, description=text)
                if not progress.console.is_terminal:
                    print(f"step {step} {text} {(time.time() - started) / (step - first + 1):.2f} s/step", flush=True)
            progress.advance(bar)
            if (step + 1) % CHECKPOINT_STEPS == 0 or step == steps - 1:
                state = dict(model=model.state_dict(), probe=probe.state_dict())
                state["optimizers"] = [o.state_dict() for o in optimizers]
                progress_made = {"step": step + 1, "log": log, "fixed": fixed, "runs": runs}
                torch.save({**state, **progress_made}, state_path.with_suffix(".tmp"))
                state_path.with_suffix(".tmp").replace(state_path)
    family.save_checkpoint(model.cpu(), tokenizer, str(out))
    (out / "training_log.json").write_text(json.dumps({**fixed, "steps": steps, "runs": runs, "log": log}, indent=1))


def _pruned_view(family: Family, step: int) -> torch.Tensor | None:
    """A drafter learns to live with pruned views, so that pruning costs it sight and not sense.

    One step in four shows everything, one 10-100 % of the tokens at random, and two as many spread evenly.
    """
    rng = np.random.default_rng([step, 31])
    ratio = 0.9 * float(rng.random()) ** 0.1  # mostly near what is the default when served
    num_moments = len(family.moments(family.VIDEO_FRAMES))
    num_visual = family.num_visual_tokens(family.VIDEO_FRAMES)
    if step % 4 == 0:
        return None
    if step % 4 == 1:
        count = max(1, round(num_visual * (1 - ratio)))
        return torch.from_numpy(rng.permutation(num_visual)[:count]).sort().values
    grid = VisualGrid(num_moments, SQUARES, SQUARES, num_extra=num_visual - num_moments * SQUARES**2)
    return keep_uniform(VideoView(grid), ratio)


def _learning_rate(peak: float, step: int, steps: int) -> float:
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


if __name__ == "__main__":
    typer.run(main)
