"""How much one of the reference models sees by itself, with a part of the video's tokens kept from it.

    python -m vllm_lvspec.reference.evaluate qwen2_5_vl draft --pruning-ratio 0.9

`lvspec bench` measures pairs in vLLM; a drafter on a pruned view never answers there by itself, so this runs it in
transformers, on the questions of the same suites.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.bench.videofacts.scene import SIDE
from vllm_lvspec.bench.videofacts.score import totals
from vllm_lvspec.draft.pruning import STRATEGIES, VisualGrid
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.families import FAMILIES, Family
from vllm_lvspec.reference.train import SQUARE


@torch.inference_mode()
def answer(
    family: Family,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    frames: np.ndarray,
    question: str,
    kept: torch.Tensor | None,
    max_tokens: int = 256,
) -> str:
    """Greedy answer to `question` about `frames [num_frames, height, width, 3]`.

    `kept`: sorted indices `[num_kept]` of the visual tokens that the model sees, at their own positions; None: all.
    """
    head = tokenizer("<|im_start|>user\n" + family.BEFORE_VISUAL).input_ids
    tail = tokenizer(f"{family.AFTER_VISUAL}{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
    num_visual = family.num_visual_tokens(len(frames))
    kept = torch.arange(num_visual) if kept is None else kept
    visual = family.encode_visual(model, family.pixel_values([frames]), len(frames), 1)[:, kept]
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([head])), visual, embed(torch.tensor([tail]))], dim=1)
    positions = family.text_positions(len(head), len(frames), len(tail) + max_tokens, 1)
    after = len(head) + num_visual
    columns = torch.cat([torch.arange(len(head)), len(head) + kept, torch.arange(after, after + len(tail))])
    cache, tokens = None, []
    for step in range(max_tokens):
        output = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions[..., columns], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        token = int(model.lm_head(output.last_hidden_state[:, -1]).argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        embeds, columns = embed(torch.tensor([[token]])), torch.tensor([after + len(tail) + step])
    return tokenizer.decode(tokens)


def main(
    family_name: Annotated[str, typer.Argument(metavar="FAMILY", help=" or ".join(FAMILIES))],
    role: Annotated[str, typer.Argument(help="target or draft")],
    checkpoint: Annotated[Path | None, typer.Option(help="another one than the bundled")] = None,
    samples: int = 60,
    seed: int = 1,
    pruning: str = "uniform",
    pruning_ratio: float = 0.0,
) -> None:
    family, pair = FAMILIES[family_name], PAIRS[family_name]
    path = checkpoint or getattr(pair, role)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = len(family.moments(pair.num_frames))
    side = SIDE // SQUARE
    grid = VisualGrid(rows, side, side, num_extra=family.num_visual_tokens(pair.num_frames) - rows * side**2)
    kept = STRATEGIES[pruning](grid, pruning_ratio) if pruning_ratio else None
    asked = videofacts(samples, seed, num_frames=pair.num_frames)
    scores = []
    for sample in track(asked, description=f"{family_name} {role}"):
        assert sample.score is not None
        scores.append(sample.score(answer(family, model, tokenizer, sample.load_video()[0], sample.question, kept)))
    ordered = [s.order_right for s in scores if s.order_right is not None]
    count = grid.num_tokens if kept is None else len(kept)
    table = Table(title=f"{family_name} {role}: {count} of {grid.num_tokens} visual tokens, {len(asked)} questions")
    table.add_column("facts")
    table.add_column("recall")
    table.add_column("precision")
    table.add_row("all (accuracy)", f"{np.mean([s.accuracy for s in scores]):.3f}", "")
    table.add_row("order of all events", f"{np.mean(ordered):.3f}", "")
    for kind, c in totals(scores).items():
        said = c["right"] + c["wrong"]
        table.add_row(
            kind,
            f"{c['right'] / c['required']:.3f}" if c["required"] else "–",
            f"{c['right'] / said:.3f}" if said else "–",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
