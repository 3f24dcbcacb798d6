"""Claims about masks: which argument hides tokens or the states of another stack, and with which value."""

from __future__ import annotations

import torch

from adapterkit.author import masks
from adapterkit.author.trial import Trial, token_shape
from adapterkit.spec.schema import Inputs, Reads


def mask(trial: Trial, name: str) -> None:
    """Hiding a token changes attention."""
    seen, names = trial.seen, trial.seen.info.inputs
    text = f"inputs.mask: {name!r} hides tokens from attention"
    found = hides(trial, name)
    if found is None:
        seen.unseen(trial.loc("mask"), text)
    else:
        seen.judge(found, trial.loc("mask"), text, "hiding a token with it changes no attention")
        _shows(trial, ("inputs",), name, names.mask_hides, _visible(trial, name))


def without(trial: Trial, block: tuple[str, ...], hides: bool) -> None:
    """Nothing is said of the ones of a mask that the entry does not take."""
    if hides:
        text = f"{block[0]}.mask_hides: ones of a mask hide"
        kind = type(trial.place.module).__name__
        trial.seen.refute((*trial.seen.loc, *block, "mask_hides"), text, f"{kind} takes none", aspect="value")


def _shows(trial: Trial, block: tuple[str, ...], name: str, hides: bool, value: int | None) -> None:
    """What the ones of a mask do, if it was seen."""
    if value is None:
        return
    text = f"{block[0]}.mask_hides: ones of {name!r} {'hide' if hides else 'show'}"
    loc = (*trial.seen.loc, *block, "mask_hides" if hides else "mask")
    observed, hint = f"they {'show' if value else 'hide'}", f"say 'mask_hides: {str(not value).lower()}'"
    trial.seen.judge(hides is not bool(value), loc, text, observed, hint, aspect="value")


def _visible(trial: Trial, name: str) -> int | None:
    """The value with which a mask lets tokens be seen, None if it hides none or that cannot be seen."""
    ids = trial.seen.info.inputs.ids or ""
    tokens = trial.given(ids)
    other = masks.edited(tokens) if tokens is not None and tokens.ndim == 2 else None
    kinds, shape = masks.kinds_of(trial.given(name)), token_shape(trial)
    if tokens is not None and other is not None:
        edits = ({ids: tokens}, {ids: other})
        return masks.visible(
            lambda mask, changed: trial.made({**edits[changed], **mask}, masks.beside),
            name,
            masks.form(trial.given(name), (tokens.shape[0], tokens.shape[1])),
            kinds,
        )
    if tokens is not None or shape is None:
        return None
    # patches and frames are no ids: their states differ where they enter the layers
    return masks.visible(
        lambda mask, changed: trial.made(mask, masks.beside, moved=changed),
        name,
        masks.form(trial.given(name), shape),
        kinds,
    )


def is_elsewhere(trial: Trial, usual: str, text: str) -> bool:
    """Whether a mask was seen where it is said that there is none; then that is refuted."""
    other = _other_mask(trial, usual)
    if other is not None:
        name, value = other
        trial.seen.refute(
            trial.loc("mask"), text, f"{name!r} hides tokens from attention", _say(name, value), "name"
        )
    return other is not None


def _say(name: str, value: int) -> str:
    return f"say 'mask: {name}'" + ("" if value else " and 'mask_hides: true'")


def _other_mask(trial: Trial, usual: str) -> tuple[str, int] | None:
    """An argument that hides tokens under a name that is not said, and with which value it shows them."""
    inputs = trial.seen.info.inputs
    known = {inputs.ids, inputs.embeds, inputs.positions, usual, *inputs.aligned}
    given = {name for name, value in trial.entry.arguments}
    for name in trial.names:
        if name not in known and name in given | set(masks.optional(trial.place.module)):
            value = _visible(trial, name)
            if value is not None:
                return name, value
    return None


def hides(trial: Trial, name: str) -> bool | None:
    """Whether attention differs if an argument hides a token, None if that cannot be seen."""
    shape = token_shape(trial)
    given = trial.given(name)
    if given is not None and given.ndim == 2:
        shape = int(given.shape[0]), int(given.shape[1])
    if shape is None:
        return None
    return _steered(trial, name, given, shape, trial.seen.info.inputs.mask_hides)


