"""What crosses between ranks says its shape once for each path and hop."""

from __future__ import annotations

import sys
from pathlib import Path as File

import pytest
import torch

sys.path.insert(0, str(File(__file__).parents[1] / "helpers"))

from post import Post

from holdfast.proto.errors import ConfigError
from holdfast.runtime.pipeline.swap import swapped_plan
from holdfast.runtime.pipeline.transfer import Wire

PLAN = swapped_plan(units=6, blocks=range(1, 5), stages=4, replicas=1, microbatches=4)
CPU = torch.device("cpu")


def test_two_paths_may_hand_on_different_things_at_one_hop_between_two_ranks() -> None:
    """Hop 0 of an odd microbatch ends behind a frozen embedding, of an even one behind a block."""
    post = Post()
    first, second = (Wire(post.group(rank), PLAN, CPU) for rank in (0, 1))
    block, frozen = torch.rand(2, 3, requires_grad=True), torch.rand(5)
    for microbatch, tensor in ((1, frozen), (0, block), (3, frozen), (2, block)):
        first.send_forward((tensor,), 1, 1, microbatch, 0)
        spec = second.forward_spec(0, microbatch, 0, wait=True)
        assert spec is not None
        received = second.receive_forward(spec, 0, 1, microbatch, 0).tensors
        assert torch.equal(received[0], tensor)
        assert spec.tensors[0][2] == tensor.requires_grad
    assert not any(post.boxes.values()), "a spec was sent that nobody took"


def test_microbatches_of_one_path_must_agree() -> None:
    wire = Wire(Post().group(0), PLAN, CPU)
    wire.send_forward((torch.rand(2, 3),), 1, 1, 0, 0)
    with pytest.raises(ConfigError, match="microbatch 2 of step 1 leaves hop 0 as float32"):
        wire.send_forward((torch.rand(2, 4),), 1, 1, 2, 0)
