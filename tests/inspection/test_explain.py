"""explain says which layers a model has, what runs them and why."""

import json
from typing import Any

import compatibility
import pytest
import torch
from inspected import CPU, Holder, shown
from torch import nn as tnn
from torch.nn.utils import parametrizations

import fusedmlp
from fusedmlp import nn
from fusedmlp.inspection.explain import explain


@pytest.mark.parametrize(
    ("model", "layers", "widths", "relus"),
    [
        (nn.MLP(5, [4, 3], 2), [("0", "2", "4")], [(5, 4, 3, 2)], [False]),
        (nn.Linear(5, 2), [("(the model)",)], [(5, 2)], [False]),
        (nn.LinearReLU(5, 2), [("(the model)",)], [(5, 2)], [True]),
        (nn.Sequential(nn.LinearReLU(5, 2), nn.Linear(2, 3)), [("0", "1")], [(5, 2, 3)], [False]),
        (nn.Sequential(tnn.Linear(5, 2, bias=False), nn.ReLU()), [("0",)], [(5, 2)], [True]),
        (
            nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3), nn.ReLU()),
            [("0",), ("3",)],
            [(5, 4), (4, 3)],
            [True, True],
        ),
        (
            nn.Sequential(nn.MLP(5, [4], 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
            [("0.0", "0.2"), ("1.0",)],
            [(5, 4, 3), (3, 3)],
            [False, True],
        ),
    ],
    ids=["MLP", "Linear", "LinearReLU", "LinearReLU first", "final ReLU", "Dropout", "nested"],
)
def test_one_row_per_chain(model: tnn.Module, layers: Any, widths: Any, relus: Any) -> None:
    explanation = explain(model, torch.randn(2, 3, 5))
    assert [row.layers for row in explanation.rows] == layers
    assert [row.widths for row in explanation.rows] == widths
    assert [row.final_relu for row in explanation.rows] == relus
    for row in explanation.rows:
        assert (row.rows, row.dtype, row.device, row.reason) == (6, "float32", "cpu", CPU)
        for one in (row.forward, row.backward):
            assert one is not None
            assert one.backend == "PyTorch's operators"
            assert (one.launches, one.bytes) == (one.unfused_launches, one.unfused_bytes)
    assert explanation.layers_not_fused == explanation.layers_not_run == ()
    text = shown(explanation)
    for row in explanation.rows:
        assert " -> ".join(map(str, row.widths)) in text


def test_positional_and_keyword_arguments() -> None:
    model = Holder(lambda self, x, *, shift: self.fc(x + shift), fc=nn.Linear(5, 2))
    (row,) = explain(model, torch.randn(4, 5), shift=1.0).rows
    assert (row.layers, row.rows) == (("fc",), 4)
    assert explain(Holder(lambda self, model: self.fc(model), fc=nn.Linear(5, 2)), model=torch.ones(5)).rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_size_of_an_element(dtype: torch.dtype) -> None:
    x = torch.randn(4, 5)
    (row,), (other,) = (explain(nn.Linear(5, 2, dtype=d), x.to(d)).rows for d in (torch.float32, dtype))
    assert other.dtype == str(dtype).removeprefix("torch.")
    assert other.forward.bytes * 4 == row.forward.bytes * dtype.itemsize


