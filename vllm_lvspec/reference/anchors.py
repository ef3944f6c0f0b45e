"""How well visual relevance tells words that carry facts from fillers, by source, layer, row and N.

    python -m vllm_lvspec.reference.anchors qwen2_5_vl --samples 30 --seed 5

The target reads true answers, of which the grammar knows where facts stand. Runs in transformers: vLLM gives the
states of one layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

from vllm_lvspec.bench.samples import SEEDS_PER_SUITE
from vllm_lvspec.bench.videofacts.scene import Scene
from vllm_lvspec.bench.videofacts.tasks import TASKS, Task, make_task
from vllm_lvspec.kernels.relevance import mean_of_top
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.families import FAMILIES, Family
from vllm_lvspec.reference.tokenizer import ASSISTANT_TURN, USER_TURN
from vllm_lvspec.verify.policies.policy import share_of_chain

TOP_N = (1, 10, 100)
CHAIN = 10
NUM_DRAWS = 200


class States:
    """States and values of a model's layers for one sequence after another."""

    def __init__(self, family: Family, model: Any, tokenizer: PreTrainedTokenizerFast):
        self.family, self.model, self.tokenizer = family, model, tokenizer
        self.values: list[torch.Tensor] = []
        for layer in model.model.language_model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: self.values.append(output[0]))

    @torch.inference_mode()
    def read(self, frames: np.ndarray, task: Task) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """By source: features `[num_visual, width]` and states `[num_tokens, width]` of the answer's tokens; and which
        of these tokens carry facts."""
        family, tokenizer = self.family, self.tokenizer
        head = tokenizer(USER_TURN + family.BEFORE_VISUAL).input_ids
        tail = tokenizer(family.AFTER_VISUAL + task.prompt + ASSISTANT_TURN).input_ids
        answer = tokenizer(task.answer.text, return_offsets_mapping=True)
        tokens = answer.input_ids
        spans = task.answer.fact_spans
        is_fact = torch.tensor(
            [any(begin < b and a < end for a, b in spans) for begin, end in answer.offset_mapping], dtype=torch.bool
        )
        visual = family.encode_visual(self.model, family.pixel_values([frames]), len(frames), 1)
        embed = self.model.get_input_embeddings()
        text = [embed(torch.tensor([ids])) for ids in (head, tail + tokens)]
        positions = family.text_positions(len(head), len(frames), len(tail) + len(tokens), 1)
        self.values.clear()
        output = self.model.model.language_model(
            inputs_embeds=torch.cat([text[0], visual, text[1]], dim=1), position_ids=positions,
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
        seen = slice(len(head), len(head) + visual.shape[1])
        first = seen.stop + len(tail)
        found = {}
        # The last of transformers' hidden states is the normalised one, as vLLM gives it.
        for name, states in [*self._layers(output.hidden_states), ("value", self.values[-1])]:
            if name != "embedding":
                found[name] = states[seen], states[first - 1 : first - 1 + len(tokens)]
            reads = name if name == "embedding" else f"{name}:read"
            found[reads] = states[seen], states[first : first + len(tokens)]
        return found, is_fact

    def _layers(self, hidden: tuple[torch.Tensor, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        yield "embedding", hidden[0][0]
        for i, states in enumerate(hidden[1:-1], start=1):
            yield f"layer:{i}", states[0]
        yield "hidden", hidden[-1][0]


def cosines(features: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Of every state with every feature: `[num_tokens, num_visual]`."""
    return F.normalize(states, dim=-1) @ F.normalize(features, dim=-1).T


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a fact's score is above a filler's, ties counted by half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_facts = labels.sum()
    return float((ranks[labels].sum() - num_facts * (num_facts + 1) / 2) / (num_facts * (~labels).sum()))


def anchors_of(scores: np.ndarray, relaxation: float) -> np.ndarray:
    """Which tokens would be anchors, were chains of ten drafted one after another."""
    anchors = np.zeros(len(scores), dtype=bool)
    for begin in range(0, len(scores), CHAIN):
        chain = scores[begin : begin + CHAIN]
        num_anchors = len(chain) - share_of_chain(relaxation, len(chain))
        anchors[begin + np.argsort(-chain, kind="stable")[:num_anchors]] = True
    return anchors


def measure(scores: list[np.ndarray], labels: list[np.ndarray], relaxation: float) -> dict[str, Any]:
    """Figures of one source over videos, with a 95 % bootstrap interval over videos of the area under the curve."""
    anchors = [anchors_of(s, relaxation) for s in scores]
    all_scores, all_labels, all_anchors = np.concatenate(scores), np.concatenate(labels), np.concatenate(anchors)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(NUM_DRAWS):
        picked = rng.integers(0, len(scores), len(scores))
        draws.append(
            area_under_curve(np.concatenate([scores[i] for i in picked]), np.concatenate([labels[i] for i in picked]))
        )
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "auc": area_under_curve(all_scores, all_labels),
        "interval": [float(low), float(high)],
        "precision": float((all_anchors & all_labels).sum() / all_anchors.sum()),
        "recall": float((all_anchors & all_labels).sum() / all_labels.sum()),
    }


def main(
    family_name: Annotated[str, typer.Argument(metavar="FAMILY", help=" or ".join(FAMILIES))],
    samples: int = 30,
    seed: int = 1,
    relaxation: float = 0.9,
    json_path: Annotated[Path | None, typer.Option("--json", help="where the figures go, too")] = None,
) -> None:
    if family_name not in FAMILIES:
        raise typer.BadParameter(f"family={family_name!r}: must be one of {', '.join(FAMILIES)}")
    family, pair = FAMILIES[family_name], PAIRS[family_name]
    model = AutoModelForImageTextToText.from_pretrained(pair.target, dtype=torch.float32).eval()
    states = States(family, model, AutoTokenizer.from_pretrained(pair.target))
    scores: dict[tuple[str, int], list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    for index in track(range(seed * SEEDS_PER_SUITE, seed * SEEDS_PER_SUITE + samples), description=family_name):
        scene = Scene.from_seed(index)
        of_video: dict[tuple[str, int], list[torch.Tensor]] = {}
        is_fact = []
        for kind in TASKS:
            task = make_task(scene, kind, np.random.default_rng([index, TASKS.index(kind)]))
            found, facts = states.read(scene.render(pair.num_frames), task)
            is_fact.append(facts)
            for source, (features, tokens) in found.items():
                compared = cosines(features, tokens)[None]
                for top_n in TOP_N:
                    of_video.setdefault((source, top_n), []).append(mean_of_top(compared, top_n))
        labels.append(torch.cat(is_fact).numpy())
        for key, parts in of_video.items():
            scores.setdefault(key, []).append(torch.cat(parts).numpy())
    figures = {key: measure(s, labels, relaxation) for key, s in scores.items()}
    density = np.concatenate(labels).mean()
    title = f"{family_name}: {samples} videos, seed {seed}; {density:.1%} of {sum(map(len, labels))} tokens carry facts"
    headings = "source", "N", "area under the curve", f"precision at {relaxation:g}", f"recall at {relaxation:g}"
    table = Table(*headings, title=title)
    for (source, top_n), f in sorted(figures.items(), key=lambda item: -item[1]["auc"]):
        low, high = f["interval"]
        auc = f"{f['auc']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(source, str(top_n), auc, f"{f['precision']:.3f}", f"{f['recall']:.3f}")
    Console().print(table)
    if json_path is not None:
        rows = [{"source": source, "top_n": top_n, **f} for (source, top_n), f in figures.items()]
        json_path.write_text(json.dumps({"family": family_name, "seed": seed, "samples": samples, "rows": rows}) + "\n")


if __name__ == "__main__":
    typer.run(main)
