"""What watches a run: does every tensor learn, what is reported, and how a run is stopped."""

import os
import signal
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unlearn.errors import Interrupted, RunFailed
from unlearn.launch import SAME_REQUEST
from unlearn.monitors import (
    EverySteps,
    StepEvents,
    StopRequest,
    UpdateCheck,
    peak_memory_bytes,
    require_finite_gradients,
)


class Trained:
    """Three tensors under SGD, driven as the trainer drives its callbacks."""

    def __init__(self, *, step: int = 0, rate: float = 0.1) -> None:
        torch.manual_seed(0)
        self.tensors = {name: torch.nn.Parameter(torch.randn(100)) for name in "abc"}
        self.optimizer = torch.optim.SGD(self.tensors.values(), lr=rate)
        self.events: list[dict[str, Any]] = []
        self.check = UpdateCheck(self.events.append)
        self.state = SimpleNamespace(global_step=step)
        named = SimpleNamespace(named_parameters=self.tensors.items)
        self.check.on_train_begin(None, self.state, None, model=named)

    def step(self, keep: str = "", **gradients: float | None) -> None:
        """Give tensors these gradients (1 when not named), step, put tensors in ``keep`` back."""
        for name, tensor in self.tensors.items():
            size = gradients.get(name, 1.0)
            tensor.grad = None if size is None else torch.full_like(tensor, size)
        before = {name: self.tensors[name].detach().clone() for name in keep}
        self.check.on_pre_optimizer_step(None, self.state, None, optimizer=self.optimizer)
        self.optimizer.step()
        for name, values in before.items():
            self.tensors[name].data.copy_(values)
        self.check.on_optimizer_step(None, self.state, None)
        self.state.global_step += 1


def test_all_tensors_moved() -> None:
    run = Trained()
    run.step()
    assert run.check.done
    assert run.events == []


def test_bfloat16_is_named_where_it_may_have_rounded_a_step_away() -> None:
    """A step of 1e-4 is below half the spacing of bfloat16 numbers around 1."""
    run = Trained(rate=1e-4)
    run.tensors["b"].data = torch.ones(100, dtype=torch.bfloat16)
    run.step()
    (event,) = run.events
    assert event["tensors"] == ["b"]
    assert "training.bf16=true" in event["why"]


def test_a_tensor_that_ignores_its_gradient_is_named_after_one_step() -> None:
    run = Trained()
    run.step(keep="b")
    assert run.events == [{"event": "unmoved", "step": 1, "tensors": ["b"]}]
    run.step(keep="b")
    assert len(run.events) == 1


def test_a_tensor_without_gradient_at_first_is_waited_for() -> None:
    """As a LoRA A matrix, whose gradient is zero while B is."""
    run = Trained()
    run.step(a=0.0)
    run.step()
    run.step()
    assert run.check.done
    assert run.events == []


@pytest.mark.parametrize("gradient", [0.0, None])
def test_a_tensor_that_never_gets_a_gradient_is_named_in_the_end(gradient: float | None) -> None:
    run = Trained()
    for _ in range(5):
        run.step(c=gradient)
    assert run.events == [{"event": "unmoved", "step": 3, "tensors": ["c"]}]


def test_waiting_for_one_tensor_does_not_accuse_it_with_another() -> None:
    run = Trained()
    run.step(keep="b", a=0.0)
    run.step(keep="b")
    assert [event["tensors"] for event in run.events] == [["b"]]


def test_steps_at_rate_zero_do_not_count() -> None:
    run = Trained(rate=0.0)
    run.step()
    run.step()
    assert not run.check.done
    run.optimizer.param_groups[0]["lr"] = 0.1
    run.step(keep="a")
    assert run.events == [{"event": "unmoved", "step": 3, "tensors": ["a"]}]


def test_nothing_moves_at_all() -> None:
    run = Trained()
    with pytest.raises(RunFailed, match="moved no weight") as caught:
        run.step(keep="abc")
    assert "learning_rate" in caught.value.hint


def test_a_resumed_run_was_checked_before() -> None:
    run = Trained(step=4)
    run.step(keep="abc")
    assert run.events == []


