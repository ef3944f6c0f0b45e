"""What a GPU would show, without one: on which device everything is, and where the host waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from harness import Engine, in_graphs_of_chains, ragged
from pretended_gpu import MIXED, OVERWRITTEN, UNREAD, WAITED, Finding, PretendedGPU, engines_on, is_there
from replays import Replays
from vllm import RequestOutput, SamplingParams
from workload import LLAVA, QWEN, Family, Request, generate_requests, token_ids, turn, video

from vllm_lvspec.device import Clock, upload
from vllm_lvspec.engine import decode_graphs
from vllm_lvspec.engine.runner import LVSpecGPUModelRunner, only_decodes
from vllm_lvspec.reference import PAIRS

# The pretence ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["inference", "no inference"])
def gpu(request: pytest.FixtureRequest) -> Iterator[PretendedGPU]:
    with torch.inference_mode(request.param), PretendedGPU() as pretended:
        yield pretended


def kinds(gpu: PretendedGPU) -> dict[str, int]:
    found: Counter[str] = Counter()
    for finding, count in gpu.findings.items():
        found[finding.kind] += count
    return dict(found)


def test_where_tensors_are_follows_from_how_they_are_made(gpu):
    there, here = torch.zeros(4, device="cuda"), torch.zeros(4)
    assert there.device.type == "cuda" and here.device.type == "cpu"
    for tensor in (there[1:], there + 1, there.view(2, 2).T, torch.stack([there, there]), there.new_zeros(3),
                   torch.zeros_like(there), there.max(0).values, torch.zeros_like(here, device="cuda"),
                   torch.arange(3, device=there.device), there.to(torch.int32)):  # fmt: skip
        assert is_there(tensor)
    assert not is_there(torch.zeros_like(there, device="cpu")) and not is_there(here + 1)
    assert not gpu.findings


@pytest.mark.parametrize(
    ("act", "wanted"),
    [
        (lambda there, here: there + here, {MIXED: 1}),
        (lambda there, here: torch.cat([there, here]), {MIXED: 1}),
        (lambda there, here: here[there.long()], {MIXED: 1}),
        (lambda there, here: there + here[0], {}),
        (lambda there, here: there.numpy(), {UNREAD: 1}),
        (lambda there, here: there.tolist(), {WAITED: 1}),
        (lambda there, here: there.sum().item(), {WAITED: 1}),
        (lambda there, here: bool(there[0] > 0), {WAITED: 1}),
        (lambda there, here: there[there > 0], {WAITED: 1}),
        (lambda there, here: there.nonzero(), {WAITED: 1}),
        (lambda there, here: there.nonzero(as_tuple=True), {WAITED: 1}),
        (lambda there, here: torch.where(there > 0), {WAITED: 1}),
        (lambda there, here: torch.where(there > 0, there, 0.0), {}),
        (lambda there, here: there.repeat_interleave(there.long()), {WAITED: 1}),
        (lambda there, here: there.repeat_interleave(2), {}),
        (lambda there, here: there[here.long()], {WAITED: 1}),
        (lambda there, here: there.cpu(), {WAITED: 1}),
        (lambda there, here: there.to("cpu", non_blocking=True), {}),
        (lambda there, here: here.copy_(there, non_blocking=True), {WAITED: 1}),
        (lambda there, here: here.pin_memory().copy_(there, non_blocking=True), {}),
        (lambda there, here: here.to(there.device), {WAITED: 1}),
        (lambda there, here: here.to(there.device, non_blocking=True), {WAITED: 1}),
        (lambda there, here: here.pin_memory().to(there.device, non_blocking=True), {}),
        (lambda there, here: there.copy_(here), {WAITED: 1}),
        (lambda there, here: torch.tensor([1.0], device=there.device), {WAITED: 1}),
        (lambda there, here: upload([here.numpy(), here.numpy()], there.device)[1] + there, {}),
    ],
)  # fmt: skip
def test_what_a_gpu_refuses_or_waits_for_is_found(act, wanted, gpu):
    there, here = torch.zeros(4, device="cuda") + 1, torch.zeros(4)
    act(there, here)
    assert kinds(gpu) == wanted


def test_who_has_waited_does_not_wait_again(gpu):
    there = torch.zeros(4, device="cuda") + 1
    there.tolist()
    there.tolist()
    assert kinds(gpu) == {WAITED: 1}
    (there + 1).tolist()
    assert kinds(gpu) == {WAITED: 2}


def test_what_is_under_way_can_not_be_read_and_must_not_be_written(gpu):
    there, clock = torch.arange(4, device="cuda"), Clock(torch.device("cuda"))
    copied, turned = there.to("cpu", non_blocking=True), there.view(2, 2).T.to("cpu", non_blocking=True)
    begin = clock.mark()
    assert copied.tolist() != [0, 1, 2, 3] and turned.tolist() != [[0, 2], [1, 3]]
    there.add_(1)
    end = clock.mark()
    with pytest.raises(AssertionError):
        clock.seconds(begin, end)
    clock.wait(begin)
    assert copied.tolist() == [0, 1, 2, 3] and turned.tolist() == [[0, 2], [1, 3]]
    source = torch.zeros(2).pin_memory()
    source.to(there.device, non_blocking=True)
    clock.wait(end)
    assert OVERWRITTEN not in kinds(gpu)
    source.fill_(1)
    clock.wait(clock.mark())
    assert kinds(gpu)[OVERWRITTEN] == 1


# Engines on it --------------------------------------------------------------------------------------------------------

PROMPT, DECODES, NOTHING = "prompts", "decodes", "nothing"


class Recorded(Replays):
    """As CUDA does, it records nothing that waits."""

    gpu: PretendedGPU

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        self.gpu.findings.clear()
        yield
        assert not self.gpu.findings


class Watched:
    """An engine on a pretended GPU, and what was found in steps of which kind."""

    def __init__(self, gpu: PretendedGPU, engine: Engine):
        self.gpu, self.engine = gpu, engine
        self.runner: LVSpecGPUModelRunner
        (self.runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
        self._execute = self.runner.execute_model
        self.runner.execute_model = self._watched  # type: ignore[method-assign]
        assert not self._refused()  # at the start, where whoever wants may wait
        self.forget()

    def forget(self) -> None:
        self.steps: Counter[str] = Counter()
        self.found: dict[str, Counter[Finding]] = {kind: Counter() for kind in (PROMPT, DECODES, NOTHING)}
        self._kind = NOTHING
        self.gpu.findings.clear()

    def _watched(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._note()
        is_empty = not scheduler_output.total_num_scheduled_tokens
        self._kind = NOTHING if is_empty else DECODES if only_decodes(scheduler_output) else PROMPT
        self.steps[self._kind] += 1
        return self._execute(scheduler_output, *args, **kwargs)

    def _note(self) -> None:
        """What was found since the last step began: drafts are made behind a step's output."""
        self.found[self._kind] += self.gpu.findings
        self.gpu.findings.clear()

    def run(self, requests: Sequence[Request], sizes: Sequence[int]) -> list[RequestOutput]:
        self.forget()
        outputs = self.engine.run(requests, sizes)
        self._note()
        self.gpu.findings.update(sum(self.found.values(), Counter()))
        assert not self._refused()  # whose ever it is
        self.gpu.findings.clear()
        return outputs

    @torch.inference_mode()
    def profile(self) -> None:
        """As a GPU's worker does before it sizes its cache; vLLM's own for CPUs looks at memory alone."""
        rows: list[int] = []
        sampler, most_rows = self.runner.rejection_sampler, self.runner.drafter.drafter.payoff.most_rows
        with pytest.MonkeyPatch.context() as patch:
            forward = sampler.forward
            patch.setattr(sampler, "forward", lambda *args: rows.append(len(args[2])) or forward(*args))
            self.runner.profile_run()
        assert max(rows) == most_rows == 11 * self.runner.scheduler_config.max_num_seqs
        assert not self._refused()
        self.runner.encoder_cache.clear()

    def _refused(self) -> list[Finding]:
        return [finding for finding in self.gpu.findings if finding.kind != WAITED]

    def count_recalls(self) -> list[int]:
        """Of how many requests each time, as they come."""
        found: list[int] = []
        drafter = self.runner.drafter.drafter
        recall = drafter._recall
        drafter._recall = lambda requests, *args: found.append(len(requests)) or recall(requests, *args)
        return found

    def waits(self, kind: str) -> Counter[str]:
        """Where this package waits in steps of a kind, and how often."""
        counts: Counter[str] = Counter()
        for finding, count in self.found[kind].items():
            if finding.is_ours and not finding.where.startswith("cpu_kernels.py"):  # which no GPU runs
                counts[finding.where] += count
        return counts

    def waits_of_vllm(self, kind: str) -> int:
        return sum(count for finding, count in self.found[kind].items() if not finding.is_ours)

    def use_graphs(self) -> Replays:
        """Have the drafter's steps replayed."""
        model = self.runner.drafter.drafter.model
        graphs = Recorded(model, sizes=(1, 4, 8))
        graphs.gpu = self.gpu
        assert graphs.record() and not self._refused()
        model.graphs = graphs
        graphs.num_rows.clear()
        return graphs


