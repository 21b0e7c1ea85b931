"""fuse on models of other packages, with random weights: same results, pairs as counted by hand."""

import copy
import importlib.util
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_all_right
from torch import nn

import fusedmlp
from fusedmlp.convert import fuse, pending_relu, report, unfuse


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a test wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def mlp() -> Any:
    from torchvision.ops import MLP

    return MLP(6, [8, 7, 3], dropout=0.0)


def alexnet_head() -> Any:
    from torchvision.models import AlexNet

    with torch.device("meta"):
        head = AlexNet(num_classes=3).classifier
    return narrow(head, {9216: 6, 4096: 8})


def vgg_head() -> Any:
    from torchvision.models import vgg11

    with torch.device("meta"):
        head = vgg11(num_classes=3).classifier
    return narrow(head, {25088: 6, 4096: 8})


def narrow(head: nn.Sequential, widths: dict[int, int]) -> nn.Sequential:
    """Make the layers narrow enough for Triton's interpreter, which is slow."""
    for i, layer in enumerate(head):
        if type(layer) is nn.Linear:
            sizes = layer.in_features, layer.out_features
            head[i] = nn.Linear(*(widths.get(size, size) for size in sizes))
    return head


def vit_block() -> Any:
    from torchvision.models.vision_transformer import MLPBlock

    return MLPBlock(6, 8, 0.0)


def vit_relu_block() -> Any:
    from torchvision.ops import MLP

    return MLP(6, [8, 6], activation_layer=nn.ReLU, inplace=True, dropout=0.0)


def encoder_layer() -> Any:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


def transformer() -> Any:
    return nn.Transformer(8, 2, 2, 1, 12, dropout=0.0, batch_first=True)


def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=16,
    )
    return BertModel(config)


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=12,
        word_embed_proj_dim=8,
        dropout=0.0,
        max_position_embeddings=16,
        activation_function="relu",
    )
    return OPTForCausalLM(config)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=11,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def mixer() -> Any:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(
        num_classes=3,
        img_size=8,
        patch_size=4,
        num_blocks=2,
        embed_dim=8,
        act_layer=nn.ReLU,
        mlp_ratio=(0.5, 2),
    )


def resmlp() -> Any:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    return MlpMixer(
        num_classes=3,
        img_size=8,
        patch_size=4,
        num_blocks=2,
        embed_dim=8,
        mlp_ratio=2,
        block_layer=ResBlock,
        norm_layer=Affine,
        act_layer=nn.ReLU,
    )


def features() -> tuple[torch.Tensor, ...]:
    return (torch.randn(5, 6),)


def sequences() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 3, 8),)


def two_sequences() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, 8), torch.randn(2, 4, 8)


def words() -> tuple[torch.Tensor, ...]:
    return (torch.randint(11, (2, 4)),)


def words_and_labels() -> tuple[torch.Tensor, ...]:
    return torch.randint(11, (2, 4)), torch.ones(2, 4, dtype=torch.long), torch.randint(11, (2, 3))


def images() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


