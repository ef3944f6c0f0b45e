import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vllm_lvspec.kernels.copy_slots import BITS, PagedCaches, copy_slots, copy_slots_reference, launch_copy_slots

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]
COPIES = [launch_copy_slots, copy_slots_reference]
# [num_blocks, num_kv_heads, block_size, content], however a cache lies; the last is no multiple of 16 bytes in.
LAYOUTS = {
    "heads before slots": lambda b, h, s, c: ((b, h, s, c), lambda cache: cache),
    "slots before heads": lambda b, h, s, c: ((b, s, h, c), lambda cache: cache.transpose(1, 2)),
    "within wider slots": lambda b, h, s, c: ((b, h, s, c + 5), lambda cache: cache[..., 3 : 3 + c]),
}


def make_caches(shape, dtype, device, layout="heads before slots", num_layers=3, seed=0):
    """Caches of any bits, NaN and what else there is included, and what they are views of."""
    generator = torch.Generator().manual_seed(seed)
    (*most, last), view = LAYOUTS[layout](*shape)
    size = torch.empty(0, dtype=dtype).element_size()
    whole = [
        torch.randint(0, 256, (*most, last * size), generator=generator, dtype=torch.uint8).to(device).view(dtype)
        for _ in range(num_layers)
    ]
    return PagedCaches.of([view(cache) for cache in whole]), whole


def bits_of(caches):
    return [cache.view(BITS[cache.element_size()]).clone() for cache in caches]


def slots(values, device):
    return torch.tensor(values, dtype=torch.int64, device=device)


