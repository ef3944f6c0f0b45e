"""Train the reference pairs on generated scenes.

    python -m vllm_lvspec.reference.train qwen2_5_vl target --out DIR
    python -m vllm_lvspec.reference.train llava_onevision target --out DIR2 --start-from DIR

Three losses: the usual one on the answers; one on looking up options of multiple choice, in text alone; and one that
makes every visual token's last state predict, through the language head, the words for what its patch shows. Large
Video-LLMs have this alignment from pre-training; without it a small model learns to caption fluently and blindly. Data
follow from the step's number, so a run that was stopped goes on from its last state (`DIR/state.pt`) exactly where it
was.
"""

from __future__ import annotations

import json
import math
import time
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from vllm_lvspec.bench.videofacts.scene import Scene
from vllm_lvspec.bench.videofacts.tasks import Task, image_task, make_task
from vllm_lvspec.reference.families import FAMILIES, Family
from vllm_lvspec.reference.tokenizer import build_tokenizer

SEED_OFFSET = 1_000_000  # training scenes start here; seeds below are for evaluation
SQUARE = 28  # pixels of a scene that one visual token shows, both ways, in either family
NUM_WORDS = 5  # what `Scene.words_at` says of a square
IGNORE = -100
FACT_WEIGHT = 3.0
IMAGE_EVERY = 16  # batches
WARMUP_STEPS = 100
CHECKPOINT_STEPS = 100
LETTERS_A_STEP = 48


