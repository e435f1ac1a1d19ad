"""The SAE against an explicit dense masked matrix, with every gradient; types, shapes, bad input, copies, compiling."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import expander_sae
from expander_sae.dictionary import DenseDictionary, ExpanderDictionary
from expander_sae.mask import Mask
from expander_sae.pursuit import omp
from expander_sae.sae import SAE, TiedEncoder, TopK, UntiedEncoder

M, N, D, K = 8, 13, 3, 4
MASK = Mask.build("left-regular", d_in=M, d_sae=N, degree=D, seed=2)

MAKERS: dict[str, Callable[..., SAE]] = {
    "expander": lambda **options: SAE.expander(MASK, K, **options),
    "dense": lambda **options: SAE.dense(M, N, k=K, **options),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
untied = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def shaken(sae: SAE, seed: int = 0, dtype: torch.dtype = torch.float64) -> SAE:
    """The SAE with every parameter, biases too, at random."""
    sae = sae.to(torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + 1000 * number))
    return sae.to(dtype)


def reader(sae: SAE) -> Tensor:
    """Dense columns of an untied encoder."""
    return sae.encoder.own(sae.dictionary.matrix()).to_dense().detach()


def explicit(sae: SAE, h: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Dense code ``(B, n)``, reconstruction, and leaves by parameter name: the paper's formulas and nothing else."""
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in sae.named_parameters()}

    def columns(name: str) -> Tensor:
        if isinstance(sae.dictionary, DenseDictionary):
            return leaves[name].T
        mask = torch.nn.functional.one_hot(sae.dictionary.rows.long(), sae.d_in).to(h.dtype)
        return torch.einsum("ntm,nt->mn", mask, leaves[name])

    decoder = columns("dictionary.values")
    decoder = decoder / decoder.norm(dim=0, keepdim=True) if sae.dictionary.unit_norm else decoder
    own = columns("encoder.values") if isinstance(sae.encoder, UntiedEncoder) else decoder
    z = (h - leaves["b_dec"]) @ own + leaves["encoder.b_enc"]
    x = z * torch.zeros_like(z).scatter(1, z.topk(sae.k, dim=1).indices, 1.0)
    x = x if sae.signed else x.relu()
    return x, x @ decoder.T + leaves["b_dec"], leaves


@st.composite
def saes(draw: st.DrawFn) -> SAE:
    m, n = draw(st.integers(1, 10)), draw(st.integers(1, 16))
    k = draw(st.integers(1, n))
    options = {name: draw(st.booleans()) for name in ("untied", "relu", "unit_norm")}
    if draw(st.booleans()):
        mask = Mask.build("balanced", d_in=m, d_sae=n, degree=draw(st.integers(1, m)), seed=draw(st.integers(0, 9)))
        return shaken(SAE.expander(mask, k, **options), draw(st.integers(0, 99)))
    return shaken(SAE.dense(m, n, k=k, **options), draw(st.integers(0, 99)))


@given(sae=saes(), batch=st.integers(0, 4))
def test_code_reconstruction_and_every_gradient_are_the_explicit_ones(sae: SAE, batch: int) -> None:
    h = normal(batch, sae.d_in)
    inputs = h.clone().requires_grad_()
    code = sae.encode(inputs)
    recon = sae.decode(code)
    assert code.indices.shape == code.values.shape == (batch, sae.k)
    assert code.indices.dtype == torch.int32
    ((recon - h).square().sum() + code.values.pow(3).sum()).backward()

    twin = h.clone().requires_grad_()
    x, expected, leaves = explicit(sae, twin)
    ((expected - h).square().sum() + x.pow(3).sum()).backward()
    torch.testing.assert_close(code.to_dense(sae.d_sae), x)
    torch.testing.assert_close(recon, expected)
    torch.testing.assert_close(sae(h), expected)
    torch.testing.assert_close(inputs.grad, twin.grad)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expander_of_full_degree_is_a_dense_sae() -> None:
    full = shaken(SAE.expander(Mask.build("left-regular", d_in=M, d_sae=N, degree=M), K))
    dense = SAE.dense(M, N, k=K).double()
    with torch.no_grad():
        dense.dictionary.values.copy_(full.dictionary.values)
        dense.encoder.b_enc.copy_(full.encoder.b_enc)
        dense.b_dec.copy_(full.b_dec)
    h = normal(20, M)
    assert torch.equal(full.encode(h).indices, dense.encode(h).indices)
    torch.testing.assert_close(full(h), dense(h))
    assert full.num_values == dense.num_values