def literally(sources, destinations, source_slots, destination_slots):
    """What the destinations hold afterwards, a token at a time."""
    wanted = bits_of(destinations.caches)
    block_size = wanted[0].shape[2]
    for source, out in zip(bits_of(sources.caches), wanted, strict=True):
        for a, b in zip(source_slots, destination_slots, strict=True):
            if a >= 0 and b >= 0:
                out[b // block_size, :, b % block_size] = source[a // block_size, :, a % block_size]
    return wanted


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "block_size", "content"),
    [(1, 1, 16, 16), (5, 3, 5, 123), (123, 2, 16, 40), (40, 8, 48, 256), (64, 1, 64, 576)],
)
def test_tokens_are_copied_in_every_layer_and_nothing_else_is(
    num_tokens, num_heads, block_size, content, dtype, copy, device
):
    generator = torch.Generator().manual_seed(1)
    num_blocks = -(-num_tokens // block_size) + 1
    shape = num_heads, block_size, content
    sources, _ = make_caches((num_blocks + 2, *shape), dtype, device)
    destinations, _ = make_caches((num_blocks, *shape), dtype, device, seed=1)
    read = torch.randint(0, (num_blocks + 2) * block_size, (num_tokens,), generator=generator)
    written = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    wanted = literally(sources, destinations, read.tolist(), written.tolist())
    copy(sources, destinations, read.to(device), written.to(device))
    assert all(map(torch.equal, bits_of(destinations.caches), wanted))


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("destination", LAYOUTS)
def test_caches_may_lie_differently(source, destination, dtype, copy, device):
    sources, _ = make_caches((4, 3, 16, 24), dtype, device, source)
    destinations, around = make_caches((6, 3, 16, 24), dtype, device, destination, seed=1)
    read, written = [3, 63, 17, 16], [95, 0, 40, 41]
    wanted = literally(sources, destinations, read, written)
    before = bits_of(around)
    copy(sources, destinations, slots(read, device), slots(written, device))
    assert all(map(torch.equal, bits_of(destinations.caches), wanted))
    changed = sum(int((a != b).sum()) for a, b in zip(before, bits_of(around), strict=True))
    assert 0 < changed <= 3 * 4 * 3 * 24


@given(st.lists(st.tuples(st.integers(-2, 23), st.integers(-2, 17)), max_size=12, unique_by=lambda pair: pair[1]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("copy", [launch_copy_slots, copy_slots])
def test_slots_below_zero_are_skipped(copy, device, pairs):
    read, written = [a for a, _ in pairs], [b for _, b in pairs]
    sources, _ = make_caches((4, 2, 6, 10), torch.float16, device, num_layers=2)
    destinations, _ = make_caches((3, 2, 6, 10), torch.float16, device, num_layers=2, seed=1)
    wanted = literally(sources, destinations, read, written)
    copy(sources, destinations, slots(read, device), slots(written, device))
    assert all(map(torch.equal, bits_of(destinations.caches), wanted))


def test_what_is_a_view_of_one_buffer_is_copied_from_where_each_layer_begins(device):
    buffer = torch.arange(5 * 4 * 2 * 4 * 8, device=device, dtype=torch.int32).view(5, 4, 2, 4, 8)
    sources = PagedCaches.of(list(buffer.unbind(0)))
    destinations = PagedCaches.of([torch.zeros(1, 2, 4, 8, device=device, dtype=torch.int32) for _ in range(5)])
    launch_copy_slots(sources, destinations, slots([9, 14], device), slots([3, 0], device))
    for layer, cache in enumerate(destinations.caches):
        assert torch.equal(cache[0, :, 3], buffer[layer, 2, :, 1])
        assert torch.equal(cache[0, :, 0], buffer[layer, 3, :, 2])
        assert not cache[0, :, 1:3].any()


def test_the_alignment_is_that_of_the_least_aligned_layer():
    buffer = torch.zeros(2**10, dtype=torch.float16)
    assert buffer.data_ptr() % 16 == 0
    assert PagedCaches.of([buffer[:64].view(1, 1, 4, 16), buffer[64:128].view(1, 1, 4, 16)]).alignment == 16
    assert PagedCaches.of([buffer[:64].view(1, 1, 4, 16), buffer[66:130].view(1, 1, 4, 16)]).alignment == 4


def test_caches_that_differ_or_cannot_be_copied_are_refused():
    one = torch.zeros(4, 2, 6, 10)
    with pytest.raises(ValueError, match="there are none"):
        PagedCaches.of([])
    with pytest.raises(ValueError, match=r"shapes differ: \(4, 2, 6, 10\) in layer 0, \(3, 2, 6, 10\) in layer 2"):
        PagedCaches.of([one, one, one[:3]])
    with pytest.raises(ValueError, match=r"strides differ: .* in layer 1"):
        PagedCaches.of([one, torch.zeros(4, 6, 2, 10).transpose(1, 2)])
    with pytest.raises(ValueError, match=r"dtypes differ: torch.float32 in layer 0, torch.int32 in layer 1"):
        PagedCaches.of([one, one.int()])
    for cannot in (one[0], one.mT, one.double()):
        with pytest.raises(ValueError, match=r"four dimensions, the last contiguous, and elements of 1, 2 or 4 bytes"):
            PagedCaches.of([cannot])


def test_sets_of_caches_and_slots_that_do_not_fit_are_refused():
    one, none = torch.zeros(4, 2, 6, 10), torch.zeros(0, dtype=torch.int64)
    caches = PagedCaches.of([one, one])
    with pytest.raises(ValueError, match=r"sources 2 x \(4, 2, 6, 10\), destinations 1 x"):
        copy_slots(caches, PagedCaches.of([one]), none, none)
    with pytest.raises(ValueError, match=r"destinations 2 x \(4, 2, 5, 10\)"):
        copy_slots(caches, PagedCaches.of([one[:, :, :5]] * 2), none, none)
    with pytest.raises(ValueError, match=r"sources torch.float32, destinations torch.int32"):
        copy_slots(caches, PagedCaches.of([one.int()] * 2), none, none)
    with pytest.raises(ValueError, match=r"source_slots \(0,\), destination_slots \(1,\)"):
        copy_slots(caches, caches, none, torch.zeros(1, dtype=torch.int64))
