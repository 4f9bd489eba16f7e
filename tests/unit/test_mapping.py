"""The mapping language: what it accepts, what it refuses and how it says so, and what the shipped files do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.ckpt.universal.errors import LossyError, MappingError, UsageError
from holdfast.ckpt.universal.mapping import Mapped, load_layout, parse_layout
from holdfast.ckpt.universal.mapping.expression import evaluate
from holdfast.ckpt.universal.mapping.language import shipped
from holdfast.ckpt.universal.mapping.pattern import Pattern, expand
from holdfast.ckpt.universal.model import Group
from holdfast.ckpt.universal.read import Reader
from holdfast.ckpt.universal.write import Details

_spec = importlib.util.spec_from_file_location("model_helpers", Path(__file__).parents[1] / "helpers" / "models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

GIVEN = {"heads": 4, "kv_heads": 2, "hidden": 16, "intermediate": 40}


def arrays(**shapes: tuple[int, ...]) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, shape in shapes.items():
        found |= models.states(name.replace("__", "."), shape)
    return found


def mapped(tmp_path: Path, tensors: Any, text: str, details: Details | None = None, **given: int) -> Mapped:
    saved = models.save(tmp_path / f"c{len(list(tmp_path.iterdir()))}", tensors, details)
    return Mapped(Reader(saved), parse_layout(text, "map"), given)


def refusal(tmp_path: Path, tensors: Any, text: str, **given: int) -> str:
    with pytest.raises(MappingError) as caught:
        mapped(tmp_path, tensors, text, **given)
    return str(caught.value)


# ---- arithmetic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), (7, 7), ("$a * ($b - 2) / 3", 8), ("-$a + 10", 4), ("17 // 3 % 4", 1), ("2 * -3", -6), ("((1))", 1)],
)
def test_an_expression_has_the_value_that_arithmetic_gives_it(text: str | int, value: int) -> None:
    assert evaluate(text, {"a": 6, "b": 6}) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("$a / 4", "leaves a rest"),
        ("1 / 0", "division by zero"),
        ("$c", "without a value"),
        ("1 +", "ends too early"),
        ("1 2", "goes on"),
        ("(1", "not closed"),
        ("__import__('os')", "cannot be read"),
        ("a.b", "cannot be read"),
        ("9" * 19, "beyond every size"),
        ("(" * 100 + "1" + ")" * 100, "nested too deeply"),
        ("-" * 100 + "1", "nested too deeply"),
        ("1+" * 400 + "1", "too long"),
        ("1152921504606846976 * 2", "beyond every size"),
    ],
)
def test_an_expression_that_cannot_be_meant_is_refused(text: str, problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        evaluate(text, {"a": 6})


# ---- names ------------------------------------------------------------------------------------------------------


def test_a_gap_holds_no_dot_a_star_holds_any_text_and_an_equal_gap_the_same_text() -> None:
    assert Pattern("a.{i}.w").match("a.12.w") == {"i": "12"}
    assert Pattern("a.{i}.w").match("a.1.2.w") is None
    assert Pattern("*w").match("a.1.w") == {"*0": "a.1."}
    assert Pattern("{i}.{i}").match("3.4") is None
    assert Pattern("{i}.{i}").match("3.3") == {"i": "3"}
    assert Pattern("a.w").match("aXw") is None


def test_alternatives_are_spelt_out_in_their_order() -> None:
    assert [p.text for p in expand("l.{i}.{q,k}.{w,b}")] == ["l.{i}.q.w", "l.{i}.q.b", "l.{i}.k.w", "l.{i}.k.b"]


# ---- what a file may say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ('match = "a"\nop = "renmae"', "unknown operation"),
        ('match = "a"\nto = "b"\naxsi = 0', "unknown key"),
        ('match = "a"\nto = "b"\nop = "scale"', "not told all"),
        ('op = "drop"\nlossy = true', "without match"),
        ('match = "a"\nop = "drop"', "drops tensors"),
        ('match = "a"\nto = "b"\nop = "cast"\ndtype = "BF16"', "converts to another dtype"),
        ('match = "a"\nto = "b"\nop = "cast"\ndtype = "BF16"\nfrom = "F32"', "converts to another dtype"),
        ('match = "a"\nto = "b"\nop = "scale"\nby = 3', "not a power of two"),
        ('match = "a"\nto = "b"\nop = "unpad"\naxis = 0\nsize = 3', "padding"),
        ('match = "a.{i}"\nto = "b"', "different gaps"),
        ('match = "a"\nto = "b.{i}"', "different gaps"),
        ('match = "{a,b}"\nto = "c"', "another number of names"),
        ('match = "a"\nto = "c"\nop = "concat"\naxis = 0', "another number of names"),
        ('match = "a"\nto = ["b", "c"]\nop = "split"\naxis = 0\nsizes = ["$x", 1]', "not declared"),
        ('match = "a"\nto = ["b", "c"]\nop = "split"\naxis = 0\nsizes = ["1 +* 2", true]', "number or an expression"),
        ('match = "a"\nto = "b"\nop = "permute"\naxis = 0\nview = [2, 2]\norder = [1, 1]', "each axis once"),
        ('match = "a"\nto = "b"\noptional = 1', "true or false"),
        ('match = "a{"\nto = "b"', "brace"),
        ('match = "e.{e}"\nto = "b"\nop = "stack"', "another number of names"),
        ('match = "e"\nto = "b"\nop = "stack"\nover = "e"', "over names a placeholder"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_without_a_checkpoint(rule: str, problem: str) -> None:
    with pytest.raises(MappingError, match=problem):
        parse_layout(f"[[rule]]\n{rule}\n")


def test_a_file_that_is_no_mapping_is_refused() -> None:
    for text in ("", "x = [", "[layout]\nname = 'x'", "[[rule]]\nmatch='a'\nto='b'\n[other]\n", "rule = 3"):
        with pytest.raises(MappingError):
            parse_layout(text)
    with pytest.raises(UsageError, match="llama-megatron"):
        load_layout("llama-megatorn")


# ---- total, unambiguous, complete ---------------------------------------------------------------------------------


def test_a_tensor_that_no_rule_takes_is_an_error_unless_the_layout_says_otherwise(tmp_path: Path) -> None:
    tensors = arrays(a=(2,), b=(2,))
    rule = '[[rule]]\nmatch = "a"\nto = "c"\n'
    assert "no rule takes" in refusal(tmp_path, tensors, rule)
    assert "'b'" in refusal(tmp_path, tensors, rule)
    kept = mapped(tmp_path, tensors, f'[layout]\notherwise = "keep"\n{rule}')
    assert {name for name, _ in kept.checkpoint.states} == {"b", "c"}
    dropped = mapped(tmp_path, tensors, f'[layout]\notherwise = "drop"\n{rule}')
    assert {name for name, _ in dropped.checkpoint.states} == {"c"}
    assert "b" in dropped.losses[0]


def test_two_rules_that_take_one_tensor_are_both_named(tmp_path: Path) -> None:
    text = '[[rule]]\nmatch = "a.{i}"\nto = "b.{i}"\n[[rule]]\nmatch = "*.0"\nto = "c*"\noptional = true\n'
    found = refusal(tmp_path, arrays(a__0=(2,)), text)
    assert "two rules take one tensor" in found
    assert "tensor=a.0" in found
    assert "rule 1" in found
    assert "rule 2" in found


def test_two_rules_that_make_one_tensor_are_both_named(tmp_path: Path) -> None:
    found = refusal(tmp_path, arrays(a=(2,), b=(2,)), '[[rule]]\nmatch="a"\nto="c"\n[[rule]]\nmatch="b"\nto="c"\n')
    assert "two rules make one tensor" in found
    assert "tensor=c" in found
    assert "rule 1" in found


def test_a_rule_that_takes_nothing_is_an_error_unless_it_is_optional(tmp_path: Path) -> None:
    text = '[[rule]]\nmatch = "a"\n[[rule]]\nmatch = "bias"\n'
    assert "takes nothing" in refusal(tmp_path, arrays(a=(2,)), text)
    mapped(tmp_path, arrays(a=(2,)), text + "optional = true\n")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    text = '[[rule]]\nmatch = "l.{i}.{q,k}"\nto = "l.{i}.qk"\nop = "concat"\naxis = 0\n'
    assert "missing=l.0.k" in refusal(tmp_path, arrays(l__0__q=(2, 2)), text)


def test_a_variable_without_a_value_says_how_to_give_it(tmp_path: Path) -> None:
    text = (
        '[variables]\nrows = ""\n[[rule]]\nmatch="a"\nto=["b","c"]\nop="split"\naxis=0\nsizes=["$rows", "6 - $rows"]\n'
    )
    assert "--set rows=N" in refusal(tmp_path, arrays(a=(6, 2)), text)
    assert mapped(tmp_path, arrays(a=(6, 2)), text, rows=4).checkpoint.tensor("b", "fp32").shape == (4, 2)
    assert "a size from 0 on" in refusal(tmp_path, arrays(a=(6, 2)), text, rows=7)
    assert "add up" in refusal(tmp_path, arrays(a=(7, 2)), text, rows=4)


def test_variables_come_from_the_models_config_from_shapes_and_from_each_other(tmp_path: Path) -> None:
    text = """
