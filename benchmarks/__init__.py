"""Ratios of adapterkit to PEFT and to the bare model, measured side by side in one run."""
