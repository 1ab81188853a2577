"""Each training option does what it says, compared with plain torch where that says it too."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from app.sources.datasets import Data
from app.sources.models import BuiltModel
from app.training.batches import Batches
from app.training.checkpoint import CorruptCheckpoint
from app.training.loop import NonFinite, Outcome, evaluate
from app.training.places import checkpoint_path, checkpoint_steps
from app.training.recipe import parse_recipe
from tests.unit.models import make
from tests.unit.optimizers import build, with_every_optimizer
from tests.unit.runs import Wish, freeze, make_data, run
from tests.unit.test_loop import digest, stop_at

# ------------------------------------------------------------------------------ rates and groups


def test_groups_decay_warm_up_and_schedule_are_those_of_plain_torch(tmp_path: Path) -> None:
    data = make_data((6,))
    config = {"groups": [{"match": "layer3.**", "lr_scale": 10.0, "weight_decay": 0.0}]}
    ours, _ = make("plain")
    _, told = run(
        ours, data, tmp_path, config=config, optimizer="adamw", lr=0.01, weight_decay=0.1,
        lr_schedule="cosine", warmup_steps=3,
    )  # fmt: skip

    def factor(step: int) -> float:  # from 0
        return (step + 1) / 4 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 6)) / 2

    by_hand, _ = make("plain")
    below = [*by_hand.layer1.parameters(), *by_hand.layer2.parameters()]
    head = {"params": list(by_hand.layer3.parameters()), "lr": 0.01 * 10.0, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": below}, head], lr=0.01, weight_decay=0.1)
    schedule = LambdaLR(optimizer, factor)
    batches = Batches(data.train, 8, seed=0, collate=None, seed_items=True)
    for _ in range(9):
        ((inputs, targets),) = batches.next_window(1)
        nn.functional.cross_entropy(by_hand(inputs), targets).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for mine, theirs in zip(ours.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    rates = [value for (_, name), value in sorted(told.metrics().items()) if name == "lr"]
    assert rates == [0.01 * factor(step) for step in range(9)]


# -------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_autocast_over_float32_weights(precision: str, tmp_path: Path) -> None:
    model, _ = make("plain")
    seen = set()
    model.layer2.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    run(model, make_data((6,)), tmp_path, precision=precision, epochs=1)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_gradients_are_measured_unscaled_accumulated_and_before_clipping(tmp_path: Path) -> None:
    norms = {}
    for name, options in {
        "plain": {"batch_size": 24},
        "accumulated": {"batch_size": 8, "grad_accumulation": 3},
        "scaled": {"batch_size": 24, "precision": "fp16"},
        "clipped": {"batch_size": 24, "max_grad_norm": 1e-3},
    }.items():
        _, told = run(
            make("plain")[0], make_data((6,)), tmp_path / name, max_steps=1, optimizer="sgd",
            momentum=0.0, lr=1e-3, **options,
        )  # fmt: skip
        norms[name] = (*told.of("layers")[0]["grad_norm"], told.metrics()[1, "grad_norm_total"])
        if name == "clipped":
            factor = told.metrics()[1, "clip_factor"]
            assert factor == pytest.approx(1e-3 / norms["plain"][-1], rel=1e-3)
            moved = math.hypot(*told.of("layers")[0]["update_norm"])
            assert moved == pytest.approx(1e-3 * 1e-3, rel=1e-2)
        else:
            assert (1, "clip_factor") not in told.metrics()
    assert norms["accumulated"] == pytest.approx(norms["plain"], rel=1e-5)
    assert norms["scaled"] == pytest.approx(norms["plain"], rel=2e-2)
    assert norms["clipped"] == norms["plain"]


@with_every_optimizer
def test_clipping_is_that_of_plain_torch(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    data = make_data((6,))
    ours, _ = make("plain")
    run(
        ours, data, tmp_path, optimizer=optimizer, lr=0.05, weight_decay=0.1, max_grad_norm=0.1,
        config=freeze("layer1"), implementation=implementation, epochs=1,
    )  # fmt: skip
    by_hand, _ = make("plain")
    by_hand.layer1.requires_grad_(False)
    trained = [p for p in by_hand.parameters() if p.requires_grad]
    steps = build(optimizer, implementation, trained, lr=0.05)
    batches = Batches(data.train, 8, seed=0, collate=None, seed_items=True)
    for _ in range(3):
        ((inputs, targets),) = batches.next_window(1)
        nn.functional.cross_entropy(by_hand(inputs), targets).backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        steps.step()
        steps.zero_grad()
    for mine, theirs in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)  # norms are summed otherwise


# ------------------------------------------------------------------------- what is not a number


def bad_at(step: int) -> Any:
    """A loss that is not a number in one of the steps."""
    calls: list[int] = []

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        calls.append(1)
        good = nn.functional.cross_entropy(output, batch[1])
        return good * math.nan if len(calls) == step else good

    return loss


def without_evaluation() -> Data:
    return Data(train=make_data((6,)).train, seed_items=True)


def test_a_step_that_is_not_finite_may_be_skipped(tmp_path: Path) -> None:
    model, _ = make("plain")
    outcome, told = run(
        model, without_evaluation(), tmp_path, loss=bad_at(4), on_nonfinite="skip", max_steps=6
    )
    assert outcome == Outcome("succeeded", 6)
    assert {step for step, name in told.metrics() if name == "nonfinite_skipped"} == {4}
    assert all(math.isfinite(value) for value in told.metrics().values())
    with pytest.raises(NonFinite, match="in step 4"):
        run(make("plain")[0], without_evaluation(), tmp_path / "stops", loss=bad_at(4))


@with_every_optimizer
def test_a_gradient_that_is_not_a_number_is_caught_before_the_step(
    optimizer: str, implementation: str, tmp_path: Path
) -> None:
    """Its loss is zero and as finite as can be."""
    model, _ = make("plain")
    before = [p.detach().clone() for p in model.parameters()]
    losses: list[float] = []

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        found = (output * 0.0).square().sum().sqrt()
        losses.append(found.item())
        return found

    options = {"optimizer": optimizer, "implementation": implementation, "weight_decay": 0.1}
    with pytest.raises(NonFinite, match="The gradient norm is nan in step 1"):
        run(model, without_evaluation(), tmp_path, loss=loss, **options)
    assert losses == [0.0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_skipping_has_an_end(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="50 steps in a row"):
        run(
            make("plain")[0], without_evaluation(), tmp_path, on_nonfinite="skip", epochs=50,
            loss=lambda output, _: output.sum() * math.nan,
        )  # fmt: skip


def test_a_stop_after_a_skipped_step_keeps_the_mark(tmp_path: Path) -> None:
    """The step after the resume tells what was left out before the stop."""
    calls: list[int] = []
    wish = Wish()

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            wish.state = "stop"
            return output.sum() * math.nan
        return nn.functional.cross_entropy(output, batch[1])

    def listen(kind: str, payload: dict[str, Any], own: Wish) -> None:
        nonlocal wish
        wish = own

    options: dict[str, Any] = {"on_nonfinite": "skip", "max_steps": 6, "checkpoint_every": 3}
    data = without_evaluation()
    outcome, _ = run(make("plain")[0], data, tmp_path, loss=loss, listen=listen, **options)
    assert outcome == Outcome("stopped", 3)
    _, rest = run(
        make("plain")[0], data, tmp_path, resume_from=checkpoint_path(tmp_path, 3), **options
    )
    assert rest.metrics()[4, "nonfinite_skipped"] == 1


# ------------------------------------------------------------------------------- evaluation


def test_every_named_set_is_judged_before_the_first_step_and_at_intervals(tmp_path: Path) -> None:
    data = make_data((6,))
    data = Data(
        train=data.train, seed_items=True, evals={"old": data.evals["eval"], "new": data.train}
    )
    _, told = run(make("plain")[0], data, tmp_path, eval_every=4, eval_batch_size=5)
    for name in ("eval/old/loss", "eval/new/loss", "eval/old/accuracy", "eval/new/accuracy"):
        assert {step for step, metric in told.metrics() if metric == name} == {0, 4, 8, 9}
    model, _ = make("plain")
    inputs, targets = data.evals["old"].tensors
    loss = nn.functional.cross_entropy(model(inputs), targets).item()
    assert told.metrics()[0, "eval/old/loss"] == pytest.approx(loss)


def test_an_evaluation_computes_no_graph_and_needs_nothing_trainable() -> None:
    model, _ = make("convolutional")
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states: set[tuple[bool, bool]] = set()
    model.register_forward_hook(lambda *_: states.add((torch.is_grad_enabled(), model.training)))
    told: list[tuple[str, dict[str, Any]]] = []
    outcome = evaluate(
        BuiltModel(model), make_data((2, 6, 6)), parse_recipe({}), device="cpu",
        emit=lambda kind, payload: told.append((kind, payload)), wishes=Wish,
    )  # fmt: skip
    assert outcome == Outcome("succeeded", 0)
    assert states == {(False, False)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ((_, metrics),) = [item for item in told if item[0] == "metrics"]
    assert set(metrics["values"]) == {"eval/eval/loss", "eval/eval/accuracy"}


def test_auto_says_loudly_that_it_fell_back_to_the_cpu(tmp_path: Path) -> None:
    _, told = run(make("plain")[0], make_data((6,)), tmp_path, epochs=1, device="auto")
    assert any("fell back to the CPU" in w for w in told.of("start")[0]["warnings"])
    _, told = run(make("plain")[0], make_data((6,)), tmp_path / "cpu", epochs=1, device="cpu")
    assert told.of("start")[0]["warnings"] == []


def test_the_proof_is_checked_each_so_many_steps(tmp_path: Path) -> None:
    _, told = run(make("plain")[0], make_data((6,)), tmp_path, proof_every=4, eval_every=100)
    assert [p["step"] for p in told.of("proof")] == [4, 8, 9]


def test_statistics_come_each_so_many_steps(tmp_path: Path) -> None:
    _, told = run(make("plain")[0], make_data((6,)), tmp_path, stats_every=4)
    assert [p["step"] for p in told.of("layers")] == [4, 8]


def test_steps_end_a_run_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    outcome, told = run(make("plain")[0], make_data((6,)), tmp_path, max_steps=4, epochs=1)
    assert outcome == Outcome("succeeded", 4)
    assert (4, "eval/eval/loss") in told.metrics()


# ---------------------------------------------------------------------- gradient checkpointing


def make_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


class Rows(TensorDataset):
    """Items as dicts, the way Transformers wants them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:  # type: ignore[override]
        tokens, label = super().__getitem__(index)
        return {"input_ids": tokens, "labels": label}


