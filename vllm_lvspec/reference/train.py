"""Train the reference pair on generated scenes.

    python -m vllm_lvspec.reference.train target --out DIR
    python -m vllm_lvspec.reference.train draft --out DIR

Two losses: the usual one on the answers, and one that makes every visual token's last state predict, through the
language head, the words for what its patch shows. Large Video-LLMs have this alignment from pre-training; without it a
small model learns to caption fluently and blindly. Data follow from the step's number, so a run that was stopped goes
on from its last state (`DIR/state.pt`) exactly where it was.
"""

from __future__ import annotations

import json
import math
import time
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from vllm_lvspec.reference.model import (
    MERGE,
    PATCH,
    SHAPES,
    TEMPORAL_PATCH,
    build_model,
    encode_visual,
    patchify,
    position_ids,
    save_checkpoint,
)
from vllm_lvspec.reference.scenes import FPS, NUM_FRAMES, SIZE, Scene, dialogue
from vllm_lvspec.reference.tokenizer import build_tokenizer

SEED_OFFSET = 1_000_000  # training scenes start here; seeds below are for evaluation
GRID_SIDE = SIZE // PATCH
TOKEN_SIDE = GRID_SIDE // MERGE
IGNORE = -100


class Batch:
    """`size` dialogues over videos (or all over single images), padded on the right."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, step: int, size: int, image: bool):
        rng = np.random.default_rng([step, 23])
        frames = 1 if image else NUM_FRAMES
        self.grid = (max(frames // TEMPORAL_PATCH, 1), GRID_SIDE, GRID_SIDE)
        pad = "<|image_pad|>" if image else "<|video_pad|>"
        head = tokenizer("<|im_start|>user\n<|vision_start|>").input_ids
        end = tokenizer("<|im_end|>\n").input_ids
        start = tokenizer("<|im_start|>assistant\n").input_ids
        self.num_before = len(head)
        self.num_visual = self.grid[0] * TOKEN_SIDE**2
        visual = [tokenizer.convert_tokens_to_ids(pad)] * self.num_visual
        patches, ids, labels, words = [], [], [], []
        for i in range(size):
            scene = Scene.from_seed(SEED_OFFSET + step * size + i)
            patches.append(patchify(scene.render(NUM_FRAMES)[:frames]))
            tokens = head + visual + tokenizer("<|vision_end|>").input_ids
            label = [IGNORE] * len(tokens)
            for turn, (ask, answer) in enumerate(dialogue(scene, rng, image)):
                prompt = ([] if turn == 0 else tokenizer("<|im_start|>user\n").input_ids) + tokenizer(ask).input_ids
                reply = tokenizer(answer).input_ids + end
                tokens += prompt + end + start + reply
                label += [IGNORE] * (len(prompt) + len(end) + len(start)) + reply[:-1] + [IGNORE]
            ids.append(torch.tensor(tokens))
            labels.append(torch.tensor(label))
            words.append(self._patch_words(tokenizer, scene))
        self.patches = torch.cat(patches)
        self.ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        self.labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        self.words = torch.stack(words)  # [size, num_visual, 3]: colour, shape, motion, or three times background

    def _patch_words(self, tokenizer: PreTrainedTokenizerFast, scene: Scene) -> torch.Tensor:
        @cache
        def token(word: str) -> int:
            (idx,) = tokenizer(f" {word}").input_ids
            return idx

        rows = []
        for t in range(self.grid[0]):
            for row in range(TOKEN_SIDE):
                for column in range(TOKEN_SIDE):
                    words = scene.words_at((t + 0.5) * TEMPORAL_PATCH - 0.5, column, row, PATCH * MERGE)
                    rows.append([token(w) for w in words or ("background",) * 3])
        return torch.tensor(rows)


def losses(model, batch: Batch, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answer loss, patch-word loss and share of answer tokens predicted right.

    `kept`: indices of the visual tokens the model sees (`None`: all), with their original positions.
    """
    size = len(batch.ids)
    grids = torch.tensor([batch.grid] * size)
    visual = encode_visual(model, batch.patches, grids).view(size, batch.num_visual, -1)
    first = batch.num_before
    after = batch.ids.shape[1] - first - batch.num_visual
    positions = position_ids(first, (batch.grid[0], TOKEN_SIDE, TOKEN_SIDE), after, TEMPORAL_PATCH / FPS)
    embeds = model.get_input_embeddings()(batch.ids)
    labels, words = batch.labels, batch.words
    if kept is None:
        kept = torch.arange(batch.num_visual)
    columns = torch.cat([torch.arange(first), first + kept, torch.arange(first + batch.num_visual, batch.ids.shape[1])])
    embeds = torch.cat([embeds[:, :first], visual[:, kept].to(embeds.dtype), embeds[:, first + batch.num_visual :]], 1)
    labels, positions, words = labels[:, columns], positions[:, columns], words[:, kept]
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions[:, None].expand(-1, size, -1), use_cache=False
    ).last_hidden_state
    mask = labels[:, 1:] != IGNORE
    logits = model.lm_head(hidden[:, :-1][mask]).float()
    answer_loss = F.cross_entropy(logits, labels[:, 1:][mask])
    right = (logits.argmax(-1) == labels[:, 1:][mask]).float().mean()
    seen = model.lm_head(hidden[:, first : first + len(kept)]).float().log_softmax(-1)
    per_token = -seen.gather(-1, words).mean(-1)
    # Most patches show background; objects and background get the same weight.
    is_object = words[..., 0] != words[..., 1]
    patch_loss = (per_token[is_object].mean() + per_token[~is_object].mean()) / 2
    return answer_loss, patch_loss, right


