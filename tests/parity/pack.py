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
from tests.parity.recordings import COMPACT, Case, cases, unpacked

KEPT = {
    "bert": r".*",
    "clip": r"lora_all|ia3_all|vera",  # two towers
    "deberta": r".*",  # fused per head, cut into thirds
    "encoder-decoder": r"lora_all|vera",  # models in a model
    "gpt2": r".*",  # fused in blocks, transposed
    "llama": r"lora_all|ia3_all|ia3_alpha2|merge_lora_all",  # grouped queries; up and down are swapped
    "modernbert": r"lora_all|lora_gating|ia3_all",  # fused MLP
    "t5": r"lora_all|lora_leave_out|lora_gating|ia3_all|dora_all|vera",  # two stacks, cross-attention
    "vit": r"lora_all|dora_all",  # other paths than then
}
"""Cases of the families that stand for a structure; of other families, and of other classes, one is kept."""
OTHERS = r"lora_all"
WITH_HEAD = r"lora|vera"
FACTS = ("attn", "merge")


def chosen(recording: Path) -> dict[str, list[Case]]:
    """Cases by family. Only the first class of a family has them all."""
    found: dict[str, list[Case]] = {}
    first: dict[str, str] = {}
    for case in cases(recording):
        plain = first.setdefault(case.family, case.cls) == case.cls
        if re.fullmatch(KEPT.get(case.family, OTHERS) if plain else WITH_HEAD, case.name):
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
