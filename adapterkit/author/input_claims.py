"""Claims about the arguments of a stack's entry: changing one must change what it is said to steer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from adapterkit.author import mask_claims
from adapterkit.author.observe import Observation
from adapterkit.author.scene import Scene
from adapterkit.author.seen import Seen
from adapterkit.author.trial import Trial, token_shape
from adapterkit.methods.entering import embeds_at
from adapterkit.methods.flow import base_forward, entry_place
from adapterkit.spec.schema import Inputs

_WORDS = ("ids", "embeds", "mask", "positions")


def inputs(seen: Seen, scene: Scene) -> None:
    """Every claim about `inputs` and `reads.mask`."""
    entry = seen.entry
    if entry is None or not seen.calls():
        return
    place = entry_place(seen.blueprint, seen.info.address)
    takes = set(inspect.signature(base_forward(place.module)).parameters)
    trial = Trial(seen, scene, place, entry)
    for word in _WORDS:
        _named(trial, word, takes)
    names = seen.info.inputs
    if names.ids in takes:
        _ids(trial, str(names.ids))
    if names.mask in takes:
        mask_claims.mask(trial, str(names.mask))
    else:
        mask_claims.without(trial, ("inputs",), names.mask_hides)
    mask_claims.layer_mask(trial, takes)
    if names.positions in takes:
        _positions(trial, str(names.positions))
    if names.embeds in takes and names.ids in takes:
        _embeds(trial, str(names.ids), str(names.embeds))
    _filler(trial)
    _aligned(trial, takes)
    mask_claims.read_mask(trial, takes)


def _named(trial: Trial, word: str, takes: set[str]) -> None:
    """What is named is an argument of the entry. What is not said means the usual name, if there is one."""
    names = trial.seen.info.inputs
    said, usual = getattr(names, word), Inputs.model_fields[word].default
    kind = type(trial.place.module).__name__
    if word not in names.model_fields_set:
        if word == "ids" and usual not in takes:
            text = "inputs.ids: the entry takes the usual 'input_ids'"
            trial.seen.refute(
                trial.loc(word), text, f"{kind} does not", "say 'ids: null', or its name", "name"
            )
        if word == "mask" and usual not in takes:
            mask_claims.is_elsewhere(trial, usual, "inputs.mask: the entry takes the usual one, or none")
        return
    if said is not None:
        text = f"inputs.{word}: the entry takes {said!r}"
        hint = f"say '{word}: null'" if said == usual else ""
        trial.seen.judge(
            said in takes, trial.loc(word), text, f"{kind} has no such argument", hint, aspect="name"
        )
    elif word == "embeds" and "prompt_tuning" in trial.seen.info.interface.unsupported:
        return  # the entry may take some that it does not treat as those of ids
    else:
        text = f"inputs.{word}: the entry takes none"
        name = _looked_up_with(trial) if word == "ids" else None
        if name is not None:
            trial.seen.refute(trial.loc(word), text, f"the table is called with {name!r}", aspect="name")
            return
        used = usual in takes and (word not in _PROBES or bool(_PROBES[word](trial, usual)))
        if word == "mask" and not used and mask_claims.is_elsewhere(trial, usual, text):
            return
        trial.seen.judge(not used, trial.loc(word), text, f"{kind} takes {usual!r}", aspect="name")


def _ids(trial: Trial, name: str) -> None:
    seen, given = trial.seen, trial.entry.argument(name)
    text = f"inputs.ids: {name!r} holds the ids"
    table = seen.place("embeddings.table")
    if _is_given_embedded(trial):
        return
    other = _looked_up_with(trial)
    if given is None and other is not None:
        seen.refute(trial.loc("ids"), text, f"the table is called with {other!r}")
        return
    if given is None or table is None:
        seen.unseen(trial.loc("ids"), text)
        return
    calls = seen.graph.calls_of(table.path)
    right = any(
        call.given is not None and seen.graph.same(call.given) == seen.graph.same(given) for call in calls
    )
    seen.judge(right, trial.loc("ids"), text, f"{table.path} is not called with it")


def _looked_up_with(trial: Trial) -> str | None:
    """The argument of the entry that the table is called with as it came."""
    graph, table = trial.seen.graph, trial.seen.place("embeddings.table")
    calls = graph.calls_of(table.path) if table is not None else ()
    given = {graph.same(call.given) for call in calls if call.given is not None}
    return next((name for name, value in trial.entry.arguments if graph.same(value) in given), None)


def _is_given_embedded(trial: Trial) -> bool:
    """Whether a part is given its tokens embedded: what ids do, models of its own type show."""
    embeds = trial.seen.info.inputs.embeds
    return "/" in trial.seen.info.address and embeds is not None and trial.given(embeds) is not None


def _embeds(trial: Trial, ids: str, name: str) -> None:
    """Given the table's output in place of ids, the stack does the same."""
    seen, table = trial.seen, trial.seen.place("embeddings.table")
    text = f"inputs.embeds: {name!r} takes what the table gives, in place of ids"
    given, mask = trial.given(ids), seen.info.inputs.mask
    if _is_given_embedded(trial):
        return
    if table is None or given is None:
        seen.unseen(trial.loc("embeds"), text)
        return
    # the first example everywhere, without a mask: padding cannot be seen in embedded tokens
    other: dict[str, Any] = {ids: given[:1].expand_as(given)}
    if mask in trial.names:
        other[str(mask)] = None
    plain = trial.run(other)
    calls = plain.graph.calls_of(table.path) if plain is not None else ()
    if plain is None or not calls or calls[0].gives is None:
        seen.unseen(trial.loc("embeds"), text)
        return
    found = trial.run({**other, ids: None, name: plain.tensors[calls[0].gives].clone()})
    if found is None:
        seen.unseen(trial.loc("embeds"), text)
        return
    before, after = trial.marks(plain, "o"), trial.marks(found, "o")
    close = len(before) == len(after) and all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True)
    )
    seen.judge(close, trial.loc("embeds"), text, "its attention differs then")


