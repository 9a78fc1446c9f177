"""Working copies: what they share with their master, what follows it, and what they hand over."""

import torch
from torch import nn

from ssr_fast.models.segmentor import ModelConfig, build_segmentor
from ssr_fast.models.working_copy import WorkingCopy
from ssr_kernels import counter


def make():
    master = build_segmentor(ModelConfig(backbone="mit_tiny", channels=16, drop_path=0.3, dropout=0.1), 5)
    return master, WorkingCopy(master, torch.bfloat16)


def test_dtypes_and_what_is_shared():
    master, working = make()
    norms = {name for name, m in master.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms
    ours = dict(working.net.named_parameters())
    for name, parameter in master.named_parameters():
        if name.rpartition(".")[0] in norms:
            assert ours[name] is parameter and parameter.dtype == torch.float32
        else:
            assert ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], parameter.bfloat16())
            assert ours[name].data_ptr() != parameter.data_ptr()
    theirs, buffers = dict(master.named_buffers()), dict(working.net.named_buffers())
    assert theirs.keys() == buffers.keys() and all(buffers[name] is theirs[name] for name in theirs)


def test_the_masters_noise_and_statistics_are_the_copys(seed):
    master, working = make()
    before = {name: buffer.clone() for name, buffer in master.named_buffers() if "running" in name}
    images = torch.randn(2, 3, 64, 64).bfloat16()
    master.noise.key.copy_(counter.fold(master.noise.key, 5))
    first = working.net(images).logits
    assert first.dtype == torch.bfloat16 and torch.equal(first, working.net(images).logits)
    master.noise.key.copy_(counter.fold(master.noise.key, 6))
    assert not torch.equal(first, working.net(images).logits)
    assert all(not torch.equal(dict(master.named_buffers())[name], value) for name, value in before.items())


def test_refresh_follows_and_hand_over_raises_every_gradient(seed):
    master, working = make()
    with torch.no_grad():
        for parameter in master.parameters():
            parameter.add_(torch.randn_like(parameter))
    working.refresh()
    pairs = list(zip(master.parameters(), working.net.parameters(), strict=True))
    assert all(torch.equal(ours.float(), theirs.bfloat16().float()) for theirs, ours in pairs if theirs is not ours)
    working.net(torch.randn(2, 3, 64, 64).bfloat16()).logits.float().square().mean().backward()
    expected = [ours.grad.float() for _, ours in pairs]
    working.hand_over()
    for (theirs, ours), grad in zip(pairs, expected, strict=True):
        assert theirs.grad is not None and theirs.grad.dtype == torch.float32 and torch.equal(theirs.grad, grad)
        assert ours is theirs or ours.grad is None


def test_a_parameter_without_gradient_gets_none_and_an_idle_copy_hands_over_nothing():
    master, working = make()
    working.hand_over()
    working.net.decode_head.conv_seg.weight.sum().backward()
    working.hand_over()
    assert [name for name, p in master.named_parameters() if p.grad is not None] == ["decode_head.conv_seg.weight"]