@makers
@untied
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(make: Callable[..., SAE], untied: bool, dtype: torch.dtype) -> None:
    sae = make(untied=untied).to(dtype)
    assert {parameter.dtype for parameter in sae.parameters()} == {dtype} == {sae.dtype}
    assert sae.dictionary.to_dense().dtype == dtype
    assert make is not MAKERS["expander"] or sae.dictionary.rows.dtype == torch.int32
    h = normal(9, M).to(dtype)
    code = sae.encode(h)
    assert code.values.dtype == dtype
    exact = sae.double()
    expected = exact.decode(exact.encode(h.double()))
    sae.to(dtype)
    recon = sae(h)
    assert recon.dtype == dtype
    # At most a swap of nearly equal features: compare the errors, not the entries.
    tolerance = 30 * torch.finfo(dtype).eps
    error, exact_error = (h - recon).double().norm(), (h.double() - expected).norm()
    assert abs(error - exact_error) < tolerance * h.double().norm()
    recon.square().sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in sae.parameters())


@makers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_of_another_type_are_computed_on_in_the_saes_own(
    make: Callable[..., SAE], dtype: torch.dtype
) -> None:
    sae, h = make(), normal(5, M).to(dtype)
    assert sae.encode(h).values.dtype == torch.float32
    recon = sae(h)
    assert recon.dtype == dtype
    assert torch.equal(recon, sae(h.float()).to(dtype))


@makers
@untied
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0), (2, 1, 3)])
def test_leading_dimensions(make: Callable[..., SAE], untied: bool, shape: tuple[int, ...]) -> None:
    sae, h = shaken(make(untied=untied)), normal(*shape, M)
    code, flat = sae.encode(h), sae.encode(h.reshape(-1, M))
    assert code.indices.shape == code.values.shape == (*shape, K)
    assert torch.equal(code.indices.reshape(-1, K), flat.indices)
    assert torch.equal(code.values.reshape(-1, K), flat.values)
    assert torch.equal(sae(h).reshape(-1, M), sae(h.reshape(-1, M)))
    assert sae(h).shape == h.shape


@makers
def test_non_contiguous_activations(make: Callable[..., SAE]) -> None:
    sae, h = shaken(make()), normal(5, M)
    strided = h.T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(sae(strided), sae(h))


@makers
def test_all_features_active(make: Callable[..., SAE]) -> None:
    sae = shaken(make())
    sae.sparsity.k = N
    h = normal(3, M)
    w = sae.dictionary.to_dense()
    torch.testing.assert_close(sae(h), ((h - sae.b_dec) @ w + sae.encoder.b_enc) @ w.T + sae.b_dec)


# Bad input


