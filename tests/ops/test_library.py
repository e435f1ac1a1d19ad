"""The operators' wiring: gradients against a dense matrix, torch.library's own checks, compiling, dispatch, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from expander_sae import ops
from expander_sae.mask import Mask
from expander_sae.ops import Selection, SparseCode, library, reference

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not ops.has_fast_cpu(), reason="no C++ kernels"))]
M, N, D, B, K = 7, 11, 3, 4, 3
ROWS = Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=1).rows


def normal(*shape: int, seed: int = 0, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


def supports(batch: int = B, k: int = K, n: int = N) -> Tensor:
    """Indices with a repetition in every sample."""
    indices = torch.randint(0, n, (batch, k), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    indices[:, -1] = indices[:, 0]
    return indices


def dense(rows: Tensor, values: Tensor, m: int) -> Tensor:
    """``(m, n)``, differentiable, written without the code under test."""
    one_hot = torch.nn.functional.one_hot(rows.long(), m).to(values.dtype)  # (n, d, m)
    return torch.einsum("ntm,nt->mn", one_hot, values)


# Every operator as a function of its differentiable inputs.
DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "correlate": (lambda b: lambda h, v: ops.correlate(h, ROWS, v, backend=b), lambda: (normal(B, M), normal(N, D))),
    "encode": (
        lambda b: lambda h, v, c: ops.encode(h, ROWS, v, c, Selection(K), backend=b).values,
        lambda: (normal(B, M), normal(N, D), normal(N)),
    ),
    "encode, no bias": (
        lambda b: lambda h, v: ops.encode(h, ROWS, v, None, Selection(K), backend=b).values,
        lambda: (normal(B, M), normal(N, D)),
    ),
    "encode, relu": (
        lambda b: lambda h, v, c: ops.encode(h, ROWS, v, c - 1.5, Selection(N, 0.0), backend=b).values,
        lambda: (normal(B, M), normal(N, D), normal(N)),
    ),
    "encode, magnitude": (
        lambda b: lambda h, v, c: ops.encode(h, ROWS, v, c, Selection(K, rank="magnitude"), backend=b).values,
        lambda: (normal(B, M), normal(N, D), normal(N)),
    ),
    "decode": (
        lambda b: lambda x, v: ops.decode(SparseCode(supports(), x), ROWS, v, M, backend=b),
        lambda: (normal(B, K), normal(N, D)),
    ),
    "correlate_at": (
        lambda b: lambda h, v: ops.correlate_at(h, supports(), ROWS, v, backend=b),
        lambda: (normal(B, M), normal(N, D)),
    ),
    "values_grad": (
        lambda b: lambda h, c: ops.values_grad(h, supports(), c, ROWS, backend=b),
        lambda: (normal(B, M), normal(B, K)),
    ),
    "gram": (lambda b: lambda v: ops.gram(supports(), ROWS, v, M, backend=b), lambda: (normal(N, D),)),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_once_and_twice(name: str, backend: str) -> None:
    make, inputs = DIFFERENTIABLE[name]
    function, tensors = make(backend), inputs()
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
@given(data=st.data())
def test_encode_and_decode_against_a_dense_matrix(backend: str, relu: bool, data: st.DataObject) -> None:
    m, n, batch = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 20)), data.draw(st.integers(0, 4))
    d, k = data.draw(st.integers(1, m)), data.draw(st.integers(1, n))
    rows = Mask.build("left-regular", d_in=m, d_sae=n, degree=d, seed=data.draw(st.integers(0, 99))).rows
    seed = data.draw(st.integers(0, 99))

    def run(encode_decode: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = normal(batch, m, seed=seed), normal(n, d, seed=seed), normal(n, seed=seed)
        code, recon = encode_decode(*leaves)
        (recon.square().sum() + (code**3).sum()).backward()
        return [code.detach(), recon.detach(), *(leaf.grad for leaf in leaves)]

    def sparse(h: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        code = ops.encode(h, rows, values, bias, Selection(k, 0.0 if relu else None), backend=backend)
        return code.to_dense(n), ops.decode(code, rows, values, m, backend=backend)

    def explicit(h: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        w = dense(rows, values, m)
        z = h @ w + bias
        kept = torch.zeros_like(z).scatter(1, z.topk(k, dim=1).indices, 1.0)
        code = z * kept
        code = code.relu() if relu else code
        return code, code @ w.T

    for found, expected in zip(run(sparse), run(explicit), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_features_get_exactly_no_gradient(backend: str) -> None:
    h, values, bias = normal(B, M), normal(N, D), normal(N)
    code = ops.encode(h, ROWS, values, bias, Selection(1), backend=backend)
    ops.decode(code, ROWS, values, M, backend=backend).square().sum().backward()
    active = torch.zeros(N, dtype=torch.bool)
    active[code.indices.flatten().long()] = True
    assert 0 < active.sum() < N
    assert (values.grad[~active] == 0).all()
    assert (bias.grad[~active] == 0).all()
    assert (values.grad[active] != 0).any(dim=1).all()


@pytest.mark.parametrize("wanted", ["h", "values", "bias"])
def test_only_the_gradient_that_is_asked_for(wanted: str) -> None:
    tensors = {"h": normal(B, M, grad=False), "values": normal(N, D, grad=False), "bias": normal(N, grad=False)}
    tensors[wanted].requires_grad_()
    code = ops.encode(tensors["h"], ROWS, tensors["values"], tensors["bias"], Selection(K))
    code.values.sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == {wanted}
    assert not code.indices.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_follow_their_tensors(dtype: torch.dtype) -> None:
    """Parameters may be wider than activations; each gradient has its tensor's type and the sum's precision."""
    batch = 4000  # a running sum in 16 bits would stop growing long before
    h = torch.ones(batch, M, dtype=dtype)
    values = torch.ones(N, D, requires_grad=True)
    bias = torch.zeros(N, requires_grad=True)
    code = ops.encode(h, ROWS, values, bias, Selection(1))
    assert code.values.dtype == dtype
    code.values.sum().backward()
    assert values.grad.dtype == bias.grad.dtype == torch.float32
    assert bias.grad.tolist() == [batch] + [0] * (N - 1)
    assert (values.grad[0] == batch).all()


OPERATORS = {
    "correlate": lambda: (normal(B, M), ROWS, normal(N, D)),
    "encode": lambda: (normal(B, M), ROWS, normal(N, D), normal(N), normal(M), K, False, 0.0, True),
    "decode": lambda: (supports(), normal(B, K), ROWS, normal(N, D), M),
    "correlate_at": lambda: (normal(B, M), supports(), ROWS, normal(N, D)),
    "values_grad": lambda: (normal(B, M), supports(), normal(B, K), ROWS),
    "gram": lambda: (supports(), ROWS, normal(N, D), M),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "encode":  # that last check adds up all outputs and fails on integer ones; compiled below instead
        checks.pop()
    torch.library.opcheck(getattr(torch.ops.expander_sae, name).default, OPERATORS[name](), test_utils=checks)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fake_tensors_have_the_true_shapes_and_types(name: str, dtype: torch.dtype) -> None:
    arguments = [
        a.detach().to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in OPERATORS[name]()
    ]
    operator = getattr(torch.ops.expander_sae, name)
    true = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for one, other in zip(*((x if isinstance(x, tuple | list) else (x,)) for x in (true, fake)), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def test_compiled_encode_with_a_dynamic_batch() -> None:
    def score(h: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return ops.encode(h, ROWS, values, bias, Selection(K)).values.square().sum()

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 50):
        tensors = normal(batch, M), normal(N, D), normal(N)
        expected = torch.autograd.grad(score(*tensors), tensors)
        for found, wanted in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_compiled_training_step_is_one_graph_with_the_same_gradients() -> None:
    def loss(h: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        code = ops.encode(h, ROWS, values, bias, Selection(K, 0.0))
        return (ops.decode(code, ROWS, values, M) - h).square().sum() + ops.correlate(h, ROWS, values).sum()

    # aot_eager traces forward and backward with fake tensors, as inductor does, but writes no C++.
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for batch in (B, 2 * B):
        tensors = normal(batch, M), normal(N, D), normal(N)
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for found, wanted in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 3), (2, 0), (2, 1, 3)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    h, values, bias = normal(*shape, M, grad=False), normal(N, D, grad=False), normal(N, grad=False)
    flat = h.reshape(-1, M)
    code = ops.encode(h, ROWS, values, bias, Selection(K))
    assert code.indices.shape == code.values.shape == (*shape, K)
    assert code.batch_shape == shape
    expected = ops.encode(flat, ROWS, values, bias, Selection(K))
    assert torch.equal(code.indices.reshape(-1, K), expected.indices)
    assert torch.equal(ops.correlate(h, ROWS, values), ops.correlate(flat, ROWS, values).reshape(*shape, N))
    assert torch.equal(ops.decode(code, ROWS, values, M), ops.decode(expected, ROWS, values, M).reshape(*shape, M))
    at = ops.correlate_at(h, code.indices, ROWS, values)
    torch.testing.assert_close(at, code.values - bias[code.indices.long()])
    assert ops.gram(code.indices, ROWS, values, M).shape == (*shape, K, K)
    assert ops.values_grad(h, code.indices, code.values, ROWS).shape == (N, D)
    assert code.to_dense(N).shape == (*shape, N)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_feature_may_be_active(backend: str) -> None:
    h, values = normal(B, M, grad=False), normal(N, D, grad=False)
    code = ops.encode(h, ROWS, values, None, Selection(N), backend=backend)
    torch.testing.assert_close(code.to_dense(N), h @ dense(ROWS, values, M))
    assert (code.values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_gradients_and_inputs(backend: str) -> None:
    def run(h: Tensor, values: Tensor) -> list[Tensor]:
        h, values = h.detach().requires_grad_(), values.detach().requires_grad_()
        code = ops.encode(h, ROWS, values, None, Selection(K), backend=backend)
        recon = ops.decode(code, ROWS, values, M, backend=backend)
        recon.backward(h.detach().square())
        return [recon.detach(), h.grad, values.grad]

    h, values = normal(B, M, grad=False), normal(N, D, grad=False)
    for found, expected in zip(run(h.T.contiguous().T, values.T.contiguous().T), run(h, values), strict=True):
        torch.testing.assert_close(found, expected)


# Dispatch


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends whose ``correlate`` ran, in order."""
    seen: list[str] = []

    def spy(name: str) -> Callable[..., Tensor]:
        def correlate(*arguments: Tensor) -> Tensor:
            seen.append(name)
            return reference.correlate(*arguments)

        return correlate

    class Fake:
        def __init__(self, name: str) -> None:
            self.correlate = spy(name)

        available = staticmethod(lambda device: device.type == "cpu")
        why_not = staticmethod(lambda device: "it is only a fake")

    monkeypatch.setattr(library, "_BACKENDS", {name: Fake(name) for name in ("reference", "cpu", "triton")})
    monkeypatch.delenv(library.BACKEND_VARIABLE, raising=False)
    return seen


