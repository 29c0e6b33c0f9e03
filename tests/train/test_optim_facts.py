"""Every entry of the references' optim_facts.json: rates of every step, shares and decay of every parameter, roundings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from reelmae.model.classifier import Classifier, ClassifierConfig
from reelmae.model.config import MAEConfig
from reelmae.model.mae import MaskedAutoencoder
from reelmae.pipeline.loading.order.masks import n_keep
from reelmae.train.optim import DecayRule, learning_rate, parameter_groups

REPO = Path(__file__).parents[2]
SHARED = Path(os.environ.get("REELMAE_SHARED", REPO.parent / "shared"))
PATH = Path(os.environ.get("REELMAE_FIXTURES", SHARED / "reference")) / "optim_facts.json"
pytestmark = pytest.mark.skipif(not PATH.is_file(), reason=f"no {PATH}")
FACTS: dict[str, Any] = json.loads(PATH.read_text()) if PATH.is_file() else {}
REFERENCES = ("mae_st", "slowfast", "videomae")

RULES: dict[str, DecayRule] = {
    "mae_st/pretrain_groups/bias_wd_false": "mae_st",
    "mae_st/pretrain_groups/bias_wd_true": "mae_st_bias_wd",
    "mae_st/finetune_groups": "mae_st_finetune",
    "slowfast/": "slowfast",
    "videomae/": "videomae",
}
# a reference's name, after its attention was fused → ours; the first that fits. NORM is where `norm` is in the model
RENAMED: list[tuple[str, tuple[str, ...]]] = [
    (r"decoder_pos_embed$", ("decoder.pos.cls", "decoder.pos.table")),
    (r"decoder_pos_embed_class$", ("decoder.pos.cls",)),
    (r"decoder_pos_embed_", ("decoder.pos.",)),
    (r"decoder_", ("decoder.",)),
    (r"mask_token", ("decoder.mask_token",)),
    (r"pred_head\.transforms\.0\.\d+\.(?=weight$|bias$)", ("decoder.norm.",)),
    (r"pred_head\.transforms\.0\.", ("decoder.blocks.",)),
    (r"pred_head\.projections\.0\.", ("decoder.pred.",)),
    (r"pos_embed_class$", ("encoder.pos.cls",)),
    (r"pos_embed_", ("encoder.pos.",)),
    (r"patch_embed\.proj\.", ("encoder.patch_embed.",)),
    (r"(?=blocks\.|cls_token)", ("encoder.",)),
    (r"fc_norm\.", ("NORM.",)),
    (r"norm\.", ("NORM.",)),
    (r"head\.(projection\.)?", ("head.",)),
]


def our_names(name: str, norm: str) -> list[str]:
    """Which of our parameters hold a parameter of a reference; `norm` is `encoder.norm`, or `norm` in a classifier."""
    name = re.sub(r"\.attn\.([qkv]\.|(?=[qv]_bias))", ".attn.qkv.", name)
    for pattern, ours in RENAMED:
        if re.match(pattern, name):
            return [re.sub(f"^{pattern}", o, name).replace("NORM", norm) for o in ours]
    raise AssertionError(f"{name}: has no counterpart")


def our_model(reference: str, names: list[str]) -> nn.Module:
    """The model that a list of a reference's parameters is of, small."""
    depth = len({m[1] for n in names if (m := re.match(r"blocks\.(\d+)\.", n))})
    sizes: dict[str, Any] = {"frames": 4, "size": 16, "patch": 8, "dim": 8, "depth": depth, "heads": 2}
    if any(n.startswith("head.") for n in names):
        if reference == "videomae":
            sizes |= {"cls_token": False, "pos": "sinusoid", "qkv_bias": "qv"}
        return Classifier(ClassifierConfig(**sizes, classes=3))
    if reference == "slowfast":
        sizes |= {"decoder_pos": "joint", "decoder_cls": "carried", "target_frames": "stride"}
    decoder = r"(?:decoder_blocks|pred_head\.transforms\.0)\.(\d+)\.norm1\.weight"
    decoder_depth = len({m[1] for n in names if (m := re.match(decoder, n))})
    return MaskedAutoencoder(MAEConfig(**sizes, decoder_dim=8, decoder_heads=2, decoder_depth=decoder_depth))