# model -> the package it is from, its inputs, and the pairs, Linears and Sequentials in it, counted by hand
MODELS: dict[str, tuple[Callable[[], Any], str, Callable[[], tuple[torch.Tensor, ...]], int, int, int]] = {
    # Linear, ReLU, Dropout, Linear, ReLU, Dropout, Linear, Dropout
    "torchvision's MLP": (mlp, "torchvision", features, 2, 3, 1),
    # Dropout, Linear, ReLU, Dropout, Linear, ReLU, Linear
    "AlexNet's head": (alexnet_head, "torchvision", features, 2, 3, 1),
    # Linear, ReLU, Dropout, Linear, ReLU, Dropout, Linear
    "VGG's head": (vgg_head, "torchvision", features, 2, 3, 1),
    # Linear, GELU, Dropout, Linear, Dropout: no ReLU
    "ViT's block": (vit_block, "torchvision", features, 0, 2, 1),
    # the same with ReLU: Linear, ReLU, Dropout, Linear, Dropout
    "ViT's block with ReLU": (vit_relu_block, "torchvision", features, 1, 2, 1),
    # pair: linear1; other Linears: linear2 and the attention's out_proj
    "TransformerEncoderLayer": (encoder_layer, "torch", sequences, 1, 3, 0),
    # pairs: linear1 of 3 layers; Linears: 3 in each of 2 encoder layers, 4 in the decoder layer
    "Transformer": (transformer, "torch", two_sequences, 3, 10, 0),
    # pairs: intermediate in 3 layers; Linears: query, key, value, 2 outputs, intermediate in each; pooler
    "BERT": (bert, "transformers", words, 3, 3 * 6 + 1, 0),
    # pairs: fc1 in 2 layers; Linears: k, v, q, out, fc1, fc2 in each; lm_head
    "OPT": (opt, "transformers", words, 2, 2 * 6 + 1, 0),
    # pairs: wi in 4 layers; Linears: q, k, v, o, wi, wo in each, 4 more in 2 decoder ones; lm_head
    "T5": (t5, "transformers", words_and_labels, 4, 2 * 6 + 2 * 10 + 1, 0),
    # pairs: fc1 of 2 MLPs in each of 2 blocks; Linears: fc1, fc2 of each MLP; head. A Sequential of blocks
    "MLP-Mixer": (mixer, "timm", images, 4, 2 * 4 + 1, 1),
    # pairs: fc1 in 2 blocks; Linears: linear_tokens, fc1, fc2 in each; head. A Sequential of blocks
    "ResMLP": (resmlp, "timm", images, 2, 2 * 3 + 1, 1),
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    package = MODELS[request.param][1]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return str(request.param)


def outputs(model: Any, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    torch.manual_seed(2)  # the heads use dropout
    if "T5" in type(model).__name__:
        results = model(input_ids=inputs[0], attention_mask=inputs[1], labels=inputs[2], use_cache=False)
    elif hasattr(model, "config"):
        results = model(input_ids=inputs[0], return_dict=True)
    else:
        results = model(*inputs)
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for t in results.to_tuple() if isinstance(t, torch.Tensor)]


def run(model: Any, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Return all outputs and all gradients, also those of floating-point inputs."""
    leaves = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    model.zero_grad()
    ys = outputs(model, leaves)
    torch.stack([y.square().mean() for y in ys if y.requires_grad]).sum().backward()
    found = {f"output {i}": y.detach().clone() for i, y in enumerate(ys)}
    found |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_the_same_model_after_fuse(name: str) -> None:
    """fuse finds the counted pairs; results are equal bit for bit, and keys and parameters stay the same."""
    make, _, make_inputs, pairs, linears, sequentials = MODELS[name]
    plain, inputs = make(), make_inputs()
    model = copy.deepcopy(plain)
    text, keys, parameters = repr(model), list(model.state_dict()), [id(p) for p in model.parameters()]
    types = [type(module) for module in model.modules()]
    attributes = [list(module.__dict__) for module in model.modules()]
    fuse(model)
    found = report(model)
    assert (found.pairs, found.linears, found.sequentials) == (pairs, linears, sequentials), str(found)
    assert report(plain) == found
    assert repr(model) == text
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    for training in (True, False):
        ours, torchs = run(model.train(training), inputs), run(plain.train(training), inputs)
        assert ours.keys() == torchs.keys()
        for what, tensor in torchs.items():
            assert torch.equal(ours[what], tensor), what
        with torch.no_grad():
            for a, b in zip(outputs(model, inputs), outputs(plain, inputs), strict=True):
                assert torch.equal(a, b)
    fresh = make()
    for source, target in ((fresh, model), (model, fresh)):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(0.01)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(outputs(target.eval(), inputs)[0], outputs(source.eval(), inputs)[0])
    unfuse(model)
    assert [type(module) for module in model.modules()] == types
    assert [list(module.__dict__) for module in model.modules()] == attributes
    assert repr(model) == text


@pytest.mark.kernels
def test_on_the_kernels(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every Linear on the kernels, errors are at most twice those of PyTorch."""
    make, _, make_inputs, _, _, _ = MODELS[name]
    plain = make().train().to(device)
    for module in plain.modules():  # dropout draws other numbers on another device or in another dtype
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = tuple(x.to(device) for x in make_inputs())
    exact_inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    model, exact = fuse(copy.deepcopy(plain)), run(copy.deepcopy(plain).double(), exact_inputs)
    torchs = run(plain, inputs)
    waited: list[int] = []
    output = pending_relu._DeferredOutput
    of = output.of
    monkeypatch.setattr(output, "of", staticmethod(lambda *a: (waited.append(1), of(*a))[1]))
    with fusedmlp.backend("triton"):
        ours = run(model, inputs)
    assert len(waited) == sum("forward of" in row.status for row in report(model).rows)
    assert ours.keys() == torchs.keys() == exact.keys()
    largest = max(t.abs().max().item() for t in exact.values())
    # These are 0 except for rounding, like the gradient of attention's key bias, which softmax cancels.
    zero = {what for what, tensor in exact.items() if tensor.abs().max() < 1e-15 * largest}
    assert all(ours[what].abs().max() < 1e-6 * largest for what in zero)
    names = [what for what in exact if what not in zero]

    def again(nudge: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        near = copy.deepcopy(plain)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.copy_(nudge(parameter))
        found = run(near, tuple(nudge(x) if x.is_floating_point() else x for x in inputs))
        return [found[what] for what in names]

    assert_all_right(
        [ours[what] for what in names], [torchs[what] for what in names], [exact[what] for what in names],
        names, again,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "ghostnet_050"])
def test_shortcuts_that_are_empty_sequentials(name: str) -> None:
    """These are two of the models that all_models.py compares. All of them take ten minutes or more."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    import all_models

    if name == "ghostnet_050":
        model = pytest.importorskip("timm", reason="timm is not installed").create_model(name)
    else:
        import torchvision

        model = torchvision.models.get_model(name)
    assert any(type(module) is nn.Sequential and len(module) == 0 for module in model.modules())
    assert all_models.compare(model, 64) == ([], [])
