"""What the whole of transformers calls the arguments of models.

No family has these to itself, and no interface says them: they are of the attention functions, of `generate`,
of the Trainer, or of every class that reads images. What a family decides is a word of the language; see
`Inputs` there.
"""

from __future__ import annotations

PACKED = ("cu_seq_lens_q", "cu_seqlens")
"""Where texts or images begin that are packed into one row, as the attention functions are told."""
CACHES = frozenset({"cache", "past_key_values"})
"""What a class takes that keeps keys and values from one call to the next."""
MAINS = ("decoder_input_ids", "inputs")
"""What has a row for each example, beside what the interface and `main_input_name` say."""
IMAGES = ("pixel_values", "input_features", "input_values")
"""What images, videos and sounds are called, or a part of that."""
NOT_EXAMPLES = ("cache_position", "logits_to_keep")
"""Tensors that have no row for each example, whatever their size."""
TARGETS = ("labels",)
COUNTS = ("num_items_in_batch",)
"""How many labels a batch has, as the Trainer says it: of a batch that is repeated, so many more."""
