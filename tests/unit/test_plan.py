"""What a freeze config does, said before anything is trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from app.freezing.assume import parse_assumption
from app.freezing.config import FreezeConfig, Rule, parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.plan import Plan, plan_config
from app.freezing.trace import read_model, trace_model
from tests.unit.models import make

GRAPHS = {name: trace_model(*make(name)) for name in ("plain", "tied", "convolutional")}


def plan(name: str, *rules: str, **fields: str) -> Plan:
    listed = [{"action": "freeze" if r[0] == "-" else "unfreeze", "match": r[1:]} for r in rules]
    return plan_config(GRAPHS[name], parse_config({"rules": listed, **fields}))


def flows(result: Plan) -> dict[str, str]:
    return {layer.path: layer.flow for layer in result.layers}


def codes(result: Plan) -> set[str]:
    return {warning.code for warning in result.warnings}


def test_a_frozen_middle_layer_passes_gradients_to_the_first() -> None:
    result = plan("plain", "-layer2")
    assert flows(result) == {"layer1": "trained", "layer2": "passes", "layer3": "trained"}
    assert result.layers[1].because == "gradients pass through to layer1, which is trained"
    assert not result.layers[1].weight_gradient


def test_a_frozen_beginning_is_idle() -> None:
    result = plan("plain", "-layer1", "-layer2")
    assert flows(result) == {"layer1": "idle", "layer2": "idle", "layer3": "trained"}


def test_an_unused_layer_is_unreached() -> None:
    result = plan("tied")
    assert flows(result)["unused"] == "unreached"
    (warning,) = [w for w in result.warnings if w.code == "unreached"]
    assert warning.names == ("unused.weight", "unused.bias")


def test_what_a_tied_parameter_does_elsewhere_counts_there() -> None:
    # The head multiplies by the embedding's matrix, on its way down to the trained scale.
    result = plan("tied", "-**", "+scale")
    assert flows(result)["head"] == "passes"
    assert flows(result)["embedding"] == "idle"


def test_a_layer_whose_calls_no_hook_sees_has_its_operations_all_the_same() -> None:
    # nn.MultiheadAttention uses out_proj's weights without calling it.
    result = plan("tied", "-block.self_attn.out_proj")
    assert flows(result)["block.self_attn.out_proj"] == "passes"


@pytest.mark.parametrize("mechanism", ["exclude", "zero_lr", "zero_grad"])
def test_other_mechanisms_compute_the_gradients_of_what_they_freeze(mechanism: str) -> None:
    result = plan("plain", "-layer1", mechanism=mechanism)
    assert flows(result)["layer1"] == "idle"
    assert result.layers[0].weight_gradient
    assert "mechanism_saves_nothing" in codes(result)
    assert result.cost["backward_flops"] == plan("plain").cost["backward_flops"]
    saves_state = result.cost["optimizer_bytes"] < plan("plain").cost["optimizer_bytes"]
    assert saves_state is (mechanism == "exclude")


def test_zeroed_gradients_are_told_to_move_weights() -> None:
    assert "frozen_weights_move" in codes(plan("plain", "-layer1", mechanism="zero_grad"))


def test_a_linear_layers_flops_are_two_for_each_multiply() -> None:
    cost = plan("plain").cost
    batch, products = 4, 6 * 8 + 8 * 8 + 8 * 3
    assert cost["forward_flops"] == 2 * batch * products
    # each product again for its weight and, but for the first layer, for its input
    assert cost["backward_flops"] == 2 * batch * (products + 8 * 8 + 8 * 3)
    assert cost["step_flops"] == cost["full_step_flops"]
    assert cost["speedup_bound"] == 1.0


def test_flops_and_activations_follow_the_batch() -> None:
    one = plan_config(GRAPHS["plain"], FreezeConfig(), parse_assumption({"batch_size": 4})).cost
    ten = plan_config(GRAPHS["plain"], FreezeConfig(), parse_assumption({"batch_size": 40})).cost
    for key in ("forward_flops", "backward_flops", "activation_bytes"):
        assert ten[key] == 10 * one[key]


def test_activations_are_what_autograd_really_saves() -> None:
    model, example = make("plain")
    resting = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for rules in ([], [Rule("freeze", "layer1")], [Rule("freeze", "layer2")]):
        config = FreezeConfig(rules=tuple(rules))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(name.startswith(r.match or "") for r in rules))
        saved: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in resting:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(example).float().square().mean()
        expected = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        assert plan_config(GRAPHS["plain"], config).cost["activation_bytes"] == expected
        del loss


def test_bytes_are_those_of_the_parameters() -> None:
    cost = plan("plain", "-layer1").cost
    trained = 4 * (8 * 8 + 8 + 8 * 3 + 3)
    assert cost["trainable_bytes"] == cost["gradient_bytes"] == trained
    assert cost["optimizer_bytes"] == 2 * trained
    assert cost["full"]["gradient_bytes"] == trained + 4 * (6 * 8 + 8)


def test_without_a_trace_only_what_surely_has_no_room_is_told() -> None:
    graph = replace(GRAPHS["plain"], nodes=())
    cost = plan_config(graph, FreezeConfig(), devices={"big": 2**30, "tiny": 1}).cost
    assert cost["peak_bytes"] is None
    assert cost["full"]["peak_bytes"] is None
    assert cost["fits"] == {"tiny": False}


def test_devices_are_told_whether_it_fits() -> None:
    cost = plan_config(GRAPHS["plain"], FreezeConfig(), devices={"big": 2**40, "tiny": 16}).cost
    assert cost["fits"] == {"big": True, "tiny": False}


def test_nothing_trainable_is_said() -> None:
    result = plan("plain", "-**")
    assert "nothing_trainable" in codes(result)
    assert result.cost["backward_flops"] == 0


def test_a_rule_that_matches_nothing_is_said() -> None:
    (warning,) = [w for w in plan("plain", "-layer9").warnings if w.code == "rule_without_match"]
    assert "'layer9'" in warning.message


def test_tied_names_on_both_sides_of_the_rules_are_said() -> None:
    assert "tied_parameters" in codes(plan("tied", "-embedding"))
    assert "tied_parameters" not in codes(plan("tied", "-**"))


def test_drifting_norm_statistics_are_said() -> None:
    result = plan("convolutional", "-stem", norm_statistics="update")
    (warning,) = [w for w in result.warnings if w.code == "norm_statistics_drift"]
    assert warning.names == ("stem.1",)
    assert "norm_statistics_drift" not in codes(plan("convolutional", "-stem"))


def test_frozen_dropout_is_said() -> None:
    assert "frozen_dropout" in codes(plan("convolutional", "-body"))
    assert "frozen_dropout" not in codes(plan("convolutional", "-body", dropout="off"))


def test_a_model_that_cannot_be_traced_still_has_a_plan() -> None:
    class Stubborn(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not today")

    graph = trace_model(nn.Sequential(Stubborn(2, 2), nn.Linear(2, 2)), torch.ones(1, 2))
    assert graph.traced_by == "none"
    result = plan_config(graph, FreezeConfig(rules=(Rule("freeze", "1"),)))
    assert flows(result) == {"0": "trained", "1": "passes"}
    assert result.cost["step_flops"] is None
    (warning,) = [w for w in result.warnings if w.code == "untraced"]
    assert "not today" in warning.message


def test_a_model_that_looks_at_values_is_traced_for_real() -> None:
    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    model = nn.Sequential(Looks(2, 2), nn.Linear(2, 2))
    graph = trace_model(model, torch.ones(1, 2))
    assert graph.traced_by == "real"
    assert flows(plan_config(graph, FreezeConfig()))["0"] == "trained"


def test_tracing_leaves_the_model_as_it_was() -> None:
    model, example = make("convolutional")
    model.stem.requires_grad_(False)
    model.stem[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    trace_model(model, example)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert model.training
    assert not model.stem[1].training
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_fingerprint_depends_on_names_shapes_types_and_ties() -> None:
    model, _ = make("tied")
    first = read_model(model).fingerprint
    assert read_model(make("tied")[0]).fingerprint == first
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert read_model(model).fingerprint != first


@pytest.mark.parametrize(
    "document", [[], {"batch": 3}, {"batch_size": 0}, {"batch_size": True}, {"optimizer": "lion"}]
)
def test_a_bad_assumption_is_refused(document: object) -> None:
    with pytest.raises(InvalidDocument):
        parse_assumption(document)


class Teacher(nn.Module):
    """A comparison and a frozen teacher run under no_grad: operations without an autograd node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 6), nn.LayerNorm(6)
        self.teacher, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        weight = 1 + self.scale.weight
        positive = x > 0
        with torch.no_grad():
            for _ in range(50):
                self.teacher(x)
        return self.head(h * weight * positive)


def test_operations_without_a_node_are_no_other_nodes_operations() -> None:
    graph = trace_model(Teacher(), torch.randn(3, 6))
    result = plan_config(graph, FreezeConfig(rules=(Rule("freeze", "scale"),)))
    assert flows(result)["scale"] == "passes"
    products = 2 * 3 * (6 * 6 + 6 * 2)
    assert result.cost["backward_flops"] == products + 2 * 3 * 6 * 2
    assert result.cost["forward_flops"] == products + 50 * 2 * 3 * 6 * 6


def test_a_size_that_was_not_applied_is_not_called_assumed() -> None:
    assume = parse_assumption({"sequence_length": 4096})
    result = plan_config(GRAPHS["tied"], FreezeConfig(), assume)
    assert result.cost["assumed"]["sequence_length"] is None
    assert "not_assumed" in codes(result)


def test_a_group_that_matches_nothing_is_said() -> None:
    config = parse_config({"groups": [{"match": "layer9", "lr_scale": 2}]})
    messages = [w.message for w in plan_config(GRAPHS["plain"], config).warnings]
    assert any(message.startswith("Group 1 matches no parameter") for message in messages)
