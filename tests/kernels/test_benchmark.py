import torch

from vllm_lvspec.kernels import benchmark


def test_every_kernel_is_timed_beside_its_reference(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "COPY_BYTES", 2**20)
    benchmark.main()
    shown = capsys.readouterr().out
    assert "a copy moves" in shown
    for name in (
        "relevance",
        "acceptance",
        "advance_decode",
        "attention_mass",
        "copy_slots",
        "decode_attention",
        "greedy_head",
        "mxfp4_matvec",
        "silu_and_mul",
        "token through",
    ):
        assert name in shown


def test_the_timed_launches_are_of_what_the_references_compute(device, has_e4m3):
    small = [
        benchmark.relevance_case(2, 3, 20, 32, device),
        benchmark.acceptance_case(2, 5, device),
    ]
    assert torch.allclose(small[0].launch(), small[0].reference(), atol=1e-2)
    launched, wanted = vars(small[1].launch()), vars(small[1].reference())
    assert all(torch.equal(launched[name], wanted[name]) for name in wanted)
    rounded = {"rtol": 0.02, "atol": 0.1}
    matrix = benchmark.mxfp4_matvec_case(64, 128, device)
    assert torch.allclose(matrix.launch().float(), matrix.reference().float(), **rounded)
    tokens = benchmark.decode_attention_case(2, 40, benchmark.Shape(3, 512, 0, 4, 2), device)
    assert torch.allclose(tokens.launch().whole(), tokens.reference().float(), **rounded)
    torch.manual_seed(0)
    shape = benchmark.Shape(2, 128, 192, 2, 1)
    layers = benchmark.token_layers_case("a small model", shape, 40, False, device)
    found, wanted = layers.launch().float(), layers.reference().float()
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert layers.num_bytes == 2 * (68 * (512 + 256 + 384 + 192) + 86 * 256)
    for in_eight in (False, True)[: 1 + has_e4m3]:
        head = benchmark.greedy_head_case(100, 64, in_eight, device)
        (found, probs), (wanted, wanted_probs) = head.launch(), head.reference()
        assert torch.equal(found, wanted) and torch.allclose(probs, wanted_probs, rtol=1e-3)
    silu = benchmark.silu_and_mul_case(2, 40, device)
    assert torch.allclose(silu.launch().float(), silu.reference().float(), **rounded)
    attention = benchmark.attention_mass_case(3, 50, 20, 4, 2, device)
    assert torch.allclose(attention.launch(), attention.reference(), rtol=1e-3)
    advance = benchmark.advance_decode_case(3, device)
    advance.launch(), advance.reference()
    copy = benchmark.copy_slots_case(5, 2, device)
    copy.launch(), copy.reference()
