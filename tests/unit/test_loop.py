"""One training run: what it reports, when it stops, and that it resumes exactly."""

import contextlib
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from app.freezing.config import parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.verify import compare_checkpoints
from app.sources.models import BuiltModel
from app.training.judge import compute_loss, evaluate_set
from app.training.loop import NonFinite, Outcome
from app.training.places import checkpoint_path, checkpoint_steps
from tests.unit.models import make
from tests.unit.runs import Wish, freeze, make_data, run

SHAPES: dict[str, tuple[int, ...]] = {"plain": (6,), "convolutional": (2, 6, 6)}


def digest(folder: Path, step: int) -> str:
    file = checkpoint_path(folder, step) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def stop_at(step: int, wish_state: str = "stop") -> Any:
    def listen(kind: str, payload: dict[str, Any], wish: Wish) -> None:
        if kind == "metrics" and payload["step"] == step:
            wish.state = wish_state

    return listen


def test_a_run_reports_every_step_once_and_in_order(tmp_path: Path) -> None:
    outcome, told = run(make("plain")[0], make_data((6,)), tmp_path, config=freeze("layer1"))
    assert outcome == Outcome("succeeded", 9)
    steps = [p["step"] for p in told.of("layers")]
    assert steps == list(range(1, 10))
    (start,) = told.of("start")
    assert start["layers"] == ["layer1", "layer2", "layer3"]
    assert start["total_steps"] == 9
    for stats in told.of("layers"):
        assert stats["grad_norm"][0] is None
        assert stats["update_norm"][0] == 0.0
        assert all(value > 0 for value in stats["update_norm"][1:])
    metrics = told.metrics()
    assert (0, "eval/eval/accuracy") in metrics
    assert {step for step, name in metrics if name == "loss"} == set(range(1, 10))
    assert {step for step, name in metrics if name == "eval/eval/loss"} == {0, 3, 6, 9}
    epochs = [p["epoch"] for p in told.of("metrics") if "loss" in p["values"]]
    assert epochs == pytest.approx([step / 3 for step in range(1, 10)])
    assert [p["step"] for p in told.of("proof")] == [3, 6, 9]
    proof = told.of("proof")[-1]
    assert proof["verdict"] == "holds"
    assert proof["frozen"] == {"checked": 2, "identical": 2, "changed": []}


def test_the_first_step_is_what_plain_torch_does(tmp_path: Path) -> None:
    data = make_data((6,))
    data = type(data)(train=data.evals["eval"], evals={}, seed_items=False)
    model, _ = make("plain")
    run(model, data, tmp_path, max_steps=1, optimizer="sgd", lr=0.1, momentum=0.0)
    plain, _ = make("plain")
    inputs, targets = data.train.tensors
    nn.functional.cross_entropy(plain(inputs), targets).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine.detach(), theirs.detach() - 0.1 * theirs.grad)


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    data = make_data((6,), size=20)
    trained = []
    for name, options in {"whole": {"batch_size": 20}, "parts": {"batch_size": 8}}.items():
        model, _ = make("plain")
        outcome, _ = run(
            model, data, tmp_path / name, epochs=2, grad_accumulation=3, optimizer="sgd", **options
        )
        assert outcome.step == 2  # 8 + 8 + 4 examples: the short last batch counts by its size
        trained.append([p.detach() for p in model.parameters()])
    for whole, parts in zip(*trained, strict=True):
        torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_resumed_run_is_bit_equal_to_the_run_that_was_not_stopped(
    name: str, optimizer: str, precision: str, tmp_path: Path
) -> None:
    data = make_data(SHAPES[name])
    options: dict[str, Any] = {
        "config": freeze("{layer1,stem}.**"),
        "optimizer": optimizer,
        "precision": precision,
        "weight_decay": 0.01,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "grad_accumulation": 2,
        "epochs": 4,
    }
    _, whole = run(make(name)[0], data, tmp_path / "whole", **options)
    outcome, first = run(make(name)[0], data, tmp_path / "parts", listen=stop_at(3), **options)
    assert outcome == Outcome("stopped", 3)
    torch.manual_seed(12345)  # whatever the new process has drawn meanwhile
    newest = checkpoint_path(tmp_path / "parts", 3)
    outcome, rest = run(make(name)[0], data, tmp_path / "parts", resume_from=newest, **options)
    assert outcome == Outcome("succeeded", 8)
    assert {**first.metrics(), **rest.metrics()} == whole.metrics()
    assert first.of("layers") + rest.of("layers") == whole.of("layers")
    assert digest(tmp_path / "parts", 8) == digest(tmp_path / "whole", 8)
    assert rest.last_proof() == whole.last_proof()


