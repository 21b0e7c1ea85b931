"""The first networks of an introductory course. Only the import of `nn` differs from plain PyTorch."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from fusedmlp import nn  # instead of: from torch import nn


def one_layer(nn: ModuleType) -> dict[str, torch.Tensor]:
    layer = nn.Linear(1, 1)
    return {"one layer": layer(torch.tensor([1.0]))}


def three_neurons(nn: ModuleType) -> dict[str, torch.Tensor]:
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    print(model)
    return {"three neurons": model(torch.tensor([[1.0], [2.0]]))}


def as_class(nn: ModuleType) -> torch.nn.Module:
    class Network(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Linear(4, 256)
            self.layer2 = nn.Linear(256, 128)
            self.layer3 = nn.Linear(128, 128)
            self.layer4 = nn.Linear(128, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.layer1(x))
            x = F.relu(self.layer2(x))
            x = F.relu(self.layer3(x))
            y: torch.Tensor = self.layer4(x)
            return y

    return Network()


def as_sequential(nn: ModuleType) -> torch.nn.Module:
    network: torch.nn.Module = nn.Sequential(
        nn.Linear(4, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 1),
    )
    return network


def train(nn: ModuleType, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Train on 100 random examples, in batches of 4."""
    data = TensorDataset(torch.randn(100, 4), torch.randn(100, 1))
    loss_function = nn.MSELoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        for x, y in DataLoader(data, batch_size=4, shuffle=True):
            optimizer.zero_grad()
            loss = loss_function(network(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    size = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": torch.tensor(size), "losses": torch.stack(losses)}


def straight_line(nn: ModuleType) -> dict[str, torch.Tensor]:
    """One neuron learns y = 10 x + 5."""
    neuron = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(neuron.parameters(), lr=0.05)
    x = torch.linspace(-1, 1, 20).unsqueeze(1)
    y = 10 * x + 5
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (neuron(x) - y).abs().mean()
        loss.backward()
        optimizer.step()
    return {"weight": neuron.weight.detach(), "bias": neuron.bias.detach()}


def main(nn: ModuleType) -> dict[str, torch.Tensor]:
    """All numbers that the networks produce; a test compares them with those of torch.nn."""
    torch.manual_seed(0)
    numbers = {**one_layer(nn), **three_neurons(nn), **straight_line(nn)}
    for kind, build in {"class": as_class, "sequential": as_sequential}.items():
        torch.manual_seed(1)
        numbers |= {f"{name} as {kind}": value for name, value in train(nn, build(nn)).items()}
    return numbers


if __name__ == "__main__":
    numbers = main(nn)
    print(f"One neuron learned y = {numbers['weight'].item():.2f} x + {numbers['bias'].item():.2f}")
    for kind in ("class", "sequential"):
        losses = numbers[f"losses as {kind}"]
        print(
            f"Four layers as a {kind}: {numbers[f'parameters as {kind}']:,} parameters, "
            f"mean loss {losses[:25].mean():.3f} in the first epoch, {losses[-25:].mean():.3f} in the last"
        )