def test_names_of_shared_and_parametrized_and_functional_layers() -> None:
    a = nn.Linear(5, 5)
    b = nn.Linear(5, 5)
    b.weight = a.weight
    c = parametrizations.weight_norm(nn.Linear(5, 5))
    d = parametrizations.weight_norm(nn.Linear(5, 5, bias=False))

    def code(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.d(self.c(self.b(self.a(x))))
        return fusedmlp.functional.linear(
            fusedmlp.functional.linear_relu(x, self.w, self.v), torch.ones(2, 5)
        )

    parameters = {"w": tnn.Parameter(torch.ones(5, 5)), "v": tnn.Parameter(torch.ones(5))}
    explanation = explain(Holder(code, a=a, b=b, c=c, d=d, **parameters), torch.randn(3, 5))
    names = [row.layers for row in explanation.rows]
    assert names == [("a",), ("b",), ("c",), ("(unnamed)",), ("w",), ("(unnamed)",)]
    assert explanation.layers_not_run == explanation.layers_not_fused == ()
    shown(explanation)


def test_layers_that_are_not_fused_or_did_not_run() -> None:
    members = {f"l{i}": tnn.Linear(5, 5) for i in range(5)} | {
        "ours": nn.Linear(5, 5),
        "idle": nn.Linear(5, 5),
    }
    explanation = explain(Holder(lambda self, x: self.ours(self.l0(x)), **members), torch.randn(3, 5))
    assert explanation.layers_not_fused == ("l0", "l1", "l2", "l3", "l4")
    assert explanation.layers_not_run == ("idle",)
    text = " ".join(shown(explanation).split())
    assert "5 plain torch.nn.Linear layers, which fusedmlp.fuse(model) changes: l0, l1, l2 and so on." in text
    assert "1 fused layer did not run in this call: idle." in text
    text = shown(explain(tnn.Sequential(tnn.Linear(5, 5)), torch.randn(3, 5)))
    assert text.startswith("No fused layer ran.\n\n1 plain torch.nn.Linear layer, which")


def test_layers_that_torch_compile_runs() -> None:
    members = nn.MLP(5, [4], 3)
    model = torch.compile(members, backend="eager")
    explanation = explain(model, torch.randn(3, 5))
    (row,) = explanation.rows
    assert explanation.compiled
    assert row.layers == ("0", "2")
    assert row.forward.backend == row.backward.backend == "torch.compile's own code"  # type: ignore[union-attr]
    assert row.forward.launches is row.forward.bytes is None
    assert row.forward.unfused_launches == ("linear", "relu", "linear")
    assert shown(explanation).startswith("2 layers in 1 chain on cpu: torch.compile's own code.")
    json.dumps(explanation.to_dict())
    partly = Holder(lambda self, x: self.plain(self.fast(x)), fast=model, plain=nn.Linear(3, 2))
    explanation = explain(partly, torch.randn(3, 5))
    assert [(row.layers, row.forward.backend) for row in explanation.rows] == [
        (("fast.0", "fast.2"), "torch.compile's own code"),
        (("plain",), "PyTorch's operators"),
    ]
    assert "not counting the code that torch.compile makes" in " ".join(shown(explanation).split())
    assert not explain(nn.Linear(5, 3), torch.randn(3, 5)).compiled
    members.compile(backend="eager")  # in place: the module keeps its class
    (row,) = explain(members, torch.randn(3, 5)).rows
    assert row.forward.backend == "torch.compile's own code"


class CallsReLU(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = tnn.Linear(5, 4), tnn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.kernels
def test_torch_compile_runs_a_pair_in_a_forward() -> None:
    model = fusedmlp.fuse(CallsReLU())
    compiled = torch.compile(model, backend="eager")
    route = compatibility.Route(True)
    with compatibility.taken(route):
        first, second = explain(compiled, torch.randn(3, 5)).rows
        eagerly, _ = explain(model, torch.randn(3, 5)).rows
    assert first.reason == "torch.compile sees the ReLU in the forward that calls this layer."
    assert first.forward.backend == "torch.compile's own code"
    assert second.forward.backend == eagerly.forward.backend == "Triton kernels"


def test_many_alike_layers_and_long_names_fit_the_terminal() -> None:
    blocks = [nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 5)) for _ in range(12)]
    name = "a_name_of_a_module_that_is_longer_than_anybody_would_want_to_type_" + "x" * 60
    model = Holder(
        lambda self, x: getattr(self, name)(self.encoder(x)),
        encoder=tnn.Sequential(*blocks),
        **{name: nn.MLP(5, [5] * 40, 2)},
    )
    explanation = explain(model, torch.randn(3, 5, requires_grad=True))
    assert len(explanation.rows) == 25
    text = shown(explanation)
    assert "encoder.*.0  x 12, all together\n3 rows, 5 -> 7, ReLU, float32 on cpu\n" in text
    assert "\n            12 linear, 12 relu\n" in text
    assert text.count("forward   PyTorch's operators") == 3
    assert "xxx: 0, 2, 4, 6, 8," in text
    with torch.no_grad(), Noted():
        text = shown(explain(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), torch.randn(3, 5)))
    assert "0; 2  x 2, all together\n" in text
    assert "why       A TorchFunctionMode is active; it sees only PyTorch's own functions." in text


class Noted(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_as_data() -> None:
    explanation = explain(nn.MLP(5, [4], 3), torch.randn(8, 5))
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["rows"][0]["layers"] == ["0", "2"]
    assert data["rows"][0]["forward"]["backend"] == "PyTorch's operators"
    assert data["rows"][0]["backward"]["bytes"] == explanation.rows[0].backward.bytes  # type: ignore[union-attr]
    assert set(data) == {"rows", "layers_not_fused", "layers_not_run", "compiled"}


def test_lazy_modules_are_initialized() -> None:
    model = tnn.Sequential(tnn.LazyLinear(4), tnn.LazyBatchNorm1d(), nn.Linear(4, 2))
    assert explain(model, torch.randn(3, 5)).layers_not_fused == ("0",)
    assert model(torch.randn(3, 5)).shape == (3, 2)


def test_unusual_inputs() -> None:
    linear = nn.Linear(5, 2)
    for x in (torch.randn(5), torch.randn(0, 5), torch.randn(2, 3, 5).transpose(0, 1)):
        (row,) = explain(linear, x).rows
        assert row.rows == x.numel() // 5
        shown(explain(linear, x))
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged)
    assert explain(linear, nested).rows[0].rows == 5
    linear.weight.data = torch.randn(2, 0)
    assert explain(linear, torch.randn(4, 0)).rows[0].rows == 4
    shown(explain(nn.MLP(5, [4], 3, bias=False), torch.randn(0, 5)))
    (row,) = explain(nn.Linear(5, 2, device="meta"), torch.empty(4, 5, device="meta")).rows
    assert (row.device, row.forward.launches) == ("meta", ("linear",))


def test_models_that_cannot_run_raise() -> None:
    with pytest.raises(RuntimeError):
        explain(nn.Linear(5, 3), torch.randn(()))
    with (
        fusedmlp.backend("triton"),
        pytest.raises(RuntimeError, match=r"backend\('triton'\) cannot run here\."),
    ):
        explain(nn.Linear(5, 3).double(), torch.randn(3, 5).double())


def test_a_pair_in_a_forward_has_its_own_reason_and_relu() -> None:
    class Frozen(dict[str, int]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError

    class Pair(Holder):
        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(x).relu()

    model = fusedmlp.fuse(Pair(print, fc=tnn.Linear(5, 5), config=Frozen(a=1)))
    (row,) = explain(model, torch.ones(2, 5)).rows
    assert (row.final_relu, row.reason) == (True, CPU)
    assert row.forward.unfused_launches == ("linear", "relu")
    assert model.config == {"a": 1}