class Batch:
    """`size` dialogues over videos (or all over single images), padded on the right.

    `long_answers`: a caption or description and two questions; else four questions.
    """

    def __init__(
        self, family: Family, tokenizer: PreTrainedTokenizerFast, step: int, size: int, image: bool, long_answers: bool
    ):
        rng = np.random.default_rng([step, 23])
        self.num_frames = 1 if image else family.VIDEO_FRAMES
        self.num_visual = family.num_visual_tokens(self.num_frames)
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>" if image else "<|video_pad|>")
        head = tokenizer("<|im_start|>user\n" + family.BEFORE_VISUAL).input_ids
        after = tokenizer(family.AFTER_VISUAL).input_ids
        end = tokenizer("<|im_end|>\n").input_ids
        start = tokenizer("<|im_start|>assistant\n").input_ids
        self.num_before = len(head)
        videos, ids, labels, weights, words = [], [], [], [], []
        for i in range(size):
            scene = Scene.from_seed(SEED_OFFSET + step * size + i)
            videos.append(scene.render()[:1] if image else scene.render(self.num_frames))
            tokens = head + [pad] * self.num_visual + after
            label, weight = [IGNORE] * len(tokens), [0.0] * len(tokens)
            for turn, task in enumerate(_dialogue(scene, rng, image, long_answers)):
                ask = tokenizer(("" if turn == 0 else "<|im_start|>user\n") + task.prompt).input_ids
                encoded = tokenizer(task.answer.text, return_offsets_mapping=True)
                reply = encoded.input_ids + end
                num_asked = len(ask) + len(end) + len(start)
                tokens += ask + end + start + reply
                label += [IGNORE] * num_asked + reply[:-1] + [IGNORE]
                weight += [0.0] * num_asked + _weights(task, encoded.offset_mapping) + [1.0] * len(end)
            ids.append(torch.tensor(tokens))
            labels.append(torch.tensor(label))
            weights.append(torch.tensor(weight))
            words.append(self._patch_words(family, tokenizer, scene))
        self.pixels = family.pixel_values(videos)
        self.ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        self.labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        self.weights = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
        (self.still,) = tokenizer(" still").input_ids
        self.words = torch.stack(words)  # [size, num_visual, NUM_WORDS]: words, or as many times background

    def to(self, device: torch.device) -> Batch:
        for name in ("pixels", "ids", "labels", "weights", "words"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def _patch_words(self, family: Family, tokenizer: PreTrainedTokenizerFast, scene: Scene) -> torch.Tensor:
        @cache
        def token(word: str) -> int:
            (idx,) = tokenizer(f" {word}").input_ids
            return idx

        background = ("background",) * NUM_WORDS
        moments = family.moments(self.num_frames)
        squares = [words or background for moment in moments for words in scene.words_at(moment, SQUARE)]
        squares += [background] * (self.num_visual - len(squares))  # a line end shows nothing
        return torch.tensor([[token(word) for word in words] for words in squares])


class LetterBatch:
    """Text alone: an answer is told, and the letter of the option that says it is wanted.

    Looking an option up takes a small model tens of thousands of examples; these cost a hundredth of a video's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, step: int, size: int):
        rng = np.random.default_rng([step, 29])
        ids, weights = [], []
        for i in range(size):
            task = make_task(Scene.from_seed(SEED_OFFSET + step * size + i), "choice", rng)
            begin, end = task.answer.fact_spans[0][0], task.answer.fact_spans[-2][1]
            options = task.prompt[task.prompt.index(" A: ") + 1 :]
            text = (
                f"<|im_start|>user\nIt is {task.answer.text[begin:end]}. {options}<|im_end|>\n<|im_start|>assistant\n"
            )
            ask = tokenizer(text).input_ids
            encoded = tokenizer(task.answer.text, return_offsets_mapping=True)
            ids.append(torch.tensor(ask + encoded.input_ids))
            weights.append(torch.tensor([0.0] * len(ask) + _fact_weights(task, encoded.offset_mapping)))
        self.ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        self.weights = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)

    def to(self, device: torch.device) -> LetterBatch:
        self.ids, self.weights = self.ids.to(device), self.weights.to(device)
        return self


def _dialogue(scene: Scene, rng: np.random.Generator, image: bool, long_answers: bool) -> list[Task]:
    if image:
        return [image_task(scene, rng)]
    # What happens, and when, is the hardest to learn: descriptions tell it in fewer words than captions.
    short = ["question"] + [("question", "choice")[int(rng.integers(2))] for _ in range(1 if long_answers else 3)]
    long = [("caption", "description")[int(rng.random() < 0.6)]] if long_answers else []
    kinds = long + short if rng.random() < 0.5 else short + long
    return [make_task(scene, kind, rng) for kind in kinds]


def _weights(task: Task, offsets: list[tuple[int, int]]) -> list[float]:
    """Facts weigh more than the fillers among which they stand; the best prediction of either stays the same."""
    spans = task.answer.fact_spans
    return [FACT_WEIGHT if any(begin < b and a < end for a, b in spans) else 1.0 for begin, end in offsets]


def _fact_weights(task: Task, offsets: list[tuple[int, int]]) -> list[float]:
    return [float(weight == FACT_WEIGHT) for weight in _weights(task, offsets)]


def letter_loss(family: Family, model: Any, batch: LetterBatch) -> torch.Tensor:
    """Loss on the facts, the letter among them, of answers to questions that need no video."""
    size, length = batch.ids.shape
    positions = torch.arange(length, device=batch.ids.device).expand(*family.POSITION_AXES, size, -1)
    hidden = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(batch.ids), position_ids=positions, use_cache=False
    ).last_hidden_state
    mask = batch.weights[:, 1:] > 0
    return F.cross_entropy(model.lm_head(hidden[:, :-1][mask]).float(), batch.ids[:, 1:][mask])


def losses(
    family: Family, model: Any, batch: Batch, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answer loss, patch-word loss and share of the answers' fact tokens predicted right.

    `kept`: indices of the visual tokens the model sees (`None`: all), with their original positions.
    """
    size, length = batch.ids.shape
    first, after = batch.num_before, batch.num_before + batch.num_visual
    visual = family.encode_visual(model, batch.pixels, batch.num_frames, size)
    positions = family.text_positions(first, batch.num_frames, length - after, size).to(batch.ids.device)
    if kept is None:
        kept = torch.arange(batch.num_visual)
    columns = torch.cat([torch.arange(first), first + kept, torch.arange(after, length)])
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = torch.cat([embeds[:, :first], visual[:, kept].to(embeds.dtype), embeds[:, after:]], 1)
    labels, weights, words = batch.labels[:, columns], batch.weights[:, columns], batch.words[:, kept]
    # Without a mask transformers takes gaps in plain positions for the borders of packed sequences.
    attended = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=attended, position_ids=positions[..., columns], use_cache=False
    ).last_hidden_state
    mask = labels[:, 1:] != IGNORE
    wanted, weights = labels[:, 1:][mask], weights[:, 1:][mask]
    logits = model.lm_head(hidden[:, :-1][mask]).float()
    answer_loss = (F.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == wanted)[weights == FACT_WEIGHT].float().mean()
    seen = model.lm_head(hidden[:, first : first + len(kept)]).float().log_softmax(-1)
    per_token = -seen.gather(-1, words).mean(-1)
    # Most patches show background, and most others something that stands still: each of the three weighs the same.
    is_object = words[..., 0] != words[..., 1]
    is_still = is_object & (words[..., 3] == batch.still)
    parts = (~is_object, is_still, is_object & ~is_still)
    patch_loss = torch.stack([per_token[part].mean() for part in parts if part.any()]).mean()
    return answer_loss, patch_loss, right


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
    """Take the text model of a pair of another family: LLaVA-OneVision, too, starts from a trained Qwen2."""
    from transformers import AutoModelForImageTextToText

    source = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    try:
        model.model.language_model.load_state_dict(source.model.language_model.state_dict())
    except RuntimeError as error:
        raise typer.BadParameter(f"start_from={str(checkpoint)!r}: its text model has another shape: {error}") from None


