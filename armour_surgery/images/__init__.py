"""Images of any source: folders, datasets of timm, drawn ones, digits."""