def make_rows() -> Data:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (12, 7), generator=generator)
    labels = torch.randint(0, 3, (12,), generator=generator)
    return Data(train=Rows(tokens, labels), seed_items=False)


def test_checkpointing_over_a_frozen_input_changes_no_bit(tmp_path: Path) -> None:
    """The reentrant kind would leave every gradient out, with a warning."""
    ends = []
    for is_on in (False, True):
        model = make_bert()
        _, told = run(
            model, make_rows(), tmp_path / str(is_on), epochs=2, batch_size=4,
            config=freeze("bert.embeddings.**"), gradient_checkpointing=is_on,
        )  # fmt: skip
        assert all(
            norm is not None
            for layer, norm in zip(
                told.of("start")[0]["layers"], told.of("layers")[-1]["grad_norm"], strict=True
            )
            if ".encoder." in layer
        )
        ends.append(digest(tmp_path / str(is_on), 6))
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------- checkpoints


TRAINED: dict[str, Any] = {"checkpoint_tensors": "trained", "checkpoint_every": 3}


def test_a_checkpoint_may_hold_the_trained_tensors_alone(tmp_path: Path) -> None:
    data, config = make_data((2, 6, 6)), freeze("stem.**", "branch.**")
    run(make("convolutional")[0], data, tmp_path, config=config, **TRAINED)
    part, whole = (
        set(load_file(checkpoint_path(tmp_path, step) / "model.safetensors")) for step in (3, 9)
    )
    model, _ = make("convolutional")
    assert whole == set(model.state_dict())  # the final one is whole
    parameters = {name for name, _ in model.named_parameters()}
    assert part & parameters == {n for n in parameters if n.startswith(("head.", "body."))}
    assert part - parameters == whole - parameters  # buffers move whatever is frozen
    with safe_open(checkpoint_path(tmp_path, 3) / "model.safetensors", "pt") as opened:
        facts = opened.metadata()
    assert set(facts) == {"format", "base_fingerprint", "base_weights_digest"}