def batch_attention_over_frames(model) -> None:
    """Let the vision tower attend to all frames in one call; transformers calls once per frame, which CPUs pay for.

    Same numbers: every window of this geometry is exactly one frame of `GRID_SIDE ** 2` patches.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        length = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        shape = -1, GRID_SIDE**2, self.num_heads, self.head_dim
        out = F.scaled_dot_product_attention(*(x.view(shape).transpose(1, 2).to(v.dtype) for x in (q, k, v)))
        return self.proj(out.transpose(1, 2).reshape(length, -1))

    for block in model.model.visual.blocks:
        block.attn.forward = forward.__get__(block.attn)


def main(
    role: Annotated[str, typer.Argument(help="target or draft")],
    out: Annotated[Path, typer.Option(help="checkpoint's folder; state.pt in it is what a stopped run goes on from")],
    steps: int = 2200,
    batch_size: int = 16,
    learning_rate: float = 1.5e-3,
    patch_weight: float = 1.0,
    seed: int = 0,
    threads: int = 2,
) -> None:
    if role not in SHAPES:
        raise typer.BadParameter(f"role={role!r}: must be one of {', '.join(SHAPES)}")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(SHAPES[role], tokenizer, seed)
    batch_attention_over_frames(model)
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    first, log = 0, []
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, log = state["step"], state["log"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task(role, total=steps, completed=first)
        started = time.time()
        for step in range(first, steps):
            image = step % 8 == 7
            batch = Batch(tokenizer, step, batch_size, image)
            # The drafter learns to live with pruned views, so that pruning costs it sight and not sense.
            kept = None
            if role == "draft" and step % 2 and not image:
                generator = torch.Generator().manual_seed(step)
                count = max(1, round(batch.num_visual * (1 - 0.9 * torch.rand(1, generator=generator).item())))
                kept = torch.randperm(batch.num_visual, generator=generator)[:count].sort().values
            share = step / steps
            rate = learning_rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            for name in ("patches", "ids", "labels", "words"):
                setattr(batch, name, getattr(batch, name).to(device))
            with torch.autocast(device.type, torch.bfloat16):
                answer_loss, patch_loss, right = losses(model, batch, kept)
            optimizer.zero_grad()
            (answer_loss + patch_weight * patch_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0 or step == steps - 1:
                log.append(
                    dict(step=step, answer_loss=answer_loss.item(), patch_loss=patch_loss.item(), right=right.item())
                )
                text = f"{role} answer {answer_loss:.3f} patch {patch_loss:.3f} right {right:.3f}"
                progress.update(task, description=text)
                if not progress.console.is_terminal:
                    print(f"step {step} {text} {(time.time() - started) / (step - first + 1):.2f} s/step", flush=True)
            progress.advance(task)
            if (step + 1) % 100 == 0 or step == steps - 1:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, log=log)
                torch.save(state, state_path.with_suffix(".tmp"))
                state_path.with_suffix(".tmp").replace(state_path)
    save_checkpoint(model.cpu(), tokenizer, str(out))
    (out / "training_log.json").write_text(json.dumps(dict(role=role, steps=steps, seed=seed, log=log), indent=1))


if __name__ == "__main__":
    typer.run(main)