def leaves(node: dict[str, Any], path: str, mark: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry below `node` that says its `mark`, and does not only group such, with its path."""
    if mark in node and ("args" in node or "cfg" in node or mark == "params"):
        yield path, node
        return
    for name, child in node.items():
        if isinstance(child, dict):
            yield from leaves(child, f"{path}/{name}", mark)


def found(mark: str) -> dict[str, dict[str, Any]]:
    return dict(leaf for r in REFERENCES if r in FACTS for leaf in leaves(FACTS[r], r, mark))


RATES, GROUPS = found("lr"), found("params")


def schedule_of(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Our `learning_rate`'s arguments for one of the file's schedules."""
    epochs = FACTS["epochs"]
    if "cfg" in entry:  # PySlowFast
        cfg = entry["cfg"]
        assert cfg["LR_POLICY"] == "cosine" and cfg["MAX_EPOCH"] == epochs
        return {
            "peak": cfg["BASE_LR"],
            "warmup": cfg["WARMUP_EPOCHS"] / epochs,
            "min_lr": cfg["COSINE_END_LR"],
            "start_lr": cfg["WARMUP_START_LR"],
            "schedule": "after_warmup" if cfg["COSINE_AFTER_WARMUP"] else "from_start",
        }
    args = entry["args"]
    assert args["epochs"] == epochs
    warmup = args["warmup_epochs"] / epochs
    if path.startswith("videomae"):
        ends = {"peak": args["base"], "min_lr": args["final"], "start_lr": args["start_warmup_value"]}
        return {**ends, "warmup": warmup, "schedule": "videomae"}
    return {"peak": args["lr"], "warmup": warmup, "min_lr": args["min_lr"]}


@pytest.mark.parametrize("path", RATES)
def test_the_rate_of_every_step_is_the_references(path: str) -> None:
    entry = RATES[path]
    steps = FACTS["epochs"] * FACTS["iters_per_epoch"]
    options = schedule_of(path, entry)
    ours = [learning_rate(s, steps, **options) for s in range(steps)]
    assert ours == pytest.approx(entry["lr"], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("path", GROUPS)
def test_share_and_decay_of_every_parameter_are_the_references(path: str) -> None:
    entry = GROUPS[path]
    assert entry["columns"] in (["lr_scale", "weight_decay"], ["layer_decay", "weight_decay"])
    model = our_model(path.split("/")[0], list(entry["params"]))
    rule = next(rule for start, rule in RULES.items() if path.startswith(start))
    groups = parameter_groups(model, entry["weight_decay"], rule=rule, layer_decay=entry.get("layer_decay", 1.0))
    ours = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    norm = "norm" if "norm.weight" in named else "encoder.norm"
    checked = set()
    for theirs, (scale, decay) in entry["params"].items():
        for name in our_names(theirs, norm):
            assert name in named, f"{theirs}: we have no {name}"
            assert ours[id(named[name])] == (pytest.approx(scale, rel=1e-12), decay), f"{theirs} → {name}"
            checked.add(name)
    assert checked == set(named)


def test_no_entry_of_the_file_is_left_out() -> None:
    paths = [*RATES, *GROUPS]
    for reference in REFERENCES:
        for name in FACTS[reference].keys() - {"optimizer"}:  # words
            assert any(p == f"{reference}/{name}" or p.startswith(f"{reference}/{name}/") for p in paths), name
    described = {"note", "epochs", "warmup_epochs", "iters_per_epoch", "step_to_epoch"}
    assert set(FACTS) <= {*REFERENCES, *described, "kept_tokens", "target_frames"}


def test_as_many_tokens_are_kept_as_the_references_keep() -> None:
    assert FACTS["kept_tokens"]["columns"] == ["L", "ratio", "int(L*(1-ratio))", "L-int(ratio*L)"]
    for n_tokens, ratio, kept, kept_of_tubes in FACTS["kept_tokens"]["rows"]:
        assert n_keep("random", ratio, (1, 1, n_tokens)) == kept, (n_tokens, ratio)
        assert n_keep("tube", ratio, (1, 1, n_tokens)) == kept_of_tubes, (n_tokens, ratio)


def test_target_frames_are_the_references() -> None:
    assert FACTS["target_frames"]["columns"] == ["T", "pred_t_dim", "mae_st", "SlowFast"]
    for frames, n, linspace, stride in FACTS["target_frames"]["rows"]:
        sizes = {"frames": frames, "t_patch": frames // n, "pred_t_dim": n}
        assert MAEConfig(**sizes, target_frames="linspace").target_frame_index() == linspace
        assert MAEConfig(**sizes, target_frames="stride").target_frame_index() == stride
