"""The rejection sampler beside vLLM's: the same outputs in less memory. For loose ones see `test_verification.py`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_lvspec.engine import sampler
from vllm_lvspec.engine.cpu_kernels import replace_cpu_kernels
from vllm_lvspec.engine.memory import BYTES_PER_LOGIT, BYTES_PLANNED_BY_VLLM, verify_rows
from vllm_lvspec.engine.sampler import LVSpecRejectionSampler

VOCAB, CPU = 40, torch.device("cpu")
LARGE_VOCAB = 6000  # beside which other arrays are nothing
MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")
GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 0.8, "top_k": 12}
PENALTIES = {"frequency": 0.4, "presence": 0.3, "repetition": 1.2}

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="beside kernels for CPUs")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    replace_cpu_kernels()


def ours(mode: str = "raw_logprobs", verification: Any = None) -> LVSpecRejectionSampler:
    return LVSpecRejectionSampler(Sampler(mode), None, CPU, verification)


def metadata_of(
    drafts: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    logprobs: int | None = None,
    **penalties: float,
) -> SamplingMetadata:
    num, is_greedy = len(drafts), temperature == 0

    def each(value: float) -> torch.Tensor:
        return torch.full((num,), value)

    return SamplingMetadata(
        temperature=None if is_greedy else each(temperature),
        all_greedy=is_greedy,
        all_random=not is_greedy,
        top_p=None if top_p is None else each(top_p),
        top_k=None if top_k is None else each(top_k),
        generators={i: torch.Generator().manual_seed(i) for i in range(0, num, 2)},
        max_num_logprobs=logprobs,
        logprob_token_ids=None,
        no_penalties=not penalties,
        prompt_token_ids=torch.arange(num * 7).reshape(num, 7) % VOCAB,
        frequency_penalties=each(penalties.get("frequency", 0.0)),
        presence_penalties=each(penalties.get("presence", 0.0)),
        repetition_penalties=each(penalties.get("repetition", 1.0)),
        output_token_ids=[list(range(i % 5)) for i in range(num)],
        spec_token_ids=[list(draft) for draft in drafts],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def layout_of(drafts: Sequence[Sequence[int]]) -> SpecDecodeMetadata:
    """As the runner lays drafts out: each request's rows, of which the last is its own."""
    lengths = np.array([len(draft) for draft in drafts])
    own = (lengths + 1).cumsum() - 1
    drafted = np.setdiff1d(np.arange(own[-1] + 1), own)
    indices = {"target_logits_indices": drafted, "bonus_logits_indices": own, "logits_indices": np.arange(own[-1] + 1)}
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor([token for draft in drafts for token in draft], dtype=torch.int32),
        num_draft_tokens=lengths.tolist(),
        cu_num_draft_tokens=torch.from_numpy(lengths.cumsum().astype(np.int32)),
        cu_num_sampled_tokens=torch.from_numpy((lengths + 1).cumsum().astype(np.int32)),
        **{name: torch.from_numpy(values.astype(np.int32)) for name, values in indices.items()},
    )


def sample(of: RejectionSampler, drafts: list[list[int]], logits: torch.Tensor, settings: dict) -> tuple[list, Any]:
    """Emitted tokens, and their logprobs as they leave the worker."""
    torch.manual_seed(7)
    sampling = metadata_of(drafts, **settings)
    if sampling.temperature is not None:  # every third is greedy all the same
        sampling.temperature[::3], sampling.all_random = 0.0, False
    sampling.bad_words_token_ids = {0: [[3], [5, 6]]}
    sampling.allowed_token_ids_mask = torch.arange(VOCAB).repeat(len(drafts), 1) == 9  # which nobody may say
    output: SamplerOutput = of(layout_of(drafts), None, logits.clone(), sampling)
    tokens, logprobs = of.parse_output(output.sampled_token_ids, VOCAB, (), output.logprobs_tensors)
    return tokens, None if logprobs is None else [np.asarray(column) for column in logprobs if column is not None]


def random_drafts(rng: random.Random, num: int, longest: int) -> tuple[list[list[int]], torch.Tensor]:
    """Drafts of all lengths, and logits by which about half of their tokens are the best."""
    lengths = [rng.randint(0, longest) for _ in range(num - 1)] + [longest]
    drafts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    logits = torch.randn(sum(lengths) + num, VOCAB, generator=torch.Generator().manual_seed(rng.randrange(10**6)))
    rows = [token for draft in drafts for token in (*draft, None)]
    for row, token in enumerate(rows):
        if token is not None and rng.random() < 0.6:
            logits[row, token] += 8
    return drafts, logits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, GREEDY | PENALTIES, SAMPLED | PENALTIES])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_outputs_are_those_of_vllm(mode, settings, logprobs, monkeypatch):
    rng = random.Random(repr((mode, settings, logprobs)))
    for num in (1, 2, 7):
        drafts, logits = random_drafts(rng, num, 5)
        logits = logits.to(rng.choice([torch.float32, torch.bfloat16]))
        want = sample(RejectionSampler(Sampler(mode)), drafts, logits, settings | {"logprobs": logprobs})
        for at_once in (1, 4, 64):
            monkeypatch.setattr(sampler, "PENALIZED_AT_ONCE", at_once)
            tokens, found = sample(ours(mode), drafts, logits, settings | {"logprobs": logprobs})
            assert tokens == want[0]
            assert (found is None) == (want[1] is None) == (logprobs is None)
            for column, other in zip(found or (), want[1] or (), strict=True):
                np.testing.assert_array_equal(column, other)


