"""The example's model, text and script: claims that a pipeline, and a rank that starts often, rely on.

One process, no agent. What the pipeline makes of these layers is tested in tests/multiprocess.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples"


def _example(name: str) -> ModuleType:
    """Import an example under the name that its own script gives it: examples are no package."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


model, text = _example("model"), _example("text")


def _build(cfg: model.DecoderConfig, seed: int = 0) -> torch.nn.Sequential:
    """All units in one process. A tie, the runtime's business, becomes a shared Parameter."""
    torch.manual_seed(seed)
    units = torch.nn.Sequential(*(build() for build in model.build_layers(cfg)))
    if cfg.tied:
        units[-1].linear.weight = units[0].embedding.weight
    return units


def _tokens(cfg: model.DecoderConfig, batch: int = 2) -> torch.Tensor:
    return torch.randint(cfg.vocab, (batch, cfg.context), generator=torch.Generator().manual_seed(1))


# ---- model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 0.10), ("demo", 1.67), ("small", 5.41), ("84m", 84.46)])
def test_a_preset_has_the_size_it_says(preset: str, millions: float) -> None:
    assert model.count_parameters(model.PRESETS[preset]) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"kv_heads": 1}, {"dropout": 0.1}])
def test_twenty_steps_of_adamw_lower_the_loss(options: dict[str, object]) -> None:
    cfg = model.DecoderConfig(dim=32, layers=2, heads=2, context=32, **options)
    net = _build(cfg)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    data = _tokens(cfg, batch=4) % 16
    losses = []
    for _ in range(20):
        loss = model.loss(net(data[:, :-1]), data[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(cfg.vocab), abs=0.1)  # it starts out knowing nothing
    assert losses[-1] < losses[0] - 1.5


def test_no_position_sees_a_later_one() -> None:
    cfg = model.PRESETS["tiny"]
    net, tokens = _build(cfg).eval(), _tokens(cfg)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % cfg.vocab
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.isclose(before[:, 40:], after[:, 40:]).all(-1).any()


def test_a_factory_gives_the_same_bits_under_the_same_generator_whatever_was_built_before() -> None:
    layers = model.build_layers(model.PRESETS["tiny"])
    torch.manual_seed(3)
    first = layers[2]()
    layers[0]()
    torch.manual_seed(3)
    again = layers[2]()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not any(a is b for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_tie_is_declared_on_the_factory_and_on_the_module_and_names_parameters_that_exist() -> None:
    cfg = model.DecoderConfig(dim=32, layers=2, heads=2, tied=True)
    layers = model.build_layers(cfg)
    head = layers[-1]()
    assert layers[-1].holdfast_ties == head.holdfast_ties == {"linear.weight": (0, "embedding.weight")}
    ((here, (unit, there)),) = head.holdfast_ties.items()
    assert head.get_parameter(here).shape == layers[unit]().get_parameter(there).shape
    assert all(not layer.holdfast_ties for layer in layers[:-1])
    untied = model.build_layers(model.DecoderConfig(dim=32, layers=2, heads=2))[-1]
    assert untied.holdfast_ties == untied().holdfast_ties == {}


def test_a_tied_matrix_is_counted_once() -> None:
    shape = {"dim": 32, "layers": 2, "heads": 2}
    untied, tied = (model.count_parameters(model.DecoderConfig(**shape, tied=t)) for t in (False, True))
    assert untied - tied == 256 * 32


def test_grouped_queries_equal_full_heads_whose_keys_and_values_are_repeated() -> None:
    torch.manual_seed(0)
    grouped = model.Attention(model.DecoderConfig(dim=32, layers=1, heads=4, kv_heads=2, context=16))
    full = model.Attention(model.DecoderConfig(dim=32, layers=1, heads=4, context=16))
    with torch.no_grad():
        full.wq.weight.copy_(grouped.wq.weight)
        full.wo.weight.copy_(grouped.wo.weight)
        for ours, theirs in ((full.wk, grouped.wk), (full.wv, grouped.wv)):
            ours.weight.copy_(theirs.weight.view(2, 8, 32).repeat_interleave(2, dim=0).view(32, 32))
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(grouped(x), full(x))


def test_a_rotated_product_depends_only_on_the_distance() -> None:
    q, k = torch.randn(1, 8).expand(16, 8), torch.randn(1, 8).expand(16, 8)
    angles = model._rope_angles(16, 8)
    scores = model.rotate(q, angles.cos(), angles.sin()) @ model.rotate(k, angles.cos(), angles.sin()).T
    for distance in range(16):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert scores.diagonal(0)[0] != pytest.approx(scores.diagonal(-5)[0].item(), abs=1e-3)


def test_the_stream_between_units_stays_float32_under_autocast() -> None:
    cfg = model.PRESETS["tiny"]
    net = _build(cfg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = _tokens(cfg)
        for unit in net[:-1]:
            x = unit(x)
            assert x.dtype == torch.float32
        loss = model.loss(net[-1](x), _tokens(cfg))
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_the_loss_of_bfloat16_logits_is_taken_in_float32() -> None:
    logits, targets = torch.randn(2, 3, 256).bfloat16(), torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(model.loss(logits, targets), model.loss(logits.float(), targets))


def test_the_state_of_a_block_is_its_parameters_alone() -> None:
    block = model.build_layers(model.PRESETS["tiny"])[1]()
    assert block.state_dict().keys() == dict(block.named_parameters()).keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 30, "heads": 4}, "dim 30 over heads 4"),
        ({"dim": 12, "heads": 4}, "dim 12 over heads 4"),
        ({"dim": 32, "heads": 4, "kv_heads": 3}, "kv_heads 3"),
        ({"dim": 32, "heads": 4, "kv_heads": 0}, "kv_heads 0"),
        ({"dim": 32, "heads": 4, "dropout": 1.0}, "dropout"),
        ({"dim": 32, "heads": 4, "context": 0}, "context"),
        ({"dim": 32, "heads": 4, "ffn_mult": 0.0}, "ffn_mult"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model.DecoderConfig(layers=1, **options)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    cfg = model.PRESETS["tiny"]
    with pytest.raises(ValueError, match="65 tokens"):
        _build(cfg)(torch.zeros(1, cfg.context + 1, dtype=torch.int64))


# ---- text -------------------------------------------------------------------------------------------------


@given(size=st.integers(4, 400), context=st.integers(1, 9), seed=st.integers(0, 5))
def test_the_splits_share_no_byte_and_leave_none_but_the_tail(size: int, context: int, seed: int) -> None:
    tokens = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    if size // (context + 1) < 2:
        return
    train, held_out = (text.TextDataset(tokens, context, split, seed) for split in ("train", "validation"))
    assert sorted(train.windows.tolist() + held_out.windows.tolist()) == list(range(size // (context + 1)))
    assert len(held_out) >= 1
    assert len(train) >= len(held_out)
    for dataset in (train, held_out):
        for index in range(len(dataset)):
            x, y = dataset[index]
            start = int(dataset.windows[index]) * (context + 1)
            assert torch.equal(x, tokens[start : start + context].long())
            assert torch.equal(y, tokens[start + 1 : start + 1 + context].long())


def test_the_split_depends_on_the_seed_alone() -> None:
    tokens = torch.zeros(10_000, dtype=torch.uint8)
    torch.manual_seed(1)
    first = text.TextDataset(tokens, 9, "validation", seed=4).windows
    torch.manual_seed(2)
    assert torch.equal(first, text.TextDataset(tokens, 9, "validation", seed=4).windows)
    assert not torch.equal(first, text.TextDataset(tokens, 9, "validation", seed=5).windows)


def test_an_item_beyond_the_end_is_an_index_error_so_that_iteration_ends() -> None:
    dataset = text.TextDataset(torch.zeros(100, dtype=torch.uint8), 9, "train")
    assert len(list(iter(dataset))) == len(dataset) == 9


def test_the_default_text_is_python_source_capped_and_the_same_from_the_cache(tmp_path: Path) -> None:
    first = text.load_tokens(cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    again = text.load_tokens(cache=tmp_path)
    assert torch.equal(first, again)
    assert kept.read_bytes() == bytes(first.numpy())
    assert 1 << 20 <= first.numel() <= text.DEFAULT_BYTES_MAX
    assert b"import " in bytes(first[:100_000].numpy())


def _corpus(folder: Path) -> str:
    (folder / "deep").mkdir()
    (folder / "b.txt").write_bytes(b"second ")
    (folder / "a.txt").write_bytes(b"first ")
    (folder / "deep" / "c.txt").write_bytes(b"third")
    return str(folder / "**" / "*.txt")


def test_a_pattern_gives_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    tokens = text.load_tokens(_corpus(tmp_path), tmp_path / "cache")
    assert bytes(tokens.numpy()) == b"first second third"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".bin"]  # nothing temporary is left


def test_a_changed_file_changes_the_text(tmp_path: Path) -> None:
    pattern = _corpus(tmp_path)
    text.load_tokens(pattern, tmp_path / "cache")
    (tmp_path / "a.txt").write_bytes(b"other ")
    assert bytes(text.load_tokens(pattern, tmp_path / "cache").numpy()) == b"other second third"


def test_a_cache_file_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    pattern = _corpus(tmp_path)
    text.load_tokens(pattern, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"fir")
    assert bytes(text.load_tokens(pattern, tmp_path / "cache").numpy()) == b"first second third"
    assert kept.read_bytes() == b"first second third"


def test_without_a_writable_cache_the_text_is_the_same(tmp_path: Path) -> None:
    pattern = _corpus(tmp_path)
    (tmp_path / "occupied").write_bytes(b"")  # a file where the folder would be: refused to root as well
    assert bytes(text.load_tokens(pattern, tmp_path / "occupied").numpy()) == b"first second third"


def test_a_cache_that_cannot_be_completed_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError("no space left on device")

    pattern = _corpus(tmp_path)
    monkeypatch.setattr(text.os, "replace", full)
    assert bytes(text.load_tokens(pattern, tmp_path / "cache").numpy()) == b"first second third"
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cap_cuts_the_text_alike_with_and_without_a_cache(tmp_path: Path) -> None:
    files = text.scan_pattern(_corpus(tmp_path))
    assert bytes(text._cached(files, 9, tmp_path / "cache").numpy()) == b"first sec"
    assert bytes(text._read(files, 9).numpy()) == b"first sec"


def test_a_single_file_is_mapped_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "[odd].txt").write_bytes(b"a name that looks like a pattern")
    tokens = text.load_tokens(str(tmp_path / "[odd].txt"), tmp_path / "cache")
    assert bytes(tokens.numpy()) == b"a name that looks like a pattern"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "ask",
    [
        lambda folder: text.load_tokens(str(folder / "nowhere*.txt")),
        lambda folder: text.load_tokens(str(folder / "empty.txt")),
        lambda folder: text.scan_library(folder),
        lambda folder: text.TextDataset(torch.zeros(10, dtype=torch.uint8), 9, "train"),
    ],
    ids=["missing", "empty", "no library", "short"],
)
def test_no_text_is_one_line_and_exit_code_2(
    ask: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(SystemExit) as left:
        ask(tmp_path)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("text: ")
    assert said.count("\n") == 1


def test_tests_and_installed_packages_are_no_part_of_the_library(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "site-packages/c.py", "json/d.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [Path(file.path).name for file in text.scan_library(tmp_path)] == ["a.py", "d.py"]


# ---- script -----------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One plain process with a small text: no agent, no ranks, nothing of an outer job."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HOLDFAST_AGENT", "HOLDFAST_FAULTS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    return tmp_path


def test_plain_python_trains_prints_and_writes_its_state(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--preset",
        "tiny",
        "--steps",
        "4",
        "--microbatches",
        "2",
        "--context",
        "16",
        "--log-every",
        "2",
    ]
    arguments += ["--validate-every", "4", "--data", str(alone / "text.txt"), "--tied"]
    states = []
    for out in ("first", "second"):
        _example("pretrain").main([*arguments, "--out", str(alone / out)])
        (path,) = (alone / out).iterdir()
        assert path.name == "rank-0-of-1.safetensors"
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"step": "4"}
            states.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split()[1] for line in steps] == ["2", "4"] * 2
    assert "validation" in steps[1]
    assert "validation" not in steps[0]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(states[0]["0.embedding.weight"], states[0]["7.linear.weight"])
    assert "1.attn.wq.weight@exp_avg" in states[0]


def test_the_rate_warms_up_and_then_falls_to_a_tenth() -> None:
    factor = _example("pretrain").warmup_cosine(50)
    rates = [factor(step) for step in range(51)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(0.1)
    assert factor(10_000) == pytest.approx(0.1)
    assert _example("pretrain").warmup_cosine(1)(0) == 1.0


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--lr", "0"], ["--preset", "huge"], ["--clip", "-1"]])
def test_an_argument_that_makes_no_sense_ends_with_exit_code_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        _example("pretrain").parse_arguments(wrong)
    assert left.value.code == 2


def test_a_layout_that_cannot_be_is_one_line_and_exit_code_2(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        _example("pretrain").main(["--preset", "tiny", "--stages", "3", "--data", str(alone / "text.txt")])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("pretrain: ")
    assert said.count("\n") == 1
