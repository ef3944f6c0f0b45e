import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from vllm_lvspec.kernels.attention_mass import (
    MAX_QUERIES,
    attention_mass,
    attention_mass_reference,
    gather_keys,
    launch_attention_mass,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Kernel and reference multiply the same numbers and add them in float32, whatever dtype they come in.
TOLERANCE = {"atol": 1e-5, "rtol": 2e-4}
# Caches that hold values beside the keys: [num_blocks, num_kv_heads, block_size, head_size], however they lie.
LAYOUTS = {
    "heads before slots": lambda b, h, s, d: ((b, h, s, 2 * d), lambda cache: cache[..., :d]),
    "slots before heads": lambda b, h, s, d: ((b, s, h, 2 * d), lambda cache: cache.transpose(1, 2)[..., d:]),
    "values in a half of their own": lambda b, h, s, d: ((2, b, s, h, d), lambda cache: cache[0].transpose(1, 2)),
}


def make_batch(
    query_positions,
    visual_positions,
    num_heads,
    num_kv_heads,
    head_size,
    block_size,
    dtype=torch.float32,
    device="cpu",
    layout="heads before slots",
    spread=1.0,
    seed=0,
):
    """Arguments of `attention_mass` and the same keys in order of places, all that a query sees and no more.

    Every other number in the cache is NaN and every other block's id is none, so that what is read beyond is seen.
    """
    generator = torch.Generator().manual_seed(seed)
    num_keys = max(query_positions) + 1
    num_blocks = -(-num_keys // block_size)
    keys = (torch.randn(num_keys, num_kv_heads, head_size, generator=generator) * spread).to(dtype)
    shape, view = LAYOUTS[layout](num_blocks + 3, num_kv_heads, block_size, head_size)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    table = torch.full((num_blocks + 2,), 2**30, dtype=torch.int32)
    table[:num_blocks] = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks]
    for place in range(num_keys):
        view(cache)[table[place // block_size], :, place % block_size] = keys[place]
    # Queries are a slice of what one matrix makes of a state.
    states = torch.randn(len(query_positions), num_heads + 2, head_size, generator=generator).to(dtype)
    states[:, num_heads:] = float("nan")
    queries = states.to(device)[:, :num_heads]
    places, visual = (torch.tensor(x, dtype=torch.int32, device=device) for x in (query_positions, visual_positions))
    batch = queries, places, view(cache.to(device)), table.to(device), visual, head_size**-0.5
    return batch, keys.to(device)


def literally(queries, query_positions, keys, visual_positions, scale):
    """The formula, a query and a head at a time in float64."""
    group = queries.shape[1] // keys.shape[1]
    mass = torch.zeros(len(visual_positions), dtype=torch.float64)
    for q, position in enumerate(query_positions.tolist()):
        for head in range(queries.shape[1]):
            weights = (keys[: position + 1, head // group].double() @ queries[q, head].double() * scale).exp()
            for v, place in enumerate(visual_positions.tolist()):
                if place <= position:
                    mass[v] += weights[place] / weights.sum()
    return mass.float()


def in_torch(queries, query_positions, key_cache, block_table, visual_positions, scale):
    keys = gather_keys(key_cache, block_table, int(query_positions.max()) + 1)
    return attention_mass_reference(queries, query_positions, keys, visual_positions, scale)


def launched(*batch, num_splits=2):
    return launch_attention_mass(*batch, num_splits=num_splits)


SHAPES = [
    # query_positions, visual_positions, num_heads, num_kv_heads, head_size, block_size
    ([0], [0], 1, 1, 32, 16),
    ([122], list(range(5, 110)), 4, 4, 80, 16),
    (list(range(120, 125)), list(range(3, 123, 2)), 6, 2, 80, 48),
    (list(range(128, 160)), list(range(16, 144)), 8, 2, 64, 32),
    ([7, 40, 41, 200], [*range(0, 64, 3), 201, 500], 5, 1, 123, 5),
    (list(range(64, 128)), list(range(64)), 2, 1, 128, 128),
    ([63, 64, 65], [62, 63, 64, 65], 3, 3, 256, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_do_what_their_reference_does(shape, dtype, device):
    batch, _ = make_batch(*shape, dtype, device)
    assert torch.allclose(launched(*batch), in_torch(*batch), **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("find", [launched, attention_mass])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_found_however_the_cache_lies(layout, find, dtype, device):
    batch, keys = make_batch([30, 31, 50], list(range(2, 45)), 4, 2, 40, 16, dtype, device, layout)
    queries, places, _, _, visual, scale = batch
    assert torch.allclose(find(*batch), attention_mass_reference(queries, places, keys, visual, scale), **TOLERANCE)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.sets(st.integers(0, 45)).map(sorted),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([5, 8, 32]),
    st.integers(1, 17),
    st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_the_reference_is_the_sum_of_softmaxes(queries, visual, num_kv_heads, group, head_size, block_size, seed):
    batch, keys = make_batch(queries, visual, num_kv_heads * group, num_kv_heads, head_size, block_size, seed=seed)
    queries, places, _, _, visual, scale = batch
    wanted = literally(queries, places, keys, visual, scale)
    assert torch.allclose(attention_mass(*batch), wanted, **TOLERANCE)
    assert torch.allclose(attention_mass_reference(queries, places, keys, visual, scale), wanted, **TOLERANCE)


def test_the_reference_weighs_as_the_attention_of_torch_does():
    (queries, places, _, _, visual, scale), keys = make_batch(list(range(25, 37)), list(range(30)), 6, 2, 40, 16)
    sees = torch.arange(len(keys)) <= places[:, None]
    # Values that say which key they belong to give back the weights.
    values = torch.eye(len(keys)).expand(2, -1, -1)
    weights = F.scaled_dot_product_attention(
        queries.transpose(0, 1), keys.transpose(0, 1), values, sees, scale=scale, enable_gqa=True
    )
    found = attention_mass_reference(queries, places, keys, visual, scale)
    assert torch.allclose(found, weights.sum((0, 1))[visual], **TOLERANCE)


@pytest.mark.parametrize("find", [launched, in_torch])
def test_all_places_together_have_a_mass_of_one_per_query_and_head(find, device):
    batch, _ = make_batch([0, 17, 90], list(range(91)), 6, 2, 32, 16, device=device)
    assert find(*batch).sum().item() == pytest.approx(3 * 6, rel=1e-4)


@pytest.mark.parametrize("find", [launched, in_torch])
def test_what_lies_behind_a_query_has_none_of_its_mass(find, device):
    batch, _ = make_batch([20, 60], [0, 20, 21, 60, 61, 10**6], 2, 1, 32, 16, device=device)
    queries, places, cache, table, visual, scale = batch
    first = find(queries[:1], places[:1], cache, table, visual, scale)
    assert (first > 0).tolist() == [True, True, False, False, False, False]
    assert (find(*batch) > 0).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("find", [launched, in_torch])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_chunks_of_queries_add_up(cut, find, device):
    batch, _ = make_batch(list(range(50, 58)), list(range(10, 56)), 4, 2, 40, 16, device=device)
    queries, places, *rest = batch
    parts = [find(queries[rows], places[rows], *rest) for rows in (slice(cut), slice(cut, None))]
    assert torch.allclose(parts[0] + parts[1], find(*batch), **TOLERANCE)


@pytest.mark.parametrize("num_splits", [1, 4, 32])
def test_the_number_of_shares_does_not_matter(num_splits, device):
    batch, _ = make_batch([70, 150], list(range(100)), 2, 1, 32, 16, device=device)
    assert torch.allclose(launched(*batch, num_splits=num_splits), in_torch(*batch), **TOLERANCE)


@pytest.mark.parametrize("find", [launched, in_torch])
def test_dot_products_too_large_for_an_exponential_are_weighed(find, device):
    batch, _ = make_batch([70, 140], list(range(141)), 2, 1, 32, 16, device=device, spread=200.0)
    found = find(*batch)
    assert found.isfinite().all()
    assert found.sum().item() == pytest.approx(4, rel=1e-4)


def test_the_same_inputs_give_the_same_bits(device):
    batch, _ = make_batch(list(range(100, 110)), list(range(90)), 4, 2, 64, 16, torch.bfloat16, device)
    assert torch.equal(launched(*batch), launched(*batch))


@pytest.mark.parametrize("find", [launched, attention_mass])
def test_no_queries_have_no_mass_and_no_visual_tokens_no_result(find, device):
    queries, places, cache, table, visual, scale = make_batch([20], [3, 4], 2, 1, 32, 16, device=device)[0]
    assert find(queries[:0], places[:0], cache, table, visual, scale).tolist() == [0, 0]
    assert find(queries, places, cache, table, visual[:0], scale).shape == (0,)


def test_what_does_not_fit_is_refused():
    (queries, places, cache, table, visual, scale), keys = make_batch([20, 21], [3, 4], 4, 2, 32, 16)
    rest = table, visual, scale
    with pytest.raises(ValueError, match=r"shapes differ: queries \(2, 4, 31\).*key_cache \(5, 2, 16, 32\)"):
        attention_mass(queries[..., :31], places, cache, *rest)
    with pytest.raises(ValueError, match=r"query_positions \(1,\)"):
        attention_mass(queries, places[:1], cache, *rest)
    with pytest.raises(ValueError, match=r"queries \(2, 3, 32\).*keys \(22, 2, 32\)"):
        attention_mass_reference(queries[:, :3], places, keys, visual, scale)
    with pytest.raises(ValueError, match=r"queries torch.bfloat16, key_cache torch.float32"):
        attention_mass(queries.bfloat16(), places, cache, *rest)
    with pytest.raises(ValueError, match="last stride must be 1"):
        attention_mass(queries, places, cache[..., ::2].repeat(1, 1, 1, 4)[..., ::2], *rest)
    many = MAX_QUERIES + 1
    with pytest.raises(ValueError, match=f"{many} queries: at most {MAX_QUERIES}"):
        attention_mass(queries[:1].expand(many, -1, -1), places[:1].expand(many), cache, *rest)