def main(
    family_name: Annotated[str, typer.Argument(metavar="FAMILY", help=" or ".join(FAMILIES))],
    role: Annotated[str, typer.Argument(help="target or draft")],
    out: Annotated[Path, typer.Option(help="checkpoint's folder; state.pt in it is what a stopped run goes on from")],
    steps: int = 2000,
    batch_size: int = 12,
    learning_rate: float = 2e-3,
    short_share: Annotated[
        float, typer.Option(help="share of the steps, at first, that have short answers only")
    ] = 0.1,
    patch_weight: float = 1.0,
    start: Annotated[
        Path | None, typer.Option("--start-from", help="checkpoint whose text model the training starts from")
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
    optimizers = build_optimizers(model, learning_rate)
    first, log = 0, []
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        model.load_state_dict(state["model"])
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
            kept = _pruned_view(batch.num_visual, step) if role == "draft" and step % 2 and not image else None
            rate = _learning_rate(learning_rate, step, steps)
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = rate
            letters = LetterBatch(tokenizer, step, LETTERS_A_STEP).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                answer_loss, patch_loss, right = losses(family, model, batch, kept)
                looked_up = letter_loss(family, model, letters)
            model.zero_grad()
            (answer_loss + patch_weight * patch_loss + looked_up).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if step % 20 == 0 or step == steps - 1:
                figures = dict(answer_loss=answer_loss.item(), patch_loss=patch_loss.item(), right=right.item())
                figures["letter_loss"] = looked_up.item()
                log.append(dict(step=step, **figures))
                text = (
                    f"{role} answer {answer_loss:.3f} patch {patch_loss:.3f} letters {looked_up:.3f} facts {right:.3f}"
                )
                progress.update(bar, description=text)
                if not progress.console.is_terminal:
                    print(f"step {step} {text} {(time.time() - started) / (step - first + 1):.2f} s/step", flush=True)
            progress.advance(bar)
            if (step + 1) % CHECKPOINT_STEPS == 0 or step == steps - 1:
                state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers])
                torch.save({**state, "step": step + 1, "log": log}, state_path.with_suffix(".tmp"))
                state_path.with_suffix(".tmp").replace(state_path)
    family.save_checkpoint(model.cpu(), tokenizer, str(out))
    settings = dict(family=family_name, role=role, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    (out / "training_log.json").write_text(json.dumps({**settings, "seed": seed, "log": log}, indent=1))


def _pruned_view(num_visual: int, step: int) -> torch.Tensor:
    """A drafter learns to live with pruned views, so that pruning costs it sight and not sense: 10-100 % are kept."""
    generator = torch.Generator().manual_seed(step)
    count = max(1, round(num_visual * (1 - 0.9 * torch.rand(1, generator=generator).item())))
    return torch.randperm(num_visual, generator=generator)[:count].sort().values


def _learning_rate(peak: float, step: int, steps: int) -> float:
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


if __name__ == "__main__":
    typer.run(main)