@pytest.mark.parametrize("step", [3, 6])
def test_a_resume_over_the_base_is_bit_equal(step: int, tmp_path: Path) -> None:
    data = make_data((2, 6, 6))
    config = freeze("stem.**", "branch.**")
    config["schedule"] = [
        {"at": {"step": 1}, "action": "unfreeze", "match": "branch.**"},
        {"at": {"step": 2}, "action": "freeze", "match": "branch.**"},  # moved, and frozen again
    ]
    options: dict[str, Any] = {"config": config, **TRAINED}
    run(make("convolutional")[0], data, tmp_path / "whole", **options)
    run(make("convolutional")[0], data, tmp_path / "parts", listen=stop_at(step), **options)
    newest = checkpoint_path(tmp_path / "parts", step)
    assert "branch.weight" in load_file(newest / "model.safetensors")
    assert "stem.0.weight" not in load_file(newest / "model.safetensors")
    run(make("convolutional")[0], data, tmp_path / "parts", resume_from=newest, **options)
    assert digest(tmp_path / "parts", 9) == digest(tmp_path / "whole", 9)


def test_a_part_over_another_base_is_refused(tmp_path: Path) -> None:
    data = make_data((6,))
    options: dict[str, Any] = {"config": freeze("layer1"), **TRAINED}
    run(make("plain")[0], data, tmp_path, listen=stop_at(3), **options)
    other, _ = make("plain")
    with torch.no_grad():
        other.layer1.weight[0, 0] += 1
    with pytest.raises(CorruptCheckpoint, match="another weights"):
        run(other, data, tmp_path, resume_from=checkpoint_path(tmp_path, 3), **options)


