"""What is frozen while a run goes on: by hand, live, in phases, and what is left when it ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from app.freezing.apply import apply_config
from app.freezing.config import expand_rules, parse_config
from app.freezing.trace import read_model
from app.sources.models import BuiltModel
from app.training.batches import Batches
from app.training.loop import Outcome
from app.training.phases import Phases, Turn
from app.training.places import checkpoint_path
from app.training.recipe import parse_recipe
from app.training.step import StaleGraph, Stepper
from tests.unit.models import make
from tests.unit.optimizers import build, with_every_optimizer
from tests.unit.runs import Told, Wish, freeze, make_data, run
from tests.unit.test_loop import digest

LEARNING_RATE, DECAY = 0.05, 0.1


def edit_after(edits: dict[int, list[dict[str, Any]]]) -> Any:
    """Send live edits when the metrics of a step have come."""

    def listen(kind: str, payload: dict[str, Any], wish: Wish) -> None:
        if kind == "metrics" and "loss" in payload["values"]:
            for edit in edits.get(payload["step"], ()):
                wish.seq += 1
                wish.edits.append({"seq": wish.seq, **edit})

    return listen


def rule(action: str, match: str) -> dict[str, str]:
    return {"action": action, "match": match}


@with_every_optimizer
def test_a_live_freeze_and_unfreeze_are_what_a_hand_written_loop_does(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    data = make_data((6,))
    freezing = {"rules": [rule("freeze", "layer2.**"), rule("unfreeze", "layer1.**")]}
    ours, _ = make("plain")
    _, told = run(
        ours, data, tmp_path, config=freeze("layer1"), optimizer=optimizer,
        implementation=implementation, lr=LEARNING_RATE, weight_decay=DECAY,
        listen=edit_after({3: [freezing], 7: [{"rules": [rule("unfreeze", "layer2.**")]}]}),
    )  # fmt: skip

    by_hand, _ = make("plain")
    by_hand.layer1.requires_grad_(False)
    layers = [{"params": list(layer.parameters())} for layer in by_hand.children()]
    steps = build(optimizer, implementation, layers, lr=LEARNING_RATE, weight_decay=DECAY)
    batches = Batches(data.train, 8, seed=0, collate=None, seed_items=True)
    for step in range(1, 10):
        if step == 4:
            by_hand.layer1.requires_grad_(True)
            by_hand.layer2.requires_grad_(False)
            for parameter in by_hand.layer2.parameters():
                parameter.grad = None
                steps.state.pop(parameter)
        if step == 8:
            by_hand.layer2.requires_grad_(True)
        ((inputs, targets),) = batches.next_window(1)
        nn.functional.cross_entropy(by_hand(inputs), targets).backward()
        steps.step()
        steps.zero_grad()
    for mine, theirs in zip(ours.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [edit["step"] for edit in told.of("freeze")] == [3, 7]
    assert [line["text"] for line in told.of("log") if line["text"].startswith("From step")] == [
        "From step 4: 2 tensors frozen, 2 unfrozen.",
        "From step 8: 2 tensors unfrozen.",
    ]
    assert Turn(["layer1.bias"], []).words() == "1 tensor frozen"
    assert told.of("proof")[-1]["frozen"]["checked"] == 0
    assert told.of("proof")[-1]["verdict"] == "holds"


def test_the_proof_starts_anew_for_what_is_frozen_and_ends_for_what_is_unfrozen(
    tmp_path: Path,
) -> None:
    edit = {"rules": [rule("freeze", "layer2.**"), rule("unfreeze", "layer1")]}
    _, told = run(
        make("plain")[0], make_data((6,)), tmp_path, config=freeze("layer1"), eval_every=100,
        listen=edit_after({4: [edit]}),
    )  # fmt: skip
    proofs = {proof["step"]: proof for proof in told.of("proof")}
    assert sorted(proofs) == [5, 9]  # after the first step under the change, and at the end
    for proof in proofs.values():
        assert proof["frozen"] == {"checked": 2, "identical": 2, "changed": []}
        assert proof["trained"] == {"checked": 4, "moved": 4, "still": []}
        assert proof["cost"]["check_ms"] > 0
        assert 0 < proof["cost"]["share"] < 1


def test_the_last_trainable_layer_cannot_be_frozen_away(tmp_path: Path) -> None:
    everything = {"rules": [rule("freeze", "**")]}
    one = {"rules": [rule("freeze", "layer2")]}
    _, told = run(
        make("plain")[0], make_data((6,)), tmp_path, listen=edit_after({2: [everything, one]})
    )
    refused, taken = told.of("freeze")
    assert refused["config"]["schedule"] == []
    assert [entry["match"] for entry in taken["config"]["schedule"]] == ["layer2"]
    assert any("last trainable layer" in line["text"] for line in told.of("log"))


@pytest.mark.parametrize("mechanism", ["exclude", "zero_lr", "zero_grad"])
def test_another_mechanism_refuses_a_live_edit(mechanism: str, tmp_path: Path) -> None:
    _, told = run(
        make("plain")[0], make_data((6,)), tmp_path, max_steps=3, optimizer="sgd",
        config=freeze("layer1", mechanism=mechanism),
        listen=edit_after({1: [{"rules": [rule("freeze", "layer2")]}]}),
    )  # fmt: skip
    (edit,) = told.of("freeze")
    assert edit["config"]["schedule"] == []
    assert any("requires_grad" in line["text"] for line in told.of("log"))


def test_a_change_waits_for_the_end_of_an_accumulation_window(tmp_path: Path) -> None:
    """An edit between two batches of one step holds from the next step on."""
    seen: list[bool] = []
    model, _ = make("plain")
    model.layer3.register_forward_hook(
        lambda *_: seen.append(model.layer2.weight.requires_grad) if model.training else None
    )
    run(
        model, make_data((6,)), tmp_path, grad_accumulation=3, epochs=3, eval_every=100,
        listen=edit_after({1: [{"rules": [rule("freeze", "layer2")]}]}),
    )  # fmt: skip
    assert seen == [True] * 3 + [False] * 6


# ------------------------------------------------------------------------------------ compiled


def test_newly_unfrozen_parameters_of_a_compiled_model_get_gradients(tmp_path: Path) -> None:
    ends = []
    for is_compiled in (False, True):
        model, _ = make("plain")
        _, told = run(
            model, make_data((6,)), tmp_path / str(is_compiled), config=freeze("layer1"),
            compile=is_compiled, compile_backend="aot_eager", optimizer="sgd", lr=0.1,
            listen=edit_after({4: [{"rules": [rule("unfreeze", "layer1")]}]}),
        )  # fmt: skip
        reached = [p["step"] for p in told.of("layers") if p["grad_norm"][0] is not None]
        assert reached == [5, 6, 7, 8, 9]
        ends.append([p.detach().clone() for p in model.parameters()])
    for plain, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(compiled, plain)


def make_stepper(**options: Any) -> tuple[Stepper, list[Any]]:
    model, _ = make("plain")
    applied = apply_config(model, parse_config(freeze("layer1")))
    recipe = parse_recipe(options)
    stepper = Stepper(
        BuiltModel(model), applied, applied.parameter_groups(0.0), recipe,
        device=torch.device("cpu"), total_steps=9, compile_backend="aot_eager",
    )  # fmt: skip
    return stepper, [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))]


def test_a_gradient_that_was_expected_and_did_not_come_is_not_passed_over() -> None:
    stepper, window = make_stepper()
    stepper.expect(["layer1.weight", "layer2.weight"])
    record = stepper.take(window, 1)
    assert record is not None
    assert record.unreached == ["layer1.weight"]
    record = stepper.take(window, 2)
    assert record is not None
    assert record.unreached == []
    stepper, window = make_stepper(compile=True)
    stepper.expect(["layer1.weight"])
    with pytest.raises(StaleGraph, match=r"layer1\.weight"):
        stepper.take(window, 1)


# -------------------------------------------------------------------------------------- phases


def test_what_is_unfrozen_may_have_a_rate_and_a_warm_up_of_its_own(tmp_path: Path) -> None:
    config = freeze("layer1", "layer2")
    config["groups"] = [{"match": "layer1", "lr_scale": 0.5}]
    config["schedule"] = [
        {"at": {"step": 2}, "action": "unfreeze", "match": "layer2", "warmup_steps": 2},
        {"at": {"step": 4}, "action": "unfreeze", "match": "layer1", "lr_scale": 0.1},
    ]
    model, _ = make("plain")
    _, told = run(
        model, make_data((6,)), tmp_path, config=config, optimizer="sgd", momentum=0.0, lr=0.1
    )
    rates = [
        [u / g if g else None for g, u in zip(p["grad_norm"], p["update_norm"], strict=True)]
        for p in told.of("layers")
    ]
    expected = [
        [None, None, 0.1],
        [None, None, 0.1],
        [None, 0.1 / 3, 0.1],
        [None, 0.2 / 3, 0.1],
        *[[0.005, 0.1, 0.1]] * 5,
    ]
    for row, wanted in zip(rates, expected, strict=True):
        assert row == [w if w is None else pytest.approx(w, rel=1e-3) for w in wanted]


def test_an_edit_may_name_a_warm_up_and_is_replayed_with_it(tmp_path: Path) -> None:
    rules = [rule("unfreeze", "layer1"), rule("freeze", "layer2")]
    edit = {"rules": rules, "warmup_steps": 3, "lr_scale": 0.5}
    _, live = run(
        make("plain")[0], make_data((6,)), tmp_path / "live", config=freeze("layer1"),
        listen=edit_after({3: [edit]}),
    )  # fmt: skip
    (told,) = live.of("freeze")
    unfreezes, freezes = told["config"]["schedule"]
    assert (unfreezes["warmup_steps"], unfreezes["lr_scale"]) == (3, 0.5)
    assert "warmup_steps" not in freezes
    run(make("plain")[0], make_data((6,)), tmp_path / "replay", config=told["config"])
    assert digest(tmp_path / "live", 9) == digest(tmp_path / "replay", 9)


def test_a_freeze_that_is_taken_back_before_the_next_step_never_was(tmp_path: Path) -> None:
    there = {"rules": [rule("freeze", "layer2")]}
    back = {"rules": [rule("unfreeze", "layer2")]}
    _, live = run(
        make("plain")[0], make_data((6,)), tmp_path / "live", listen=edit_after({4: [there, back]})
    )
    run(make("plain")[0], make_data((6,)), tmp_path / "plain")
    run(
        make("plain")[0],
        make_data((6,)),
        tmp_path / "replay",
        config=live.of("freeze")[1]["config"],
    )
    assert digest(tmp_path / "live", 9) == digest(tmp_path / "plain", 9)
    assert digest(tmp_path / "replay", 9) == digest(tmp_path / "plain", 9)


def test_another_norm_policy_at_a_resume_holds(tmp_path: Path) -> None:
    """Also where the rules stay as they are."""
    config = freeze("stem.**")
    data = make_data((2, 6, 6))
    run(make("convolutional")[0], data, tmp_path, config=config, max_steps=3)
    outcome, told = run(
        make("convolutional")[0], data, tmp_path, max_steps=6,
        config={**config, "norm_statistics": "update"}, resume_from=checkpoint_path(tmp_path, 3),
    )  # fmt: skip
    assert outcome.step == 6
    proof = told.of("proof")[-1]
    assert proof["buffers"]["checked"] == 0
    assert "stem.1.running_mean" in proof["buffers"]["allowed"]


# ------------------------------------------------------- random lives, against a naive second look

NAMES = [
    "layer1.weight",
    "layer1.bias",
    "layer2.weight",
    "layer2.bias",
    "layer3.weight",
    "layer3.bias",
]
MOVES = st.one_of(
    st.tuples(st.just("freeze"), st.sampled_from(["layer1", "layer2", "**.bias", "layer{2,3}"])),
    st.tuples(st.just("unfreeze"), st.sampled_from(["layer1", "layer2.weight", "**.bias", "**"])),
    st.tuples(st.sampled_from(["hold", "release", "stop"]), st.just("")),
)
LAST = 6
LIVES = st.lists(st.tuples(st.integers(1, LAST - 1), MOVES), max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(life=LIVES, start=st.sampled_from(["layer1", "layer2", "**.weight", ""]))
def test_any_life_ends_with_the_proof_that_its_checkpoints_give(
    life: list[tuple[int, tuple[str, str]]],
    start: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("life")
    data = make_data((6,))
    model, _ = make("plain")
    beginning = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = freeze(*filter(None, [start]))
    moves: dict[int, list[tuple[str, str]]] = {}
    for step, move in life:
        moves.setdefault(step, []).append(move)
    told, resume_from = [], None
    while True:
        outcome, attempt = live_on(make("plain")[0], data, folder, config, resume_from, moves)
        told.append(attempt)
        config = attempt.of("freeze")[-1]["config"] if attempt.of("freeze") else config
        if outcome.outcome == "succeeded":
            break
        resume_from = checkpoint_path(folder, outcome.step)
    # Naively: where each tensor was when it was last frozen or unfrozen, by the recorded weights.
    graph = read_model(make("plain")[0])
    phases = Phases(make("plain")[0], parse_config(config), steps_per_epoch=3)
    was: dict[str, bool] | None = None
    since: dict[str, torch.Tensor] = {}
    for step in range(LAST):
        weights = beginning if step == 0 else read_weights(folder, step)
        frozen = expand_rules(phases.config_at(step), graph)
        changed = [n for n in NAMES if was is None or frozen[n] != was[n]]
        since |= {name: weights[name] for name in changed}
        was = frozen
    assert was is not None
    end = read_weights(folder, LAST)
    proof = told[-1].of("proof")[-1]
    still = {item["name"] for item in proof["trained"]["still"]}
    assert proof["verdict"] == "holds"
    assert proof["frozen"]["checked"] == sum(was.values())
    for name in NAMES:
        assert torch.equal(end[name], since[name]) == (was[name] or name in still)


def read_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(folder, step) / "model.safetensors")


def live_on(
    model: nn.Module,
    data: Any,
    folder: Path,
    config: dict[str, Any],
    resume_from: Path | None,
    moves: dict[int, list[tuple[str, str]]],
) -> tuple[Outcome, Told]:
    """One attempt: what is to be done after a step is done there, and taken off the list."""

    def listen(kind: str, payload: dict[str, Any], wish: Wish) -> None:
        if kind == "state" and payload["state"] == "paused":
            wish.state = "running"
        if kind != "layers":
            return
        for action, match in moves.pop(payload["step"], ()):
            if action in ("freeze", "unfreeze"):
                wish.seq += 1
                wish.edits.append({"seq": wish.seq, "rules": [rule(action, match)]})
            else:
                wish.state = action

    return run(
        model, data, folder, config=config, resume_from=resume_from, listen=listen,
        checkpoint_every=1, keep_last=100, max_steps=LAST, optimizer="adam", weight_decay=0.1,
    )  # fmt: skip