@makers
@pytest.mark.parametrize("call", [lambda sae, h: sae(h), lambda sae, h: sae.encode(h)], ids=["forward", "encode"])
def test_bad_activations(make: Callable[..., SAE], call: Callable[[SAE, Tensor], object]) -> None:
    sae = make()
    for shape in [(4, M - 1), (4, M + 1), (M // 2, 2), ()]:
        with pytest.raises(ValueError, match=f"this SAE reads vectors of width d_in = {M}"):
            call(sae, torch.zeros(shape))
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(TypeError, match=r"must be floating point, got torch.*; convert them with .float\(\)"):
            call(sae, torch.zeros(4, M, dtype=dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        h = torch.zeros(2, 3, M)
        h[1, 0, 5] = h[0, 2, 0] = bad
        with pytest.raises(ValueError, match="2 of the 6 activation vectors hold NaN or infinity; leave them out"):
            call(sae, h)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    h = torch.zeros(2, M)
    h[0, 0], h[0, 1] = float("inf"), -float("inf")
    with pytest.raises(ValueError, match="1 of the 2"):
        SAE.dense(M, N, k=K)(h)


def test_large_finite_activations_are_no_error() -> None:
    sae = SAE.dense(M, N, k=K).double()
    assert torch.isfinite(sae.encode(torch.full((4, M), 1e307, dtype=torch.float64)).indices).all()


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_k_out_of_range(k: int) -> None:
    for make in (lambda: SAE.expander(MASK, k), lambda: SAE.dense(M, N, k=k)):
        with pytest.raises(ValueError, match=f"k must be between 1 and d_sae = {N}, got {k}"):
            make()


@pytest.mark.parametrize(("d_in", "d_sae"), [(0, 5), (5, 0), (-1, 5)])
def test_sizes_below_one(d_in: int, d_sae: int) -> None:
    with pytest.raises(ValueError, match="d_in and d_sae must be at least 1"):
        SAE.dense(d_in, d_sae, k=1)


# Construction


@makers
@untied
@pytest.mark.parametrize("unit_norm", [True, False])
def test_parameters_are_memory_of_their_own(make: Callable[..., SAE], untied: bool, unit_norm: bool) -> None:
    sae = make(untied=untied, unit_norm=unit_norm)
    pointers = [parameter.data_ptr() for parameter in sae.parameters()]
    assert len(pointers) == len(set(pointers)) == (4 if untied else 3)
    if untied:
        torch.testing.assert_close(reader(sae), sae.dictionary.to_dense())
        assert sae.num_values == 2 * sae.dictionary.num_values


@makers
def test_the_seed_decides(make: Callable[..., SAE]) -> None:
    assert torch.equal(make(seed=3).dictionary.to_dense(), make(seed=3).dictionary.to_dense())
    assert not torch.equal(make(seed=3).dictionary.to_dense(), make(seed=4).dictionary.to_dense())
    before = torch.random.get_rng_state()
    make(seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_counts() -> None:
    sae = SAE.expander(MASK, K, untied=True).bfloat16()
    assert (sae.d_in, sae.d_sae, sae.k, sae.num_values) == (M, N, K, 2 * N * D)
    assert sae.num_bytes == 2 * (2 * N * D + N + M)
    learned = SAE.expander(Mask.from_rows(MASK.rows, M), K)
    assert learned.num_bytes == 4 * (N * D + N + M) + N * D
    assert SAE.dense(M, N, k=K).num_values == M * N


# The rest of its life


@makers
@untied
@pytest.mark.parametrize("factor", [0.037, 1.0, 8.0, 1234.5])
def test_rescaling(make: Callable[..., SAE], untied: bool, factor: float) -> None:
    sae = shaken(make(untied=untied, relu=True))
    h = normal(50, M)
    before, recon = sae.encode(h * factor), sae(h * factor)
    dictionary = sae.dictionary.to_dense()
    sae.rescale_(factor)
    after = sae.encode(h)
    assert torch.equal(after.indices, before.indices)
    torch.testing.assert_close(after.values, before.values / factor)
    torch.testing.assert_close(sae(h), recon / factor)
    assert torch.equal(sae.dictionary.to_dense(), dictionary)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in sae.parameters())


def test_rescaling_by_a_power_of_two_is_exact() -> None:
    sae, h = shaken(SAE.expander(MASK, K), dtype=torch.float32), normal(50, M).float()
    expected = sae(h * 4) / 4
    sae.rescale_(4.0)
    assert torch.equal(sae(h), expected)


@makers
@untied
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(make: Callable[..., SAE], untied: bool, copier: Callable[[SAE], SAE]) -> None:
    sae, h = shaken(make(untied=untied)), normal(5, M)
    sae.metadata["training"] = {"seconds": 1.0}
    other = copier(sae)
    assert torch.equal(other(h), sae(h))
    assert other.config() == sae.config()
    assert other.encoder.kind == sae.encoder.kind
    before = sae(h)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.metadata["training"]["seconds"] = 2.0
    assert torch.equal(sae(h), before)
    assert sae.metadata["training"]["seconds"] == 1.0


def test_a_state_brings_its_supports_along() -> None:
    sae = shaken(SAE.expander(MASK, K, untied=True))
    other = SAE.expander(Mask.build("balanced", d_in=M, d_sae=N, degree=D, seed=8), K, untied=True).double()
    theirs = other.dictionary.mask
    other.load_state_dict(sae.state_dict())
    h = normal(5, M)
    assert torch.equal(other(h), sae(h))
    assert other.dictionary.recipe == sae.dictionary.recipe
    assert other.config() == sae.config()
    assert theirs.sha256 == Mask.from_recipe(theirs.recipe).sha256  # a mask handed out before stays as it was
    with pytest.raises(RuntimeError, match="size mismatch"):
        SAE.expander(Mask.build("balanced", d_in=M, d_sae=N, degree=D + 1), K, untied=True).load_state_dict(
            sae.state_dict()
        )
    wider = SAE.expander(Mask.build("balanced", d_in=M + 1, d_sae=N, degree=D), K, untied=True)
    with pytest.raises(ValueError, match="the state is of a dictionary with d_in = 8, this one has d_in = 9"):
        wider.load_state_dict(sae.state_dict())
    with pytest.raises(ValueError, match="not distinct and ascending"):
        other.load_state_dict(sae.state_dict() | {"dictionary.rows": sae.dictionary.rows.flip(1)})


def test_supports_that_moved() -> None:
    sae = shaken(SAE.expander(MASK, K, untied=True))
    before, values = sae.dictionary.to_dense(), normal(2, D)
    sae.dictionary.move(torch.tensor([2, 5]), torch.tensor([[7, 0, 3], [1, 2, 6]]), values)
    assert sae.dictionary.recipe is None
    assert sae.dictionary.rows[[2, 5]].tolist() == [[0, 3, 7], [1, 2, 6]]
    after = sae.dictionary.to_dense()
    torch.testing.assert_close(after[[7, 0, 3], 2], values[0] / values[0].norm())
    kept = [j for j in range(N) if j not in (2, 5)]
    assert torch.equal(after[:, kept], before[:, kept])
    assert (reader(sae)[:, 2] != 0).nonzero().flatten().tolist() == [0, 3, 7]  # one copy: the encoder moved with it
    assert MASK.sha256 == Mask.from_recipe(MASK.recipe).sha256
    twin = SAE.expander(MASK, K, untied=True).double()
    twin.load_state_dict(sae.state_dict())
    assert twin.config() == sae.config()
    with pytest.raises(ValueError, match="distinct and ascending"):
        sae.dictionary.move(torch.tensor([2]), torch.tensor([[7, 7, 3]]), values[:1])


def test_float16_refuses_what_it_cannot_hold() -> None:
    sae = SAE.expander(MASK, K).half()
    h = normal(5, M).float()
    h[3, 2] = 70_000
    with pytest.raises(ValueError, match="1 of the 5 activation vectors exceed 65504, the largest float16"):
        sae.encode(h)
    assert torch.isfinite(SAE.expander(MASK, K).bfloat16()(h)).all()


@makers
@untied
def test_state_dict_round_trip(make: Callable[..., SAE], untied: bool) -> None:
    sae, other = shaken(make(untied=untied)), make(untied=untied, seed=5).double()
    other.load_state_dict(sae.state_dict())
    h = normal(5, M)
    assert torch.equal(other(h), sae(h))


@makers
def test_training_through_reset_features(make: Callable[..., SAE]) -> None:
    sae = shaken(make(untied=True))
    targets = normal(2, M)
    bias = sae.encoder.b_enc.detach().clone()
    sae.reset_features(torch.tensor([1, 6]), targets)
    w, own = sae.dictionary.to_dense(), reader(sae)
    for j, target in zip((1, 6), targets, strict=True):
        aimed = target * MASK.to_dense()[:, j] if make is MAKERS["expander"] else target
        torch.testing.assert_close(w[:, j], aimed / aimed.norm())
        torch.testing.assert_close(own[:, j], aimed / aimed.norm())
    assert (sae.encoder.b_enc == bias).tolist() == [j not in (1, 6) for j in range(N)]


@makers
def test_reconstruction_with_some_features(make: Callable[..., SAE]) -> None:
    sae, h = shaken(make()), normal(6, M)
    features = torch.tensor([0, 3, 4, 9, 12])
    w = sae.dictionary.to_dense()[:, features]
    z = (h - sae.b_dec) @ w + sae.encoder.b_enc[features]
    x = z * torch.zeros_like(z).scatter(1, z.topk(2, dim=1).indices, 1.0)
    torch.testing.assert_close(sae.reconstruct_with(h, features, 2), x @ w.T)


def test_compiled_expander_is_one_graph() -> None:
    sae = shaken(SAE.expander(MASK, K, untied=True, relu=True), dtype=torch.float32)
    compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
    for batch in (4, 7):
        h = normal(batch, M).float()
        torch.testing.assert_close(compiled(h), sae(h))
        expected = torch.autograd.grad(sae(h).square().sum(), list(sae.parameters()))
        found = torch.autograd.grad(compiled(h).square().sum(), list(sae.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_compiled_dense() -> None:
    sae = shaken(SAE.dense(M, N, k=K), dtype=torch.float32)
    h = normal(4, M).float()
    torch.testing.assert_close(torch.compile(sae, backend="aot_eager")(h), sae(h))


def test_another_encoder_on_the_same_dictionary() -> None:
    sae, h = shaken(SAE.expander(MASK, K)), normal(10, M)
    sae.metadata |= {"metrics": {"fvu": 0.5}, "trained_on": {"layer": 3}}
    other = sae.with_encoder("omp", k=3, block=1)
    code = other.encode(h)
    expected = omp(h - sae.b_dec, sae.dictionary.matrix().detach(), 3, block=1)
    assert torch.equal(code.indices, expected.indices)
    torch.testing.assert_close(code.values, expected.values)
    assert other.dictionary is sae.dictionary
    assert other.b_dec is sae.b_dec
    assert other.metadata == {"trained_on": {"layer": 3}}
    assert other.num_values == sae.num_values
    assert (h - other(h)).norm() < (h - sae(h)).norm()


def test_a_pursuit_sae_is_trained_through_its_decoder() -> None:
    sae, h = shaken(SAE.expander(MASK, K)).with_encoder("omp"), normal(10, M)
    code, recon = sae.encode(h), sae(h)
    (h - recon).square().sum().backward()
    values = sae.dictionary.values.detach().requires_grad_()
    w = (values / values.norm(dim=1, keepdim=True))[code.indices.long()]  # (B, k, d)
    expected = torch.zeros(10, M, dtype=torch.float64).scatter_add(
        1, MASK.rows[code.indices.long()].long().flatten(1), (w * code.values.unsqueeze(2)).flatten(1)
    )
    (h - expected - sae.b_dec.detach()).square().sum().backward()
    torch.testing.assert_close(sae.dictionary.values.grad, values.grad)
    assert sae.b_dec.grad is not None


def test_the_package_offers_what_the_readme_imports() -> None:
    from expander_sae import SAE as public_sae
    from expander_sae import Mask as public_mask
    from expander_sae import SparseCode

    assert public_sae is SAE
    assert public_mask is Mask
    assert isinstance(SAE.dense(M, N, k=np.int64(K)).encode(torch.zeros(1, M)), SparseCode)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="has no attribute 'Masks'"):
        _ = expander_sae.Masks


def test_foreign_parts_fit_together() -> None:
    dictionary = ExpanderDictionary(MASK, normal(N, D).float(), unit_norm=False)
    sae = SAE(dictionary, TiedEncoder(N), TopK(N, K))
    assert sae(torch.zeros(2, M)).shape == (2, M)