def test_a_frozen_tensor_that_moved_is_in_the_part(tmp_path: Path) -> None:
    """So that a resume does not undo, and hide, what broke the proof."""
    model, _ = make("plain")

    def nudge(module: nn.Module, *_: Any) -> None:
        module.bias.data.add_(0.001)

    model.layer1.register_forward_hook(nudge)
    run(model, make_data((6,)), tmp_path, config=freeze("layer1"), listen=stop_at(3), **TRAINED)
    part = load_file(checkpoint_path(tmp_path, 3) / "model.safetensors")
    assert "layer1.bias" in part
    assert "layer1.weight" not in part


def test_transformers_loads_the_folder_of_the_final_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = make_bert()
    run(model, make_rows(), tmp_path, epochs=1, batch_size=4, config=freeze("bert.embeddings.**"))
    folder = checkpoint_path(tmp_path, checkpoint_steps(tmp_path)[-1])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_plain_torch_loads_the_final_checkpoint_ties_included(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (8, 5), generator=generator)
    data = Data(train=TensorDataset(tokens, tokens[:, 0]), seed_items=False)
    trained, _ = make("tied")
    run(trained, data, tmp_path, epochs=2)
    fresh, _ = make("tied")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_model(fresh, checkpoint_path(tmp_path, 2) / "model.safetensors")
    for mine, theirs in zip(fresh.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert fresh.head.weight is fresh.embedding.weight
