"""What drafting and loose verification must give, in plain transformers and plain Python: the oracle of a real engine.

Written from the design and not from the plugin: only the pruning strategy and the tokens of guarded words, which have
tests of their own, are the plugin's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, DynamicCache

from vllm_lvspec.bench.samples import Sample
from vllm_lvspec.bench.videofacts.scene import SIDE
from vllm_lvspec.config import LVSpecConfig
from vllm_lvspec.draft.pruning import STRATEGIES, VideoView, VisualGrid
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.families import FAMILIES
from vllm_lvspec.reference.tokenizer import ASSISTANT_TURN, USER_TURN
from vllm_lvspec.reference.train import SQUARE
from vllm_lvspec.verify.guards import KINDS, guard_words, token_kinds

MAX_TOKENS = 256
# Decisions closer than these may fall either way with another order of additions.
LOGIT_MARGIN, SHARE_MARGIN, RELEVANCE_MARGIN = 5e-4, 2e-4, 5e-6


@dataclass(frozen=True)
class Rules:
    """What one request's acceptance depends on, as in the design; kinds of tokens are sets of ids."""

    config: LVSpecConfig
    ends: frozenset[int]
    special: frozenset[int]
    guarded: frozenset[int]
    order_words: frozenset[int]


@dataclass
class Verdict:
    """Emitted tokens with a reason each, and how close the closest decision was (1: as wide as a margin)."""

    token_ids: list[int]
    reasons: list[str]
    closeness: float


def accept(
    draft: list[int], choices: list[int], relevance: list[float], shares: list[float], rules: Rules
) -> tuple[list[int], list[str]]:
    """The design's eight rules for one greedy request: `draft` d[0..k), `choices` t[0..k], `relevance` A[0..k)."""
    config = rules.config
    k = next((i + 1 for i, token in enumerate(draft) if token in rules.ends), len(draft))
    exact = [draft[i] == choices[i] for i in range(k)]

    num_anchors = k - math.floor(config.relaxation * k + 1e-9)
    falling = sorted((math.inf if math.isnan(a) else a for a in relevance[:k]), reverse=True)
    least = falling[num_anchors - 1] if num_anchors else math.inf
    threshold = math.inf if config.anchor_threshold is None else config.anchor_threshold
    anchor = [math.isnan(a) or a >= least or a >= threshold for a in relevance[:k]]

    never = rules.ends | rules.special | rules.guarded
    free = [
        not {draft[i], choices[i]} & never and shares[i] > 0 and shares[i] >= config.probability_floor for i in range(k)
    ]
    loose = [not anchor[i] and free[i] for i in range(k)]

    def may_rest_on(i: int, j: int) -> bool:
        crossed = [x for at in range(min(i, j), max(i, j) + 1) for x in (draft[at], choices[at])]
        near = 0 < abs(j - i) <= config.shift_window and (j < i or config.shift_direction == "both")
        return near and choices[j] == draft[i] and rules.order_words.isdisjoint(crossed)

    used = {i for i in range(k) if exact[i]}
    shift: dict[int, int] = {}
    for i in range(k):
        if exact[i] or not anchor[i] or not free[i]:
            continue
        nearest = sorted((abs(j - i), j) for j in range(k) if j not in used and may_rest_on(i, j))
        if nearest:
            shift[i] = nearest[0][1]
            used.add(shift[i])

    while True:
        n = next((i for i in range(k) if not (exact[i] or loose[i] or i in shift)), k)
        void = [i for i, j in shift.items() if j >= n]
        if not void:
            break
        for i in void:
            del shift[i]

    reasons = ["exact" if exact[i] else "loose" if loose[i] else "shift" for i in range(n)]
    if n and draft[n - 1] in rules.ends:
        return draft[:n], reasons
    return [*draft[:n], choices[n]], [*reasons, "target"]


@dataclass
class Rows:
    """States of the tokens of one forward: into the first layer, after I layers, after the last norm, last values."""

    embeds: torch.Tensor
    layers: list[torch.Tensor]
    hidden: torch.Tensor
    values: torch.Tensor

    def of(self, source: str) -> torch.Tensor:
        kind, _, layer = source.removesuffix(":read").partition(":")
        if kind == "layer":
            return self.layers[int(layer)]
        return {"hidden": self.hidden, "embedding": self.embeds, "value": self.values}[kind]