def test_argument_before_environment_before_the_fast_one(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    h, values = normal(B, M, grad=False), normal(N, D, grad=False)
    ops.correlate(h, ROWS, values)
    monkeypatch.setenv("EXPANDER_SAE_BACKEND", "reference")
    ops.correlate(h, ROWS, values)
    ops.correlate(h, ROWS, values, backend="triton")
    monkeypatch.setenv("EXPANDER_SAE_BACKEND", "")
    ops.correlate(h, ROWS, values)
    assert called == ["cpu", "reference", "triton", "cpu"]


def test_backward_stays_on_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> Tensor:
        raise AssertionError("another backend ran")

    for name in ("values_grad", "decode", "correlate_at", "encode"):
        monkeypatch.setattr(library._BACKENDS["cpu"], name, refuse)
    values = normal(N, D)
    code = ops.encode(normal(B, M), ROWS, values, normal(N), Selection(K), backend="reference")
    ops.decode(code, ROWS, values, M, backend="reference").sum().backward()
    assert values.grad is not None


def test_which_backend_is_fast() -> None:
    assert ops.resolve_backend(None, torch.device("cpu")) == ("cpu" if ops.has_fast_cpu() else "reference")
    assert ops.resolve_backend(None, torch.device("meta")) == "reference"


def test_reference_stands_in_where_no_kernels_were_built(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library._BACKENDS["cpu"], "available", lambda device: False)
    ops.correlate(normal(B, M), ROWS, normal(N, D))
    assert called == ["reference"]


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "unknown backend 'cuda'; choose one of 'reference', 'cpu', 'triton'"
    with pytest.raises(ValueError, match=message):
        ops.correlate(normal(B, M), ROWS, normal(N, D), backend="cuda")
    monkeypatch.setenv("EXPANDER_SAE_BACKEND", "cuda")
    with pytest.raises(ValueError, match=message):
        ops.resolve_backend(None, torch.device("cpu"))


def test_a_backend_that_cannot_run_here_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run on cuda here: .+"):
        ops.resolve_backend("cpu", torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run on cpu here: .+"):
        ops.resolve_backend("triton", torch.device("cpu"))


def test_has_fast_cpu_is_about_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ops.has_fast_cpu()
    for name in ("reference", "triton"):
        monkeypatch.setenv("EXPANDER_SAE_BACKEND", name)
        assert ops.has_fast_cpu() == before


# Errors


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be between 1 and d_sae = {N}, got {k}|capacity must be at least 1"):
        ops.encode(normal(B, M), ROWS, normal(N, D), None, Selection(k))


@pytest.mark.parametrize(
    "call",
    [
        lambda h, values: ops.encode(h, ROWS, values, None, Selection(K), m=M),
        lambda h, values: ops.correlate(h, ROWS, values, m=M),
        lambda h, values: ops.correlate_at(h, supports(), ROWS, values, m=M),
    ],
)
def test_bad_activations(call: Callable[[Tensor, Tensor], object]) -> None:
    values = normal(N, D)
    for width in (M - 1, M + 1):
        with pytest.raises(ValueError, match=f"activations have width {width}, the dictionary has d_in = {M}"):
            call(normal(B, width), values)
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(
            TypeError, match=r"activations must be floating point, got .*; convert them with .float\(\)"
        ):
            call(torch.ones(B, M).to(dtype), values)


@pytest.mark.parametrize("shape", [(N + 1,), (1,), (1, N)])
def test_bad_bias(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"b_enc must have shape \({N},\)"):
        ops.encode(normal(B, M), ROWS, normal(N, D), torch.zeros(shape, dtype=torch.float64), Selection(K))


def test_sparse_code_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        SparseCode(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4))


def test_sparse_code() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    code = SparseCode(torch.tensor([[1, 1], [0, 3]], dtype=torch.int32), values)
    assert code.to_dense(4).tolist() == [[0, 3, 0, 0], [3, 0, 0, 4]]
    assert code.k == 2
    assert not code.detach().values.requires_grad
    assert code.reshape(2, 1).batch_shape == (2, 1)
    code.to_dense(4).square().sum().backward()
    assert values.grad.tolist() == [[6, 6], [6, 8]]


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_center_and_thresholds_by_feature(backend: str, data: st.DataObject) -> None:
    """Every gradient too, that of the centre among them, against the formula on dense matrices."""
    batch, k = data.draw(st.integers(0, 4)), data.draw(st.integers(1, N))
    threshold = normal(N, seed=data.draw(st.integers(0, 99)), grad=False) if data.draw(st.booleans()) else 0.3
    leaves = normal(batch, M), normal(N, D), normal(N), normal(M)
    h, values, bias, center = leaves
    code = ops.encode(h, ROWS, values, bias, Selection(k, threshold), center=center, backend=backend)
    z = (h - center) @ dense(ROWS, values, M) + bias
    margin = z - threshold
    kept = torch.zeros_like(z).scatter(1, margin.topk(k, dim=1).indices, 1.0) * (margin > 0)
    torch.testing.assert_close(code.to_dense(N), z * kept)
    assert (code.indices[code.values == 0] == 0).all()
    found = torch.autograd.grad(code.values.pow(3).sum(), leaves, allow_unused=True)
    for one, other in zip(found, torch.autograd.grad((z * kept).pow(3).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_counted(backend: str, dtype: torch.dtype) -> None:
    for batch, width, bad in ((3, M, float("nan")), (70, 33, float("inf")), (17, 40, -float("inf"))):
        h = normal(batch, width, grad=False).to(dtype)
        rows = Mask.build("left-regular", d_in=width, d_sae=N, degree=2).rows
        values = normal(N, 2, grad=False).to(dtype)
        ops.encode(h, rows, values, None, Selection(3), backend=backend, check_finite=True)
        for sample, place in ((0, 0), (batch - 1, width - 1), (batch // 2, width // 2)):
            h[sample, place] = bad
        with pytest.raises(ValueError, match=f"3 of the {batch} activation vectors hold NaN or infinity"):
            ops.encode(h, rows, values, None, Selection(3), backend=backend, check_finite=True)
        ops.encode(h, rows, values, None, Selection(3), backend=backend)
