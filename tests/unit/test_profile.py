"""Where the time of steps goes, with a clock that the test winds."""

from types import SimpleNamespace

import pytest
import torch

from vllm_lvspec.bench.overhead import overhead
from vllm_lvspec.engine import profile
from vllm_lvspec.engine.profile import DECODE, ENGINE, PARTS, PROMPT, StepProfile


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Thing:
    """Has the methods that are watched; each takes a second of its own."""

    def __init__(self, clock, **inner):
        self.clock = clock
        vars(self).update(inner)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def method(*args):
            self.clock.now += 1

        return method


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profile, "time", clock)
    return clock


class Runner(Thing):
    """A step of a target with a drafter, in short."""

    device = torch.device("cpu")

    def execute_model(self, step):
        self.clock.now += 2
        self._model_forward()
        self.model.compute_logits()

    def sample_tokens(self):
        self.clock.now += 3
        self.verification.accept()

    def take_draft_token_ids(self):
        self.drafter.drafter._draft()


class Drafter(Thing):
    def _draft(self):
        self._catch_up()
        for _ in range(4):
            self.model.forward()
            self.clock.now += 0.5

    def _catch_up(self):
        self.model.forward()


@pytest.fixture
def runner(clock):
    drafter = Drafter(clock, model=Thing(clock))
    return Runner(
        clock,
        model=Thing(clock),
        verification=Thing(clock),
        scores=Thing(clock),
        drafter=SimpleNamespace(drafter=drafter),
    )


def step(num_tokens: int, num_drafted: int):
    return SimpleNamespace(
        total_num_scheduled_tokens=num_tokens,
        num_scheduled_tokens={"a": num_tokens} if num_tokens else {},
        scheduled_spec_decode_tokens={"a": [0] * num_drafted},
    )


def run(runner, *steps, between=7.0):
    for each in steps:
        runner.execute_model(each)
        runner.sample_tokens()
        if "drafter" in vars(runner):  # the engine asks where there is speculation
            runner.take_draft_token_ids()
        runner.clock.now += between


def test_every_part_of_a_step_has_what_others_within_it_have_not(runner):
    watched = StepProfile(runner)
    watched.start()
    run(runner, step(100, 0), step(5, 4), step(5, 4), step(5, 4))
    watched.stop()
    assert watched.num_steps == {DECODE: 2, PROMPT: 1}
    assert watched.seconds[DECODE] == {
        "inputs": 4, "target": 2, "target: logits": 2, "sampling": 6, "verification": 2,
        "drafter: for whom, how far": 0, "drafter: its batches": 4, "drafter: its first batch": 0,
        "drafter: prompts, first tokens": 2, "drafter: further tokens": 8, ENGINE: 14,
    }  # fmt: skip
    assert ENGINE not in watched.seconds[PROMPT]  # before a step of another kind the engine may have waited


def test_steps_of_nothing_are_not_counted(runner):
    watched = StepProfile(runner)
    watched.start()
    run(runner, step(5, 4), step(0, 0), step(5, 4))
    watched.stop()
    assert watched.num_steps == {DECODE: 1, PROMPT: 0}
    assert ENGINE not in watched.seconds[DECODE]


def test_what_was_replaced_is_put_back(runner):
    runner.model.compute_logits = runner.model.compute_logits  # its own, not its class's
    before = {id(x): dict(vars(x)) for x in (runner, runner.model, runner.verification, runner.drafter.drafter)}
    watched = StepProfile(runner)
    watched.start()
    assert "execute_model" in vars(runner)
    watched.stop()
    for x in (runner, runner.model, runner.verification, runner.drafter.drafter):
        assert vars(x) == before[id(x)]


def test_a_runner_without_a_drafter_has_fewer_parts(clock):
    class Plain(Runner):
        def sample_tokens(self):
            self.clock.now += 3

    plain = Plain(clock, model=Thing(clock))
    watched = StepProfile(plain)
    for _ in range(2):
        watched.start()
        run(plain, step(1, 0), step(1, 0), step(1, 0))
        watched.stop()
    assert watched.num_steps[DECODE] == 4
    assert watched.seconds[DECODE] == {"inputs": 8, "target": 4, "target: logits": 4, "sampling": 12, ENGINE: 28}


def test_overhead_leaves_forwards_out(clock, runner):
    without, other = StepProfile(runner), StepProfile(runner)
    without.num_steps[DECODE], other.num_steps[DECODE] = 10, 20
    without.seconds[DECODE] |= {"target": 8.0, "inputs": 1.0, ENGINE: 1.0}
    other.seconds[DECODE] |= {"target": 60.0, "inputs": 2.0, ENGINE: 2.0, "verification": 1.0}
    assert overhead(without, other, DECODE) == pytest.approx(0.05)


def test_a_part_that_fails_is_left(runner):
    def fails():
        raise RuntimeError("no memory")

    watched = StepProfile(runner)
    runner.model.compute_logits = fails
    watched.start()
    with pytest.raises(RuntimeError, match="no memory"):
        runner.execute_model(step(5, 4))
    assert not watched._parts


def test_runner_verification_scores_and_drafter_have_what_is_watched():
    from vllm_lvspec.draft.drafter import Drafter as RealDrafter
    from vllm_lvspec.engine.draft_model import VLLMDraftModel
    from vllm_lvspec.engine.runner import LVSpecGPUModelRunner
    from vllm_lvspec.engine.scoring import PromptScores
    from vllm_lvspec.engine.verification import Verification

    owners = {
        "": LVSpecGPUModelRunner,
        "verification": Verification,
        "scores": PromptScores,
        "drafter.drafter": RealDrafter,
        "drafter.drafter.model": VLLMDraftModel,
    }
    for part in PARTS:
        if part.path != "model":  # any of vLLM's
            assert callable(getattr(owners[part.path], part.method)), part