def test_frozen_tensors_are_nobodys_business() -> None:
    model = torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    model.weight.grad = torch.ones(3, 3)
    require_finite_gradients(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_is_found(bad: float) -> None:
    model = torch.nn.Linear(3, 3)
    model.weight.grad, model.bias.grad = torch.ones(3, 3), torch.ones(3)
    model.bias.grad[1] = bad
    with pytest.raises(RunFailed, match="not finite in 1 trainable tensors: bias"):
        require_finite_gradients(model)


def test_long_lists_of_names_are_cut() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(RunFailed, match=r"8 trainable tensors: 0.weight, .*, 2.weight and 3 more$"):
        require_finite_gradients(model)


def events_of(readings: dict[str, Any], step: int = 4) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    callback = StepEvents(events.append, lambda: readings)
    state = SimpleNamespace(global_step=step, max_steps=9)
    callback.on_train_begin(None, state, None)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.25)
    callback.on_optimizer_step(None, state, None, optimizer=optimizer)
    return events


def test_a_step_event_holds_every_reading() -> None:
    (event,) = events_of({"forget/npo": torch.tensor(1.5), "retain/nll": torch.tensor(2.0)})
    assert event["seconds"] >= 0
    assert event["memory_bytes"] > 2**20
    del event["seconds"], event["memory_bytes"]
    assert event == {
        "event": "step", "step": 5, "of": 9, "learning_rate": 0.25,
        "forget/npo": 1.5, "retain/nll": 2.0, "tokens": 0,
    }  # fmt: skip


def test_a_diverged_reading_ends_the_run() -> None:
    with pytest.raises(RunFailed, match="forget/npo is not finite at step 5") as caught:
        events_of({"forget/npo": torch.tensor(float("nan")), "retain/nll": torch.tensor(1.0)})
    assert "unlearn resume" in caught.value.hint


def test_peak_memory_is_in_bytes() -> None:
    """Python with torch takes hundreds of MB: neither kilobytes nor a thousand times too much."""
    assert 50 * 2**20 < peak_memory_bytes() < 50 * 2**30


def test_every_steps_runs_in_evaluation_mode_and_not_at_the_end() -> None:
    model = torch.nn.Dropout().train()
    seen: list[tuple[int, bool]] = []
    callback = EverySteps(2, lambda step: seen.append((step, model.training)))
    for step in range(1, 7):
        state = SimpleNamespace(global_step=step, max_steps=6)
        callback.on_step_end(None, state, None, model=model)
        assert model.training
    assert seen == [(2, False), (4, False)]


NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_in_training_waits_for_the_end_of_the_step(number: int) -> None:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    with StopRequest().listening() as stop:
        stop.on_train_begin(None, None, control)
        stop.on_step_end(None, None, control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        stop.on_step_end(None, None, control)
    assert control.should_save
    assert control.should_training_stop


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_stops_at_once(number: int) -> None:
    with StopRequest().listening() as stop:
        stop.on_train_begin(None, None, None)
        signal.raise_signal(number)
        stop.asked_at -= SAME_REQUEST
        with pytest.raises(Interrupted):
            signal.raise_signal(number)


def test_a_sigterm_that_arrives_twice_is_one_request() -> None:
    """From the scheduler, which reaches every process, and from the launcher that passes it on."""
    with StopRequest().listening() as stop:
        stop.on_train_begin(None, None, None)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert not stop.stopped


def test_outside_training_a_signal_stops_at_once() -> None:
    with StopRequest().listening() as stop:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        stop.on_train_begin(None, None, None)
        stop.on_train_end(None, None, None)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert not stop.requested


def test_a_library_that_catches_exceptions_does_not_swallow_the_stop() -> None:
    def careless() -> None:
        with suppress(Exception):
            signal.raise_signal(signal.SIGTERM)

    with StopRequest().listening(), pytest.raises(Interrupted):
        careless()


def test_handlers_are_given_back_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]

    def stopped() -> None:
        with StopRequest().listening():
            assert not set(before) & {signal.getsignal(number) for number in NUMBERS}
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        stopped()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_another_thread_may_run_without_signals() -> None:
    before, entered = [signal.getsignal(number) for number in NUMBERS], []

    def work() -> None:
        with StopRequest().listening():
            entered.append([signal.getsignal(number) for number in NUMBERS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [before]
