"""Make the compact copy of a recording: `python -m tests.parity.pack <recording>`.

Kept are the cases below, of each the facts that the tests read, the expected outputs and the adapter's own
files. The same recording gives the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save

from tests.parity import weights
from tests.parity.recordings import (
    AVERAGED,
    BOTTLENECK,
    COMPACT,
    FUSE,
    LORA,
    OTHERS,
    PREFIX,
    PROMPT,
    SETUPS,
    Case,
    cases,
    unpacked,
)

LINEAR = r"lora_all|ia3_all"
KEPT = {
    "bert": rf"{LORA}|{BOTTLENECK}|{OTHERS}|{PROMPT}|{PREFIX}|{FUSE}|{SETUPS}|{AVERAGED}",
    "albert": r"lora_all|seq_bn|seq_bn_inv|noreft|prompt_.*|prefix_tuning",  # layers that are run again
    "clip": r"lora_all|ia3_all|vera|double_seq_bn|seq_bn_inv|loreft|prefix_tuning",  # two towers
    "deberta": rf"{LORA}|prompt_tuning|prefix_gating|unipelt",  # fused per head, cut into thirds
    "distilbert": r"lora_all|double_seq_bn|prompt_tuning|prefix_tuning",
    # models in a model
    "encoder-decoder": r"lora_all|vera|compacter|seq_bn_inv|bn_rf_map_leave_out|prefix_no_cross|split"
    "|stack_parallel",
    "gemma2": r"lora_all|double_seq_bn|par_bn_mh|fuse2_double|fuse_par",  # norms behind the branches
    # fused in blocks, transposed; norms before the branches
    "gpt2": rf"{LORA}|bn_ob.*|compacter|prefix_leave_out|mam|parallel_lora|stack_prefix|avg_w_lora_.*",
    "gptj": r"lora_all|bn_ob.*|par_bn_mh|adapterplus|unipelt|fuse2",  # branches beside one another
    # up and down are swapped
    "llama": rf"{LINEAR}|ia3_alpha2|merge_lora_all|seq_bn_inv|loreft|prefix_gating_unshared",
    # fused MLP; the residual is the normed input
    "modernbert": rf"{LINEAR}|lora_gating|seq_bn|par_bn_mh|fuse2",
    "phi": r"lora_all|seq_bn|par_bn|bn_obT_oaT_resF|compacter|union_two_bn",  # no residual at the MLP
    "qwen2": r"lora_all|bn_obT_oaT_resF",
    "t5": rf"{LINEAR}|lora_leave_out|lora_gating|dora_all|vera|bn_cross|compacter|seq_bn_inv|noreft"
    "|prefix_tuning_flat|mam|batch_split_lora|stack_parallel|multi_task_seq_bn",
    # other paths than then
    "vit": r"lora_all|dora_all|double_seq_bn|adapterplus|prompt_tuning|prefix_tuning",
    "xmod": r"lora_all|seq_bn|double_seq_bn|adapterplus|bn_gating|prefix_tuning|noreft|fuse2|skip_layers.*",
    "whisper": r"lora_all|seq_bn_inv|bn_cross|prefix_no_encoder",
}
"""Cases of the families that stand for a structure; of other families and classes, a few are kept."""
ELSE = r"lora_all|double_seq_bn|prefix_tuning_flat"
WITH_HEAD = r"lora|vera|seq_bn_inv"
FACTS = ("attn", "merge", "setup", "skip_layers", "task_ids", "average")


def chosen(recording: Path) -> dict[str, list[Case]]:
    """Cases by family. Only the first class of a family has them all."""
    found: dict[str, list[Case]] = {}
    first: dict[str, str] = {}
    for case in cases(recording):
        plain = first.setdefault(case.family, case.cls) == case.cls
        if re.fullmatch(KEPT.get(case.family, ELSE) if plain else WITH_HEAD, case.name):
            found.setdefault(case.family, []).append(case)
    return found


def files(kept: list[Case]) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of everything that is kept of one family."""
    for cls in sorted({case.cls for case in kept}):
        first = next(case for case in kept if case.cls == cls)
        source = unpacked(first.root, first.family) / cls
        meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
        key = (meta["seed"], meta["dims"], first.family, cls)
        recipe, rest = weights.describe(load_file(source / "model.safetensors"), key)
        yield f"{cls}/{weights.RECIPE}", json.dumps(recipe, separators=(",", ":")).encode()
        if rest:
            yield f"{cls}/{weights.KEPT}", save(rest)
        for name in ("config.json", "inputs.safetensors"):
            yield f"{cls}/{name}", (source / name).read_bytes()
    for case in kept:
        said = {key: value for key, value in case.said().items() if key in FACTS}
        yield f"{case.cls}/{case.name}/case.json", json.dumps(said).encode()
        for path in sorted(case.directory.rglob("*")):
            if path.is_file() and path.name != "case.json":
                yield f"{case.cls}/{path.relative_to(case.base)}", path.read_bytes()


def pack(recording: Path, target: Path) -> None:
    """Write one archive for each family, and the list of cases."""
    target.mkdir(parents=True, exist_ok=True)
    matrix: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for family, kept in chosen(recording).items():
        with tarfile.open(target / f"{family}.tar.xz", "w:xz", preset=9) as archive:
            for name, content in files(kept):
                member = tarfile.TarInfo(f"{family}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        for case in kept:
            matrix.setdefault(family, {}).setdefault(case.cls, {})[case.name] = {"status": "ok"}
    text = json.dumps(matrix, indent=1, sort_keys=True) + "\n"
    (target / "matrix.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    pack(Path(sys.argv[1]), COMPACT)