def test_a_hold_goes_on_where_it_paused(tmp_path: Path) -> None:
    states: list[str] = []

    def listen(kind: str, payload: dict[str, Any], wish: Wish) -> None:
        if kind == "metrics" and payload["step"] == 2:
            wish.state = "hold"
        if kind == "state":
            states.append(payload["state"])
            wish.state = "running"

    data = make_data((6,))
    _, held = run(make("plain")[0], data, tmp_path / "held", listen=listen)
    _, straight = run(make("plain")[0], data, tmp_path / "straight")
    assert states == ["running", "paused", "running"]
    assert held.metrics() == straight.metrics()
    assert digest(tmp_path / "held", 9) == digest(tmp_path / "straight", 9)


def test_a_release_leaves_a_checkpoint(tmp_path: Path) -> None:
    outcome, told = run(make("plain")[0], make_data((6,)), tmp_path, listen=stop_at(4, "release"))
    assert outcome == Outcome("released", 4)
    assert [p["step"] for p in told.of("checkpoint")] == [4]


def test_a_schedule_unfreezes_after_whole_epochs(tmp_path: Path) -> None:
    config = freeze("layer1", "layer2")
    config["schedule"] = [
        {"at": {"epoch": 1}, "action": "unfreeze", "match": "layer2"},
        {"at": {"step": 6}, "action": "freeze", "match": "layer2"},
    ]
    _, told = run(make("plain")[0], make_data((6,)), tmp_path, config=config)
    with_gradient = [p["step"] for p in told.of("layers") if p["grad_norm"][1] is not None]
    assert with_gradient == [4, 5, 6]
    assert told.of("proof")[-1]["verdict"] == "holds"


def test_a_live_edit_holds_from_the_next_step_and_replays_to_the_same(tmp_path: Path) -> None:
    def listen(kind: str, payload: dict[str, Any], wish: Wish) -> None:
        if kind == "layers" and payload["step"] == 4:
            wish.edits.append({"seq": 1, "rules": [{"action": "freeze", "match": "layer2"}]})

    data = make_data((6,))
    _, live = run(make("plain")[0], data, tmp_path / "live", listen=listen)
    (edit,) = live.of("freeze")
    assert edit["step"] == 4
    assert [p["step"] for p in live.of("layers") if p["grad_norm"][1] is None] == [5, 6, 7, 8, 9]
    run(make("plain")[0], data, tmp_path / "replay", config=edit["config"])
    assert digest(tmp_path / "live", 9) == digest(tmp_path / "replay", 9)


def test_only_the_last_checkpoints_are_kept_besides_the_final_one(tmp_path: Path) -> None:
    _, told = run(
        make("plain")[0], make_data((6,)), tmp_path, checkpoint_every=1, keep_last=2, max_steps=7
    )
    assert checkpoint_steps(tmp_path) == [5, 6, 7]
    assert [p["step"] for p in told.of("checkpoint_deleted")] == [1, 2, 3, 4]


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    outcome, _ = run(
        make("plain")[0], make_data((6,)), tmp_path, lr=1e-12, epochs=50, patience=2,
        precision="fp32", optimizer="sgd", momentum=0.0,
    )  # fmt: skip
    assert outcome.outcome == "succeeded"
    assert outcome.step < 150


