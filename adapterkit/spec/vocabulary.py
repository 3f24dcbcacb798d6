"""The closed vocabulary of the language: sublayers, roles, places. Docs are generated from it."""

from __future__ import annotations

LANGUAGE_VERSION = 1

SUBLAYERS: dict[str, str] = {
    "attention": "self-attention of a layer",
    "cross_attention": "attention of a layer to the states of another stack",
    "mlp": "feed-forward part of a layer",
}

ROLES: dict[str, str] = {
    "q": "projection of the queries",
    "k": "projection of the keys",
    "v": "projection of the values",
    "o": "projection of the attention output, back into the residual stream",
    "gate": "the half of a gated MLP that the activation acts on",
    "up": "first matrix of an MLP; in a gated MLP the half without activation",
    "down": "last matrix of an MLP, back into the residual stream",
    "fused": "the one matrix that holds several of the roles above",
}

ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("gate", "up", "down")

# Names that `extra` may not take, because addresses already use them.
RESERVED = frozenset(
    (*SUBLAYERS, *ROLES, "layer", "embeddings", "unembed", "head", "norm", "tail", "out", "core")
)
