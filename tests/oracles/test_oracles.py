"""Tests of the references themselves: against peft, against transformers, and against each other."""

import math

import pytest
import torch
from torch import nn

from . import dora, fused, ia3, lora, mtl_lora, vera

TOLERANCE = 1e-10


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    assert (actual - expected).abs().max().item() <= tolerance


def assert_apart(actual, expected, distance=1e-3):
    assert (actual - expected).abs().max().item() > distance


D_IN, D_HIDDEN, D_OUT, RANK = 5, 7, 4, 3
X = rand(2, 6, D_IN, seed=100)
W = rand(D_OUT, D_IN, seed=101)
BIAS = rand(D_OUT, seed=102)
A = rand(RANK, D_IN, seed=103)
B = rand(D_OUT, RANK, seed=104)
M = rand(D_OUT, seed=105).abs() + 0.5


# ---------------------------------------------------------------------------------------------------- peft


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def peft_model(peft, config, bias=True):
    """A peft model in float64 over two layers of different sizes, its trainable values random."""
    base = nn.Sequential(
        nn.Linear(D_IN, D_HIDDEN, bias=bias), nn.GELU(), nn.Linear(D_HIDDEN, D_OUT, bias=bias)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model = peft.get_peft_model(base.double(), config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert any(parameter.requires_grad for parameter in model.parameters())
    return model


def layers(model):
    """The two layers of the model (wrapped or plain), in order."""
    sequential = model.base_model.model
    return [sequential[0], sequential[2]]


def run_layers(model, x):
    """Per layer (input, output) of one forward pass, and the output of the model."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
        for layer in layers(model)
    ]
    y = model(x)
    for hook in hooks:
        hook.remove()
    return seen, y


def weights(layer):
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return base.weight.detach().clone(), None if base.bias is None else base.bias.detach().clone()


def lora_factors(layer):
    return layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()


def check_against_peft(model, output_of, merged_of):
    """Each layer's output, and its merged weight and bias, against the references."""
    seen, _ = run_layers(model, X)
    expected_merged = []
    for layer, (x, y) in zip(layers(model), seen, strict=True):
        assert_close(y.detach(), output_of(layer, x.detach()))
        assert_apart(y.detach(), lora.linear_output(x.detach(), *weights(layer)))
        expected_merged.append(merged_of(layer))
    merged = model.merge_and_unload()
    for layer, (weight, bias) in zip([merged[0], merged[2]], expected_merged, strict=True):
        assert_close(layer.weight.detach(), weight)
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            assert_close(layer.bias.detach(), bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_lora_is_peft(peft, rslora, bias):
    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["0", "2"], use_rslora=rslora)
    check_against_peft(
        peft_model(peft, config, bias),
        lambda layer, x: lora.lora_output(x, *weights(layer), *lora_factors(layer), 5, rslora),
        lambda layer: (
            lora.lora_merged(weights(layer)[0], *lora_factors(layer), 5, rslora),
            weights(layer)[1],
        ),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_ia3_is_peft(peft, bias):
    config = peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
    model = peft_model(peft, config, bias)
    outer, inner = layers(model)

    def scale(layer):
        return layer.ia3_l["default"].detach().clone()

    assert not outer.is_feedforward and inner.is_feedforward
    check_against_peft(
        model,
        lambda layer, x: (ia3.ia3_scale_output if layer is outer else ia3.ia3_scale_input)(
            x, *weights(layer), scale(layer)
        ),
        lambda layer: (ia3.ia3_merged_output if layer is outer else ia3.ia3_merged_input)(
            *weights(layer), scale(layer)
        ),
    )


def test_ia3_feed_forward_is_peft(peft):
    model = peft_model(peft, peft.IA3Config(target_modules=["2"], feedforward_modules=["2"]))
    first, second = layers(model)
    expected = ia3.ia3_ffn_output(
        X, *weights(first), *weights(second), second.ia3_l["default"].detach(), nn.functional.gelu
    )
    assert_close(model(X).detach(), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_vera_is_peft(peft, bias):
    config = peft.VeraConfig(r=RANK, target_modules=["0", "2"], projection_prng_key=3)
    model = peft_model(peft, config, bias)

    def parameters(layer):
        shared_A, shared_B = layer.vera_A["default"].detach(), layer.vera_B["default"].detach()
        assert shared_A.shape == (RANK, D_HIDDEN) and shared_B.shape == (D_HIDDEN, RANK)
        return (
            shared_A,
            shared_B,
            layer.vera_lambda_d["default"].detach().clone(),
            layer.vera_lambda_b["default"].detach().clone(),
        )

    check_against_peft(
        model,
        lambda layer, x: vera.vera_output(x, *weights(layer), *parameters(layer)),
        lambda layer: (vera.vera_merged(weights(layer)[0], *parameters(layer)), weights(layer)[1]),
    )


def dora_parameters(layer):
    return *lora_factors(layer), layer.lora_magnitude_vector["default"].weight.detach().clone()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_dora_is_peft(peft, rslora, bias):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["0", "2"], use_rslora=rslora, use_dora=True
    )
    check_against_peft(
        peft_model(peft, config, bias),
        lambda layer, x: dora.dora_output(x, *weights(layer), *dora_parameters(layer), 5, rslora),
        lambda layer: (
            dora.dora_merged(weights(layer)[0], *dora_parameters(layer), 5, rslora),
            weights(layer)[1],
        ),
    )


def test_dora_initial_magnitude_is_peft(peft):
    base = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
    config = peft.LoraConfig(r=RANK, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    assert_close(magnitude, dora.dora_magnitude(weights(layer)[0]))


@pytest.mark.parametrize("rslora", [True, False])
def test_dora_gradients_are_those_of_peft(peft, rslora):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["0", "2"], use_rslora=rslora, use_dora=True
    )
    model = peft_model(peft, config)
    seen, y = run_layers(model, X)
    for _, output in seen:
        output.retain_grad()
    (rand(*y.shape, seed=7) * y).sum().backward()
    for layer, (x, output) in zip(layers(model), seen, strict=True):
        W0, (A0, B0, m0) = weights(layer)[0], dora_parameters(layer)
        dA, dB, dm = dora.dora_grads(x.detach(), W0, A0, B0, m0, output.grad, 5, rslora)
        assert_close(layer.lora_A["default"].weight.grad, dA)
        assert_close(layer.lora_B["default"].weight.grad, dB)
        assert_close(layer.lora_magnitude_vector["default"].weight.grad, dm)


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_initial_factors_are_those_of_peft(peft, method, rslora):
    """peft computes these two in float32 only; the signs of the factors are compared by the product."""
    base = nn.Sequential(nn.Linear(D_HIDDEN, D_IN))
    original = rand(D_IN, D_HIDDEN, seed=9).float()
    with torch.no_grad():
        base[0].weight.copy_(original)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["0"], init_lora_weights=method, use_rslora=rslora
    )
    layer = peft.get_peft_model(base, config).base_model.model[0]
    scaling = lora.lora_scaling(5, RANK, rslora)
    factors = {"pissa": lora.pissa_factors, "olora": lora.olora_factors}[method]
    A0, B0, residual = factors(original, RANK, scaling)
    peft_A, peft_B = (factor.double() for factor in lora_factors(layer))
    assert_close(weights(layer)[0].double(), residual, 1e-5)
    assert_close(peft_B @ peft_A, B0 @ A0, 1e-5)
    assert_close(peft_A.abs(), A0.abs(), 1e-5)
    assert_close(peft_B.abs(), B0.abs(), 1e-5)


# ---------------------------------------------------------------------------------------------------- lora


def test_lora_by_loops():
    y = lora.lora_output(X, W, BIAS, A, B, alpha=8)
    n, t, o = 1, 4, 2
    expected = BIAS[o].item()
    for i in range(D_IN):
        update = sum(B[o, r].item() * A[r, i].item() for r in range(RANK))
        expected += (W[o, i].item() + 8 / RANK * update) * X[n, t, i].item()
    assert abs(y[n, t, o].item() - expected) <= TOLERANCE


def test_lora_scaling():
    assert lora.lora_scaling(8, 4) == 2.0
    assert lora.lora_scaling(8, 4, rslora=True) == 4.0


@pytest.mark.parametrize("bias", [BIAS, None])
@pytest.mark.parametrize("rslora", [True, False])
def test_lora_merged_gives_the_same_output(rslora, bias):
    merged = lora.linear_output(X, lora.lora_merged(W, A, B, 8, rslora), bias)
    assert_close(merged, lora.lora_output(X, W, bias, A, B, 8, rslora))


def test_lower_precision_inputs_are_computed_in_float64():
    single = [value.float() for value in (X, W, BIAS, A, B)]
    double = [value.double() for value in single]
    assert_close(lora.lora_output(*single, 8), lora.lora_output(*double, 8), 0.0)


@pytest.mark.parametrize(("b_g", "gate"), [(800.0, 1.0), (-800.0, 0.0), (0.0, 0.5)])
def test_gate_forced(b_g, gate):
    w_g = torch.zeros(1, D_IN)
    assert_close(lora.lora_gate(X, w_g, b_g), torch.full((2,), gate, dtype=torch.float64))
    y = lora.gated_lora_output(X, W, BIAS, A, B, w_g, b_g)
    # alpha = R makes the factor of plain LoRA one.
    assert_close(y, lora.lora_output(X, W, BIAS, A, gate * B, alpha=RANK))


def test_gate_is_the_mean_over_the_tokens_of_each_example():
    w_g, b_g = rand(1, D_IN, seed=11), rand(1, seed=12)
    gates = torch.sigmoid(X @ w_g[0] + b_g).mean(dim=1)
    assert_close(lora.lora_gate(X, w_g, b_g), gates)
    assert_apart(gates[0], gates[1])
    y = lora.gated_lora_output(X, W, BIAS, A, B, w_g, b_g)
    for n in range(2):
        assert_close(y[n], lora.lora_output(X[n], W, BIAS, A, gates[n] * B, alpha=RANK))
    # An example's output does not depend on the others of its batch.
    assert_close(lora.gated_lora_output(X[:1], W, BIAS, A, B, w_g, b_g), y[:1])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_pissa_factors(shape, scaling):
    weight = rand(*shape, seed=13)
    A0, B0, residual = lora.pissa_factors(weight, RANK, scaling)
    assert A0.shape == (RANK, shape[1]) and B0.shape == (shape[0], RANK)
    assert_close(residual + scaling * B0 @ A0, weight)
    S = torch.linalg.svdvals(weight)
    # The update is the best approximation of rank R; its singular values are shared evenly by the factors.
    assert_close(torch.linalg.svdvals(residual)[: len(S) - RANK], S[RANK:])
    assert_close(A0 @ A0.T, torch.diag(S[:RANK] / scaling))
    assert_close(B0.T @ B0, torch.diag(S[:RANK] / scaling))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_olora_factors(shape, scaling):
    weight = rand(*shape, seed=14)
    A0, B0, residual = lora.olora_factors(weight, RANK, scaling)
    assert A0.shape == (RANK, shape[1]) and B0.shape == (shape[0], RANK)
    assert_close(residual + scaling * B0 @ A0, weight)
    assert_close(B0.T @ B0, torch.eye(RANK, dtype=torch.float64))
    assert_close(A0, torch.triu(A0))
    # The first R columns of Q span the first R columns of W.
    assert_close((B0 @ A0)[:, :RANK], weight[:, :RANK])
    assert_close(B0 @ A0, B0 @ (B0.T @ weight))


# ----------------------------------------------------------------------------------------------- ia3, vera


@pytest.mark.parametrize("bias", [BIAS, None])
def test_ia3_merged_gives_the_same_output(bias):
    scale_out, scale_in = rand(D_OUT, seed=15), rand(D_IN, seed=16)
    merged = lora.linear_output(X, *ia3.ia3_merged_output(W, bias, scale_out))
    assert_close(merged, ia3.ia3_scale_output(X, W, bias, scale_out))
    merged = lora.linear_output(X, *ia3.ia3_merged_input(W, bias, scale_in))
    assert_close(merged, ia3.ia3_scale_input(X, W, bias, scale_in))


def test_ia3_of_ones_is_the_base_layer():
    base = lora.linear_output(X, W, BIAS)
    assert_close(ia3.ia3_scale_output(X, W, BIAS, torch.ones(D_OUT)), base)
    assert_close(ia3.ia3_scale_input(X, W, BIAS, torch.ones(D_IN)), base)


def shared_matrices():
    return rand(RANK + 2, D_IN + 3, seed=17), rand(D_OUT + 4, RANK + 2, seed=18)


@pytest.mark.parametrize("bias", [BIAS, None])
def test_vera_merged_gives_the_same_output(bias):
    shared, d, lambda_b = shared_matrices(), rand(RANK, seed=19), rand(D_OUT, seed=20)
    y = vera.vera_output(X, W, bias, *shared, d, lambda_b)
    assert_close(lora.linear_output(X, vera.vera_merged(W, *shared, d, lambda_b), bias), y)
    # Lambda_b B and Lambda_d A as the factors of LoRA, alpha = R.
    sliced_A, sliced_B = shared[0][:RANK, :D_IN], shared[1][:D_OUT, :RANK]
    plain = lora.lora_output(X, W, bias, torch.diag(d) @ sliced_A, torch.diag(lambda_b) @ sliced_B, RANK)
    assert_close(y, plain)


def test_vera_refuses_shared_matrices_that_are_too_small():
    with pytest.raises(ValueError, match="smaller"):
        vera.vera_output(X, W, BIAS, A[:, :-1], B, torch.ones(RANK), torch.ones(D_OUT))


# ---------------------------------------------------------------------------------------------------- dora


def test_dora_starts_as_the_base_layer():
    m = dora.dora_magnitude(W)
    lengths = [math.sqrt(sum(v * v for v in row)) for row in W.tolist()]
    assert_close(m, torch.tensor(lengths, dtype=torch.float64))
    y = dora.dora_output(X, W, BIAS, A, torch.zeros_like(B), m, 8)
    assert_close(y, lora.linear_output(X, W, BIAS))
    shared = shared_matrices()
    y = dora.dvora_output(X, W, BIAS, *shared, torch.ones(RANK), torch.zeros(D_OUT), m)
    assert_close(y, lora.linear_output(X, W, BIAS))


def test_dora_rows_have_the_length_of_the_magnitude():
    merged = dora.dora_merged(W, A, B, M, 8)
    assert_close(dora.row_norms(merged), M)
    # With m = ||W + s B A||_c, DoRA is LoRA.
    lora_weight = lora.lora_merged(W, A, B, 8)
    assert_close(dora.dora_merged(W, A, B, dora.row_norms(lora_weight), 8), lora_weight)


@pytest.mark.parametrize("bias", [BIAS, None])
def test_dora_merged_gives_the_same_output(bias):
    y = dora.dora_output(X, W, bias, A, B, M, 8)
    assert_close(lora.linear_output(X, dora.dora_merged(W, A, B, M, 8), bias), y)
    parameters = (*shared_matrices(), rand(RANK, seed=21), rand(D_OUT, seed=22))
    y = dora.dvora_output(X, W, bias, *parameters, M)
    assert_close(lora.linear_output(X, dora.dvora_merged(W, *parameters, M), bias), y)
    V = vera.vera_merged(W, *parameters)
    assert_close(dora.dvora_merged(W, *parameters, M), M[:, None] * V / V.norm(dim=1, keepdim=True))


def dora_autograd(G, alpha, detach_norm):
    A0, B0, m0 = (value.clone().requires_grad_() for value in (A, B, M))
    V = W + alpha / RANK * B0 @ A0
    norm = V.norm(dim=1, keepdim=True)
    y = X @ (m0[:, None] * V / (norm.detach() if detach_norm else norm)).T + BIAS
    return torch.autograd.grad((G * y).sum(), (A0, B0, m0))


def test_dora_gradients_by_autograd():
    G = rand(2, 6, D_OUT, seed=23)
    by_rule = {}
    for detach_norm in (True, False):
        by_rule[detach_norm] = dora.dora_grads(X, W, A, B, M, G, 8, detach_norm=detach_norm)
        for actual, expected in zip(by_rule[detach_norm], dora_autograd(G, 8, detach_norm), strict=True):
            assert_close(actual, expected)
    # The two rules differ in A and B, not in m.
    assert_apart(by_rule[True][0], by_rule[False][0])
    assert_apart(by_rule[True][1], by_rule[False][1])
    assert_close(by_rule[True][2], by_rule[False][2])


def test_dora_exact_gradients_are_those_of_the_reference_output():
    G = rand(2, 6, D_OUT, seed=24)
    A0, B0, m0 = (value.clone().requires_grad_() for value in (A, B, M))
    loss = (G * dora.dora_output(X, W, BIAS, A0, B0, m0, 8, rslora=True)).sum()
    expected = torch.autograd.grad(loss, (A0, B0, m0))
    actual = dora.dora_grads(X, W, A, B, M, G, 8, rslora=True, detach_norm=False)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


# ------------------------------------------------------------------------------------------------ mtl-lora


N_UP = 3
BS = rand(N_UP, D_OUT, RANK, seed=25)
MIX = rand(N_UP, seed=26)


@pytest.mark.parametrize("lam", [rand(RANK, RANK, seed=27), rand(RANK, seed=28)])
@pytest.mark.parametrize("bias", [BIAS, None])
def test_mtl_lora_merged_gives_the_same_output(lam, bias):
    y = mtl_lora.mtl_lora_output(X, W, bias, A, BS, lam, MIX, 0.5, 2.0)
    merged = mtl_lora.mtl_lora_merged(W, A, BS, lam, MIX, 0.5, 2.0)
    assert_close(lora.linear_output(X, merged, bias), y)
    full = lam if lam.dim() == 2 else torch.diag(lam)
    mixed = sum(p * up for p, up in zip(torch.softmax(MIX / 0.5, 0), BS, strict=True))
    # B = sum_k p_k B_k and Lambda A as the factors of LoRA.
    assert_close(y, lora.lora_output(X, W, bias, full @ A, mixed, alpha=2.0 * RANK))


def test_mtl_lora_takes_lambda_from_the_left():
    lam = rand(RANK, RANK, seed=29)
    y = mtl_lora.mtl_lora_output(X, W, BIAS, A, BS, lam, MIX, 0.5)
    assert_apart(y, mtl_lora.mtl_lora_output(X, W, BIAS, A, BS, lam.T, MIX, 0.5))


def test_mtl_lora_with_one_up_projection_is_lora():
    y = mtl_lora.mtl_lora_output(X, W, BIAS, A, [B], torch.ones(RANK), torch.tensor([0.7]), 0.5, 2.0)
    assert_close(y, lora.lora_output(X, W, BIAS, A, B, alpha=2.0 * RANK))


def test_mtl_mixing_temperature():
    assert_close(mtl_lora.mtl_mixing(MIX, 0.5), torch.softmax(MIX / 0.5, 0))
    assert_close(mtl_lora.mtl_mixing(MIX, 1e12), torch.full((N_UP,), 1 / N_UP, dtype=torch.float64))
    one_hot = torch.zeros(N_UP, dtype=torch.float64)
    one_hot[MIX.argmax()] = 1.0
    assert_close(mtl_lora.mtl_mixing(MIX, 1e-6), one_hot)


# --------------------------------------------------------------------------------------------------- fused


E = 3
FUSED_CASES = [
    (layout, H, K, order)
    for layout, H, K in [
        ("blocks", 4, 4),
        ("blocks", 6, 2),
        ("blocks", 4, 1),
        ("per_head", 4, 4),
        ("per_head", 1, 1),
        ("per_group", 6, 2),
        ("per_group", 4, 4),
        ("per_group", 4, 1),
    ]
    for order in [("q", "k", "v"), ("q", "v", "k"), ("v", "q", "k")]
]


def labelled_roles(H, K):
    """Per role rows whose entries say where they come from: (role, head, row of the head)."""
    return tuple(
        torch.tensor([[role, h, e] for h in range(heads) for e in range(E)], dtype=torch.float64)
        for role, heads in enumerate((H, K, K))
    )


@pytest.mark.parametrize(("layout", "H", "K", "order"), FUSED_CASES)
@pytest.mark.parametrize("dims", [1, 2])
def test_fused_split_is_the_inverse_of_join(layout, H, K, order, dims):
    roles = tuple(rand(*(heads * E, 5)[:dims], seed=seed) for seed, heads in enumerate((H, K, K), start=30))
    joined = fused.join(*roles, layout, H, K, E, order)
    assert joined.shape[0] == (H + 2 * K) * E
    back = fused.split(joined, layout, H, K, E, order)
    for one, other in zip(back, roles, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(fused.join(*back, layout, H, K, E, order), joined)


@pytest.mark.parametrize(("layout", "H", "K", "order"), FUSED_CASES)
def test_fused_rows_are_a_permutation(layout, H, K, order):
    rows = [row for role in fused.ROLES for row in fused.role_rows(role, layout, H, K, E, order)]
    assert sorted(rows) == list(range((H + 2 * K) * E))


def test_fused_layouts_written_out():
    def heads_of(layout, H, K, order=fused.ROLES):
        joined = fused.join(*labelled_roles(H, K), layout, H, K, E, order)
        assert joined[:, 2].tolist() == [0.0, 1.0, 2.0] * (H + 2 * K)
        return " ".join("qkv"[int(role)] + str(int(h)) for role, h, _ in joined[::E].tolist())

    assert heads_of("blocks", 4, 2) == "q0 q1 q2 q3 k0 k1 v0 v1"
    assert heads_of("blocks", 2, 2, ("q", "v", "k")) == "q0 q1 v0 v1 k0 k1"
    assert heads_of("per_head", 2, 2) == "q0 k0 v0 q1 k1 v1"
    assert heads_of("per_head", 2, 2, ("v", "q", "k")) == "v0 q0 k0 v1 q1 k1"
    assert heads_of("per_group", 4, 2) == "q0 q1 k0 v0 q2 q3 k1 v1"
    assert heads_of("per_group", 2, 2) == heads_of("per_head", 2, 2)
    assert heads_of("per_group", 4, 1) == heads_of("blocks", 4, 1)


def test_fused_refuses_impossible_layouts():
    roles = labelled_roles(4, 2)
    with pytest.raises(ValueError, match="per_head"):
        fused.join(*roles, "per_head", 4, 2, E)
    with pytest.raises(ValueError, match="divide"):
        fused.join(*roles, "per_group", 4, 3, E)
    with pytest.raises(ValueError, match="layout"):
        fused.join(*roles, "other", 4, 2, E)
    with pytest.raises(ValueError, match="order"):
        fused.join(*roles, "blocks", 4, 2, E, ("q", "k", "k"))
    with pytest.raises(ValueError, match="rows"):
        fused.join(*roles, "blocks", 4, 4, E)
    with pytest.raises(ValueError, match="rows"):
        fused.split(roles[0], "blocks", 4, 2, E)


def test_fused_per_head_is_bloom():
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    H = 4
    config = modeling.BloomConfig(hidden_size=H * E, n_head=H, n_layer=1, vocab_size=8)
    attention = modeling.BloomAttention(config, layer_idx=0)
    roles = [rand(H * E, 5, seed=seed) for seed in (33, 34, 35)]
    y = lora.linear_output(X, fused.join(*roles, "per_head", H, H, E))
    for actual, weight in zip(attention._reshape(y), roles, strict=True):
        expected = lora.linear_output(X, weight).unflatten(-1, (H, E)).transpose(1, 2)
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("layout", "H", "K", "options"),
    [
        ("per_group", 6, 2, {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("per_head", 4, 4, {"new_decoder_architecture": False, "multi_query": False}),
        ("blocks", 4, 1, {"new_decoder_architecture": False, "multi_query": True}),
    ],
)
def test_fused_layouts_are_those_of_falcon(layout, H, K, options):
    modeling = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    config = modeling.FalconConfig(
        hidden_size=H * E, num_attention_heads=H, num_hidden_layers=1, vocab_size=8, **options
    )
    attention = modeling.FalconAttention(config, layer_idx=0)
    roles = [rand(heads * E, 5, seed=seed) for seed, heads in ((36, H), (37, K), (38, K))]
    y = lora.linear_output(X, fused.join(*roles, layout, H, K, E))
    q, k, v = attention._split_heads(y)
    for actual, weight, heads in zip((q, k, v), roles, (H, K, K), strict=True):
        expected = lora.linear_output(X, weight).unflatten(-1, (heads, E))
        # The new architecture repeats each key/value head for the query heads of its group.
        expected = expected.repeat_interleave(actual.shape[2] // heads, dim=2)
        assert_close(actual, expected)
