"""From rows to batches: images, rendering, sources, the collator."""