@pytest.fixture
def start(checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watched]]:
    """`start(family, pair, **options)`: an engine of random weights, its own drafter, or of the bundled pair."""
    monkeypatch.setattr(decode_graphs, "_takes_several", lambda model: True)  # CPUs' attention knows no graphs
    with ExitStack() as stack:

        def start(family: Family, pair: bool = False, **options: Any) -> Watched:
            bundled = PAIRS[family.checkpoint]
            target = str(bundled.target) if pair else checkpoint(family.checkpoint, seed=0)
            drafter = str(bundled.draft) if pair else target
            gpu = PretendedGPU()
            stack.enter_context(engines_on(gpu))
            engine = Engine(target, drafter, **options)
            stack.callback(engine.close)
            return Watched(gpu, engine)

        yield start


def is_plain(request: Request) -> bool:
    """Whether vLLM has to look at no token on the host before it chooses the next."""
    params = request.params
    return not (params.bad_words or params.logprobs or params.min_tokens)


@pytest.mark.parametrize(
    ("family", "settings", "options", "waits_at_prompts"),
    [
        pytest.param(QWEN, {}, {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 19}, set(), id="scarce"),
        pytest.param(QWEN, {"model": "self"}, {}, set(), id="self"),
        pytest.param(LLAVA, {"pruning": "similarity"}, {}, {"scoring.py:of"}, id="similarity"),
    ],
)
def test_answers_are_the_targets_and_decodes_wait_once_for_what_they_emit(
    family, settings, options, waits_at_prompts, start, oracle
):
    count = 18
    want = token_ids(oracle(family, count, 2))
    run = start(family, lvspec=settings, **options)
    tries = run.count_recalls()
    run.profile()
    graphs = run.use_graphs() if settings.get("model") != "self" else None
    requests = generate_requests(family, count, seed=2)
    plain = [i for i, request in enumerate(requests) if is_plain(request)]
    others = [i for i in range(count) if i not in plain]
    for chosen in (plain, others):
        got = run.run([requests[i] for i in chosen], (8, 1, 5))
        assert token_ids(got) == [want[i] for i in chosen]
        if chosen is plain:
            assert run.steps[DECODES] > 10
            assert any(requests[i].params.repetition_penalty != 1 for i in plain)
            # And to learn what of a rejected draft is drafted again.
            waits = run.waits(DECODES) + run.waits(PROMPT)
            assert waits.pop("device.py:wait", 0) == len(tries) > 0
            assert set(waits) <= waits_at_prompts
            assert run.waits_of_vllm(DECODES) <= run.steps[DECODES]
        else:  # whose drafts are looked at before the target's tokens are chosen, of which one waits at most
            assert set(run.waits(DECODES)) == {"device.py:wait"}
            assert run.waits(DECODES)["device.py:wait"] <= run.steps[DECODES] + len(tries)
        tries.clear()
    assert graphs is None or {tokens for _, tokens in graphs.num_rows} == {1, 2, 10}
    stats = run.engine.stats()
    assert stats["drafted_tokens"] > 300 and stats["pages_free"] == stats["pages_total"]