def _filler(trial: Trial) -> None:
    """There is room to be made, and the id is one of the table."""
    seen, filler = trial.seen, trial.seen.info.inputs.filler
    if filler is None:
        return
    text = f"inputs.filler: no embedded tokens are taken, so that {filler} makes room for a prompt"
    given = embeds_at(seen.blueprint, seen.info.address)
    kind = type(given.module).__name__ if given is not None else ""
    seen.judge(given is None, trial.loc("filler"), text, f"{kind} takes embedded tokens", "leave it out")
    table = seen.place("embeddings.table")
    rows = getattr(table.module, "num_embeddings", None) if table is not None else None
    if rows is not None:
        text = f"inputs.filler: {filler} is a row of the table"
        seen.judge(filler < rows, trial.loc("filler"), text, f"there are {rows}", aspect="value")


def _positions(trial: Trial, name: str) -> None:
    seen = trial.seen
    text = f"inputs.positions: {name!r} holds the positions"
    found = _places(trial, name)
    if found is None:
        seen.unseen(trial.loc("positions"), text)
    else:
        seen.judge(found, trial.loc("positions"), text, "moving them changes nothing")


def _places(trial: Trial, name: str) -> bool | None:
    """Whether other positions change anything, None if that cannot be seen."""
    shape = token_shape(trial)
    if shape is None:
        return None
    plain = torch.arange(shape[1])[None].repeat(shape[0], 1) + 2
    return trial.steers(trial.run({name: plain}), trial.run({name: plain + 3}))


_PROBES: dict[str, Callable[[Trial, str], bool | None]] = {"mask": mask_claims.hides, "positions": _places}
"""Arguments that some families take without a use for them."""


def _aligned(trial: Trial, takes: set[str]) -> None:
    """Arguments with a value for every token that change what enters the stack are named, and no others."""
    seen, names = trial.seen, trial.seen.info.inputs
    shape = token_shape(trial)
    if shape is None or names.ids is None:
        return
    known = {names.ids, names.embeds, names.mask, names.positions}
    for name in sorted(takes):
        is_said, given = name in names.aligned, trial.given(name)
        is_given = given is not None and given.shape[:2] == shape and not given.is_floating_point()
        if name in known or not (is_said or is_given or name.endswith(("_ids", "_types"))):
            continue
        if name.startswith(("encoder_", "decoder_")):
            continue
        zeros = torch.zeros(given.shape if given is not None and is_given else shape, dtype=torch.long)
        if not is_given and trial.run({name: zeros}) is None:  # boxes have four numbers
            zeros = zeros[..., None].repeat(1, 1, 4)
        before, after = trial.run({name: zeros}), trial.run({name: zeros + 1})
        found = _enters(trial, before, after)
        text = (
            f"inputs.aligned: {name!r} has one value per token"
            if is_said
            else "inputs.aligned names all such"
        )
        if is_said and not found:  # there may be configs under which it has a use
            seen.unseen(trial.loc("aligned"), text, aspect=name)
        elif found:
            seen.judge(is_said, trial.loc("aligned"), text, f"{name!r} is not named", aspect=name)
    for name in names.aligned:
        if name not in takes:
            text = f"inputs.aligned: the entry takes {name!r}"
            seen.unseen(trial.loc("aligned"), text, aspect=name)  # a class of another type may take it


def _enters(trial: Trial, before: Observation | None, after: Observation | None) -> bool | None:
    """Whether the stream before the first layer differs."""
    if before is None or after is None:
        return None
    return trial.steers(before, after, words="")