def _steered(
    trial: Trial, name: str, given: torch.Tensor | None, shape: tuple[int, int], hides: bool
) -> bool | None:
    """Whether attention differs if a mask (B, T) hides one position; None if it does not run."""
    for kind in masks.kinds_of(given):
        full = torch.full(masks.form(given, shape), int(not hides)).to(kind)
        hidden = full.clone()
        hidden[..., shape[1] // 2] = int(hides)
        found = trial.steers(trial.run({name: full}), trial.run({name: hidden}), words="o")
        if found is not None:
            return found
    return None


def layer_mask(trial: Trial, takes: set[str]) -> None:
    """The mask of positions that the layers alone get."""
    seen, usual = trial.seen, str(Inputs.model_fields["mask"].default)
    said, layers = seen.info.inputs.layer_mask, [place for _, place, _ in seen.layers()]
    if said is not None:
        text = f"inputs.layer_mask: every layer takes {said!r}"
        right = all(said in masks.names_of(place.module) for place in layers)
        seen.judge(
            right, trial.loc("layer_mask"), text, f"{type(layers[0].module).__name__} does not", aspect="name"
        )
    elif seen.info.inputs.mask is None and usual in takes:
        scene = trial.scene
        own = masks.of_layers(scene.model, scene.inputs, trial.place.module, usual, layers[0].path)
        if own is not None:
            text = "inputs.layer_mask: the layers are told of no padding"
            observed = f"they get {own!r} if the entry gets {usual!r}"
            seen.refute(trial.loc("layer_mask"), text, observed, f"say 'layer_mask: {own}'")


def read_mask(trial: Trial, takes: set[str]) -> None:
    """The mask of what a stack reads."""
    seen, reads = trial.seen, trial.seen.info.reads
    if reads is None:
        return
    loc = (*seen.loc, "reads", "mask")
    if reads.mask is None:
        text, usual = "reads.mask: the entry takes none", "encoder_attention_mask"
        used = usual in takes and bool(_hides_states(trial, reads, usual))
        other = None if used or reads.states is None else _other_read_mask(trial, reads.states)
        if other is not None:
            name, value = other
            seen.refute(loc, text, f"{name!r} hides states from cross-attention", _say(name, value))
            return
        seen.judge(not used, loc, text, f"it takes {usual!r}")
        return
    text = f"reads.mask: {reads.mask!r} hides states from cross-attention"
    if "mask" not in reads.model_fields_set and reads.mask not in takes:
        other = _other_read_mask(trial, reads.states) if reads.states is not None else None
        if other is not None:
            seen.refute(loc, text, f"{other[0]!r} does", _say(*other))
        without(trial, ("reads",), reads.mask_hides)
        return
    if reads.mask not in takes:
        seen.judge(False, loc, text, "the entry has no such argument")
        return
    if _hides_states(trial, reads, reads.mask):
        seen.judge(True, loc, text, "")
        _shows(trial, ("reads",), reads.mask, reads.mask_hides, _visible_read(trial, reads.mask))
    else:  # there are versions of models that do not heed it
        seen.unseen(loc, text)


def _hides_states(trial: Trial, reads: Reads, name: str) -> bool | None:
    """Whether attention differs if an argument hides one of the states that are read."""
    states = trial.given(reads.states) if reads.states else None
    if states is None or states.ndim != 3:
        return None
    shape = (int(states.shape[0]), int(states.shape[1]))
    return _steered(trial, name, trial.given(name), shape, reads.mask_hides)


def _visible_read(trial: Trial, name: str) -> int | None:
    """The value with which a mask lets states of another stack be seen."""
    reads = trial.seen.info.reads
    said = (reads.states if reads else None) or ""
    states = trial.given(said)
    if states is None or states.ndim != 3:
        return None
    edits = ({said: states}, {said: masks.moved(states)})
    return masks.visible(
        lambda mask, changed: trial.made({**edits[changed], **mask}, lambda made: made),
        name,
        masks.form(trial.given(name), (states.shape[0], states.shape[1])),
        masks.kinds_of(trial.given(name)),
    )


def _other_read_mask(trial: Trial, said: str) -> tuple[str, int] | None:
    """An argument that hides the states under a name that is not said."""
    known = {*dict(trial.entry.arguments), *masks.optional(trial.place.module)} - {said}
    for name in trial.names:
        value = _visible_read(trial, name) if name in known else None
        if value is not None:
            return name, value
    return None