def captions(family: Family, count: int, params: Sequence[SamplingParams]) -> list[Request]:
    frames = PAIRS[family.checkpoint].num_frames
    prompt = turn("user", family.video + "Describe the video in detail.") + "<|im_start|>assistant\n"
    return [Request("video", prompt, {"video": [video(i, frames)]}, params[i % len(params)]) for i in range(count)]


@pytest.mark.parametrize(
    ("family", "settings", "waits"),
    [
        pytest.param(QWEN, {"trace": 8}, {"device.py:wait"}, id="fixed and traced"),
        pytest.param(
            LLAVA, {"anchor_source": "layer:1", "anchor_projection": 32, "draft_length": "adaptive", "trace": 8},
            {"drafter.py:_ended", "drafter.py:_note_chances", "device.py:wait"}, id="adaptive and traced",
        ),
    ],
)  # fmt: skip
def test_loose_answers_are_the_hosts_and_decodes_wait_for_nothing_else(family, settings, waits, start, engines):
    settings = {"policy": "lvspec", **settings}
    params = [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=1, seed=1, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=40, extra_args={"lvspec": {"policy": "fly"}}),
    ]
    want = None
    if settings.get("draft_length") != "adaptive":  # whose lengths follow from times
        engine = engines(family, pair=True, lvspec=settings)
        (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
        with pytest.MonkeyPatch.context() as patch, ragged(engine):
            patch.setattr(runner.drafter.drafter, "sees_tokens", False)
            want = token_ids(engine.run(captions(family, 8, params), (4, 3, 1)))
    run = start(family, pair=True, max_model_len=1024, lvspec=settings)
    tries = run.count_recalls()
    graphs = run.use_graphs()
    with in_graphs_of_chains(run.engine) as seen, ragged(run.engine):
        got = run.run(captions(family, 8, params), (4, 3, 1))
    assert set(run.waits(DECODES)) <= waits
    if settings.get("draft_length") != "adaptive":
        assert run.waits(DECODES)["device.py:wait"] <= len(tries)
    assert run.waits_of_vllm(DECODES) <= run.steps[DECODES]
    stats = run.engine.stats()
    assert graphs.num_rows and stats["drafted_tokens"] > 100
    if want is not None:
        assert token_ids(got) == want
        assert seen["padding"] > 50 and stats["tokens_loose"] > 10