[variables]
heads = { config = "num_attention_heads" }
hidden = { shape = ["a", 1] }
head_dim = "$hidden / $heads"
other = { config = "absent", default = "$head_dim * 2" }
[[rule]]
match = "a"
op = "require"
shape = ["$heads", "$hidden"]
[[rule]]
match = "b"
op = "require"
shape = ["$other"]
"""
    saved = models.save(
        tmp_path / "c", arrays(a=(4, 12), b=(6,)), Details(metadata={"model_config": {"num_attention_heads": 4}})
    )
    Mapped(Reader(saved), parse_layout(text), {})
    with pytest.raises(MappingError, match="required shape"):
        Mapped(Reader(saved), parse_layout(text), {"heads": 2})


# ---- every state, steps, groups, ties -----------------------------------------------------------------------------


def test_moments_follow_their_weights(tmp_path: Path) -> None:
    tensors = arrays(q=(4, 3), k=(4, 3))
    view = mapped(
        tmp_path, tensors, '[[rule]]\nmatch="{q,k}"\nto="qk"\nop="concat_grouped"\naxis=0\ngroups=2\nsizes=[2,2]\n'
    )
    found = models.load(view)
    for state in ("weight", "fp32", "exp_avg", "exp_avg_sq"):
        q, k = tensors["q", state], tensors["k", state]
        assert np.array_equal(found["qk", state], np.concatenate([q[:2], k[:2], q[2:], k[2:]]))


def test_parameters_at_different_steps_or_in_different_groups_cannot_become_one(tmp_path: Path) -> None:
    tensors = arrays(q=(2, 3), k=(2, 3))
    text = '[[rule]]\nmatch="{q,k}"\nto="qk"\nop="concat"\naxis=0\n'
    one = Details(steps={"q": 3, "k": 4})
    with pytest.raises(MappingError, match="different steps"):
        mapped(tmp_path, tensors, text, one)
    two = Details(groups=(Group(0, {"lr": 1.0}, ("q",)), Group(1, {"lr": 2.0}, ("k",))))
    with pytest.raises(MappingError, match="different groups"):
        mapped(tmp_path, tensors, text, two)
    both = Details(groups=(Group(0, {"lr": 1.0}, ("q",)), Group(1, {"lr": 1.0}, ("k",))), steps={"q": 3, "k": 3})
    view = mapped(tmp_path, tensors, text, both)
    assert [group.params for group in view.checkpoint.groups] == [("qk",), ()]
    assert view.checkpoint.steps == {"qk": 3}


def test_a_state_that_only_one_part_has_is_named(tmp_path: Path) -> None:
    tensors = arrays(q=(2, 3), k=(2, 3))
    text = '[[rule]]\nmatch="{q,k}"\nto="qk"\nop="concat"\naxis=0\n'
    for name, lacks in (("k", "k"), ("q", "q")):
        fewer = {key: array for key, array in tensors.items() if key != (name, "exp_avg")}
        assert f"lacks={lacks}" in refusal(tmp_path, fewer, text)


def test_what_is_tied_stays_tied_and_does_not_come_apart_unsaid(tmp_path: Path) -> None:
    tensors, tied = arrays(embed=(4, 3)), Details(aliases={"head": "embed"})
    view = mapped(tmp_path, tensors, '[[rule]]\nmatch="embed"\nto="e"\n[[rule]]\nmatch="head"\nto="h"\n', tied)
    assert view.checkpoint.aliases == {"h": "e"}
    both = '[[rule]]\nmatch="{embed,head}"\nto="{e,h}"\nop="transpose"\n'
    assert mapped(tmp_path, tensors, both, tied).checkpoint.aliases == {"h": "e"}
    apart = '[[rule]]\nmatch="embed"\nto="e"\nop="transpose"\n[[rule]]\nmatch="head"\nto="h"\n'
    with pytest.raises(MappingError, match="come apart"):
        mapped(tmp_path, tensors, apart, tied)
    dropped = '[[rule]]\nmatch="embed"\nto="e"\n[[rule]]\nmatch="head"\nop="drop"\nlossy=true\n'
    gone = mapped(tmp_path, tensors, dropped, tied)
    assert (gone.checkpoint.aliases, gone.losses) == ({}, ())


def test_tie_makes_an_equal_copy_an_alias_and_refuses_an_unequal_one_when_it_is_read(tmp_path: Path) -> None:
    tensors = arrays(e=(4, 3))
    tensors |= {("h", state): array.copy() for (_, state), array in tensors.items()}
    text = '[[rule]]\nmatch="e"\nto="embed"\n[[rule]]\nmatch="h"\nto="head"\nop="tie"\nof="embed"\n'
    view = mapped(tmp_path, tensors, text)
    assert view.checkpoint.aliases == {"head": "embed"}
    assert np.array_equal(models.load(view)["embed", "fp32"], tensors["e", "fp32"])
    back = Mapped(view, parse_layout(text), {}, reverse=True)
    assert back.checkpoint.aliases == {"h": "e"}
    tensors["h", "fp32"][2, 1] += 1
    with pytest.raises(MappingError, match="copies that should be equal differ"):
        models.load(mapped(tmp_path, tensors, text))


def test_padding_that_is_not_zero_is_not_lost_unsaid(tmp_path: Path) -> None:
    text = '[[rule]]\nmatch="a"\nop="unpad"\naxis=0\nsize=3\npadded=5\n'
    tensors = {("a", "fp32"): np.arange(10, dtype=np.float32).reshape(5, 2)}
    view = mapped(tmp_path, tensors, text)
    with pytest.raises(LossyError, match="padding that is not zero"):
        view.read("a", "fp32")
    tensors["a", "fp32"][3:] = 0
    assert np.array_equal(models.load(mapped(tmp_path, tensors, text))["a", "fp32"], tensors["a", "fp32"][:3])
    tensors["a", "fp32"][3:] = 1
    said = mapped(tmp_path, tensors, text + "lossy = true\n")
    assert np.array_equal(models.load(said)["a", "fp32"], tensors["a", "fp32"][:3])
    assert said.losses


def test_a_scale_goes_to_each_state_with_its_power(tmp_path: Path) -> None:
    tensors = {("a", state): np.full(3, 8.0, np.float32) for state in ("fp32", "exp_avg", "exp_avg_sq")}
    found = models.load(mapped(tmp_path, tensors, '[[rule]]\nmatch="a"\nop="scale"\nby=4\n'))
    assert [found["a", s][0] for s in ("fp32", "exp_avg", "exp_avg_sq")] == [32.0, 2.0, 0.5]


def test_a_cast_is_of_weights_and_leaves_the_optimizers_states(tmp_path: Path) -> None:
    tensors = arrays(a=(3, 2))
    found = models.load(mapped(tmp_path, tensors, '[[rule]]\nmatch="a"\nop="cast"\ndtype="F32"\nfrom="BF16"\n'))
    assert found["a", "weight"].dtype == np.float32
    assert np.array_equal(found["a", "weight"].view(np.uint32), tensors["a", "weight"].astype(np.uint32) << 16)
    assert np.array_equal(found["a", "exp_avg"], tensors["a", "exp_avg"])


def test_experts_are_stacked_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tensors = {(f"l.0.e.{e}.w", "fp32"): np.full((2, 3), e, np.float32) for e in range(12)}
    text = '[[rule]]\nmatch="l.{i}.e.{e}.w"\nto="l.{i}.w"\nop="stack"\nover="e"\n'
    view = mapped(tmp_path, tensors, text)
    assert np.array_equal(models.load(view)["l.0.w", "fp32"][:, 0, 0], np.arange(12))
    assert models.same(models.load(Mapped(view, parse_layout(text), {}, reverse=True)), tensors)
    del tensors["l.0.e.5.w", "fp32"]
    assert "not numbered" in refusal(tmp_path, tensors, text)


# ---- shipped files ------------------------------------------------------------------------------------------------


def test_every_shipped_file_can_be_read_and_reversed() -> None:
    assert {"gpt2", "llama-megatron", "llama-torchtitan"} <= set(shipped())
    for name in shipped():
        layout = load_layout(name)
        assert len(layout.inverted().inverted().rules) >= 5


def test_megatrons_fused_qkv_has_for_each_key_value_head_its_queries_its_key_and_its_value(tmp_path: Path) -> None:
    tensors = models.llama()
    saved = models.save(tmp_path / "c", tensors, models.details(tensors))
    layout = load_layout("llama-megatron")
    found = models.load(Mapped(Reader(saved), layout, GIVEN))
    for state in ("weight", "exp_avg"):
        q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight", state].reshape(-1, 4, 16) for x in "qkv")
        expected = np.concatenate([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
        assert np.array_equal(found["decoder.layers.1.self_attention.linear_qkv.weight", state], expected)


def test_torchtitans_queries_are_those_of_metas_rotary_embedding(tmp_path: Path) -> None:
    tensors = models.llama()
    saved = models.save(tmp_path / "c", tensors)
    found = models.load(Mapped(Reader(saved), load_layout("llama-torchtitan"), {"heads": 4, "kv_heads": 2}))
    # Hugging Face's own conversion: w.view(heads, dim // 2, 2, in).transpose(1, 2) of Meta's gives theirs.
    meta = found["layers.0.attention.wq.weight", "fp32"]
    theirs = meta.reshape(4, 2, 2, 16).transpose(0, 2, 1, 3).reshape(16, 16)
    assert np.array_equal(theirs, tensors["model.layers.0.self_attn.q_proj.weight", "fp32"])


@pytest.mark.parametrize("name", ["llama-megatron", "llama-torchtitan"])
def test_llama_comes_back_from_a_shipped_mapping_bit_for_bit(tmp_path: Path, name: str) -> None:
    tensors = models.llama()
    saved = models.save(tmp_path / "c", tensors, models.details(tensors))
    layout = load_layout(name)
    given = {key: value for key, value in GIVEN.items() if key in layout.variables}
    there = Mapped(Reader(saved), layout, given)
    back = Mapped(there, layout, given, reverse=True)
    assert models.same(models.load(back), tensors)
    assert back.checkpoint.groups == saved.groups
    assert back.checkpoint.steps == saved.steps


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2s_matrices_are_transposed_and_come_back(tmp_path: Path, prefix: str) -> None:
    tensors: dict[tuple[str, str], Any] = {}
    shapes = {"h.0.attn.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8), "h.0.mlp.c_fc": (8, 32), "h.0.mlp.c_proj": (32, 8)}
    for name, shape in shapes.items():
        tensors |= models.states(f"{prefix}{name}.weight", shape) | models.states(f"{prefix}{name}.bias", shape[1:])
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        tensors |= models.states(f"{prefix}{name}.weight", (8,)) | models.states(f"{prefix}{name}.bias", (8,))
    tensors |= models.states(f"{prefix}wte.weight", (11, 8)) | models.states(f"{prefix}wpe.weight", (5, 8))
    saved = models.save(tmp_path / "c", tensors, Details(aliases={"lm_head.weight": f"{prefix}wte.weight"}))
    there = Mapped(Reader(saved), load_layout("gpt2"), {})
    assert there.checkpoint.tensor(f"{prefix}h.0.attn.c_attn.weight", "weight").shape == (24, 8)
    assert there.checkpoint.aliases == {"lm_head.weight": f"{prefix}wte.weight"}
    assert models.same(models.load(Mapped(there, load_layout("gpt2"), {}, reverse=True)), tensors)
