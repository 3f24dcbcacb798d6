"""For who writes an interface: tiny models, one recorded forward, a draft, the proof."""
