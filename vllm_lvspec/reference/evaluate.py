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

from vllm_lvspec.bench.results import fact_figures, figures
from vllm_lvspec.bench.run import Answer
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.bench.videofacts.scene import SIDE
from vllm_lvspec.draft.pruning import STRATEGIES, VideoView, VisualGrid
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.families import FAMILIES, Family
from vllm_lvspec.reference.tokenizer import ASSISTANT_TURN, USER_TURN
from vllm_lvspec.reference.train import SQUARE


@torch.inference_mode()
def answer(
    family: Family,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    frames: np.ndarray,
    question: str,
    kept: torch.Tensor,
    max_tokens: int = 256,
) -> list[int]:
    """Tokens of the greedy answer to `question` about `frames [num_frames, height, width, 3]`.

    `kept`: sorted indices `[num_kept]` of the visual tokens that the model sees, at their own positions.
    """
    head = tokenizer(USER_TURN + family.BEFORE_VISUAL).input_ids
    tail = tokenizer(family.AFTER_VISUAL + question + ASSISTANT_TURN).input_ids
    num_visual = family.num_visual_tokens(len(frames))
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
    return tokens


def main(
    family_name: Annotated[str, typer.Argument(metavar="FAMILY", help=" or ".join(FAMILIES))],
    role: Annotated[str, typer.Argument(help="target or draft")],
    checkpoint: Annotated[Path | None, typer.Option(help="another one than the bundled")] = None,
    samples: int = 60,
    seed: int = 1,
    pruning: Annotated[str, typer.Option(help=" or ".join(sorted(STRATEGIES)))] = "uniform",
    pruning_ratio: Annotated[float, typer.Option(min=0, max=0.99)] = 0.0,
) -> None:
    for key, value, known in (
        ("family", family_name, FAMILIES),
        ("role", role, ("target", "draft")),
        ("pruning", pruning, [name for name, s in STRATEGIES.items() if s.looks_at == "grid"]),
    ):
        if value not in known:
            raise typer.BadParameter(f"{key}={value!r}: must be one of {', '.join(known)}")
    family = FAMILIES[family_name]
    path = checkpoint or getattr(PAIRS[family_name], role)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    side = SIDE // SQUARE
    moments, num_visual = len(family.moments(family.VIDEO_FRAMES)), family.num_visual_tokens(family.VIDEO_FRAMES)
    grid = VisualGrid(moments, side, side, num_extra=num_visual - moments * side**2)
    kept = STRATEGIES[pruning].keep(VideoView(grid), pruning_ratio) if pruning_ratio else torch.arange(num_visual)
    asked = videofacts(samples, seed, num_frames=family.VIDEO_FRAMES)
    answers = []
    for sample in track(asked, description=f"{family_name} {role}"):
        token_ids = answer(family, model, tokenizer, sample.load_video()[0], sample.question, kept)
        text = tokenizer.decode(token_ids)
        answers.append(Answer(role, sample.name, token_ids, text, len(token_ids), 0.0, 0.0, "", 0.0))
    found = figures(answers, asked, None)
    title = f"{family_name} {role}: {len(kept)} of {num_visual} visual tokens, {len(asked)} questions, seed {seed}"
    table = Table("facts", "recall", "precision", title=title)
    for name, heading in (("fact_accuracy", "all (accuracy)"), ("order_accuracy", "order of all events")):
        low, high = found.intervals[name]
        table.add_row(heading, f"{getattr(found, name):.3f} [{low:.3f}, {high:.3f}]", "")
    for kind, facts in fact_figures(answers, asked).items():
        table.add_row(kind, *("–" if x is None else f"{x:.3f}" for x in (facts.recall, facts.precision)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
