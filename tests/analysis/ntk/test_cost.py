"""The cost of a kernel before it is computed: routes, operations and bytes by hand."""

import json

import pytest
import torch
from torch import nn

from at_extensions.analysis import ntk_cost
from at_extensions.models import create_model


def head(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def test_operations_and_bytes_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(256, 10))
    cost = ntk_cost(model, 20, outputs=3, shape=(3, 8, 8))
    conv, linear = cost.layers
    pairs, entries, pixels = 20 * 21 / 2, 4 * 27, 64
    assert (conv.route, conv.parameters, conv.bytes) == ("J-dot", entries, 4 * 20 * entries)
    assert conv.operations == 2 * (pairs * entries + 20 * pixels * entries)
    assert (linear.route, linear.parameters, linear.bytes) == ("Gram", 2570, 4 * 20 * (256 + 10))
    assert linear.operations == 2 * pairs * (256 + 10 + 1)
    assert cost.pass_operations == 2 * 20 * (pixels * entries + 2560) * 2
    assert cost.operations == conv.operations + linear.operations + cost.pass_operations


def test_rows_and_columns_of_their_own_cost_all_pairs():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10, bias=False))
    for outputs, pairs in ((0, 1), ("class", 10), ("all", 100)):
        (layer,) = ntk_cost(model, 20, 30, outputs=outputs, shape=(3, 2, 2)).layers
        assert layer.operations == 2 * 600 * (12 + pairs * (10 + 1))


def test_a_residual_network_of_cifar_takes_pixel_grams_in_its_last_stage():
    cost = ntk_cost(create_model("cifar_resnet18", 10), 500, outputs=0, shape=(3, 32, 32))
    routes = {layer.name: layer.route for layer in cost.layers}
    assert [name for name, route in routes.items() if route == "pixel Gram"] == [
        "network.layer4.0.conv2", "network.layer4.1.conv1", "network.layer4.1.conv2"
    ]  # fmt: skip
    assert routes["network.layer1.0.conv1"] == "J-dot"
    assert routes["network.linear"] == "Gram"
    assert cost.groups == 1
    assert cost.pass_operations == pytest.approx(500 * 2 * 2 * 0.5554e9, rel=0.01)
    assert 1.5e12 < cost.operations < 2.8e12
    assert cost.bytes < 4 * 2**30


def test_many_outputs_share_the_input_gram():
    model = create_model("cifar_resnet18", 10)
    one, each = (ntk_cost(model, 500, outputs=o, shape=(3, 32, 32), memory_limit=2**36) for o in (0, "class"))
    gram = {c.name: c.operations for c in one.layers if c.route == "pixel Gram"}
    for layer in each.layers:
        if layer.name in gram:
            assert layer.operations < 6 * gram[layer.name]
    assert each.backward_passes == 10
    assert each.operations < 9 * one.operations


def test_less_memory_costs_more_sweeps():
    model = create_model("cifar_resnet18", 10, width=16)
    roomy = ntk_cost(model, 200, outputs=0, shape=(3, 32, 32))
    tight = ntk_cost(model, 200, outputs=0, shape=(3, 32, 32), memory_limit=roomy.least_bytes)
    assert tight.groups > roomy.groups == 1
    assert tight.pass_operations == tight.groups * roomy.pass_operations
    assert tight.bytes <= roomy.least_bytes


def test_a_cost_reads_as_a_table_and_as_data(small_net, batch):
    x, _ = batch()
    cost = ntk_cost(small_net(), x, x[:2], outputs="class")
    lines = repr(cost).splitlines()
    assert "4 x 2 inputs, outputs 'class'" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "5", "passes"]
    assert "1 x (1 forward, 3 backward)" in lines[-1]
    data = json.loads(json.dumps(cost.to_dict()))
    assert data["operations"] == cost.operations
    assert data["layers"][0]["route"] == cost.layers[0].route


def test_bad_input_is_refused(small_net):
    with pytest.raises(ValueError, match=r"shape= is needed"):
        ntk_cost(small_net(), 20, outputs=0)
    with pytest.raises(ValueError, match="x must be at least 1"):
        ntk_cost(small_net(), 0, outputs=0, shape=(2, 5, 5))
    with pytest.raises(ValueError, match="one shape"):
        ntk_cost(small_net(), torch.rand(2, 2, 5, 5), torch.rand(2, 2, 6, 5), outputs=0)