@pytest.mark.parametrize("frequency", [0.4, 4.0])
def test_penalties_ask_for_no_draft_on_the_host(frequency):
    drafts, logits = random_drafts(random.Random(3), 9, 5)
    drafts[-1], drafts[-2] = [7, 7, 7, 3, 7], [5] * len(drafts[-2])  # what is said twice is punished twice
    sampling = metadata_of(drafts, **{**PENALTIES, "frequency": frequency}, logprobs=2)
    want = RejectionSampler(Sampler("processed_logits"))(layout_of(drafts), None, logits.clone(), sampling)
    sampling.spec_token_ids = [[-1] * len(draft) for draft in drafts]
    found = ours("processed_logits")(layout_of(drafts), None, logits.clone(), sampling)
    assert torch.equal(found.sampled_token_ids, want.sampled_token_ids)
    is_token = want.sampled_token_ids.flatten() >= 0
    assert torch.equal(found.logprobs_tensors.logprobs[is_token], want.logprobs_tensors.logprobs[is_token])


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_of(run: Any) -> int:
    """Bytes at most that are taken at once."""
    tracker = MemTracker()
    with tracker:
        run()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


@pytest.fixture
def _in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs' kernel cuts what is not among the likely ones; on CPUs vLLM sorts all."""
    for module in (topk_topp_sampler, rejection_sampler):
        monkeypatch.setattr(module, "apply_top_k_top_p", lambda logits, k, p: logits)


@pytest.mark.usefixtures("_in_place")
@pytest.mark.parametrize("logprobs", [None, 3])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, SAMPLED | PENALTIES])
@pytest.mark.parametrize("num_drafting", [1, 24])
@pytest.mark.parametrize(("dtype", "is_loose"), [(torch.bfloat16, False), (torch.float32, True)])
def test_logits_take_no_more_than_is_planned_for_them(dtype, logprobs, settings, num_drafting, is_loose, monkeypatch):
    monkeypatch.setattr(sampler, "PENALIZED_AT_ONCE", 4)  # of many fewer than there would be
    drafts = [[0] * 10] * num_drafting + [[]] * (24 - num_drafting)
    num_rows = sum(map(len, drafts)) + len(drafts)
    metadata, sampling = layout_of(drafts), metadata_of(drafts, **settings, logprobs=logprobs)
    accepted = torch.zeros(len(drafts), 11, dtype=torch.int32)
    tested = ours(verification=SimpleNamespace(accept=lambda *args: accepted))

    def logits() -> torch.Tensor:
        return torch.randn(num_rows, LARGE_VOCAB, dtype=dtype)

    def run() -> None:
        tested.batch = SimpleNamespace(places=None) if is_loose else None
        tested(metadata, None, logits(), sampling)

    def alone() -> None:  # what vLLM takes for the requests' own tokens
        rows = logits()
        own = rows[metadata.bonus_logits_indices]
        Sampler()(own, replace(sampling, max_num_logprobs=-1, no_penalties=True), True, "raw_logits")

    run()  # what is made once
    assert peak_of(run) < 1.04 * max(BYTES_PER_LOGIT * num_rows * LARGE_VOCAB, peak_of(alone))


@pytest.mark.usefixtures("_in_place")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_profile_has_as_many_rows_as_a_step_may_have_and_takes_no_less(dtype, monkeypatch):
    monkeypatch.setattr(sampler, "PENALIZED_AT_ONCE", 4)
    rows: list[int] = []
    tested = ours()
    forward = tested.forward
    tested.forward = lambda *args: rows.append(len(args[2])) or forward(*args)
    for num_rows in (11, 33, 34, 35, 43):
        verify_rows(tested, num_rows, 10, VOCAB, dtype, CPU)
    assert rows == [11, 33, 33, 35, 43]
    drafts = [[0] * 10] * 10
    profiled = peak_of(lambda: verify_rows(tested, 110, 10, LARGE_VOCAB, dtype, CPU))
    for settings in (GREEDY, SAMPLED, SAMPLED | PENALTIES):
        for logprobs in (None, 3):
            metadata, sampling = layout_of(drafts), metadata_of(drafts, **settings, logprobs=logprobs)
            step = peak_of(
                lambda metadata=metadata, sampling=sampling: tested(
                    metadata, None, torch.randn(110, LARGE_VOCAB, dtype=dtype), sampling
                )
            )
            assert profiled > 0.98 * step, (settings, logprobs)


@pytest.mark.usefixtures("_in_place")
def test_what_is_taken_for_planned_by_vllm_is():
    drafts = [[0]] * 24
    vllms, sampling = RejectionSampler(Sampler()), metadata_of(drafts, **SAMPLED)
    metadata = layout_of(drafts)

    def run() -> None:
        vllms(metadata, None, torch.randn(2 * len(drafts), LARGE_VOCAB, dtype=torch.bfloat16), sampling)

    assert peak_of(run) >= BYTES_PLANNED_BY_VLLM * 24 * LARGE_VOCAB  # on CPUs some more