class Speaker:
    """A model of the pair that sees `kept` of a video's tokens, at their original positions, and keeps a cache."""

    def __init__(self, name: str, path: str, kept: torch.Tensor):
        self.family = FAMILIES[name]
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.kept = kept
        # What transformers lists as the last layer's states has gone through the last norm.
        self.model.model.language_model.norm.register_forward_pre_hook(self._keep_unnormed)

    def _keep_unnormed(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.unnormed = args[0][0]

    def read_prompt(self, sample: Sample) -> Rows:
        """Begin anew with a question about a video."""
        family, embed = self.family, self.model.get_input_embeddings()
        frames = sample.load_video()[0]
        head = self.tokenizer(USER_TURN + family.BEFORE_VISUAL).input_ids
        tail = self.tokenizer(family.AFTER_VISUAL + sample.question + ASSISTANT_TURN).input_ids
        visual = family.encode_visual(self.model, family.pixel_values([frames]), len(frames), 1)[0, self.kept]
        num_visual = family.num_visual_tokens(len(frames))
        self.num_prompt = len(head) + num_visual + len(tail)
        self.visual_rows = slice(len(head), len(head) + len(self.kept))
        self.positions = family.text_positions(len(head), len(frames), len(tail) + MAX_TOKENS + 32, 1)
        self.cache = DynamicCache()
        begin = len(head) + num_visual
        places = torch.cat([torch.arange(len(head)), len(head) + self.kept, torch.arange(begin, self.num_prompt)])
        self.num_hidden = self.num_prompt - len(places)
        embeds = torch.cat([embed(torch.tensor(head)), visual, embed(torch.tensor(tail))])
        return self._forward(embeds, places)

    def read(self, token_ids: list[int], first: int) -> Rows:
        """Read tokens of the answer, of which the cache knows those before `first` and maybe others."""
        known = self.num_prompt - self.num_hidden + first
        if (surplus := self.cache.get_seq_length() - known) > 0:
            self.cache.crop(-surplus)
        places = torch.arange(len(token_ids)) + self.num_prompt + first
        return self._forward(self.model.get_input_embeddings()(torch.tensor(token_ids)), places)

    def _forward(self, embeds: torch.Tensor, places: torch.Tensor) -> Rows:
        out = self.model.model.language_model(
            inputs_embeds=embeds[None], position_ids=self.positions[..., places], past_key_values=self.cache,
            use_cache=True, output_hidden_states=True,
        )  # fmt: skip
        values = self.cache.layers[-1].values[0, :, -len(embeds) :]
        layers = [*(h[0] for h in out.hidden_states[:-1]), self.unnormed]
        return Rows(embeds, layers, out.last_hidden_state[0], values.transpose(0, 1).flatten(1))

    def logits(self, rows: Rows) -> torch.Tensor:
        return self.model.lm_head(rows.hidden)


@dataclass
class Simulated:
    """An answer with a reason for each token, and the closeness of the step that emitted it."""

    token_ids: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    closeness: list[float] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return {reason: self.reasons.count(reason) for reason in ("exact", "loose", "shift", "target")}

    def num_certain(self) -> int:
        """How many tokens there are before the first decision that might fall either way."""
        return next((i for i, close in enumerate(self.closeness) if close < 1), len(self.token_ids))


class Simulation:
    """A target and a drafter of a family, by default the bundled ones. All is greedy, one request at a time."""

    def __init__(self, name: str, target: str = "", draft: str = "", pruning_ratio: float = 0.9):
        family, pair = FAMILIES[name], PAIRS[name]
        num_visual, num_moments = family.num_visual_tokens(pair.num_frames), len(family.moments(pair.num_frames))
        side = SIDE // SQUARE
        grid = VisualGrid(num_moments, side, side, num_extra=num_visual - num_moments * side**2)
        self.target = Speaker(name, target or str(pair.target), torch.arange(num_visual))
        kept = STRATEGIES["uniform"].keep(VideoView(grid), pruning_ratio)
        self.drafter = Speaker(name, draft or str(pair.draft), kept)
        self.shared_vocab = min(len(s.model.get_input_embeddings().weight) for s in (self.target, self.drafter))
        self.tokenizer = self.target.tokenizer
        self.answer = functools.cache(self._answer)

    def rules(self, config: LVSpecConfig) -> Rules:
        ends = {self.tokenizer.eos_token_id}
        kinds = token_kinds(self.tokenizer, self.shared_vocab, ends, guard_words(["en"], {}))

        def tokens(*names: str) -> frozenset[int]:
            return frozenset((kinds & sum(KINDS[name] for name in names)).nonzero()[:, 0].tolist())

        return Rules(
            config,
            frozenset(ends),
            frozenset(self.tokenizer.all_special_ids),
            tokens(*config.guards),
            tokens("order") if "order" in config.guards else frozenset(),
        )

    @torch.inference_mode()
    def _answer(self, sample: Sample, config_json: str, max_tokens: int = MAX_TOKENS) -> Simulated:
        config = LVSpecConfig.model_validate_json(config_json)
        rules = self.rules(config)
        rows = self.target.read_prompt(sample)
        seen = rows.of(config.anchor_source)[self.target.visual_rows]
        first = self.target.logits(rows)[-1]
        self.drafter.read_prompt(sample)
        self.num_drafter_read = 0
        said = Simulated([int(first.argmax())], ["target"], [_gap(first) / LOGIT_MARGIN])
        while said.token_ids[-1] not in rules.ends and len(said.token_ids) < max_tokens:
            left = max_tokens - len(said.token_ids)
            draft, certain = self._draft(said.token_ids, min(config.num_speculative_tokens, left - 1))
            verdict = self._verify(said.token_ids, draft, seen, rules)
            emitted = verdict.token_ids[:left]
            said.token_ids += emitted
            said.reasons += verdict.reasons[: len(emitted)]
            said.closeness += [min(certain, verdict.closeness)] * len(emitted)
        return said

    def _draft(self, said: list[int], count: int) -> tuple[list[int], float]:
        """`count` tokens after those that were said, and how close the closest choice was."""
        draft: list[int] = []
        closest = math.inf
        for _ in range(count):
            known = self.num_drafter_read if not draft else len(said) + len(draft) - 1
            rows = self.drafter.read([*said, *draft][known:], known)
            logits = self.drafter.logits(rows)[-1, : self.shared_vocab]
            draft.append(int(logits.argmax()))
            closest = min(closest, _gap(logits) / LOGIT_MARGIN)
            self.num_drafter_read = len(said)  # beyond that it has read what may be rejected
        return draft, closest

    def _verify(self, said: list[int], draft: list[int], seen: torch.Tensor, rules: Rules) -> Verdict:
        config = rules.config
        rows = self.target.read([said[-1], *draft], len(said) - 1)
        logits = self.target.logits(rows)
        states = rows.of(config.anchor_source)
        reads = config.anchor_source.endswith(":read") or config.anchor_source == "embedding"
        relevance = _relevance(states[1:] if reads else states[: len(draft)], seen, config.anchor_top_n)
        probs = logits.softmax(-1)
        shares = [float(probs[i, token] / probs[i].max()) for i, token in enumerate(draft)]
        choices = logits.argmax(-1).tolist()
        k = next((i + 1 for i, token in enumerate(draft) if token in rules.ends), len(draft))
        return Verdict(
            *accept(draft, choices, relevance, shares, rules),
            min(
                *(_gap(row) / LOGIT_MARGIN for row in logits),
                _closeness_of_shares(shares[:k], draft, choices, config),
                _closeness_of_relevance(relevance[:k], config),
            ),
        )

    @torch.inference_mode()
    def visual_states(self, sample: Sample, source: str) -> torch.Tensor:
        """What is stored of a video's tokens: `[num_visual, width]`."""
        return self.target.read_prompt(sample).of(source)[self.target.visual_rows]

    @torch.inference_mode()
    def teacher_forced(self, sample: Sample, token_ids: Sequence[int]) -> torch.Tensor:
        """The target's logits at the place of each of an answer's tokens: `[num_tokens, vocab_size]`."""
        first = self.target.logits(self.target.read_prompt(sample))[-1:]
        return torch.cat([first, self.target.logits(self.target.read(list(token_ids), 0))])[:-1]


def _relevance(states: torch.Tensor, seen: torch.Tensor, top_n: int) -> list[float]:
    """A_s: the mean of the `top_n` largest cosines of each state with those of the visual tokens."""
    found = []
    for state in states:
        cosines = sorted(torch.nn.functional.cosine_similarity(state[None], seen).tolist(), reverse=True)
        largest = cosines[:top_n]
        found.append(sum(largest) / len(largest))
    return found


def _closeness_of_relevance(relevance: list[float], config: LVSpecConfig) -> float:
    k, falling = len(relevance), sorted(relevance, reverse=True)
    num_anchors = k - math.floor(config.relaxation * k + 1e-9)
    gaps = [falling[num_anchors - 1] - falling[num_anchors]] if 0 < num_anchors < k else []
    if config.anchor_threshold is not None:
        gaps += [abs(a - config.anchor_threshold) for a in relevance]
    return min(gaps, default=math.inf) / RELEVANCE_MARGIN


def _closeness_of_shares(shares: list[float], draft: list[int], choices: list[int], config: LVSpecConfig) -> float:
    if not config.probability_floor:
        return math.inf
    gaps = [abs(share - config.probability_floor) for i, share in enumerate(shares) if draft[i] != choices[i]]
    return min(gaps, default=math.inf) / SHARE_MARGIN


def _gap(logits: torch.Tensor) -> float:
    best = logits.topk(2).values
    return float(best[0] - best[1])