def test_a_loss_that_is_not_a_number_is_caught_before_the_step(tmp_path: Path) -> None:
    model, _ = make("plain")
    before = [p.detach().clone() for p in model.parameters()]
    told: list[dict[str, Any]] = []
    with pytest.raises(NonFinite, match=r"loss is nan in step 1"):
        run(
            model, make_data((6,)), tmp_path, loss=lambda output, _: output.sum() * math.nan,
            listen=lambda kind, payload, _: told.append(payload) if kind == "metrics" else None,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert math.isnan(told[-1]["values"]["loss"])


def test_a_last_batch_of_one_is_left_out_where_batchnorm_could_not_take_it(tmp_path: Path) -> None:
    outcome, _ = run(make("convolutional")[0], make_data((2, 6, 6), size=17), tmp_path, epochs=2)
    assert outcome.step == 4


@pytest.mark.parametrize(
    ("config", "training", "words"),
    [
        (freeze("**"), {}, "Nothing is trainable"),
        ({}, {"gradient_checkpointing": True}, "gradient_checkpointing_enable"),
        (freeze("layer*"), {}, "Nothing is trainable"),
    ],
)
def test_what_cannot_train_is_refused_in_words(
    config: dict[str, Any], training: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidDocument, match=words):
        run(make("plain")[0], make_data((6,)), tmp_path, config=config, **training)


def test_targets_that_do_not_fit_the_output_are_refused_in_words(tmp_path: Path) -> None:
    data = make_data((6,))
    deep = torch.utils.data.TensorDataset(torch.randn(4, 6), torch.zeros(4, 2, 2, dtype=torch.long))
    with pytest.raises(InvalidDocument, match="cross-entropy"):
        run(make("plain")[0], type(data)(train=deep), tmp_path)


def test_two_checkpoints_prove_the_freeze(tmp_path: Path) -> None:
    config = freeze("stem", "branch")
    run(make("convolutional")[0], make_data((2, 6, 6)), tmp_path, config=config, checkpoint_every=3)
    before, after = checkpoint_path(tmp_path, 3), checkpoint_path(tmp_path, 9)
    document = compare_checkpoints(before, after, parse_config(config))
    assert document["verdict"] == "holds"
    assert document["frozen"]["checked"] == 5
    assert document["trained"]["moved"] == 4
    assert document["buffers"]["checked"] == 3
    broken = compare_checkpoints(before, after, parse_config(freeze("head")))
    assert broken["verdict"] == "broken"
    assert {c["name"] for c in broken["frozen"]["changed"]} == {"head.weight", "head.bias"}


def test_steps_that_fp16_leaves_out_are_no_steps(tmp_path: Path) -> None:
    outcome, told = run(
        make("plain")[0], make_data((6,)), tmp_path, precision="fp16", eval_every=2,
        checkpoint_every=2, max_steps=4, patience=9, optimizer="sgd", lr=1e-9,
        loss=lambda output, _: output.float().square().mean() * 1e4,
    )  # fmt: skip
    assert outcome == Outcome("succeeded", 4)
    assert [p["step"] for p in told.of("checkpoint")] == [2, 4]
    evaluated = [p["step"] for p in told.of("metrics") if "eval/eval/loss" in p["values"]]
    assert evaluated == [0, 2, 4]
    assert sum("amp_skipped" in p["values"] for p in told.of("metrics")) >= 1


def test_rare_layer_statistics_do_not_hide_gradients_from_the_proof(tmp_path: Path) -> None:
    model, _ = make("plain")
    model.to(torch.bfloat16)
    data = make_data((6,))
    data = type(data)(
        train=torch.utils.data.TensorDataset(
            torch.randn(8, 6).bfloat16(), torch.zeros(8, dtype=torch.long)
        ),
        seed_items=False,
    )
    _, told = run(model, data, tmp_path, stats_every=10**6, lr=1e-9, max_steps=3)
    still = told.of("proof")[-1]["trained"]["still"]
    assert still
    assert {item["cause"].split(":")[0] for item in still} == {"rounded away"}


def test_a_metric_of_the_factory_replaces_ours_of_its_name() -> None:
    model, _ = make("plain")
    built = BuiltModel(model, metrics={"accuracy": lambda output, batch: 0.25})
    judged = evaluate_set(
        built, make_data((6,)).evals["eval"], batch_size=4, collate=None, seed_items=False,
        seed=0, device=torch.device("cpu"), autocast=contextlib.nullcontext,
        interrupted=lambda: False,
    )  # fmt: skip
    assert judged is not None
    assert judged["accuracy"] == 0.25


def test_two_axes_that_could_be_the_classes_are_refused() -> None:
    built = BuiltModel(nn.Identity())
    with pytest.raises(InvalidDocument, match="both the second and the last"):
        compute_loss(built, torch.randn(2, 5, 5), (None, torch.zeros(2, 5, dtype=torch.long)))


def test_verify_holds_statistics_and_no_other_buffer(tmp_path: Path) -> None:
    tensors = {
        "counter.weight": torch.ones(2),
        "counter.calls": torch.zeros(()),
        "head.weight": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    moved = {"counter.calls": torch.ones(()), "head.weight": torch.ones(2)}
    save_file({**tensors, **moved}, tmp_path / "b.safetensors")
    config = parse_config(
        {**freeze("counter"), "frozen": ["counter.weight"], "trainable": ["head.weight"]}
    )
    document = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", config)
    assert document["verdict"] == "holds"
    assert document["buffers"]["allowed"] == ["counter.calls"]


def test_a_rule_that_matches_nothing_is_a_warning_of_the_run(tmp_path: Path) -> None:
    _, told = run(make("plain")[0], make_data((6,)), tmp_path, config=freeze("encoder.**"))
    (start,) = told.of("start")
    assert any("encoder.**" in warning for warning in start["warnings"])
